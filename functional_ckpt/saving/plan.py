"""The ranks agree on who writes what: one round trip a save, a second when the structure is new.

Every rank tells the primary a digest of its structure. If all are equal, or all are as they were at
the last save, every rank knows its part already. Only where they differ (pipeline stages; norms
that each tensor-parallel rank shards over a mesh of its own) do the ranks exchange the names and
shardings of their leaves.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from functional_ckpt import errors
from functional_ckpt.core.arrays import write_plan
from functional_ckpt.core.arrays.sharding import DimShard, Sharding
from functional_ckpt.core.records import merge_ranks, records
from functional_ckpt.distributed.coordinator import Coordinator
from functional_ckpt.runtime import threads
from functional_ckpt.saving.lower import LoweredItem, Source

__all__ = ["ItemPlan", "SavePlanner", "SavePlan"]

Shardings: TypeAlias = "dict[str, Sharding]"
"""`item/leaf` -> which ranks hold what of the leaf, all ranks considered."""


@dataclasses.dataclass(frozen=True, slots=True)
class ItemPlan:
    """One rank's part in writing one item.

    Attributes:
        arrays: One for each source, in the item's order.
        scalars: Names of the plain numbers that this rank writes for Orbax.
    """

    arrays: tuple[write_plan.PlannedArray, ...]
    scalars: frozenset[str]


SavePlan: TypeAlias = dict[str, ItemPlan]


class SavePlanner:
    """Plans saves for one rank; remembers the last plan, since structures rarely change."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._signature = b""
        self._plan: SavePlan = {}

    def plan(self, items: Sequence[LoweredItem] | BaseException, step: int | None) -> SavePlan:
        """This rank's part of a save; every rank must call it.

        Args:
            items: What this rank holds; or the error that kept it from lowering.
            step: Which step; the same on every rank.

        Raises:
            CoordinationError: Another rank failed, or the ranks disagree about the step or the
                items.
        """
        coordinator = self._coordinator
        if isinstance(items, BaseException):
            coordinator.gather_broadcast(f"the plan of step {step}", items, _first)
            raise items  # unreachable: exchange raises what it was given
        shared = [item for item in items if not item.per_rank]
        own = [item for item in items if item.per_rank]
        return self._plan_shared(shared, items, step) | _plan(own, coordinator.rank, (), None)

    def _plan_shared(
        self, items: Sequence[LoweredItem], every: Sequence[LoweredItem], step: int | None
    ) -> SavePlan:
        coordinator = self._coordinator
        with threads.gc_paused():
            signature = _signature(items)
        head = json.dumps([step, sorted(item.name for item in every)]).encode()
        is_known = b"1" if signature == self._signature else b"0"
        # A plan holds for what all ranks have: after a failed round nobody can say if it still
        # does.
        self._signature = b""
        verdict = coordinator.gather_broadcast(
            f"the plan of step {step}", b"%d\n" % len(head) + head + is_known + signature, _compare
        )
        if verdict == b"as before":
            self._signature = signature
            return self._plan
        ranks = tuple(range(coordinator.num_ranks))
        shardings: Shardings | None = None
        if verdict != b"alike":
            own = _to_bytes(dict(_local_shardings(items)))
            what = f"the leaves of step {step}"
            shardings = _from_bytes(coordinator.gather_broadcast(what, own, _merge_shardings))
        with threads.gc_paused():
            self._plan = _plan(items, coordinator.rank, ranks, shardings)
        self._signature = signature
        return self._plan


def _compare(values: Sequence[bytes]) -> bytes:
    """On the primary: whether the structures are alike, as before, or must be exchanged."""
    heads: list[bytes] = []
    signatures: list[bytes] = []
    for value in values:
        length, _, rest = value.partition(b"\n")
        heads.append(rest[: int(length)])
        signatures.append(rest[int(length) :])
    for rank, head in enumerate(heads):
        if head != heads[0]:
            step, names = json.loads(head)
            first_step, first_names = json.loads(heads[0])
            raise errors.CoordinationError(
                f"Rank {rank} saves step {step} with the items {names}, rank 0 step "
                f"{first_step} with {first_names}; every rank must make the same calls.",
                ranks=(rank,),
            )
    if all(signature[:1] == b"1" for signature in signatures):
        return b"as before"
    return b"alike" if len({signature[1:] for signature in signatures}) == 1 else b"exchange"


