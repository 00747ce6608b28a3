"""The rules by which nodes use, keep and remove parts: a pure function of their inventories.

The names of the nodes that ask are only the keys of the result. Parts are combined by commit id
alone. The nodes may be renumbered, fewer or more.

`decide` is called at every start with the inventories of all nodes. Each node then executes `moves`
for its own parts, in that order. A crash between two moves leaves a state that leads to the same
decision.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal

from functional_ckpt.core.nodes.part import PartRecord


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HeldPart:
    """A directory of one node that has a part record.

    Attributes:
        name: The final name of the step's directory.
        path: Where it is now, relative to the node's directory.
        record: Its part record.
        is_renamed: Whether it was renamed after a decision to commit; else it is a vote.
        is_aside: Whether it was renamed, and moved aside since.
        files: The data files that are present in full size: the node's own, and copies.
    """

    name: str
    path: str = ""
    record: PartRecord
    is_renamed: bool
    is_aside: bool = False
    files: frozenset[str]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class UsableCommit:
    """A step of which the nodes hold every file.

    Attributes:
        record: Its part record.
        name: The name of its directory, on every node.
        nodes: The nodes that hold a part of it, and thus its indexes and records.
        holders: For each data file, the nodes that hold it.
    """

    record: PartRecord
    name: str
    nodes: tuple[str, ...]
    holders: Mapping[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Unusable:
    """A commit that cannot be used, and why.

    Attributes:
        record: Its part record.
        nodes: The nodes that hold a part or a vote of it.
        why: The reason, for people.
    """

    record: PartRecord
    nodes: tuple[str, ...]
    why: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The decision of all nodes; equal on all of them.

    Attributes:
        usable: The steps that can be used, from the oldest to the newest; one per step number.
        roll_forward: Commit ids whose votes are renamed, like a part on another node.
        abort: Commit ids whose votes are removed: every directory is here, and none was renamed.
        waiting: Votes that are kept: a node that is missing may have renamed its part.
        aside: Commit ids whose parts make way for another commit of their step.
        bring_back: Commit ids whose parts were aside, and are the best of their step now.
        retired: Commit ids whose parts are removed: their removal was interrupted.
        incomplete: Renamed parts that together lack files.
    """

    usable: tuple[UsableCommit, ...] = ()
    roll_forward: tuple[str, ...] = ()
    abort: tuple[str, ...] = ()
    waiting: tuple[Unusable, ...] = ()
    aside: tuple[str, ...] = ()
    bring_back: tuple[str, ...] = ()
    retired: tuple[str, ...] = ()
    incomplete: tuple[Unusable, ...] = ()

    @property
    def newest(self) -> UsableCommit | None:
        """The step that a run resumes from: the highest (generation, step)."""
        return self.usable[-1] if self.usable else None


Action = Literal["rename", "aside", "remove"]


@dataclasses.dataclass(frozen=True, slots=True)
class Move:
    """An action of one node on one of its parts.

    Attributes:
        action: `rename` to the final name, move `aside`, or `remove`.
        part: The part.
    """

    action: Action
    part: HeldPart


