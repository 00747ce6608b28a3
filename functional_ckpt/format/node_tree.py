"""The nodes of a database's tree: read when their keys are wanted, checked against their parents.

The nodes that were not read yet divide the range of all keys. Wanted keys select some of them;
those of one level are fetched together, and a node with children is replaced by them. A hostile
tree costs no more than its files: heights decrease downwards, so there are no loops, the nodes of a
file do not overlap, and one node is referred to a bounded number of times.
"""

from __future__ import annotations

import bisect
import dataclasses
import operator
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple, TypeAlias

from functional_ckpt import errors
from functional_ckpt.format.ocdbt import Root, Span, is_inside
from functional_ckpt.format.ocdbt_decode import DecodedNode, InvalidNodeError

Fetch: TypeAlias = "Callable[[Sequence[Span]], list[DecodedNode | Exception]]"
"""Reads and decodes nodes; an error instead of a node that cannot be read."""

_NODES_AT_ONCE = 16
_MAX_REPEATS = 1000
_MAX_NODE_BYTES = 2**30


class Leaf(NamedTuple):
    """A checked leaf. The keys are complete and in order; those of the node lack the prefix."""

    keys: list[bytes]
    node: DecodedNode
    file: str


class DamagedNode(NamedTuple):
    """A node that cannot be read.

    It may hold keys from `low` up to, not including, `high`; None is without a bound.
    """

    low: bytes
    high: bytes | None
    file: str
    error: errors.CheckpointError


class _Unread(NamedTuple):
    """A node to be read: its range of keys, the prefix that its keys lack, height and location."""

    low: bytes
    high: bytes | None
    prefix: bytes
    height: int
    span: Span


@dataclasses.dataclass(slots=True)
class _FileNodes:
    """The nodes read from one file."""

    spans: set[tuple[int, int]] = dataclasses.field(default_factory=set[tuple[int, int]])
    total_bytes: int = 0
    end: int = 0


