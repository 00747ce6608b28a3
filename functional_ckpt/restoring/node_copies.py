"""A step as the own node and remote tiers hold it, opened for reading."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence

from functional_ckpt import errors
from functional_ckpt.core.arrays.node_plan import Chunk
from functional_ckpt.core.arrays.spec import Array
from functional_ckpt.core.tree import structure
from functional_ckpt.distributed.coordinator import Coordinator
from functional_ckpt.format import backends
from functional_ckpt.format.checkpoint_dir import OpenCheckpoint, OpenItem
from functional_ckpt.format.index import Index, open_index
from functional_ckpt.format.ocdbt_decode import INLINE
from functional_ckpt.format.read_plan import Destination, ReadRequest
from functional_ckpt.format.reader import ArrayReader


@dataclasses.dataclass(slots=True)
class Amounts:
    """Bytes that the ranks got, by where they were read.

    Attributes:
        own: On the node of the rank that wants them.
        others: On other nodes.
        tiers: In remote tiers.
        damaged: Copies of chunks that could not be read.
    """

    own: int = 0
    others: int = 0
    tiers: int = 0
    damaged: int = 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NodeSources:
    """Where a step is read in node-local mode.

    Attributes:
        coordinator: The ranks that restore together.
        node_of: The node of each rank; nodes are numbered from 0.
        tiers: Open the same step in remote tiers, the nearest first.
        shares: Whether the ranks of one node read for each other.
        report: Called with the amounts once all is read.
    """

    coordinator: Coordinator
    node_of: tuple[int, ...]
    tiers: Sequence[Callable[[], OpenCheckpoint]] = ()
    shares: bool = True
    report: Callable[[Amounts], None] = lambda _: None

    @property
    def num_nodes(self) -> int:
        """The number of nodes."""
        return max(self.node_of) + 1

    @property
    def own_node(self) -> int:
        """The node of this rank."""
        return self.node_of[self.coordinator.rank]

    @property
    def is_head(self) -> bool:
        """Whether this rank is the first of its node."""
        return self.node_of.index(self.own_node) == self.coordinator.rank


class OpenCopy:
    """One item of a copy of the step."""

    def __init__(self, item: OpenItem, index: Index, reader: ArrayReader) -> None:
        self.item = item
        self.index = index
        self.reader = reader
        self.nodes: Mapping[str, structure.ArrayNode] = {
            node.stored_name: node for node in item.array_nodes()
        }


class Copies:
    """The copies that this rank can read: of its own node, and of remote tiers.

    Args:
        checkpoint: The step on this node.
        tiers: As of `NodeSources`.
        num_nodes: The number of nodes; sources from this number on are tiers.
        verified: Whether bytes are compared with their digests.
        files: Closes the readers.
    """

    def __init__(
        self,
        checkpoint: OpenCheckpoint,
        sources: NodeSources,
        *,
        verified: bool,
        files: contextlib.ExitStack,
    ) -> None:
        self.checkpoint = checkpoint
        self._tiers = sources.tiers
        self._num_nodes = sources.num_nodes
        self._verified = verified
        self._files = files
        self._opened: dict[tuple[int | None, str], OpenCopy] = {}
        self._checkpoints: dict[int, OpenCheckpoint | errors.CheckpointError] = {}

    def add(self, item: OpenItem) -> None:
        """Takes an item of this node that is open already."""
        if item.record is not None:
            self._open(None, item.name, item)

    def own(self, name: str) -> OpenCopy:
        """Returns an item of this node."""
        found = self._opened.get((None, name))
        return found or self._open(None, name, self.checkpoint.tree(name))

    def _of_tier(self, tier: int, name: str) -> OpenCopy:
        found = self._opened.get((tier, name))
        return found or self._open(tier, name, self._checkpoint(tier).tree(name))

    def _checkpoint(self, tier: int) -> OpenCheckpoint:
        """Returns the step in a tier; raises the same error each time it cannot be opened there."""
        if tier not in self._checkpoints:
            try:
                opened = self._tiers[tier]()
                if opened.files.identity != self.checkpoint.files.identity:
                    raise errors.StepNotFoundError(
                        f"{opened.path} is another save of the step.", path=opened.path
                    )
                self._checkpoints[tier] = opened
            except errors.CheckpointError as error:
                self._checkpoints[tier] = error
        found = self._checkpoints[tier]
        if isinstance(found, errors.CheckpointError):
            raise found
        return found

    def _open(self, tier: int | None, name: str, item: OpenItem) -> OpenCopy:
        files = {} if item.record is None else item.record.files
        index = open_index(item.storage, item.path, files)
        reader = backends.reader_of(item.storage, index)
        self._files.callback(reader.close)
        self._opened[tier, name] = opened = OpenCopy(item, index, reader)
        return opened

    def files_of(self, name: str, requests: Sequence[ReadRequest]) -> dict[str, dict[int, str]]:
        """Returns the file of each chunk of requests: array -> position of the chunk -> file.

        Chunks in the index are left out.

        Raises:
            CorruptCheckpointError: A chunk is not in the index.
        """
        requests = [request for request in requests if request.grid is not None]
        if not requests:
            return {}
        index = self.own(name).index
        keys = {
            (request.name, part.chunk): f"{structure.key_prefix(request.name)}{part.key}".encode()
            for request in requests
            for part in request.parts
        }
        index.load(list(keys.values()))
        grids = {request.name: request.grid for request in requests}
        found: dict[str, dict[int, str]] = {}
        for (array, chunk), key in keys.items():
            if key not in index.locations:
                raise errors.CorruptCheckpointError(
                    f"{index.directory}: array {array!r}, chunk {key.decode()!r}: found none.",
                    path=index.directory,
                    key_path=array,
                )
            number, _, _ = index.locations[key]
            grid = grids[array]
            if number != INLINE and grid is not None:
                file = f"{name}/{index.files[number]}"
                found.setdefault(array, {})[grid.position(chunk)] = file
        return found

    def sizes(self, name: str) -> dict[str, int]:
        """Returns the recorded size of each file of an item."""
        record = self.own(name).item.record
        files = {} if record is None else record.files
        return {f"{name}/{file}": each.size_bytes for file, each in files.items()}

    def held(self) -> dict[str, int]:
        """Returns the files of the step on this node, with their sizes."""
        storage, path = self.checkpoint.storage, self.checkpoint.path
        return {
            file: stat.size_bytes
            for file, stat in storage.walk(path).items()
            if stat.kind == "a file"
        }

    def chunk_tasks(
        self, chunk: Chunk, source: int, memory: Array | None
    ) -> list[Callable[[], None]]:
        """Returns tasks that read and verify one entire chunk.

        Args:
            chunk: The chunk.
            source: This rank's node, or a tier.
            memory: Where it goes; None keeps nothing.
        """
        item, _, name = chunk.array.partition("/")
        tier = source - self._num_nodes
        opened = self.own(item) if tier < 0 else self._of_tier(tier, item)
        destination = None if memory is None else Destination.into(memory)
        whole = opened.item.request(opened.nodes[name], verified=self._verified)
        if whole.grid is None:
            raise errors.CorruptCheckpointError(f"{opened.item.path}: not a native item.")
        request = whole._replace(box=whole.grid.box(chunk.at), destination=destination)
        return opened.reader.tasks([request])