def _first(values: Sequence[bytes]) -> bytes:
    return values[0]


def _signature(items: Sequence[LoweredItem]) -> bytes:
    """A digest of everything that the plan of these items depends on."""
    places: dict[
        Sharding | None, int
    ] = {}  # a sharding names every rank: spelled out once, not per leaf
    described = [
        (
            item.name,
            [
                (
                    s.node.name,
                    s.node.spec.shape,
                    s.node.spec.dtype,
                    places.setdefault(s.sharding, len(places)),
                )
                for s in item.sources
            ],
            [name for name, _, _ in item.scalars],
        )
        for item in items
    ]
    return records.digest_hex(repr((described, list(places))).encode()).encode()


def _local_shardings(items: Sequence[LoweredItem]) -> Iterator[tuple[str, Sharding | None]]:
    """`item/leaf` and its sharding, None for a plain value, of all that this rank might write."""
    for item in items:
        for source in item.sources:
            yield f"{item.name}/{source.node.name}", source.sharding
        for name, _, _ in item.scalars:
            yield f"{item.name}/{name}", None


def _merge_shardings(values: Sequence[bytes]) -> bytes:
    """On the primary: one sharding for every leaf that any rank holds."""
    held: dict[str, list[tuple[int, Sharding | None]]] = {}
    for rank, value in enumerate(values):
        for name, sharding in _from_bytes(value).items():
            held.setdefault(name, []).append((rank, sharding))
    return _to_bytes({name: merge_ranks.merge_shardings(parts) for name, parts in held.items()})


def _to_bytes(shardings: Mapping[str, Sharding | None]) -> bytes:
    """JSON in which each different sharding is spelled out once."""
    places: dict[Sharding | None, int] = {}
    leaves = {name: places.setdefault(each, len(places)) for name, each in shardings.items()}
    table = [None if each is None else dataclasses.astuple(each) for each in places]
    return zlib.compress(json.dumps([table, leaves]).encode(), 1)


def _from_bytes(value: bytes) -> dict[str, Any]:
    table, leaves = json.loads(zlib.decompress(value))
    shardings = [None if entry is None else _sharding(*entry) for entry in table]
    return {name: shardings[place] for name, place in leaves.items()}


def _sharding(mesh_shape: list[int], ranks: list[int], placements: list[Any]) -> Sharding:
    cuts = (None if cut is None else DimShard(*cut) for cut in placements)
    return Sharding(tuple(mesh_shape), tuple(ranks), tuple(cuts))


def _plan(
    items: Sequence[LoweredItem], rank: int, ranks: tuple[int, ...], shardings: Shardings | None
) -> SavePlan:
    if ranks == (0,) and not any(s.sharding for item in items for s in item.sources):
        return {
            item.name: ItemPlan(
                arrays=tuple(write_plan.plan_alone(s.node.spec) for s in item.sources),
                scalars=frozenset(name for name, _, _ in item.scalars),
            )
            for item in items
        }
    placed: list[tuple[str, Source, Sharding]] = []
    for item in items:
        for source in item.sources:
            if item.per_rank:
                sharding = source.sharding or Sharding.replicated((rank,))
            elif shardings is not None:
                sharding = shardings[f"{item.name}/{source.node.name}"]
            else:
                sharding = source.sharding or Sharding.replicated(ranks)
            placed.append((item.name, source, sharding))
    # Ranks with different trees must meet what they share in the same order.
    placed.sort(key=lambda entry: (entry[0], entry[1].node.name))
    planned = write_plan.plan_writes(
        [
            write_plan.ShardedArray(n, s.node.name, s.node.spec, sharding)
            for n, s, sharding in placed
        ],
        rank,
    )
    by_name = {
        (name, source.node.name): array
        for (name, source, _), array in zip(placed, planned, strict=True)
    }
    return {
        item.name: ItemPlan(
            arrays=tuple(by_name[item.name, source.node.name] for source in item.sources),
            scalars=frozenset(
                name for name, _, _ in item.scalars if _writes_scalar(item, name, rank, shardings)
            ),
        )
        for item in items
    }


def _writes_scalar(item: LoweredItem, name: str, rank: int, shardings: Shardings | None) -> bool:
    if item.per_rank:
        return True
    return rank == (0 if shardings is None else min(shardings[f"{item.name}/{name}"].ranks))