def decide(
    inventories: Mapping[str, Sequence[HeldPart]],
    *,
    directories: Collection[str],
    retired: Collection[str] = (),
) -> Decision:
    """Returns the decision about the parts that the nodes hold.

    Args:
        inventories: For every node of this run, in its order, the parts that it holds.
        directories: The ids of the directories of these nodes.
        retired: Commit ids that any of the nodes has noted before it removed a part of them.
    """
    commits: dict[str, dict[str, HeldPart]] = {}
    for node, parts in inventories.items():
        for part in parts:
            held = commits.setdefault(part.record.commit_id, {})
            held[node] = _better(held.get(node), part)
    ended = sorted(commits.keys() & set(retired))
    roll_forward: list[str] = []
    abort: list[str] = []
    waiting: list[Unusable] = []
    usable: list[UsableCommit] = []
    incomplete: list[Unusable] = []
    for commit_id in sorted(commits.keys() - set(ended)):
        held = commits[commit_id]
        record = next(iter(held.values())).record
        if any(part.is_renamed for part in held.values()):
            if not all(part.is_renamed for part in held.values()):
                roll_forward.append(commit_id)
            commit = _commit(record, held)
            missing = [file for file, nodes in commit.holders.items() if not nodes]
            if missing:
                incomplete.append(_unusable(record, held, missing))
            else:
                usable.append(commit)
        elif not (
            away := [node.name for node in record.nodes if node.directory not in directories]
        ):
            abort.append(commit_id)  # none of its directories was renamed
        else:
            why = f"not renamed on {', '.join(held)}; {', '.join(away)} may have renamed it"
            waiting.append(Unusable(record=record, nodes=tuple(held), why=why))
    best = _best(usable)
    # A name is taken by one commit: of several unusable ones, by the newest.
    named = {record.step: record.commit_id for record in _records(incomplete)}
    named |= {commit.record.step: commit.record.commit_id for commit in best}
    losers = [
        each.record.commit_id
        for each in (*usable, *incomplete)
        if named[each.record.step] != each.record.commit_id
    ]
    return Decision(
        usable=best,
        roll_forward=tuple(roll_forward),
        abort=tuple(abort),
        waiting=tuple(waiting),
        aside=tuple(each for each in losers if _is_any(commits[each], is_aside=False)),
        bring_back=tuple(
            commit.record.commit_id
            for commit in best
            if _is_any(commits[commit.record.commit_id], is_aside=True)
        ),
        retired=tuple(ended),
        incomplete=tuple(incomplete),
    )


def moves(parts: Sequence[HeldPart], decision: Decision) -> tuple[Move, ...]:
    """Returns the actions of one node on its parts, in this order.

    Parts make way before others take their names. After a crash, the node calls this again with
    the parts that it holds then.
    """
    gone = {*decision.abort, *decision.retired}
    waiting = {each.record.commit_id for each in decision.waiting}
    aside = set(decision.aside)
    first: list[Move] = []
    last: list[Move] = []
    for part in parts:
        commit_id = part.record.commit_id
        if commit_id in gone:
            first.append(Move("remove", part))
        elif commit_id in aside:
            if not part.is_aside:
                first.append(Move("aside", part))
        elif part.is_renamed:
            if part.is_aside and commit_id in decision.bring_back:
                last.append(Move("rename", part))
        elif commit_id not in waiting:
            last.append(Move("rename", part))
    return (*first, *last)


def is_replicated(
    record: PartRecord, holders: Mapping[str, Collection[str]], replicas: int, *, num_nodes: int
) -> bool:
    """Returns whether a step survives the loss of any `replicas` nodes.

    Args:
        record: The step's part record.
        holders: For each data file, the nodes that hold it, verified.
        replicas: The number of nodes that may be lost.
        num_nodes: The number of nodes of the run; with fewer than `replicas` partners, each of them
            holds every file.
    """
    needed = 1 + min(replicas, num_nodes - 1)
    return all(len(set(holders.get(file, ()))) >= needed for file in record.files)


def newest_replicated(
    usable: Iterable[UsableCommit], replicas: int, *, num_nodes: int
) -> UsableCommit | None:
    """Returns the newest step that survives the loss of any `replicas` nodes."""
    found = (
        commit
        for commit in usable
        if is_replicated(commit.record, commit.holders, replicas, num_nodes=num_nodes)
    )
    return max(found, key=lambda commit: commit.record.order, default=None)


def prunable(
    usable: Iterable[UsableCommit], replicas: int, *, num_nodes: int
) -> tuple[UsableCommit, ...]:
    """Returns the steps that a keep policy may remove: a newer one is replicated."""
    steps = tuple(usable)
    newest = newest_replicated(steps, replicas, num_nodes=num_nodes)
    if newest is None:
        return ()
    return tuple(each for each in steps if each.record.order < newest.record.order)


