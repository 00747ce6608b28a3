"""An exhaustive model of the node-local tier: every order of crashes of three nodes.

A state has the content of the disks. A run starts (the real `rules.decide` and `rules.moves`),
raises the generation, restores any step or none, then saves, copies files to partners
and prunes. It may crash at every step of this; nodes may be wiped, be away for some runs, and come
back. Between the barriers of the protocol the nodes work independently, so a crash leaves every
combination of their progress.

States are canonical: nodes are rotated, generations are ranks, commits that left no trace are
dropped. So the number of crashes needs no bound.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from functional_ckpt.core.nodes import rules
from functional_ckpt.core.nodes.part import NodeFiles, PartRecord
from functional_ckpt.core.nodes.rules import Decision, HeldPart, UsableCommit
from functional_ckpt.core.records.file_list import FileRecord

NODES = 3
NONE, VOTE, STEP, ASIDE = range(4)
AWAY = -1
_FILE = FileRecord(1, "0" * 16)
_NAMES = tuple(f"model/{node}" for node in range(NODES))


def part(kind: int = NONE, files: int = 0, owner: int = AWAY) -> int:
    """Returns one node's part of a commit as a small number.

    Args:
        kind: Nothing, a vote, the step, or aside.
        files: A bit for each file.
        owner: The node that this directory was when the commit was saved.
    """
    return kind | files << 2 | (owner + 1) << 5


def kind_of(number: int) -> int:
    return number & 3


def files_of(number: int) -> int:
    return number >> 2 & 7


def owner_of(number: int) -> int:
    return (number >> 5) - 1


class Disk(NamedTuple):
    """One node's directory."""

    generation: int = 0
    retired: int = 0  # a bit for each commit
    parts: tuple[int, ...] = ()  # for each commit, see `part`


class Commit(NamedTuple):
    """One save; in the order of time."""

    step: int
    generation: int
    nodes: int  # a bit for each node that took part
    decided: bool = False  # the key says commit
    renamed: bool = False  # on any node: from now on it must not be lost
    intact: bool = True  # no disk of it was lost, and nothing of it was pruned


class Run(NamedTuple):
    """A run that has restored."""

    last: int  # its last step
    replaced: int = 0  # a bit for each commit that it has overwritten


class State(NamedTuple):
    """All that any rule or invariant reads."""

    disks: tuple[Disk | None, ...]  # None: this node is away
    commits: tuple[Commit, ...]
    saves_left: int
    wipes_left: int
    trips_left: int
    shelf: Disk | None = None  # a disk that is away
    run: Run | None = None
    # The newest step that was replicated, the losses that it must survive, the nodes lost since.
    safe: tuple[int, int, int] | None = None
    is_harmed: bool = False  # any disk was ever lost or away


class ViolationError(AssertionError):
    """An invariant does not hold."""


def require(condition: object, text: str) -> None:
    if not condition:
        raise ViolationError(text)


@dataclasses.dataclass(frozen=True)
class Protocol:
    """The rules and the order of actions; a mutant replaces one of them."""

    decide: Callable[..., Decision] = rules.decide
    moves: Callable[..., tuple[rules.Move, ...]] = rules.moves
    prunable: Callable[..., tuple[UsableCommit, ...]] = rules.prunable
    newest_replicated: Callable[..., UsableCommit | None] = rules.newest_replicated
    is_replicated: Callable[..., bool] = rules.is_replicated
    replaced: Callable[..., tuple[HeldPart, ...]] = rules.replaced
    raises_generation: bool = True
    raises_over_all: bool = True
    keeps_replaced: bool = True
    retires: bool = True
    votes_needed: int = NODES
    keeps_vote: bool = True


