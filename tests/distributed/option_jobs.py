"""Managers that the ranks make differently: jobs for worker processes."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import functional_ckpt as fc
from functional_ckpt.distributed.torch_store import StoreCoordinator

SECONDS = 30.0


@dataclasses.dataclass(frozen=True)
class Own:
    """A user's policy."""

    n: int

    def should_preserve(self, checkpoints: Sequence[Any], /, *, context: Any) -> list[bool]:
        return [True] * len(checkpoints)


def options(name: str, rank: int, directory: Path) -> dict[str, Any]:
    """The arguments of one rank, of which one differs."""
    last = rank == dist.get_world_size() - 1
    policies = fc.policies
    found: dict[str, Any] = {
        "save_policy": {"save_policy": policies.every(3 if last else 2)},
        "save_policy kinds": {"save_policy": policies.every("1s" if last else 2)},
        "keep_policy": {"keep_policy": policies.LatestN(2 if last else 1)},
        "keep_policy only some": {} if last else {"keep_policy": policies.LatestN(1)},
        "keep_policy own": {"keep_policy": Own(2 if last else 1)},
        "latest_link": {"latest_link": "latest"} if last else {},
        "step_name": {
            "step_name": fc.step_names.StepName(prefix="step") if last else fc.step_names.StepName()
        },
        "tiers": {"tiers": [fc.Tier(path=directory / "far")]} if last else {},
        "tiers policies": {"tiers": [fc.Tier(path=directory / "far", keep=Own(2 if last else 1))]},
        "overwrite": {"overwrite": last},
        "staging": {"staging": fc.Overlapped() if last else fc.Eager()},
        "staging options": {"staging": fc.Overlapped(checked=last)},
        "on_busy": {"on_busy": "skip" if last else "wait"},
        "read_only": {"read_only": last},
    }
    return found[name]


NAMES = (
    "save_policy",
    "save_policy kinds",
    "keep_policy",
    "keep_policy only some",
    "keep_policy own",
    "latest_link",
    "step_name",
    "tiers",
    "tiers policies",
    "overwrite",
    "staging",
    "staging options",
    "on_busy",
    "read_only",
)


def open_all(directory: Path) -> dict[str, str]:
    """Makes one manager after another; returns the error of each."""
    found: dict[str, str] = {}
    started = time.monotonic()
    for name in NAMES:
        group = StoreCoordinator(dist.group.WORLD, timeout_seconds=SECONDS)
        given = options(name, dist.get_rank(), directory)
        try:
            fc.CheckpointManager(directory / "run", coordinator=group, **given).close()
        except fc.errors.CoordinationError as error:
            found[name] = f"{error.ranks} {error}"
    assert time.monotonic() - started < SECONDS
    return found


def open_alike(directory: Path) -> list[int]:
    """Options that are equal, though the objects are not; and those that may differ."""

    def best(metrics: Any) -> float:
        return metrics["a"]

    with fc.CheckpointManager(
        directory,
        save_policy=[fc.policies.every(1), fc.policies.Preemption()],
        keep_policy=[fc.policies.LatestN(2), fc.policies.BestN(1, best), Own(1)],
        staging=fc.Eager(budget_bytes=1000 * dist.get_rank()),
        on_event=print if dist.get_rank() else None,
    ) as manager:
        for step in range(3):
            manager.save(step, {"t": {"w": torch.ones(3)}}, metrics={"a": step})
        manager.wait_until_finished()
        return manager.all_steps()


def save_elsewhere(directory: Path) -> None:
    """Each rank into a directory of its own."""
    with fc.CheckpointManager(directory / f"rank_{dist.get_rank()}") as manager:
        manager.save(0, {"t": {"w": torch.ones(3)}})


def save_moved(directory: Path) -> None:
    """The directories are the same when they are opened, and are not any more at the save."""
    rank = dist.get_rank()
    path = directory / f"link_{rank}"
    path.symlink_to(directory / "run")
    manager = fc.CheckpointManager(path)
    if rank == 1:
        path.unlink()
        (directory / "other").mkdir()
        path.symlink_to(directory / "other")
    manager.save(0, {"t": {"w": torch.ones(3)}})
    manager.close()


