"""Distributed save planning: one collective per save, a second one where structures differ.

Every rank sends the primary a digest of its structure, and samples of the leaves that other ranks
hold too. If all structures are equal, or unchanged since the last save, every rank computes its
part alone. If structures differ (pipeline stages; norms that each tensor-parallel rank shards over
its own mesh), or samples do, the ranks exchange structures, shardings and samples.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Generator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from functional_ckpt import errors
from functional_ckpt.core.arrays import write_plan
from functional_ckpt.core.arrays.chunks import ChunkGrid
from functional_ckpt.core.arrays.sharding import Sharding
from functional_ckpt.core.arrays.spec import Box
from functional_ckpt.core.arrays.write_plan import PlannedPiece
from functional_ckpt.core.files import file_plan
from functional_ckpt.core.files.file_plan import FilePlan, StoredBox
from functional_ckpt.core.records import records
from functional_ckpt.core.tree import structure
from functional_ckpt.distributed import same_options
from functional_ckpt.distributed.collective import collective
from functional_ckpt.distributed.coordinator import Coordinator
from functional_ckpt.runtime import threads
from functional_ckpt.saving import leaf_table, replicas
from functional_ckpt.saving.lower import LoweredItem

_log = logging.getLogger("functional_ckpt")

_Shardings: TypeAlias = "dict[str, Sharding]"
"""`item/leaf` -> the sharding of the leaf over all ranks."""


class PlannedPart(NamedTuple):
    """A region that this rank writes.

    Attributes:
        source: The index of its array among the item's sources.
        box: The region, in the array.
        local: The region, in the local tensor.
        grid: The array's chunks.
        offset: The offset of its first byte in the file.
    """

    source: int
    box: Box
    local: Box
    grid: ChunkGrid
    offset: int


@dataclasses.dataclass(frozen=True, slots=True)
class ItemPlan:
    """One rank's part in writing one item.

    Attributes:
        files: The data files.
        parts: The parts in the files, in the order of the bytes.
    """

    files: tuple[FilePlan, ...]
    parts: tuple[PlannedPart, ...]


SavePlan: TypeAlias = dict[str, ItemPlan]


@dataclasses.dataclass(slots=True)
class Planning:
    """One rank's side of planning a save.

    Attributes:
        items: This rank's items; set it in the block.
        plan: This rank's part in writing it; set after the block.
    """

    items: Sequence[LoweredItem] = ()
    plan: SavePlan = dataclasses.field(default_factory=dict[str, ItemPlan])


def plan_of(step: int | None) -> str:
    """Returns the name of the round in which a save is planned."""
    return f"the plan of {_named(step)}"


def _named(step: int | None) -> str:
    return "the checkpoint" if step is None else f"step {step}"


class SavePlanner:
    """Plans saves for one rank; keeps the last plan, since structures rarely change."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._signature = ""
        self._plan: SavePlan = {}
        self._groups: replicas.Groups = {}
        self._num_saves = 0
        self._has_warned = False

    @contextlib.contextmanager
    def planning(self, step: int | None, **options: object) -> Generator[Planning]:
        """Plans a save: every rank sets `.items` in the block, and gets `.plan` after it.

        Args:
            step: The step; the same on every rank. None for a checkpoint without a step.
            options: Other arguments that must be the same on every rank.

        Raises:
            CoordinationError: Another rank failed in its block, or the ranks disagree about the
                step or the items, or hold different values of one leaf.
        """
        planning = Planning()
        what = plan_of(step)
        with collective(self._coordinator, what, self._compare) as turn:
            yield planning
            shared = [item for item in planning.items if not item.per_rank]
            own = [item for item in planning.items if item.per_rank]
            with threads.gc_paused():
                signature = _signature(shared, with_trees=self._coordinator.num_ranks > 1)
            turn.value = self._describe(shared, planning.items, signature, step, options)
        planning.plan = self._plan_shared(shared, step, signature, turn.outcome)
        planning.plan |= _plan(own, self._coordinator.rank, (), None)

    def _describe(
        self,
        items: Sequence[LoweredItem],
        every: Sequence[LoweredItem],
        signature: str,
        step: int | None,
        options: Mapping[str, object],
    ) -> bytes:
        """Returns this rank's data for the primary's comparison."""
        is_known = signature == self._signature
        if not is_known:
            self._num_saves, self._groups = 0, self._group(items, None)
        # A plan is valid for the structures of all ranks: after a failed round it may not be.
        self._signature = ""
        value = {
            "step": step,
            "options": same_options.texts(options),
            "items": dict(sorted(map(_kind, every))),
            "texts": {item.name: _text_digest(item) for item in every if item.text is not None},
            "is_known": is_known,
            "signature": signature,
            "samples": replicas.samples(
                self._groups, [item.sources for item in items], self._num_saves
            ),
        }
        return json.dumps(value).encode()

    def _plan_shared(
        self, items: Sequence[LoweredItem], step: int | None, signature: str, verdict: bytes
    ) -> SavePlan:
        """Returns this rank's part of the items that ranks share, given the primary's verdict."""
        coordinator = self._coordinator
        if verdict == b"as before":
            self._signature = signature
            self._num_saves += 1
            return dict(self._plan)
        ranks = tuple(range(coordinator.num_ranks))
        shardings: _Shardings | None = None
        if verdict != b"alike":
            with collective(coordinator, f"the leaves of {_named(step)}", leaf_table.merge) as turn:
                turn.value = leaf_table.to_bytes(leaf_table.leaves_of(items), items)
            shardings = leaf_table.shardings_of(turn.outcome)
        with threads.gc_paused():
            self._plan = _plan(items, coordinator.rank, ranks, shardings)
            self._groups = self._group(items, shardings)
        self._signature = signature
        self._num_saves = 1
        return dict(self._plan)

    def _group(self, items: Sequence[LoweredItem], shardings: _Shardings | None) -> replicas.Groups:
        """Returns the leaves that other ranks have too, from all ranks' shardings or its own."""
        if self._coordinator.num_ranks == 1:
            return {}
        whole = Sharding.replicated(tuple(range(self._coordinator.num_ranks)))
        leaves: list[tuple[str, tuple[int, int], Sharding, str]] = []
        for number, item in enumerate(items):
            for index, source in enumerate(item.sources):
                name = f"{item.name}/{source.node.name}"
                mark = leaf_table.mark_of(item, source.node.name)
                if mark != leaf_table.UNCHECKED:
                    known = source.sharding or whole if shardings is None else shardings[name]
                    leaves.append((name, (number, index), known, mark))
        return replicas.group(leaves, self._coordinator.rank)

    def _compare(self, values: Sequence[bytes]) -> bytes:
        """On the primary: decides whether structures are equal, unchanged, or must be exchanged."""
        given = [json.loads(value) for value in values]
        _check_same_call(given)
        if all(each["is_known"] for each in given):
            verdict = b"as before"
        elif len({each["signature"] for each in given}) == 1:
            verdict = b"alike"
        else:
            return b"exchange"
        wrong = replicas.differing([each["samples"] for each in given])
        if any(key.startswith(leaf_table.FIRST_RANK) for key in wrong) and not self._has_warned:
            self._has_warned = True
            _log.warning(
                "Batch norm statistics differ between ranks; those of rank 0 are saved. "
                "torch.nn.SyncBatchNorm keeps them equal."
            )
        return b"exchange" if any(key.startswith(leaf_table.EQUAL) for key in wrong) else verdict


