"""The wants of each rank and the files of each node, exchanged between all ranks."""

from __future__ import annotations

import dataclasses
import json
import threading
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

from functional_ckpt import errors
from functional_ckpt.core.arrays.chunks import ChunkGrid
from functional_ckpt.core.arrays.node_plan import Chunk, Holders
from functional_ckpt.core.arrays.share_plan import Region, StoredArray
from functional_ckpt.core.arrays.spec import Array, ArraySpec, Box
from functional_ckpt.format.read_plan import Destination, ReadRequest
from functional_ckpt.restoring.node_copies import Copies, NodeSources


class Want:
    """A region that this rank restores; its parts arrive one after the other, on any thread.

    Attributes:
        array: The array, with its item's name.
        item: The number of the item.
        number: The number of the request among the item's.
        request: The request.
        num_arrived: Parts that have arrived since `begin`.
    """

    def __init__(self, array: str, item: int, number: int, request: ReadRequest) -> None:
        self.array = array
        self.item = item
        self.number = number
        self.request = request
        self.num_arrived = 0
        self._num_repeated = 0
        self._mutex = threading.Lock()

    @property
    def grid(self) -> ChunkGrid:
        """The array's chunks."""
        return cast("ChunkGrid", self.request.grid)

    @property
    def num_bytes(self) -> int:
        """The size of the region."""
        return self.request.box.num_elements * self.request.spec.itemsize_bytes

    def common(self, index: tuple[int, ...]) -> Box:
        """Returns the part of the region that is in a chunk."""
        return cast("Box", self.grid.box(index).intersect(self.request.box))

    def memory(self, index: tuple[int, ...]) -> Array:
        """Returns the memory for that part."""
        destination = cast("Destination", self.request.destination)
        local = self.common(index).relative_to(self.request.box.offset)
        return destination.memory()[local.slices()]

    def begin(self) -> None:
        """Counts from here."""
        self.num_arrived = 0

    def counting(self) -> Destination:
        """Returns the destination of the request; it counts the parts."""
        return Destination(cast("Destination", self.request.destination).memory, self.arrive)

    def arrive(self) -> None:
        """Notes that a part has arrived; the value is made after the last one."""
        with self._mutex:
            self.num_arrived += 1
            if self._num_repeated:
                self._num_repeated -= 1
                return
        cast("Destination", self.request.destination).done()

    def read_again(self) -> None:
        """Notes that the parts that have arrived since `begin` will arrive once more."""
        self._num_repeated = self.num_arrived


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Exchanged:
    """The wants of all ranks and the files of all nodes, the same on each rank.

    Attributes:
        arrays: Every array that is wanted.
        wants: The regions, in order of rank.
        holders: Where chunks can be read.
    """

    arrays: Mapping[str, StoredArray]
    wants: Sequence[Sequence[Region]]
    holders: Holders

    def file_of(self, chunk: Chunk) -> str:
        """Returns the file of a chunk."""
        position = self.arrays[chunk.array].grid.position(chunk.at)
        return self.holders.files.get(chunk.array, {}).get(position, "")


def exchange(
    sources: NodeSources,
    copies: Copies,
    names: Sequence[str],
    wanted: Sequence[Want],
    files: Sequence[Mapping[str, Mapping[int, str]]],
) -> Exchanged:
    """Exchanges the wants of the ranks and the files of the nodes.

    Args:
        sources: The nodes.
        copies: The step on this node.
        names: The items.
        wanted: The wants of this rank.
        files: For each item, the files of the wanted chunks; see `Copies.files_of`.

    Raises:
        StorageError: The nodes hold different saves of the step.
    """
    arrays = {
        each.array: (each.request.spec.dtype, *dataclasses.astuple(each.grid)) for each in wanted
    }
    sizes = {
        file: size
        for name, of_item in zip(names, files, strict=True)
        if of_item
        for file, size in copies.sizes(name).items()
    }
    places = {
        f"{name}/{array}": sorted(of.items())
        for name, of_item in zip(names, files, strict=True)
        for array, of in of_item.items()
    }
    told = {
        "arrays": arrays,
        "wants": [(each.array, each.request.box.offset, each.request.box.shape) for each in wanted],
        "files": places,
        "sizes": sizes,
        "held": copies.held() if sources.is_head else None,
        "identity": copies.checkpoint.files.identity,
    }
    united = json.loads(
        zlib.decompress(
            sources.coordinator.gather_broadcast(
                "the files of the step on each node", _packed(told), _unite
            )
        )
    )
    if len(united["identities"]) > 1:
        raise errors.StorageError(
            f"{copies.checkpoint.path}: the nodes hold different saves of the step.",
            path=copies.checkpoint.path,
        )
    return _parsed(united, sources)


def _packed(value: object) -> bytes:
    return zlib.compress(json.dumps(value).encode(), 1)


def _unite(values: Sequence[bytes]) -> bytes:
    told = [json.loads(zlib.decompress(value)) for value in values]
    files: dict[str, dict[int, str]] = {}
    for each in told:
        for array, places in each["files"].items():
            files.setdefault(array, {}).update(places)
    return _packed(
        {
            "arrays": {name: array for each in told for name, array in each["arrays"].items()},
            "wants": [each["wants"] for each in told],
            "files": {array: sorted(places.items()) for array, places in files.items()},
            "sizes": {file: size for each in told for file, size in each["sizes"].items()},
            "held": [each["held"] for each in told],
            "identities": sorted({str(each["identity"]) for each in told}),
        }
    )


def _parsed(united: Mapping[str, Any], sources: NodeSources) -> Exchanged:
    nodes_of: dict[str, list[int]] = {}
    for rank, held in enumerate(united["held"]):
        for file, size in (held or {}).items():
            if united["sizes"].get(file) == size:
                nodes_of.setdefault(file, []).append(sources.node_of[rank])
    return Exchanged(
        arrays={
            name: StoredArray(
                spec=ArraySpec(tuple(shape), dtype),
                grid=ChunkGrid(tuple(shape), tuple(chunk_shape), block_bytes),
            )
            for name, (dtype, shape, chunk_shape, block_bytes) in united["arrays"].items()
        },
        wants=[
            [Region(name, Box(tuple(offset), tuple(shape))) for name, offset, shape in of_rank]
            for of_rank in united["wants"]
        ],
        holders=Holders(
            node_of=sources.node_of,
            files={name: dict(places) for name, places in united["files"].items()},
            nodes_of=nodes_of,
            num_nodes=sources.num_nodes,
            num_tiers=len(sources.tiers),
        ),
    )