class Model:
    """The states that can be reached from empty disks."""

    def __init__(
        self,
        replicas: int,
        saves: int,
        wipes: int,
        trips: int,
        protocol: Protocol | None = None,
        *,
        strides: tuple[int, ...] = (1,),
    ) -> None:
        self.replicas = replicas
        self.strides = strides
        self.protocol = protocol or Protocol()
        self.first = State((Disk(),) * NODES, (), saves, wipes, trips)
        self.parents: dict[State, tuple[State, str] | None] = {}
        self.num_decisions = 0
        self._decide = functools.lru_cache(maxsize=2**18)(self._decide_parts)

    def explore(self) -> int:
        """Visits every state, and returns their number; raises `ViolationError`."""
        first = canonical(self.first)
        self.parents = {first: None}
        queue = collections.deque([first])
        while queue:
            state = queue.popleft()
            try:
                for label, following in self.following(state):
                    found = canonical(following)
                    if found not in self.parents:
                        self.parents[found] = state, label
                        queue.append(found)
            except ViolationError as error:
                raise ViolationError(f"{error}\n{self.trace(state)}") from None
        return len(self.parents)

    def trace(self, state: State) -> str:
        lines: list[str] = [f"    {state}"]
        parent = self.parents[state]
        while parent is not None:
            state, label = parent
            lines += [f"  {label}", f"    {state}"]
            parent = self.parents[state]
        return "\n".join(reversed(lines))

    # ------------------------------------------------------------------------------- transitions

    def following(self, state: State) -> Iterator[tuple[str, State]]:
        if state.run is None:
            yield from self._harm(state)
            if any(disk is not None for disk in state.disks):
                yield from self._start(state)
        else:
            yield "crash", state._replace(run=None)
            yield from self._copy(state)
            yield from self._prune(state)
            if state.saves_left:
                for stride in self.strides:
                    if state.run.last + stride:
                        yield from self._save(state, state.run.last + stride)

    def _harm(self, state: State) -> Iterator[tuple[str, State]]:
        """Disks are lost, and nodes go away and come back, while no run is active."""
        for node, disk in enumerate(state.disks):
            if disk is None:
                yield f"node {node} is new", put(state, node, empty(state))
            elif state.wipes_left and any(map(kind_of, disk.parts)):
                after = put(lost(state, node), node, empty(state))
                yield f"wipe {node}", after._replace(wipes_left=state.wipes_left - 1)
            if disk is not None and state.trips_left and state.shelf is None:
                away = counted(state, node)._replace(shelf=disk, trips_left=state.trips_left - 1)
                yield f"node {node} goes away", put(away, node, None)
            if state.shelf is not None:
                over = state if disk is None else lost(state, node)
                yield f"node {node} is back", put(over, node, state.shelf)._replace(shelf=None)

    def _start(self, state: State) -> Iterator[tuple[str, State]]:
        decision = self.decided(state)
        self._check(state, decision)
        usable = {index_of(each.record) for each in decision.usable}
        programs = [self._program(state, node, decision) for node in range(NODES)]
        moved = state
        for lengths, moved in _prefixes(state, programs):
            yield f"crash in the moves {lengths}", moved
        self._check_moved(moved, decision)
        present = [node for node in range(NODES) if state.disks[node] is not None]
        known = [disk.generation for disk in moved.disks if disk is not None]
        highest = max([*known, *(c.generation for c in held_commits(moved))])
        raised = {}
        for node in present:
            disk = moved.disks[node]
            assert disk is not None
            over = highest if self.protocol.raises_over_all else disk.generation
            raised[node] = over + self.protocol.raises_generation
        for some in itertools.product((False, True), repeat=len(present)):
            after = moved
            for node, is_raised in zip(present, some, strict=True):
                disk = after.disks[node]
                assert disk is not None
                if is_raised:
                    after = put(after, node, disk._replace(generation=raised[node]))
            if not all(some):
                yield f"crash while the generation is raised {some}", after
                continue
            for step in {0, *(moved.commits[k].step for k in usable)}:
                yield f"restore {step}", after._replace(run=Run(step))

    def _program(
        self, state: State, node: int, decision: Decision
    ) -> list[Callable[[State], State]]:
        """Returns the actions of one node at a start."""
        disk = state.disks[node]
        if disk is None:
            return []
        program: list[Callable[[State], State]] = []
        for move in self.protocol.moves(parts_of(state, disk), decision):
            k = index_of(move.part.record)
            if move.action == "remove":
                program += self._removal(state, node, k, is_abort=k in map(_index, decision.abort))
            elif move.action == "aside":
                program.append(functools.partial(change, node=node, k=k, kind=ASIDE))
            else:
                program.append(functools.partial(rename, node=node, k=k))
        return program

    def _removal(
        self, state: State, node: int, k: int, *, is_abort: bool
    ) -> list[Callable[[State], State]]:
        if is_abort:
            require(not state.commits[k].renamed, f"commit {k} is aborted after a rename")
        first = [functools.partial(retire, node=node, k=k)] if self.protocol.retires else []
        return [*first, functools.partial(remove, node=node, k=k)]

    def _save(self, state: State, step: int) -> Iterator[tuple[str, State]]:
        present = [node for node in range(NODES) if state.disks[node] is not None]
        generation = next(disk.generation for disk in state.disks if disk is not None)
        k, nodes = len(state.commits), sum(1 << node for node in present)

        def longer(disk: Disk | None, owner: int) -> Disk | None:
            return disk and disk._replace(parts=(*disk.parts, part(owner=owner)))

        started = state._replace(
            commits=(*state.commits, Commit(step, generation, nodes)),
            saves_left=state.saves_left - 1,
            disks=tuple(longer(disk, node) for node, disk in enumerate(state.disks)),
            shelf=longer(state.shelf, AWAY),
        )
        yield from self._stopped_save(started, k, present)
        voters = present[: self.protocol.votes_needed]
        decided = started
        for node in voters:
            decided = change(decided, node, k, VOTE, 1 << node)
        commits = (*state.commits, started.commits[k]._replace(decided=True))
        yield from self._committed(decided._replace(commits=commits), k, present, voters)

    def _stopped_save(
        self, state: State, k: int, present: list[int]
    ) -> Iterator[tuple[str, State]]:
        """Any nodes have voted; the run crashed, or a rank has set the key to abort."""
        step = state.commits[k].step
        for progress in itertools.product(
            ("nothing", "vote", "noted", "removed"), repeat=len(present)
        ):
            after = state
            for node, done in zip(present, progress, strict=True):
                if done in ("vote", "noted"):
                    after = change(after, node, k, VOTE, 1 << node)
                if done in ("noted", "removed") and self.protocol.retires:
                    after = retire(after, node, k)
            yield f"save {step}: crash {progress}", after._replace(run=None)
            if set(progress) == {"removed"}:
                yield f"save {step}: aborted", after

    def _committed(
        self, state: State, k: int, present: list[int], voters: list[int]
    ) -> Iterator[tuple[str, State]]:
        """Each node moves another commit of this step aside, renames its part, and acknowledges."""
        assert state.run is not None
        step = state.commits[k].step
        programs: list[list[Callable[[State], State]]] = []
        replaced = 0
        for node in present:
            disk = state.disks[node]
            assert disk is not None
            program: list[Callable[[State], State]] = []
            for other, number in enumerate(disk.parts):
                if kind_of(number) == STEP and state.commits[other].step == step:
                    replaced |= 1 << other
                    away = ASIDE if self.protocol.keeps_replaced else NONE
                    program.append(functools.partial(change, node=node, k=other, kind=away))
            if node in voters:
                program.append(functools.partial(rename, node=node, k=k))
            programs.append(program)
        after = state
        for lengths, after in _prefixes(state, programs):
            yield f"save {step}: crash among the renames {lengths}", after._replace(run=None)
        if not self.protocol.keeps_vote:
            alone = remove(after, present[-1], k)
            yield "a head removes its vote alone", alone._replace(run=None)
        run = Run(step, state.run.replaced | replaced)
        yield f"save {step}: committed", self._noted(after._replace(run=run))

    def _copy(self, state: State) -> Iterator[tuple[str, State]]:
        """One file of the newest step is copied to the next node that lacks it."""
        newest = self.decided(state).newest
        if newest is None:
            return
        k, needed = index_of(newest.record), 1 + min(self.replicas, num_present(state) - 1)
        for file in range(NODES):
            holders = newest.holders.get(_NAMES[file])
            if holders is None or len(holders) >= needed:
                continue
            for offset in range(1, NODES):
                node = (file + offset) % NODES
                disk = state.disks[node]
                if disk is None or files_of(disk.parts[k]) & 1 << file:
                    continue
                after = change(state, node, k, STEP, files_of(disk.parts[k]) | 1 << file)
                yield f"copy {file} of {k} to {node}", self._noted(after)
                break

    def _noted(self, state: State) -> State:
        """Remembers the newest step that is replicated, with the losses that it must survive."""
        newest = self.decided(state).newest
        if newest is None:
            return state
        copies = min(len(nodes) for nodes in newest.holders.values())
        if copies < 1 + min(self.replicas, num_present(state) - 1):
            return state
        return state._replace(safe=(index_of(newest.record), copies - 1, 0))

    def _prune(self, state: State) -> Iterator[tuple[str, State]]:
        """An older step is removed, or one that was overwritten."""
        assert state.run is not None
        decision, num_nodes = self.decided(state), num_present(state)
        doomed = {
            index_of(each.record)
            for each in self.protocol.prunable(decision.usable, self.replicas, num_nodes=num_nodes)
        }
        newest = self.protocol.newest_replicated(
            decision.usable, self.replicas, num_nodes=num_nodes
        )
        doomed |= {index_of(each.record) for each in rules.outdated(decision.waiting, newest)}
        newest = decision.newest
        if newest and self.protocol.is_replicated(
            newest.record, newest.holders, self.replicas, num_nodes=num_nodes
        ):
            doomed |= {k for k in range(len(state.commits)) if state.run.replaced >> k & 1}
        commits = tuple((each.step, each.generation, each.nodes) for each in state.commits)
        for disk in state.disks:  # at a start
            parts = () if disk is None else _parts(disk.parts, commits)
            found = self.protocol.replaced(
                parts, decision.usable, self.replicas, num_nodes=num_nodes
            )
            doomed |= {index_of(part.record) for part in found}
        for k in doomed:
            nodes = [n for n, disk in enumerate(state.disks) if disk and kind_of(disk.parts[k])]
            if not nodes:
                continue
            self._check_pruned(state, k)
            gone = state._replace(
                commits=tuple(
                    each._replace(intact=each.intact and j != k)
                    for j, each in enumerate(state.commits)
                )
            )
            programs = [self._removal(state, node, k, is_abort=False) for node in nodes]
            after = gone
            for lengths, after in _prefixes(gone, programs):
                yield f"prune {k}: crash {lengths}", after._replace(run=None)
            yield f"prune {k}", after

    # ------------------------------------------------------------------------------ invariants

    def _check(self, state: State, decision: Decision) -> None:
        """Checks a decision at a start."""
        usable = [index_of(each.record) for each in decision.usable]
        newest = usable[-1] if usable else -1
        require(
            newest == max(usable, default=-1),
            f"a run resumes from commit {newest} of an abandoned line: {usable} are usable",
        )
        taken = {state.commits[k].step: k for k in usable}
        for k, each in enumerate(state.commits):
            require(k not in usable or each.decided, f"commit {k} is used without a decision")
            there = [disk.parts[k] for disk in state.disks if disk is not None]
            members = [each for each in there if kind_of(each) and owner_of(each) != AWAY]
            is_there = len(members) == each.nodes.bit_count()
            if each.renamed and each.intact and (is_there or not state.is_harmed):
                require(taken.get(each.step, -1) >= k, f"commit {k} is lost without a lost disk")
        if state.safe is not None:
            require(newest >= state.safe[0], f"commit {state.safe[0]} is lost, though replicated")
        if not state.is_harmed:
            require(not decision.incomplete, "kills alone leave an incomplete step")
            require(not decision.waiting, "kills alone leave a vote that waits")

    def _check_moved(self, state: State, decision: Decision) -> None:
        """Checks the disks after the moves: every usable step is at its name, of one commit."""
        for commit in decision.usable:
            k = index_of(commit.record)
            for file, nodes in commit.holders.items():
                require(nodes, f"commit {k} lacks {file}")
                for node in nodes:
                    disk = state.disks[int(node)]
                    assert disk is not None
                    require(
                        kind_of(disk.parts[k]) == STEP
                        and files_of(disk.parts[k]) >> _NAMES.index(file) & 1,
                        f"node {node} gives {file} of another commit than {k}",
                    )
        again = self.decided(state)
        require(
            [each.record.commit_id for each in again.usable]
            == [each.record.commit_id for each in decision.usable],
            "the moves change the decision",
        )

    def _check_pruned(self, state: State, k: int) -> None:
        newer = [
            each
            for each in self.decided(state).usable
            if index_of(each.record) > k
            and rules.is_replicated(
                each.record, each.holders, self.replicas, num_nodes=num_present(state)
            )
        ]
        require(newer, f"commit {k} is pruned, and no newer one is replicated")

    # ------------------------------------------------------------------------------- decisions

    def decided(self, state: State) -> Decision:
        key = tuple(None if disk is None else (disk.retired, disk.parts) for disk in state.disks)
        return self._decide(key, tuple((c.step, c.generation, c.nodes) for c in state.commits))

    def _decide_parts(
        self,
        disks: tuple[tuple[int, tuple[int, ...]] | None, ...],
        commits: tuple[tuple[int, int, int], ...],
    ) -> Decision:
        self.num_decisions += 1
        inventories = {
            str(node): _parts(disk[1], commits)
            for node, disk in enumerate(disks)
            if disk is not None
        }
        retired = {
            _commit_id(k)
            for disk in disks
            if disk is not None
            for k in range(len(commits))
            if disk[0] >> k & 1
        }
        directories = {
            f"{k}-{owner_of(number)}"
            for disk in disks
            if disk is not None
            for k, number in enumerate(disk[1])
        }
        return self.protocol.decide(inventories, directories=directories, retired=retired)