def _check_same_call(given: Sequence[dict[str, Any]]) -> None:
    """Raises unless all ranks save the same step, with the same items, of the same kinds."""
    first = given[0]
    same_options.check_texts([each["options"] for each in given])
    for rank, each in enumerate(given):
        if (each["step"], list(each["items"])) != (first["step"], list(first["items"])):
            raise errors.CoordinationError(
                f"Rank {rank} saves step {each['step']} with the items {list(each['items'])}, "
                f"rank 0 step {first['step']} with {list(first['items'])}; every rank must make "
                "the same calls.",
                ranks=(rank,),
            )
        for name, kind in each["items"].items():
            if kind != first["items"][name]:
                raise errors.CoordinationError(
                    f"{name}: rank {rank} saves it as {kind}, rank 0 as {first['items'][name]}; an "
                    "item must be of one kind on all ranks.",
                    ranks=(rank,),
                    key_path=name,
                )
        for name, digest in each["texts"].items():
            if digest != first["texts"][name]:
                raise errors.CoordinationError(
                    f"{name}: ranks 0 and {rank} save different JSON, of which one is kept. Make "
                    "it equal on all ranks; or save a plain dict, which keeps every rank's own "
                    "values; or keep rank 0's with fc.Json(value, replicated='unchecked').",
                    ranks=(rank,),
                    key_path=name,
                )


def _kind(item: LoweredItem) -> tuple[str, str]:
    kind = "a tree" if item.text is None else "JSON (fc.Json)"
    return item.name, "a tree for each rank (per_rank)" if item.per_rank else kind


def _text_digest(item: LoweredItem) -> str | None:
    """Returns a digest of an item's JSON; None where it may differ."""
    return records.digest_hex(item.text) if item.is_checked else None


def _signature(items: Sequence[LoweredItem], *, with_trees: bool) -> str:
    """Returns a digest of everything that the plan of these items depends on."""
    # A sharding names every rank: it is spelled out once, not per leaf.
    meshes: dict[Sharding | None, int] = {}
    described = [
        (
            item.name,
            [
                (
                    s.node.name,
                    s.node.kind,
                    s.node.spec.shape,
                    s.node.dtype,
                    meshes.setdefault(s.sharding, len(meshes)),
                )
                for s in item.sources
            ],
            [name for name, _, _ in item.scalars],
            sorted(item.first_rank.items()),
            sorted(item.stored_names.items()),
            sorted(item.frozen),
            sorted(item.ties.items()),
            _skeleton(item.root) if with_trees and item.root is not None else None,
        )
        for item in items
    ]
    return records.digest_hex(repr((described, list(meshes))).encode())


