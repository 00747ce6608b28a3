"""One round of reads for other nodes: large chunks are sent and received without a copy."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence

import numpy as np

from functional_ckpt.core.arrays.node_plan import NodeChunk
from functional_ckpt.core.arrays.spec import Array
from functional_ckpt.distributed.coordinator import Bytes, Link
from functional_ckpt.restoring.node_wants import Exchanged, Want

_APART_BYTES = 256 * 2**10
"""Larger parts are messages of their own, sent from the memory that they were read into and
received where they belong. Smaller ones are packed: a message costs as much as copying this."""


def trade(
    link: Link,
    rank: int,
    chunks: Sequence[NodeChunk],
    memory: Mapping[int, Array],
    exchanged: Exchanged,
    wanted: Sequence[Want],
) -> None:
    """Sends parts of the chunks that this rank read, and receives parts of others.

    Args:
        link: Between the ranks.
        rank: This rank.
        chunks: The chunks of the round, the same on all ranks.
        memory: The chunks that this rank read, by their `id`.
        exchanged: The wants of all ranks.
        wanted: The wants of this rank.
    """
    outgoing: list[tuple[int, Bytes]] = []
    incoming: list[tuple[int, Bytes]] = []
    packed: dict[int, list[Bytes]] = collections.defaultdict(list)
    to_unpack: dict[int, list[tuple[Array, int]]] = collections.defaultdict(list)
    to_copy: list[tuple[Array, Bytes]] = []
    arrived: list[Want] = []
    for each in chunks:
        array = exchanged.arrays[each.chunk.array]
        offset = array.grid.box(each.chunk.at).offset
        for part in each.parts:
            is_mine = part.rank == rank
            if each.reader != rank and not is_mine:
                continue
            num_bytes = part.box.num_elements * array.spec.itemsize_bytes
            if is_mine:
                want = wanted[part.want]
                arrived.append(want)
                target = want.memory(each.chunk.at)
                if each.reader == rank:
                    target[...] = memory[id(each)][part.box.relative_to(offset).slices()]
                elif num_bytes < _APART_BYTES:
                    to_unpack[each.reader].append((target, num_bytes))
                elif target.flags.c_contiguous:
                    incoming.append((each.reader, _flat(target)))
                else:
                    to_copy.append((target, np.empty(num_bytes, np.uint8)))
                    incoming.append((each.reader, to_copy[-1][1]))
            else:
                values = memory[id(each)][part.box.relative_to(offset).slices()]
                data = _flat(np.ascontiguousarray(values))
                if num_bytes < _APART_BYTES:
                    packed[part.rank].append(data)
                else:
                    outgoing.append((part.rank, data))
    outgoing += [(getter, np.concatenate(parts)) for getter, parts in packed.items()]
    buffers: dict[int, Bytes] = {}
    for sender, places in to_unpack.items():
        buffers[sender] = np.empty(sum(size for _, size in places), np.uint8)
        incoming.append((sender, buffers[sender]))
    _exchange(link, outgoing, incoming)
    for sender, places in to_unpack.items():
        _unpack(buffers[sender], places)
    for target, data in to_copy:
        _put(target, data)
    for want in arrived:
        want.arrive()


def _exchange(
    link: Link, outgoing: Sequence[tuple[int, Bytes]], incoming: Sequence[tuple[int, Bytes]]
) -> None:
    transfers = [link.receive(sender, into) for sender, into in incoming]
    transfers += [link.send(getter, data) for getter, data in outgoing]
    for transfer in transfers:
        transfer.wait()


def _unpack(buffer: Bytes, places: Sequence[tuple[Array, int]]) -> None:
    start = 0
    for target, size_bytes in places:
        _put(target, buffer[start : start + size_bytes])
        start += size_bytes


def _flat(values: Array) -> Bytes:
    return values.reshape(-1).view(np.uint8)


def _put(target: Array, data: Bytes) -> None:
    target[...] = data.view(target.dtype).reshape(target.shape)
