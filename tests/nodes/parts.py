"""Nodes of one process: a saved step whose files are dealt out to directories of nodes."""

from __future__ import annotations

import dataclasses
import shutil
import threading
from pathlib import Path

import torch
from thread_ranks import MemoryStore, ThreadCoordinator

import functional_ckpt as fc
from functional_ckpt.core.nodes.part import PART_FILE, NodeFiles, PartRecord
from functional_ckpt.core.nodes.rules import UsableCommit
from functional_ckpt.distributed.nodes import Nodes as DistributedNodes
from functional_ckpt.events import Events
from functional_ckpt.steps import names, node_inventory, upload_step
from functional_ckpt.steps.node_tier import NodeTier
from functional_ckpt.steps.replication import Replication
from functional_ckpt.steps.tier_steps import TierSteps
from functional_ckpt.storage.local import LocalStorage
from functional_ckpt.verify import checkpoint

NAMES = "abcdef"


class Owner:
    """Stands for a manager."""


@dataclasses.dataclass(slots=True)
class Nodes:
    """The directories of some nodes, and who replicates them.

    Attributes:
        root: Holds the directory of each node, by its name.
        count: The number of nodes.
        storages: The store of each.
        events: All events of the primary.
    """

    root: Path
    count: int
    storages: list[LocalStorage]
    events: list[fc.Event] = dataclasses.field(default_factory=list[fc.Event])
    commits: list[dict[int, UsableCommit]] = dataclasses.field(init=False)
    tiers: dict[int, NodeTier] = dataclasses.field(default_factory=dict[int, NodeTier])
    num_saves: int = 0

    def is_replicated(self, step: int) -> bool:
        """Whether all nodes know that a step is replicated."""
        found = [tier.survives(step) for tier in self.tiers.values()]
        assert len(set(found)) == 1
        return found[0]

    def __post_init__(self) -> None:
        self.commits = [{} for _ in range(self.count)]
        for name in self.order:
            (self.root / name).mkdir()

    @property
    def order(self) -> tuple[str, ...]:
        return tuple(NAMES[: self.count])

    def save(self, step: int, *, size: int = 300_000, changed: float = 0.0) -> PartRecord:
        """Commits a step: each node has its own files, and all records."""
        self.num_saves += 1
        whole = self.root / "whole"
        items = {
            f"part{n}": {"w": torch.arange(float(size)) + n + (changed if n else 0.0)}
            for n in range(2 * self.count)
        }
        with fc.CheckpointManager(whole, share_unchanged=False) as manager:
            manager.save(step, items)
        source = whole / str(step)
        files, _ = upload_step.files_of(LocalStorage(), str(source))
        data = {name: file for name, file in files.items() if name.endswith(".safetensors")}
        owned: list[list[str]] = [[] for _ in self.order]
        for number, name in enumerate(sorted(data)):
            owned[number % self.count].append(name)
        record = PartRecord(
            commit_id=f"commit{self.num_saves}",
            step=step,
            generation=0,
            serial=self.num_saves,
            nodes=tuple(
                NodeFiles(
                    name=node,
                    directory=node,
                    ranks=(number,),
                    files={name: data[name] for name in owned[number]},
                )
                for number, node in enumerate(self.order)
            ),
        )
        for number, node in enumerate(self.order):
            for name in files:
                if name not in data or name in owned[number]:
                    target = self.root / node / str(step) / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source / name, target)
            (self.root / node / str(step) / PART_FILE).write_bytes(record.to_json())
        shutil.rmtree(whole)
        self.look()
        return record

    def look(self) -> None:
        """Reads again which files the nodes hold, as a start does."""
        held = {
            node: node_inventory.inventory(
                self.storages[number], str(self.root / node), names.StepName()
            )
            for number, node in enumerate(self.order)
        }
        found: dict[int, UsableCommit] = {}
        for node, parts in held.items():
            for part in parts:
                step = part.record.step
                known = found.get(step)
                holders = dict.fromkeys(part.record.files, ()) if known is None else known.holders
                found[step] = UsableCommit(
                    record=part.record,
                    name=part.name,
                    nodes=(*(() if known is None else known.nodes), node),
                    holders={
                        name: (*nodes, node) if name in part.files else nodes
                        for name, nodes in holders.items()
                    },
                )
        for commits in self.commits:
            commits.clear()
            commits.update(found)

    def steps(self, number: int) -> TierSteps:
        return TierSteps(
            self.storages[number],
            str(self.root / NAMES[number]),
            names.StepName(),
            Events(self.events.append if number == 0 else None),
            read_only=True,
            latest_link=None,
        )

    def replications(
        self,
        replicas: int = 1,
        *,
        store: MemoryStore | None = None,
        timeout_seconds: float = 10.0,
        max_bytes_per_second: float | None = None,
    ) -> list[Replication]:
        """One for each node, not started."""
        store = store or MemoryStore()
        option = fc.NodeLocal(replicas=replicas, max_bytes_per_second=max_bytes_per_second)
        found: list[Replication] = []
        for number in range(self.count):
            group = ThreadCoordinator(store, number, self.count, timeout_seconds=timeout_seconds)
            tier = NodeTier(group, option)
            tier.commits, tier._nodes = self.commits[number], DistributedNodes(self.order, number)
            found.append(Replication(tier, self.steps(number), group, owner=_OWNER))
            self.tiers[number] = tier
        return found

    def replicate(self, replicas: int = 1) -> list[Replication]:
        """Starts, and copies all that lacks copies."""
        found = self.replications(replicas)
        for each in found:
            each.start()
        close(found)
        return found

    def held(self, step: int) -> list[set[str]]:
        """The data files of each node, by their names."""
        return [
            {
                path.relative_to(self.root / node / str(step)).as_posix()
                for path in (self.root / node / str(step)).rglob("*.safetensors")
            }
            for node in self.order
        ]

    def check_whole(self, step: int, *nodes: str) -> None:
        """The named nodes together have all of a step, undamaged."""
        whole = self.root / "together" / str(step)
        for node in nodes:
            shutil.copytree(self.root / node / str(step), whole, dirs_exist_ok=True)
        (whole / PART_FILE).unlink()
        assert checkpoint.verify_checkpoint(LocalStorage(), str(whole), step) == []
        shutil.rmtree(whole.parent)

    def in_transit(self) -> list[Path]:
        return [
            each for each in self.root.glob("*/.functional_ckpt/incoming/**/*") if each.is_file()
        ]


_OWNER = Owner()


def close(replications: list[Replication]) -> None:
    """Closes them together, as ranks do."""
    threads = [threading.Thread(target=each.close) for each in replications]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
        assert not each.is_alive()