def _prefixes(
    state: State, programs: Sequence[Sequence[Callable[[State], State]]]
) -> Iterator[tuple[tuple[int, ...], State]]:
    """Yields the states after any number of actions of each node; the last has all of them."""
    for lengths in itertools.product(*[range(len(program) + 1) for program in programs]):
        after = state
        for program, length in zip(programs, lengths, strict=True):
            for action in program[:length]:
                after = action(after)
        yield lengths, after


# ------------------------------------------------------------------------------------- the disks


def put(state: State, node: int, disk: Disk | None) -> State:
    return state._replace(disks=(*state.disks[:node], disk, *state.disks[node + 1 :]))


def empty(state: State) -> Disk:
    return Disk(parts=(part(),) * len(state.commits))


def counted(state: State, node: int) -> State:
    """Counts a node as lost for the step that must survive losses."""
    safe = state.safe
    if safe is not None:
        k, losses, nodes = safe
        nodes |= 1 << node
        safe = (k, losses, nodes) if nodes.bit_count() <= losses else None
    return state._replace(safe=safe, is_harmed=True)


def lost(state: State, node: int) -> State:
    """Notes that the content of a disk is lost."""
    disk = state.disks[node]
    assert disk is not None
    commits = tuple(
        each._replace(intact=each.intact and not kind_of(disk.parts[k]))
        for k, each in enumerate(state.commits)
    )
    return counted(state, node)._replace(commits=commits)


