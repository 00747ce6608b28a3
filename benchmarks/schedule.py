"""Which measurements a run has, and in which order: systems in turn, never one after itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.results import Task

__all__ = ["BEFORE", "MEASURES", "ROUNDS", "SYSTEMS", "selects", "tasks"]

# An earlier version of this library; measured only where one is given.
BEFORE = "functional_ckpt.before"

_SYNC = ("torch.save", "safetensors", "dcp", "dcp.huggingface", "orbax", "torch_checkpointing")
# A second way of one system, where it says nothing new.
_LEFT_OUT = {("sync", "tiny"): ("dcp.huggingface",), ("sync", "gpt2"): ("dcp.huggingface",)}
_ASYNC = (
    "dcp.thread",
    "dcp.process",
    "orbax.manager",
    "torch_checkpointing.eager",
    "torch_checkpointing.overlapped",
)
SYSTEMS = {
    "sync": (*_SYNC, BEFORE, "functional_ckpt"),
    "async": (*_ASYNC, "functional_ckpt.eager", "functional_ckpt.overlapped"),
    "ranks": ("dcp", "torch_checkpointing", "functional_ckpt"),
}
# Measure -> rounds per process: starting a process costs more than a round.
ROUNDS = {"sync": 3, "async": 3, "limits": 3}
# Measure -> the workloads it is made with.
MEASURES = {
    "sync": ("big", "small", "tiny", "gpt2", "big-16", "gpt2-16", "tiny-16"),
    "async": ("big", "gpt2", "small", "frozen"),
    "ranks": ("ranks",),
    "loop": ("big",),
    "cuda": ("big",),
}


def selects(wanted: Sequence[str], system: str) -> bool:
    """Whether a system is selected: by its name, or by the part before a dot in it."""
    return any(system == name or system.startswith(f"{name}.") for name in wanted)


def tasks(
    repeat: int,
    workloads: Sequence[str],
    peers: Sequence[str],
    measures: Sequence[str],
    *,
    has_before: bool = False,
) -> Iterator[Task]:
    """One repeat; the limits and each system once.

    Args:
        repeat: Its number; the first system rotates.
        workloads: Those to measure.
        peers: Systems to measure; none for all.
        measures: Kinds of measurement.
        has_before: Whether there is an earlier version to measure.
    """
    yield Task(measure="limits")
    yield Task(measure="latency")
    yield Task(measure="tier")
    for measure in measures:
        for load in MEASURES[measure]:
            if load not in workloads:
                continue
            if measure not in SYSTEMS:
                yield Task(measure=measure, workload=load)
                continue
            left_out = _LEFT_OUT.get((measure, load), ())
            systems = [
                system
                for system in SYSTEMS[measure]
                if system not in left_out
                and (has_before or system != BEFORE)
                and (not peers or selects(peers, system))
            ]
            turn = repeat % len(systems) if systems else 0
            for system in (*systems[turn:], *systems[:turn]):
                yield Task(measure=measure, workload=load, peer=system)
