"""Compares the state after a soak with its journal."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

import soak_journal
import soak_values
from soak_journal import Journal, Register
from soak_worker import Arena, key_of, read, reader

import functional_ckpt as fc
from functional_ckpt import errors


@dataclasses.dataclass(slots=True)
class Verdict:
    """The result of a check.

    Attributes:
        losses: Lost, changed or wrongly reported steps; one sentence each.
        num_verified: Values that were compared bit for bit.
    """

    losses: list[str] = dataclasses.field(default_factory=list[str])
    num_verified: int = 0


def check(arena: Arena, journal: Journal) -> Verdict:
    """Restores all listed steps, while no writer is alive, and looks for missing ones."""
    verdict = Verdict()
    items = soak_values.new_items()
    registers = soak_journal.registers(soak_journal.read(journal.path))
    held: set[str] = set()
    if arena.run.is_dir():
        with reader(arena) as manager:
            for step in manager.all_steps():
                held.add(key_of(step))
                register = registers.get(key_of(step), Register())
                _check_step(manager, step, register, items, verdict)
                # Other tiers keep steps that are deleted here.
                if register.must_be_absent and not arena.tiers:
                    verdict.losses.append(f"step {step} was deleted and is there again")
    for key, register in registers.items():
        if key.startswith("step/") and key not in held and not register.may_be_absent:
            verdict.losses.append(f"{key} is lost; there are {sorted(held)}")
    for path in arena.paths:
        _read_path(arena, journal, path, items)
    for key, register in soak_journal.registers(soak_journal.read(journal.path)).items():
        verdict.losses += [f"{key}: {what}" for what in register.wrong_reads()]
    return verdict


def _check_step(
    manager: fc.CheckpointManager,
    step: int,
    register: Register,
    items: dict[str, Any],
    verdict: Verdict,
) -> None:
    try:
        restored = manager.restore(step, soak_values.targets(items))
        metrics = manager.metadata(step).metrics or {}
    except errors.CheckpointError as error:
        if not register.is_damaged:
            verdict.losses.append(f"step {step}: {soak_journal.describe(error)}")
        return
    digest = soak_values.digest(items, restored)
    _check_value(f"step {step}", digest, register, verdict)
    if register.is_damaged or digest not in register.digests:
        return
    version = register.digests[digest].fields["version"]
    expected = {"version": version, "accuracy": soak_values.accuracy(step)}
    expected |= register.must_have_metrics(digest)
    missing = {name for name, value in expected.items() if metrics.get(name) != value}
    if missing:
        verdict.losses.append(f"step {step}: metrics {sorted(missing)} are lost or changed")


def _read_path(arena: Arena, journal: Journal, path: str, items: dict[str, Any]) -> None:
    """Records the content of a path, which other processes may be writing."""
    place = arena.folder / path

    def restore() -> Any:
        if not place.exists():
            raise errors.StepNotFoundError(f"Absent: {place}")
        return fc.restore(place, soak_values.targets(items))

    read(journal, f"path/{path}", items, restore)


def _check_value(what: str, digest: str, register: Register, verdict: Verdict) -> None:
    verdict.num_verified += 1
    if digest not in register.digests:
        known = [w.fields["version"] for w in register.writes if w.fields["digest"] == digest]
        went_back = (
            f"version {known[0]}, which was replaced" if known else "a value that was never saved"
        )
        verdict.losses.append(f"{what} holds {went_back}")


def main(arena: Arena, journal: Journal, descriptor: int) -> None:
    """Writes the verdict to a pipe."""
    with os.fdopen(descriptor, "w") as pipe:
        json.dump(dataclasses.asdict(check(arena, journal)), pipe)
