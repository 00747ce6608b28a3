"""A run of round figures, to compute by hand with."""

from __future__ import annotations

from typing import Any

from benchmarks.results import Result, Run, Task

GIB = 2**30
SETTINGS = {"machine": "two cores", "divisor": 1, "versions": {"torch": "2.13.0"}}


def result(key: str, repeat: int = 0, **figures: Any) -> Result:
    names = dict(zip(("measure", "workload", "peer"), key.split("/"), strict=False))
    return Result(task=Task(**names), repeat=repeat, wall_seconds=1.0, figures=figures)


def limits(repeat: int = 0) -> Result:
    return result(
        "limits",
        repeat,
        size_bytes=2 * GIB,
        memcpy_1_seconds=0.4,
        memcpy_2_seconds=0.2,
        write_buffered_1_seconds=2.0,
        write_buffered_2_seconds=1.6,
        write_direct_1_seconds=1.2,
        write_direct_2_seconds=1.0,
        read_warm_1_seconds=0.5,
        read_warm_2_seconds=0.3,
        read_cold_1_seconds=1.8,
        read_cold_2_seconds=1.5,
    )


def sync(load: str, peer: str, durable: float, warm: float, **more: Any) -> Result:
    figures: dict[str, Any] = {
        "size_bytes": 2 * GIB,
        "digest": load,
        "save_seconds": durable / 2,
        "save_durable_seconds": durable,
        "save_cpu_seconds": 1.0,
        "save_peak_bytes": 2**20,
        "disk_bytes": 2 * GIB,
        "num_files": 3,
        "restore_warm_seconds": warm,
        "restore_warm_peak_bytes": 2**20,
        "restore_cold_seconds": 1.6,
        "cold_resident": 0.0,
        "restore_new_seconds": 1.0,
        "restore_new_peak_bytes": 2 * GIB,
    }
    return result(f"sync/{load}/{peer}", **(figures | more))


def background(load: str, peer: str, blocked: float, **more: Any) -> Result:
    figures: dict[str, Any] = {
        "size_bytes": 2 * GIB,
        "digest": load,
        "blocked_1_seconds": 2 * blocked,
        "blocked_3_seconds": blocked,
        "fence_3_seconds": 0.0,
        "durable_3_seconds": 2.0,
        "cpu_seconds": 1.0,
        "peak_1_bytes": 2 * GIB,
        "peak_bytes": 2 * GIB,
        "growth_bytes": 0,
        "disk_bytes": 2 * GIB,
        "new_disk_bytes": 2 * GIB,
        "num_files": 3,
    }
    return result(f"async/{load}/{peer}", **(figures | more))


def run(*results: Result) -> Run:
    return Run(settings=SETTINGS, results=(limits(), *results))
