"""Tuning constants of reading and writing arrays, each with the reason for its value.

docs/design/008 has the measurements. "Not measured" is said where a value only bounds memory.
"""

from __future__ import annotations

STEP_BYTES = 2**20
"""Read and verified, or hashed and copied, at a time: while it is in the cache of a core."""

# ------------------------------------------------------------------------------------ reading

BATCH_BYTES = 8 * 2**20
"""Bytes of one task. With less, tasks cost more than they read; with more, two threads do not end
at the same time. Not measured."""
BATCH_READS = 512
"""Reads of one task: the system takes 1,024 buffers in one call, and two threads share 1,000
leaves."""
BATCH_FILES = 32
"""Files of one task, which are open at the same time. Not measured."""
MAX_OPEN_FILES = 128
"""Files that stay open until all is read. A process may often open 1,024, and each rank of a large
job has written files of its own. Not measured."""
NUM_AHEAD = 8
"""Batches requested ahead: with 64 MiB under way a disk reads as fast as it can."""
PADDING_BYTES = 4096
"""Values this close are requested ahead as one span: a block, to which large values are aligned."""
TREE_CACHE_BYTES = 2**30
"""TensorStore's cache for nodes of a database's tree, as large as they are: without it every read
decodes its node again, which for 20,000 small arrays takes 9 ms a read instead of 0.3."""

# ------------------------------------------------------------------------------------ writing

MAX_NODE_BYTES = 2_000_000
"""Decoded size of a node of an index. TensorStore's time for one key grows with it: 0.28, 0.07 and
0.05 ms with nodes of 100, 8 and 1 MB; smaller ones are more requests to a store."""
RUN_KEYS = 128
"""Keys of a leaf, of an array with twice as many chunks or more. A rank reads one leaf for its part
of an array: 6 KB; in 2 MB are all keys of eight arrays of 4,096 chunks."""
NUM_THREADS = 4
"""Threads that write, each a file of its own: three or four requests in flight, as many as a raw
write needs. Staging has two threads (memory-bound), object stores `queries.NUM_REQUESTS`."""
QUICK_BYTES = 256 * 2**20
"""Data written in about a second, the longest pause of garbage collection."""
BUFFER_BYTES = 4 * 2**20
"""Bytes of one request to the disk; four buffers of 3 MiB were not faster than three of 4 MiB."""
MAX_FULL = 2
"""Full buffers: one being written, one waiting. With one, the disk was idle for a fifth of the
time."""
LENT_FROM_BYTES = 128 * 2**10
"""Smaller data is copied in less time than cutting off its unaligned ends takes."""
COPIED_ALONE_BYTES = 64 * 2**10
"""Smaller copies keep the interpreter lock: another thread would hold it longer than the copy
takes."""
DIRECT_FROM_BYTES = 16 * 2**20
"""Smaller files go through the page cache, from which they may soon be read."""
SHARED_FROM_BYTES = 2**20
"""Smaller files are written at each step: that takes about as long as a link, and damage to one
takes no other step."""
REFRESH_STEPS = 100
"""Steps that share a file at most, since damage takes all of them: one percent of the bytes that
steps of their own would write. Not measured."""
