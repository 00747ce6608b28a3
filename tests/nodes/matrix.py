"""Every failure in every phase of a save, then restores on the same, fewer and more ranks.

A run of 4 ranks on 2 nodes, or 6 on 3, saves two steps, which are replicated, and a third one, in
which ranks are killed and directories are lost. The files on all nodes at that moment say which
steps were replicated; the ranks' notes, which were reported as committed.
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import matrix_jobs
from gloo_workers import Failure, Workers

from functional_ckpt.core.nodes import rules
from functional_ckpt.steps import node_inventory
from functional_ckpt.steps.names import StepName
from functional_ckpt.storage.local import LocalStorage

_DISK = LocalStorage()
PRELOAD = (
    "functional_ckpt.manager",
    "functional_ckpt.checkpoint",
    "functional_ckpt.saving.node_publishing",
)
PHASES = ("staging", "writing", "voted", "renaming", "replicating", "uploading", "idle")
FAILURES = (
    "rank killed",
    "node killed",
    "node wiped",
    "two nodes wiped",
    "node from the past",
    "copy damaged",
    "remote absent",
)
_SIZES = {
    "aabb": {"same": "aabb", "fewer": "ab", "more": "aabbc"},
    "aabbcc": {"same": "aabbcc", "fewer": "abc", "more": "aabbccd"},
}


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """One run that fails; it is restored on each number of ranks.

    Attributes:
        nodes: The node of each rank.
        failure: One of `FAILURES`.
        phase: One of `PHASES`, in which ranks are killed.
        copies: The copies of each step on other nodes, where one node fails.
    """

    nodes: str
    failure: str
    phase: str
    copies: int = 1

    def __str__(self) -> str:
        return f"{len(self.nodes)}-{self.failure}-{self.phase}".replace(" ", "_")

    @property
    def replicas(self) -> int:
        return 2 if self.failure == "two nodes wiped" else self.copies

    @property
    def lost(self) -> str:
        """The nodes that are lost: whose directories are wiped, or come from the past."""
        if self.failure == "two nodes wiped":
            return "".join(sorted({"writing": "ab", "renaming": "ac"}.get(self.phase, "bc")))
        return "b" if self.failure in ("node wiped", "node from the past") else ""

    @property
    def dying(self) -> tuple[int, ...]:
        """The ranks that are killed; in some phases only a head acts."""
        if self.lost or self.failure in ("node killed", "copy damaged"):
            killed = self.lost or "b"
            return tuple(rank for rank, node in enumerate(self.nodes) if node in killed)
        acts_on_heads = self.phase in ("voted", "renaming", "replicating", "uploading")
        return (2,) if acts_on_heads else (0,) if self.failure == "remote absent" else (1,)


def cases() -> Iterator[Case]:
    """All cases."""
    for nodes, failure, phase in itertools.product(_SIZES, FAILURES, PHASES):
        if failure != "two nodes wiped" or nodes == "aabbcc":
            yield Case(nodes, failure, phase)


def check(case: Case, root: Path, workers: Workers, sizes: tuple[str, ...] = ()) -> list[str]:
    """Runs a case; returns its violations."""
    first = root / "first"
    first.mkdir()
    is_absent = case.failure == "remote absent"
    tier = str(root / "tier") if is_absent or case.phase == "uploading" else None
    args = (str(first), case.nodes, case.replicas, case.phase, case.dying, tier, is_absent)
    left = workers.outcomes(len(case.nodes), matrix_jobs.save_and_die, *args, may_die=True)
    found = [
        f"rank {rank}: {each.traceback}"
        for rank, each in enumerate(left)
        if hasattr(each, "traceback")
    ]
    replicated = _replicated(first, case)
    committed = _committed(first)
    # A save may be refused for the failed upload before it.
    steps = {2, 3} if case.phase == "idle" and not is_absent else {2}
    if (case.replicas and not steps <= replicated.keys()) or not steps <= committed.keys():
        found.append(f"replicated were only {[*replicated]}, committed {[*committed]}")
    _lose(first, case)
    for size, nodes in _SIZES[case.nodes].items():
        if sizes and size not in sizes:
            continue
        copy = root / size
        shutil.copytree(first, copy, symlinks=True)
        found += [
            f"{size}: {each}" for each in _resume(case, copy, nodes, workers, replicated, committed)
        ]
        shutil.rmtree(copy)
    return found


def _failed(outcome: object) -> bool:
    return isinstance(outcome, Failure)


def _resume(
    case: Case,
    root: Path,
    nodes: str,
    workers: Workers,
    replicated: dict[int, int],
    committed: dict[int, int],
) -> Iterator[str]:
    least = max(replicated, default=-1) if case.lost else max(committed, default=-1)
    num_ranks = len(nodes)
    outcomes = workers.outcomes(num_ranks, matrix_jobs.resume, str(root), nodes, case.replicas)
    for rank, outcome in enumerate(outcomes):
        if not isinstance(outcome, tuple):
            yield f"rank {rank} failed: {outcome.traceback}"
            continue
        step, seed, is_saved, wrong = outcome
        if step < least:
            yield f"rank {rank}: step {step} was restored, and step {least} was lost"
        if step > 0 and seed != 100 + step:
            yield f"rank {rank}: step {step} has the values of seed {seed}"
        if wrong:
            yield f"rank {rank}: {wrong} has values of another save"
        if not is_saved:
            yield f"rank {rank}: the next save was lost"
    if len({outcome[:2] for outcome in outcomes if isinstance(outcome, tuple)}) > 1:
        yield f"the ranks restored different steps: {outcomes}"


def _committed(root: Path) -> dict[int, int]:
    """The steps that were reported to any rank, with their seeds."""
    lines = [line for path in root.glob("committed.*") for line in path.read_text().splitlines()]
    return dict(tuple(map(int, line.split())) for line in lines)  # type: ignore[misc]


def _replicated(root: Path, case: Case) -> dict[int, int]:
    """The steps of which all files are intact on enough nodes, by their directories."""
    taken = {
        node: node_inventory.take(_DISK, str(root / node), StepName())
        for node in sorted(set(case.nodes))
    }
    parts = {node: [part for part in each.parts if part.is_renamed] for node, each in taken.items()}
    decision = rules.decide(parts, directories={each.directory for each in taken.values()})
    num_nodes = len(parts)
    return {
        each.record.step: 100 + each.record.step
        for each in decision.usable
        if len(each.nodes) == num_nodes
        and rules.is_replicated(each.record, each.holders, case.replicas, num_nodes=num_nodes)
    }


def _lose(root: Path, case: Case) -> None:
    past = root / "past"
    for node in case.lost:
        shutil.rmtree(root / node)
        if case.failure == "node from the past":
            shutil.copytree(past / node, root / node)
    if case.failure == "copy damaged":
        for part in (root / "b").glob("[0-9]*"):
            if not part.name.isdigit():
                continue
            record = node_inventory.read_part(_DISK, str(part))
            copies = [] if record is None else record.nodes[0].files
            for file in copies:
                path = part / file
                if path.is_file():
                    data = bytearray(path.read_bytes())
                    data[len(data) // 2] ^= 1
                    path.write_bytes(data)
    shutil.rmtree(past, ignore_errors=True)