def change(state: State, node: int, k: int, kind: int, files: int | None = None) -> State:
    disk = state.disks[node]
    assert disk is not None
    parts = list(disk.parts)
    files = files_of(parts[k]) if files is None else files
    parts[k] = part(kind, files if kind else 0, owner_of(parts[k]))
    disks = list(state.disks)
    disks[node] = Disk(disk.generation, disk.retired, tuple(parts))
    return State(tuple(disks), *state[1:])


def rename(state: State, node: int, k: int) -> State:
    disk = state.disks[node]
    assert disk is not None
    step = state.commits[k].step
    for other, number in enumerate(disk.parts):
        is_taken = other != k and kind_of(number) == STEP and state.commits[other].step == step
        require(not is_taken, f"commit {k} takes the name of commit {other} on node {node}")
    commits = list(state.commits)
    commits[k] = commits[k]._replace(renamed=True)
    return change(state, node, k, STEP)._replace(commits=tuple(commits))


def remove(state: State, node: int, k: int) -> State:
    return change(state, node, k, NONE)


def retire(state: State, node: int, k: int) -> State:
    disk = state.disks[node]
    assert disk is not None
    return put(state, node, disk._replace(retired=disk.retired | 1 << k))


def num_present(state: State) -> int:
    return sum(disk is not None for disk in state.disks)