def outdated(waiting: Iterable[Unusable], newest: UsableCommit | None) -> tuple[Unusable, ...]:
    """Returns the votes that need not wait any longer, once a step of a later run is replicated.

    They were never reported as committed, and a later run has resumed without them.

    Args:
        waiting: `Decision.waiting`.
        newest: The newest replicated step.
    """
    if newest is None:
        return ()
    generation = newest.record.generation
    return tuple(each for each in waiting if each.record.generation < generation)


def replaced(
    parts: Iterable[HeldPart], usable: Iterable[UsableCommit], replicas: int, *, num_nodes: int
) -> tuple[HeldPart, ...]:
    """Returns the parts aside that a replicated save of the same run has replaced.

    A part of another generation stays: it may be of a line that the run went back from.

    Args:
        parts: The parts of one node.
        usable: `Decision.usable`.
        replicas: As of `is_replicated`.
        num_nodes: As of `is_replicated`.
    """
    later = {
        commit.record.step: commit.record
        for commit in usable
        if is_replicated(commit.record, commit.holders, replicas, num_nodes=num_nodes)
    }
    return tuple(
        part
        for part in parts
        if part.is_aside
        and (record := later.get(part.record.step)) is not None
        and part.record.generation == record.generation
        and part.record.serial < record.serial
    )


def removals(
    parts: Sequence[HeldPart], decision: Decision, replicas: int, *, num_nodes: int
) -> tuple[Move, ...]:
    """Returns the removals of one node's parts that no run needs any more.

    Args:
        parts: Its parts.
        decision: The decision of all nodes.
        replicas: As of `is_replicated`.
        num_nodes: As of `is_replicated`.
    """
    newest = newest_replicated(decision.usable, replicas, num_nodes=num_nodes)
    gone = {each.record.commit_id for each in outdated(decision.waiting, newest)}
    others = replaced(parts, decision.usable, replicas, num_nodes=num_nodes)
    gone |= {part.record.commit_id for part in others}
    return tuple(Move("remove", part) for part in parts if part.record.commit_id in gone)


def next_generation(generations: Iterable[int], parts: Iterable[HeldPart]) -> int:
    """Returns the generation that the nodes write before they save: higher than any they know."""
    return 1 + max((*generations, *(part.record.generation for part in parts)), default=0)


def _better(known: HeldPart | None, part: HeldPart) -> HeldPart:
    """Returns the one of two directories of a commit on one node that counts.

    A node that was stopped between a link and a rename may have two: the renamed one counts.
    """
    if known is None or (part.is_renamed, not part.is_aside) > (
        known.is_renamed,
        not known.is_aside,
    ):
        return part
    return known


def _is_any(held: Mapping[str, HeldPart], *, is_aside: bool) -> bool:
    return any(part.is_aside is is_aside for part in held.values())


def _records(incomplete: Iterable[Unusable]) -> list[PartRecord]:
    """Returns the records of commits, the newest last."""
    return sorted((each.record for each in incomplete), key=lambda record: record.order)


def _commit(record: PartRecord, held: Mapping[str, HeldPart]) -> UsableCommit:
    holders = {
        file: tuple(node for node, part in held.items() if file in part.files)
        for file in record.files
    }
    name = next(iter(held.values())).name
    return UsableCommit(
        record=record, name=name, nodes=tuple(held), holders=MappingProxyType(holders)
    )


def _unusable(record: PartRecord, held: Mapping[str, HeldPart], missing: Sequence[str]) -> Unusable:
    owners = dict.fromkeys(record.owner(file) for file in missing)
    why = (
        f"{len(missing)} of its {len(record.files)} files are on no node; written by "
        f"{', '.join(owners)}"
    )
    return Unusable(record=record, nodes=tuple(held), why=why)


def _best(usable: Iterable[UsableCommit]) -> tuple[UsableCommit, ...]:
    """Returns the newest commit of each step number, the newest step last."""
    best: dict[int, UsableCommit] = {}
    for commit in sorted(usable, key=lambda commit: commit.record.order):
        best[commit.record.step] = commit
    return tuple(sorted(best.values(), key=lambda commit: commit.record.order))