class NodeTree:
    """A tree of which parts have been read. Use it from one thread at a time.

    With `skips_damage`, damaged nodes are recorded in `damaged` instead of raising.

    Attributes:
        damaged: The nodes that could not be read.
        num_unread: The number of known nodes that were not read yet.
        is_leaf: Whether the tree is one leaf.
    """

    def __init__(
        self, directory: str, fetch: Fetch, root: Root | None, *, skips_damage: bool = False
    ) -> None:
        self.damaged: list[DamagedNode] = []
        self._directory = directory
        self._fetch = fetch
        self._skips_damage = skips_damage
        self._files: dict[str, _FileNodes] = {}
        self._num_repeats = 0
        # In order of keys; None for a range that was read.
        self._lows: list[bytes] = [b""]
        self._nodes: list[_Unread | None] = [
            None if root is None else _Unread(b"", None, b"", root.height, root.span)
        ]
        self.num_unread = 0 if root is None else 1
        self.is_leaf = root is not None and root.height == 0

    def read(self, keys: Collection[bytes] | None = None) -> Iterator[Leaf]:
        """Reads the nodes that may hold some keys, and yields the leaves among them.

        Raises:
            CorruptCheckpointError: A node is damaged.
            StorageError: The store refused.
        """
        while wanted := self._wanted(keys):
            found: dict[int, list[_Unread]] = {}
            for start in range(0, len(wanted), _NODES_AT_ONCE):
                indices = wanted[start : start + _NODES_AT_ONCE]
                unread = [node for index in indices if (node := self._nodes[index]) is not None]
                nodes = self._fetch_nodes(unread)
                for index, below, node in zip(indices, unread, nodes, strict=True):
                    try:
                        leaf, found[index] = self._check(below, node)
                    except (errors.CorruptCheckpointError, errors.StorageError) as error:
                        if not self._skips_damage:
                            raise
                        found[index] = []
                        damage = DamagedNode(below.low, below.high, below.span.file, error)
                        self.damaged.append(damage)
                    else:
                        if leaf is not None:
                            yield leaf
            self._replace(found)

    def _wanted(self, keys: Collection[bytes] | None) -> list[int]:
        """Returns the indices of unread nodes that may hold a key, in order."""
        if not self.num_unread:
            return []
        if keys is None:
            indices = range(len(self._nodes))
        else:
            indices = sorted({bisect.bisect_right(self._lows, key) - 1 for key in keys})
        return [index for index in indices if self._nodes[index] is not None]

    def _replace(self, found: dict[int, list[_Unread]]) -> None:
        lows: list[bytes] = []
        nodes: list[_Unread | None] = []
        for index, low in enumerate(self._lows):
            children = found.get(index)
            if children:
                lows += [child.low for child in children]
                nodes += children
            else:
                lows.append(low)
                nodes.append(self._nodes[index] if children is None else None)
        self._lows, self._nodes = lows, nodes
        self.num_unread = sum(node is not None for node in nodes)

    # ---------------------------------------------------------------------------- checks

    def _fetch_nodes(self, unread: Sequence[_Unread]) -> list[DecodedNode | Exception]:
        unsafe = [self._refusal(node.span) for node in unread]
        fetched = iter(
            self._fetch([n.span for n, why in zip(unread, unsafe, strict=True) if why is None])
        )
        return [next(fetched) if why is None else InvalidNodeError(why) for why in unsafe]

    def _refusal(self, span: Span) -> str | None:
        """Returns why a node is not even read; None where it may be."""
        if not is_inside(span.file):
            return "is outside the item"
        if not 0 < span.length <= _MAX_NODE_BYTES or span.offset < 0:
            return f"has an impossible length of {span.length:,} bytes"
        known = self._files.setdefault(span.file, _FileNodes())
        if (span.offset, span.length) in known.spans:
            self._num_repeats += 1
            if self._num_repeats > _MAX_REPEATS:
                return f"is one of more than {_MAX_REPEATS:,} repeated references"
        return None

    def _check(
        self, unread: _Unread, node: DecodedNode | Exception
    ) -> tuple[Leaf | None, list[_Unread]]:
        """Returns the leaf, or the children, of a node that agrees with its parent."""
        if isinstance(node, InvalidNodeError):
            raise self._error(unread, str(node))
        if isinstance(node, Exception):
            raise node
        self._claim(unread)
        if node.height != unread.height:
            raise self._error(unread, f"has height {node.height}, expected {unread.height}")
        keys, prefix = node.entries.keys, unread.prefix
        if not keys:
            raise self._error(unread, "has no keys")
        if prefix:
            keys = [prefix + key for key in keys]
        if any(map(operator.ge, keys, keys[1:])):
            raise self._error(unread, "has keys that are not in order")
        if keys[0] < unread.low or (unread.high is not None and keys[-1] >= unread.high):
            raise self._error(unread, "has keys outside the range that its parent records")
        for file in node.files:
            if not is_inside(file):
                raise self._error(unread, f"refers to {file!r}, which is outside the item")
        if not node.height:
            return Leaf(keys, node, unread.span.file), []
        return None, self._children(unread, node, keys)

    def _claim(self, unread: _Unread) -> None:
        """Refuses overlapping nodes: together they would be more bytes than the file has."""
        _, offset, length, _ = unread.span
        known = self._files[unread.span.file]
        if (offset, length) in known.spans:
            return
        known.spans.add((offset, length))
        known.total_bytes += length
        known.end = max(known.end, offset + length)
        if known.total_bytes > known.end:
            raise self._error(unread, "overlaps another node")

    def _children(self, unread: _Unread, node: DecodedNode, keys: list[bytes]) -> list[_Unread]:
        entries, bases = node.entries, node.bases or [""] * len(node.files)
        children: list[_Unread] = []
        for index, (key, length) in enumerate(zip(keys, node.prefix_lengths, strict=True)):
            number = entries.files[index]
            end = len(unread.prefix) + length
            if end > len(key):
                raise self._error(unread, "has a child whose prefix is longer than its key")
            offset, size = entries.offsets[index], entries.lengths[index]
            span = Span(node.files[number], offset, size, bases[number])
            high = keys[index + 1] if index + 1 < len(keys) else unread.high
            # Keys below the first child's are in none: its range starts where the parent's does.
            low = key if index else unread.low
            children.append(_Unread(low, high, key[:end], unread.height - 1, span))
        return children

    def _error(self, unread: _Unread, why: str) -> errors.CorruptCheckpointError:
        span = unread.span
        return errors.CorruptCheckpointError(
            f"{self._directory}: the index node of {span.length:,} bytes at byte {span.offset:,} "
            f"of {span.file!r} {why}. The item was damaged or changed after it was written.",
            path=os.path.join(self._directory, span.file),
        )