def _skeleton(root: structure.Node) -> list[object]:
    """Returns the properties of a structure that must agree between ranks, except for the sources.

    Plain values may differ.
    """
    found: list[object] = []
    todo = [root]
    while todo:
        node = todo.pop()
        if isinstance(node, structure.ValueNode):
            found.append(0)
        elif isinstance(node, structure.ArrayNode):
            found.append(node.tied_to and (node.tied_to, node.kind, node.dtype, node.spec.shape))
        elif node.kind == "per_rank" or structure.is_names(node):
            found.append(node.kind)
        else:
            found.append((node.kind, [key.value for key in node.keys], node.detail))
            todo.extend(node.children)
    return found


def _plan(
    items: Sequence[LoweredItem], rank: int, ranks: tuple[int, ...], shardings: _Shardings | None
) -> SavePlan:
    if ranks == (0,) and not any(s.sharding for item in items for s in item.sources):
        return {
            item.name: _plan_files(
                item, [write_plan.plan_alone(s.node.spec) for s in item.sources], rank, ranks
            )
            for item in items
        }
    placed: list[tuple[str, int, write_plan.ShardedArray]] = []
    complete: dict[str, bool] = {}
    for item in items:
        for number, source in enumerate(item.sources):
            node = source.node
            if item.per_rank:
                sharding = source.sharding or Sharding.replicated((rank,))
            elif shardings is not None:
                sharding = shardings[f"{item.name}/{node.name}"]
            else:
                sharding = source.sharding or Sharding.replicated(ranks)
            is_complete = sharding.num_replicas == len(ranks)
            complete[item.name] = complete.get(item.name, True) and is_complete
            if node.name in item.first_rank:
                sharding = sharding.first_replica()
            array = write_plan.ShardedArray(item.name, node.name, node.spec, sharding)
            placed.append((item.name, number, array))
    # Ranks with different trees must visit shared leaves in the same order.
    placed.sort(key=lambda entry: (entry[0], entry[2].name))
    planned = write_plan.plan_writes([array for _, _, array in placed], rank)
    by_source = {
        (name, number): array for (name, number, _), array in zip(placed, planned, strict=True)
    }
    return {
        item.name: _plan_files(
            item,
            [by_source[item.name, number] for number in range(len(item.sources))],
            rank,
            ranks if complete.get(item.name, True) and not item.per_rank else None,
            is_alike=shardings is None,
        )
        for item in items
    }


def _plan_files(
    item: LoweredItem,
    arrays: Sequence[write_plan.PlannedArray],
    rank: int,
    ranks: tuple[int, ...] | None,
    *,
    is_alike: bool = True,
) -> ItemPlan:
    """Returns a rank's files of an item.

    Args:
        item: The item.
        arrays: Its arrays, with the ranks that write them.
        rank: The rank.
        ranks: All ranks, if each has every array entirely; else None.
        is_alike: Whether all ranks know the same frozen parameters.
    """
    held: dict[int, list[tuple[int, PlannedPiece, StoredBox]]] = {}
    names = {} if ranks is None else item.stored_names
    frozen = item.frozen if is_alike or ranks is None else ()
    for number, (source, array) in enumerate(zip(item.sources, arrays, strict=True)):
        node = source.node
        is_tensor = array.is_tensor and "dtype" not in node.detail
        for piece in array.pieces:
            name = names.get(node.name, node.name)
            box = StoredBox(name, node.spec, piece.box, array.grid, is_tensor, node.name in frozen)
            held.setdefault(piece.rank, []).append((number, piece, box))
    tied = {names.get(name, name): names.get(owner, owner) for name, owner in item.ties.items()}
    planned = {
        each: file_plan.plan_files(
            [box for _, _, box in held.get(each, ())],
            is_sharded=ranks is None,
            tied=tied,
            rank=each,
        )
        for each in ranks or (rank,)
    }
    own, stem = planned[rank], item.file_stem
    if ranks is None:
        files = file_plan.file_names(stem, own, shard=rank)
    else:
        counts = {each: sum(file.has_tensors for file in planned[each]) for each in ranks}
        before = sum(counts[each] for each in ranks if each < rank)
        files = file_plan.file_names(stem, own, rank=rank, first=before, total=sum(counts.values()))
    mine = held.get(rank, [])
    placed = [(m, *mine[m.number]) for file in files for m in file.members]
    parts = [PlannedPart(n, piece.box, piece.local, m.grid, m.offset) for m, n, piece, _ in placed]
    return ItemPlan(files=tuple(files), parts=tuple(parts))
