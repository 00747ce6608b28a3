"""The tests that need a GPU, then its figures, in at most eight minutes: `scripts/gpu_check`.

Figures: copies over the bus from and to pinned memory; saves that wait for the copies and saves
that copy on a stream beside a training loop; restores to the device; the same of DCP's async saves
with pinned memory.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import report, summary
from benchmarks.__main__ import run_child
from benchmarks.results import Result, Run, Task

__all__ = ["main"]

_TESTS_SECONDS = 240
_FIGURES_SECONDS = 220


def main() -> int:
    """Returns the exit code: 0 where all is well, or where there is no GPU."""
    if not torch.cuda.is_available():
        print("gpu_check: no GPU")
        return 0
    print(f"gpu_check: {torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    is_tested = _run_tests()
    is_measured = _print_figures()
    return 0 if is_tested and is_measured else 1


def _run_tests() -> bool:
    files = [
        str(path)
        for path in sorted(Path("tests").rglob("test_*.py"))
        if "mark.cuda" in path.read_text(encoding="utf-8")
    ]
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-q", *files]
    try:
        return subprocess.run(command, timeout=_TESTS_SECONDS).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"gpu_check: the tests did not end within {_TESTS_SECONDS} s", flush=True)
        return False


def _print_figures() -> bool:
    task = Task(measure="cuda", workload="big")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=os.getcwd(), prefix=".bench-") as folder:
        found = run_child(task, 1, folder, 1, timeout_seconds=_FIGURES_SECONDS)
    if "rounds" not in found:
        print(f"gpu_check: not measured: {found}")
        return False
    [figures] = found["rounds"]
    wall_seconds = time.perf_counter() - started
    result = Result(task=task, repeat=0, wall_seconds=wall_seconds, figures=figures)
    measured = summary.summarize(Run(settings={}, results=(result,)))
    print("\n".join(report.figures_table(measured, task.key, figures["device"])))
    return True


if __name__ == "__main__":
    sys.exit(main())
