"""No order of crashes loses a step or mixes two, and the model finds every rule that is broken."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import full
import pytest
from node_model import Model, Protocol, ViolationError

from functional_ckpt.core.nodes import rules
from functional_ckpt.core.nodes.part import PartRecord
from functional_ckpt.core.nodes.rules import Decision, HeldPart, UsableCommit

Inventories = Mapping[str, Sequence[HeldPart]]


Bounds = tuple[int, int, int, int, tuple[int, ...]]
"""Replicas, saves, wiped nodes, nodes that are away, and by how much saved steps differ."""


SMALL: list[Bounds] = [(1, 2, 0, 0, (0, 1)), (1, 1, 1, 0, (1,))]
LARGE: list[Bounds] = [
    (1, 3, 0, 0, (1,)),
    (2, 3, 0, 0, (1,)),
    (1, 2, 1, 0, (1,)),
    (2, 2, 1, 0, (1,)),
    (1, 1, 1, 1, (1,)),
]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("bounds", [*SMALL, *(LARGE if full.IS_FULL else [])])
def test_no_order_of_crashes_breaks_an_invariant(bounds: Bounds) -> None:
    replicas, saves, wipes, trips, strides = bounds
    assert Model(replicas, saves, wipes, trips, strides=strides).explore() > 100


# -------------------------------------------------------------------------------------- mutants


def by_step_number(inventories: Inventories, **options: Any) -> Decision:
    found = rules.decide(inventories, **options)
    usable = sorted(found.usable, key=lambda commit: commit.record.step)
    return dataclasses.replace(found, usable=tuple(usable))


def aborting_alone(inventories: Inventories, **options: Any) -> Decision:
    """A directory that is missing is not waited for."""
    found = rules.decide(inventories, **options)
    ids = tuple(each.record.commit_id for each in found.waiting)
    return dataclasses.replace(found, abort=(*found.abort, *ids), waiting=())


def forward_without_a_rename(inventories: Inventories, **options: Any) -> Decision:
    """Votes of all nodes count as a decision."""
    renamed = {
        node: [
            dataclasses.replace(part, is_renamed=True)
            if _num_votes(inventories, part.record) == len(part.record.nodes)
            else part
            for part in parts
        ]
        for node, parts in inventories.items()
    }
    return rules.decide(renamed, **options)


def _num_votes(inventories: Inventories, record: PartRecord) -> int:
    return sum(part.record == record for parts in inventories.values() for part in parts)


def using_votes_that_wait(inventories: Inventories, **options: Any) -> Decision:
    found = rules.decide(inventories, **options)
    waiting = {each.record.commit_id for each in found.waiting}
    renamed = {
        node: [
            dataclasses.replace(
                part, is_renamed=part.is_renamed or part.record.commit_id in waiting
            )
            for part in parts
        ]
        for node, parts in inventories.items()
    }
    return rules.decide(renamed, **options)


def never_forward(inventories: Inventories, **options: Any) -> Decision:
    """Votes are aborted, though another node has renamed its part."""
    found = rules.decide(inventories, **options)
    return dataclasses.replace(found, roll_forward=(), abort=(*found.abort, *found.roll_forward))


def combined_by_step(inventories: Inventories, **options: Any) -> Decision:
    """Parts of one step number are one step, that of the newest record."""
    newest: dict[int, PartRecord] = {}
    for parts in inventories.values():
        for part in parts:
            known = newest.setdefault(part.record.step, part.record)
            newest[part.record.step] = max(known, part.record, key=lambda each: each.order)
    mixed = {
        node: [
            dataclasses.replace(part, record=newest[part.record.step], is_aside=False)
            for part in parts
        ]
        for node, parts in inventories.items()
    }
    return rules.decide(mixed, **options)


def oldest_of_a_step(inventories: Inventories, **options: Any) -> Decision:
    """Of two commits of a step, the older one is the step."""
    found = rules.decide(inventories, **options)
    losers = set(found.aside)
    others = {
        node: [part for part in parts if part.record.commit_id in losers]
        for node, parts in inventories.items()
    }
    older = rules.decide(others, **options).usable
    steps = {each.record.step for each in older}
    kept = [each for each in found.usable if each.record.step not in steps]
    usable = sorted([*kept, *older], key=lambda each: each.record.order)
    return dataclasses.replace(found, usable=tuple(usable))


def blind_to_parts_aside(inventories: Inventories, **options: Any) -> Decision:
    shown = {
        node: [part for part in parts if not part.is_aside] for node, parts in inventories.items()
    }
    return rules.decide(shown, **options)


def renames_first(parts: Sequence[HeldPart], decision: Decision) -> tuple[rules.Move, ...]:
    return tuple(reversed(rules.moves(parts, decision)))


def all_but_the_newest(usable: Sequence[UsableCommit], *_: object, **__: object) -> Any:
    """Steps may be pruned before a newer one is replicated."""
    return tuple(usable)[:-1]


def one_copy_is_enough(usable: Sequence[UsableCommit], replicas: int, **options: Any) -> Any:
    return rules.prunable(usable, replicas - 1, **options)


def always(*_: object, **__: object) -> bool:
    return True


def all_votes_outdated(usable: Sequence[UsableCommit], *_: object, **__: object) -> Any:
    return usable[-1] if usable else None


def all_parts_aside(parts: Sequence[HeldPart], *_: object, **__: object) -> Any:
    return tuple(part for part in parts if part.is_aside)


KILLS: Bounds = (1, 2, 0, 0, (0, 1))
BACK: Bounds = (1, 2, 0, 0, (-1, 1, 2))
AWAY: Bounds = (1, 1, 0, 1, (1,))
TWICE: Bounds = (1, 2, 0, 1, (1, 2))
MUTANTS: dict[str, tuple[Protocol, Bounds]] = {
    "the newest is the highest step number": (Protocol(decide=by_step_number), BACK),
    "abort while a directory is missing": (Protocol(decide=aborting_alone), AWAY),
    "roll forward without a rename": (Protocol(decide=forward_without_a_rename), KILLS),
    "use votes that wait": (Protocol(decide=using_votes_that_wait), AWAY),
    "do not roll forward": (Protocol(decide=never_forward), KILLS),
    "combine by step number": (Protocol(decide=combined_by_step), KILLS),
    "the older commit of a step": (Protocol(decide=oldest_of_a_step), KILLS),
    "parts aside do not count": (Protocol(decide=blind_to_parts_aside), KILLS),
    "rename before the name is free": (Protocol(moves=renames_first), KILLS),
    "prune before a newer step is replicated": (Protocol(prunable=all_but_the_newest), KILLS),
    "one copy fewer is replicated": (Protocol(prunable=one_copy_is_enough), KILLS),
    "remove replaced parts before replication": (Protocol(is_replicated=always), KILLS),
    "remove parts aside before replication": (Protocol(replaced=all_parts_aside), KILLS),
    "remove votes before replication": (Protocol(newest_replicated=all_votes_outdated), TWICE),
    "overwrite without moving aside": (Protocol(keeps_replaced=False), KILLS),
    "the generation is not raised": (Protocol(raises_generation=False), BACK),
    "each node raises its own generation": (Protocol(raises_over_all=False), TWICE),
    "a removal is not noted first": (Protocol(retires=False), KILLS),
    "commit before all have voted": (Protocol(votes_needed=2), KILLS),
    "a head aborts alone after its vote": (Protocol(keeps_vote=False), KILLS),
}


SLOW = {name for name, (_, bounds) in MUTANTS.items() if bounds is TWICE}


@pytest.mark.parametrize("name", [each for each in MUTANTS if full.IS_FULL or each not in SLOW])
def test_the_model_finds_a_broken_rule(name: str) -> None:
    protocol, (replicas, saves, wipes, trips, strides) = MUTANTS[name]
    model = Model(replicas, saves, wipes, trips, protocol, strides=strides)
    with pytest.raises(ViolationError):
        model.explore()