def held_commits(state: State) -> list[Commit]:
    """Returns the commits of which a node that is present holds a part."""
    return [
        each
        for k, each in enumerate(state.commits)
        if any(disk is not None and kind_of(disk.parts[k]) for disk in state.disks)
    ]


# ----------------------------------------------------------------------------- canonical states


def canonical(state: State) -> State:
    """Returns the one state of all that differ by names, or by data that no rule will read."""
    state = _ranked(_without_harm(_without_traces(state)))
    turned = [state.disks, _turned_disks(state.disks, 1), _turned_disks(state.disks, 2)]
    keys = [[disk or () for disk in disks] for disks in turned]
    by = keys.index(min(keys))
    return _turned_state(state, turned[by], by) if by else state


def _without_harm(state: State) -> State:
    """Returns the state with the nodes' notes united, if no node will be lost or away any more."""
    if state.wipes_left or state.trips_left or state.shelf is not None or None in state.disks:
        return state
    disks = [disk for disk in state.disks if disk is not None]
    generation = max(disk.generation for disk in disks)
    retired = functools.reduce(operator.or_, (disk.retired for disk in disks))
    return state._replace(
        disks=tuple(Disk(generation, retired, disk.parts) for disk in disks),
        safe=state.safe and (state.safe[0], 0, 0),
    )