def restore_mismatched(directory: Path, strict: bool) -> tuple[str, float, Any]:
    """Rank 1 alone has a target that does not fit; every rank restores something else."""
    rank = dist.get_rank()
    group = StoreCoordinator(dist.group.WORLD, timeout_seconds=SECONDS)
    target: dict[str, Any] = {"a": torch.zeros(3)} if rank == 0 else {"b": torch.zeros(4)}
    started = time.monotonic()
    kind = "restored"
    report: Any = None
    with fc.CheckpointManager(directory, read_only=True, coordinator=group) as manager:
        try:
            items = {
                "t": fc.PyTree({name: fc.handlers.Fill(each) for name, each in target.items()})
            }
            report = manager.restore(0, items, strict=strict).report
        except fc.errors.MismatchError as error:
            kind = f"{type(error).__name__} {isinstance(error, fc.errors.CoordinationError)}"
            report = (error.mismatched, error.step, getattr(error, "ranks", ()))
        # Whatever came of it, the ranks still agree.
        manager.restore(0)
    assert all((each == 0).all() for each in target.values()) or kind == "restored"
    return kind, time.monotonic() - started, str(report)


RESTORES = (
    *({"step": 0}, {"discard_later": True}, {"strict": False}, {"cast": True}, {"verify": "first"}),
    *({"share_reads": True}, {"only": ["t.*"]}, {"ignore": "t.w"}, {"key_map": {"t.v": "t.w"}}),
    *({"step": -1}, {"strict": 1}, {"verify": "last"}, {"unknown": 3}),
)
"""Arguments of `restore` that the last rank alone passes; those of the last row are invalid."""

STARTS = ({"on_corrupt": "older"}, {"fallback": "weights"}, {"strict": False}, {"on_corrupt": "x"})
"""The same of `restore_or`."""

SAVES = ({"force": True}, {"step": -2}, {"progress": 3}, {"metrics": {"a": len}})
"""The same of `save`."""


def _outcome(act: Callable[[], object]) -> str:
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__} {isinstance(error, fc.errors.CoordinationError)} {error}"
    return "done"


def ask_differently(directory: Path) -> list[str]:
    """Calls in which the last rank has another argument; then all ranks make an equal one."""
    last = dist.get_rank() == dist.get_world_size() - 1
    group = StoreCoordinator(dist.group.WORLD, timeout_seconds=SECONDS)
    items = {"t": {"w": torch.ones(3)}}
    started = time.monotonic()
    found: list[str] = []
    with fc.CheckpointManager(directory, coordinator=group) as manager:
        for step in (0, 1):
            manager.save(step, items)
        for each in RESTORES:
            own: dict[str, Any] = {"step": 1, **(each if last else {})}
            found.append(_outcome(lambda own=own: manager.restore(into=items, **own)))
        for each in STARTS:
            own = each if last else {}
            found.append(_outcome(lambda own=own: manager.restore_or(items, **own)))
        for each in SAVES:
            own = {"step": 2, "items": items, **(each if last else {})}
            found.append(_outcome(lambda own=own: manager.save(**own)))
        step, metrics = (-1, {"a": len}) if last else (1, {"a": 1.0})
        found.append(_outcome(lambda: manager.delete(step)))
        found.append(_outcome(lambda: manager.record_metrics(1, metrics)))
        path = directory.parent / "one"
        for own in ({"overwrite": last}, {"path": 3 if last else path}):
            arguments: dict[str, Any] = {"path": path, "items": items, **own}
            alike = functools.partial(fc.save, process_group=dist.group.WORLD, **arguments)
            found.append(_outcome(alike))
        assert not path.exists()
        manager.save(2, items)
        manager.wait_until_finished()
        assert manager.all_steps() == [0, 1, 2] and manager.restore_or(items).step == 2
    invalid: dict[str, Any] = {"on_busy": "stop"} if last else {}
    found.append(_outcome(lambda: fc.CheckpointManager(directory, coordinator=group, **invalid)))
    assert time.monotonic() - started < 2 * SECONDS
    return found
