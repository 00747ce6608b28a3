"""Measures this project beside its peers; each measurement in a process of its own.

An interrupted run resumes when it is started again with the same folder.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xxhash

from benchmarks import bars, files, plots, report, results, schedule, summary
from benchmarks.results import Result, Run, Task

_VERSIONS = (
    "torch",
    "tensorstore",
    "orbax-checkpoint",
    "jax",
    "safetensors",
    "torch-checkpointing",
    "functional-ckpt",
)
_FREE_BYTES = 20 * 2**30
_QUICK_DIVISOR = 16


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures missing results, then writes the report."""
    options = _options(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "results.json"
    run = Run(settings=_settings(_QUICK_DIVISOR if options.quick else 1, options.before))
    if path.exists() and not options.fresh:
        kept = results.load(path)
        if not options.report and kept.settings != run.settings:
            raise SystemExit(
                f"{path} is of another run: {kept.settings} there, {run.settings} here. "
                "Pass --fresh to replace it, or another --out."
            )
        run = kept
    if not options.report:
        run = _measure_all(run, path, options)
    return _write_report(run, options.out)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    add = parser.add_argument
    loads = list(dict.fromkeys(load for each in schedule.MEASURES.values() for load in each))
    add("--quick", action="store_true", help="a sixteenth of the data, once")
    add("--repeats", type=int, help="how often each is measured (default 5, quick 1)")
    add("--minutes", type=float, help="start nothing after this time; the next call continues")
    add("--workloads", nargs="+", choices=loads, help="default all; quick: without small, frozen")
    add("--peers", nargs="+", default=[], help="systems, or prefixes of their names")
    add("--measures", nargs="+", default=list(schedule.MEASURES), choices=list(schedule.MEASURES))
    add("--out", type=Path, help="default docs/benchmarks; quick: runs/bench")
    add("--dir", help="where checkpoints are written (default: the current directory's disk)")
    add("--fresh", action="store_true", help="discard earlier measurements")
    add(
        "--before",
        metavar="DIR",
        help="also measure an earlier version of this library: a folder into which its wheel was "
        "installed with pip install --no-deps --target DIR",
    )
    add("--report", action="store_true", help="measure nothing, only write the report")
    options = parser.parse_args(arguments)
    options.repeats = options.repeats or (1 if options.quick else 5)
    few = [load for load in loads if load not in ("small", "frozen")]
    options.workloads = options.workloads or (few if options.quick else loads)
    options.out = options.out or Path("runs/bench" if options.quick else "docs/benchmarks")
    return options


def _settings(divisor: int, before: str | None) -> dict[str, Any]:
    versions: dict[str, str] = {}
    for name in _VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    machine = (
        f"{os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()}, "
        f"Python {platform.python_version()}"
    )
    return {
        "machine": machine,
        "divisor": divisor,
        "versions": versions,
        "code": _digest("functional_ckpt", "benchmarks"),
        "before": before and _digest(os.path.join(before, "functional_ckpt")),
    }


def _digest(*folders: str) -> str:
    """Of the modules in them."""
    code = xxhash.xxh3_64()
    for folder in folders:
        for path in sorted(Path(folder).rglob("*.py")):
            code.update(path.read_bytes())
    return code.hexdigest()


def _measure_all(run: Run, path: Path, options: argparse.Namespace) -> Run:
    started = time.monotonic()
    divisor = run.settings["divisor"]
    directory = options.dir or os.getcwd()
    os.makedirs(directory, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".bench-") as root:
        for repeat in range(options.repeats):
            for task in schedule.tasks(
                repeat,
                options.workloads,
                options.peers,
                options.measures,
                has_before=options.before is not None,
            ):
                if run.has(task, repeat) or run.is_skipped(task):
                    continue
                if options.minutes and time.monotonic() - started > options.minutes * 60:
                    print("time is up; the same command continues from here", file=sys.stderr)
                    return run
                rounds = min(schedule.ROUNDS.get(task.measure, 1), options.repeats - repeat)
                found = _measure(task, repeat, divisor, root, rounds, options.before)
                for result in found:
                    run = run.with_result(result)
                results.store(run, path)
                note = found[0].error or found[0].skipped or ""
                print(
                    f"[{(time.monotonic() - started) / 60:5.1f} min] {repeat + len(found)}/"
                    f"{options.repeats} {task.key} {found[0].wall_seconds:.0f} s {note[:200]}",
                    file=sys.stderr,
                )
    return run


def _measure(
    task: Task, repeat: int, divisor: int, root: str, rounds: int, before: str | None
) -> list[Result]:
    """One child process, and a result for each of its rounds; whatever it does, this returns."""
    folder = tempfile.mkdtemp(dir=root)
    started = time.perf_counter()
    found: dict[str, Any]
    try:
        if shutil.disk_usage(folder).free < _FREE_BYTES // divisor:
            found = {"error": "there is too little space on the disk"}
        else:
            if divisor == 1:
                files.fill_free_memory(os.path.join(root, "no-data"))
            found = run_child(task, divisor, folder, rounds, timeout_seconds=600, before=before)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.sync()  # one system's writes do not count for the next
    wall_seconds = time.perf_counter() - started
    if "rounds" not in found:
        return [Result(task=task, repeat=repeat, wall_seconds=wall_seconds, **found)]
    return [
        Result(task=task, repeat=repeat + index, wall_seconds=wall_seconds, figures=figures)
        for index, figures in enumerate(found["rounds"])
    ]


def run_child(
    task: Task,
    divisor: int,
    folder: str,
    rounds: int,
    *,
    timeout_seconds: float,
    before: str | None = None,
) -> dict[str, Any]:
    """Returns the figures that a child process prints, or its error; its children end with it."""
    command = [sys.executable, "-m", "benchmarks.child", task.measure, task.workload, task.peer]
    command += ["--divisor", str(divisor), "--root", folder, "--rounds", str(rounds)]
    if before is not None:
        command += ["--before", before]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        output, errors = child.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        return {"error": f"no end after {timeout_seconds:.0f} s"}
    finally:  # with its children, and if this process is stopped
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            return json.loads(line)
    last = errors.strip().splitlines()[-1:] or ["no output"]
    return {"error": f"exit code {child.returncode}: {last[0]}"}


def _write_report(run: Run, folder: Path) -> int:
    found = summary.summarize(run)
    drawn = plots.draw(found, folder)
    text = report.markdown(found, drawn)
    (folder / "measurements.md").write_text(text, encoding="utf-8")
    (folder / "plots.txt").write_text("\n".join(report.plots_markdown(drawn)), encoding="utf-8")
    (folder / "bars.txt").write_text(
        "\n".join(report.bars_table(bars.bars(found))), encoding="utf-8"
    )
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