def _without_traces(state: State) -> State:
    every = [*state.disks, state.shelf]
    kept = [
        k
        for k in range(len(state.commits))
        if any(disk is not None and kind_of(disk.parts[k]) for disk in every)
    ]
    if len(kept) == len(state.commits):
        return state
    if state.safe is not None:
        require(state.safe[0] in kept, f"the last copy of commit {state.safe[0]} was removed")
    for k, each in enumerate(state.commits):
        require(
            k in kept or not each.renamed or not each.intact,
            f"the last copy of commit {k} was removed",
        )

    def bits(mask: int) -> int:
        return sum(1 << new for new, old in enumerate(kept) if mask >> old & 1)

    def cut(disk: Disk | None) -> Disk | None:
        return disk and Disk(
            disk.generation, bits(disk.retired), tuple(disk.parts[k] for k in kept)
        )

    return state._replace(
        disks=tuple(cut(disk) for disk in state.disks),
        shelf=cut(state.shelf),
        commits=tuple(state.commits[k] for k in kept),
        run=state.run and state.run._replace(replaced=bits(state.run.replaced)),
        safe=state.safe and (kept.index(state.safe[0]), *state.safe[1:]),
    )


def _ranked(state: State) -> State:
    every = [disk for disk in (*state.disks, state.shelf) if disk is not None]
    used = {0, *(disk.generation for disk in every), *(c.generation for c in state.commits)}
    if max(used) == len(used) - 1:
        return state
    rank = {generation: k for k, generation in enumerate(sorted(used))}

    def ranked(disk: Disk | None) -> Disk | None:
        return disk and disk._replace(generation=rank[disk.generation])

    return state._replace(
        disks=tuple(ranked(disk) for disk in state.disks),
        shelf=ranked(state.shelf),
        commits=tuple(c._replace(generation=rank[c.generation]) for c in state.commits),
    )


def _turned(bits: int, by: int) -> int:
    return sum(1 << (node + by) % NODES for node in range(NODES) if bits >> node & 1)


_TURNED_BITS = [[_turned(bits, by) for bits in range(8)] for by in range(NODES)]
_TURNED_PARTS = [
    [
        part(
            kind_of(number),
            _turned(files_of(number), by),
            AWAY if owner_of(number) == AWAY else (owner_of(number) + by) % NODES,
        )
        for number in range(1 << 7)
    ]
    for by in range(NODES)
]


def _turned_disk(disk: Disk | None, by: int) -> Disk | None:
    table = _TURNED_PARTS[by]
    return disk and Disk(disk[0], disk[1], tuple([table[number] for number in disk[2]]))


def _turned_disks(disks: tuple[Disk | None, ...], by: int) -> tuple[Disk | None, ...]:
    return tuple([_turned_disk(disks[node - by], by) for node in range(NODES)])


def _turned_state(state: State, disks: tuple[Disk | None, ...], by: int) -> State:
    bits = _TURNED_BITS[by]
    return state._replace(
        disks=disks,
        shelf=_turned_disk(state.shelf, by),
        commits=tuple(c._replace(nodes=bits[c.nodes]) for c in state.commits),
        safe=state.safe and (*state.safe[:2], bits[state.safe[2]]),
    )


# ------------------------------------------------------------------------- the rules' own records


def _commit_id(k: int) -> str:
    return f"commit-{k}"


def _index(commit_id: str) -> int:
    return int(commit_id.rpartition("-")[2])


def index_of(record: PartRecord) -> int:
    return record.serial


@functools.cache
def _record(k: int, step: int, generation: int, nodes: int) -> PartRecord:
    return PartRecord(
        commit_id=_commit_id(k),
        step=step,
        generation=generation,
        serial=k,
        nodes=tuple(
            NodeFiles(
                name=str(node),
                directory=f"{k}-{node}",
                ranks=(node,),
                files={_NAMES[node]: _FILE},
            )
            for node in range(NODES)
            if nodes >> node & 1
        ),
    )


@functools.cache
def _held(k: int, kind: int, mask: int, step: int, generation: int, nodes: int) -> HeldPart:
    return HeldPart(
        name=str(step),
        record=_record(k, step, generation, nodes),
        is_renamed=kind != VOTE,
        is_aside=kind == ASIDE,
        files=frozenset(_NAMES[file] for file in range(NODES) if mask >> file & 1),
    )


def _parts(parts: Sequence[int], commits: Sequence[tuple[int, int, int]]) -> tuple[HeldPart, ...]:
    return tuple(
        _held(k, kind_of(number), files_of(number), *commits[k])
        for k, number in enumerate(parts)
        if kind_of(number)
    )


def parts_of(state: State, disk: Disk) -> tuple[HeldPart, ...]:
    return _parts(disk.parts, [(c.step, c.generation, c.nodes) for c in state.commits])
