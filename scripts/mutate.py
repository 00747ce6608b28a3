#!/usr/bin/env python3
"""Change the code a little, many times, and see whether a test fails each time.

Run ``scripts/mutants --sample 200 --seed 1 --measure``. It measures which test calls which function
(once: the work directory keeps it); each change then runs the tests that call what it changes, the
quickest first, in a copy of the repository. Without a measurement a change runs the tests of its
folder. What survives is printed with its diff: it needs a test, or an entry in
``scripts/mutants.json`` that says why it changes nothing.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import difflib
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mutate_sites
from mutate_sites import Mutant

ROOT = Path(__file__).resolve().parent.parent
KNOWN = ROOT / "scripts" / "mutants.json"
PACKAGE = "functional_ckpt"
# Not measured: programs of their own, servers, many processes, documentation.
UNMEASURED = ("benchmarks", "distributed", "docs", "examples", "flags", "interop", "remote")
# By the beginning of a module's path in the package: what to run where nothing was measured.
TESTS = {
    "storage/buckets": ("tests/remote",),
    "storage/object_store": ("tests/remote",),
    "storage/commit_marker": ("tests/remote",),
    "storage": ("tests/storage", "tests/faults/test_power_cut.py", "tests/manager"),
    "format": ("tests/format", "tests/verify", "tests/checkpoint"),
    "core": ("tests/core", "tests/checkpoint", "tests/handlers"),
    "handlers": ("tests/handlers", "tests/checkpoint"),
    "policies": ("tests/policies", "tests/steps"),
    "runtime": ("tests/runtime", "tests/saving", "tests/cli"),
    "saving": ("tests/saving", "tests/manager", "tests/checkpoint", "tests/faults"),
    "restoring": ("tests/restoring", "tests/manager", "tests/checkpoint"),
    "steps/upload": ("tests/remote", "tests/faults/test_power_cut.py"),
    "steps": ("tests/steps", "tests/manager", "tests/faults/test_power_cut.py", "tests/remote"),
    "verify": ("tests/verify", "tests/cli"),
    "cli": ("tests/cli", "tests/verify"),
    "distributed": ("tests/distributed", "tests/faults/test_ranks.py"),
    "interop": ("tests/interop", "tests/cli"),
    "flags": ("tests/flags",),
    "": ("tests/manager", "tests/checkpoint", "tests/cli"),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """Tests to run in a copy.

    Attributes:
        name: Of its log.
        tests: What pytest is given.
        work: Runs in the child, in the copy; its result is the child's exit status.
        prepare: Changes the copy, and returns what undoes that.
    """

    name: str
    work: Callable[[], int]
    prepare: Callable[[Path], Callable[[], None]] = lambda copy: lambda: None


# ----------------------------------------------------------------------------------- processes


def preload() -> None:
    """Imports what every child needs and no change concerns."""
    names = ("torch", "torch.distributed", "torch.distributed.tensor", "numpy", "tensorstore")
    for name in (*names, "xxhash", "pytest"):
        importlib.import_module(name)


def run_jobs(
    jobs: Sequence[Job],
    copies: Sequence[Path],
    logs: Path,
    wall_seconds: float,
    done: Callable[[Job, int | None], None],
) -> None:
    """Runs each job in a child of its own, one at a time in each copy.

    Args:
        jobs: What to run.
        copies: Copies of the repository.
        logs: Where the children's output goes.
        wall_seconds: When a child hangs, and is killed with its processes.
        done: Called with each job and its exit status; None for one that hung.
    """
    waiting, free = list(reversed(jobs)), list(copies)
    running: dict[int, tuple[Job, Path, float, Callable[[], None]]] = {}
    while waiting or running:
        while waiting and free:
            job, copy = waiting.pop(), free.pop()
            undo = job.prepare(copy)
            running[_fork(job, copy, logs)] = (job, copy, time.monotonic(), undo)
        time.sleep(0.05)
        for pid, (job, copy, began, undo) in list(running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            is_late = time.monotonic() - began > wall_seconds
            if not ended and not is_late:
                continue
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # with what it has started
            if not ended:
                os.waitpid(pid, 0)
            undo()
            del running[pid]
            free.append(copy)
            done(job, os.waitstatus_to_exitcode(status) if ended else None)


def _fork(job: Job, copy: Path, logs: Path) -> int:
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 3
    try:
        os.setsid()
        descriptor = os.open(logs / f"{job.name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.chdir(copy)
        sys.path[0:0] = [str(copy)]
        os.environ |= {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
        sys.dont_write_bytecode = True
        code = job.work()
    except BaseException:  # noqa: BLE001 - there is nobody else to see it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def seconds_used() -> float:
    """Processor time of this process and of those it waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + used.ru_utime + used.ru_stime


# ------------------------------------------------------------------------- which test calls what


class Coverage:
    """A plugin of pytest: the functions that each test calls, its seconds, whether it failed."""

    def __init__(self, limit_seconds: float) -> None:
        import builtins

        self.tests: dict[str, dict[str, Any]] = {}
        self._hits: set[str] = set()
        self._began, self._limit = 0.0, seconds_used() + limit_seconds
        builtins.__dict__["__mutation_hit__"] = self._hits.add

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Begins to count."""
        self._hits.clear()
        self._began = seconds_used()
        self.tests[nodeid] = {"failed": False}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Notes a failure."""
        self.tests[report.nodeid]["failed"] |= report.failed

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Ends counting."""
        seconds = round(seconds_used() - self._began, 3)
        self.tests[nodeid] |= {"seconds": seconds, "hits": sorted(self._hits)}

    def pytest_runtest_teardown(self, item: Any) -> None:
        """Leaves out the rest of a slow file."""
        if seconds_used() > self._limit:
            item.session.shouldstop = "long enough"


def instrument(path: str, source: str) -> str:
    """The module, of which every function says its name when it is called."""
    lines = source.splitlines(keepends=True)
    inserts: list[tuple[int, str]] = []

    def visit(node: ast.AST, name: str) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            name = f"{name}.{node.name}".lstrip(".")
            first = node.body[0]
            if not isinstance(node, ast.ClassDef) and first.lineno > node.lineno:
                call = 'get("__mutation_hit__", len)'
                text = f'__import__("builtins").__dict__.{call}("{path}:{name}")'
                after = first.end_lineno or 0
                is_documented = isinstance(first, ast.Expr) and isinstance(
                    first.value, ast.Constant
                )
                place = after if is_documented else first.lineno - 1
                if not getattr(first, "decorator_list", None):
                    inserts.append((place, f"{' ' * first.col_offset}{text}\n"))
        for child in ast.iter_child_nodes(node):
            visit(child, name)

    visit(ast.parse(source), "")
    for place, text in sorted(inserts, reverse=True):
        lines.insert(place, text)
    return "".join(lines)


def measure(copies: Sequence[Path], logs: Path, file: Path, limit_seconds: float) -> None:
    """Runs the tests once, and writes down what each calls."""
    folders = [each for each in sorted((ROOT / "tests").iterdir()) if each.name not in UNMEASURED]
    names = [
        str(path.relative_to(ROOT)) for each in folders for path in sorted(each.glob("test_*.py"))
    ]
    found: dict[str, Any] = {}

    def instrumented(copy: Path) -> Callable[[], None]:
        for path in copy.glob(f"{PACKAGE}/**/*.py"):
            if (text := (ROOT / path.relative_to(copy)).read_text()).strip():
                path.write_text(instrument(str(path.relative_to(copy)), text))
        return lambda: None

    def work(name: str) -> Callable[[], int]:
        def run() -> int:
            import pytest

            coverage = Coverage(limit_seconds)
            pytest.main([name, "-q", "-p", "no:cacheprovider"], plugins=[coverage])
            complete = {k: v for k, v in coverage.tests.items() if "hits" in v}
            (logs / f"{label(name)}.json").write_text(json.dumps(complete))
            return 0

        return run

    def done(job: Job, code: int | None) -> None:
        result = logs / f"{job.name}.json"
        if code is None or not result.exists():
            print(f"not measured: {job.name}", flush=True)
            return
        found.update(json.loads(result.read_text()))

    jobs = [Job(label(name), work(name), instrumented) for name in names]
    run_jobs(jobs, copies, logs, 60 * limit_seconds, done)
    file.write_text(json.dumps(found))
    for copy in copies:
        shutil.rmtree(copy / PACKAGE)
        shutil.copytree(ROOT / PACKAGE, copy / PACKAGE)


def label(name: str) -> str:
    """A file's name for a test or a change."""
    return name.replace("/", ".").removesuffix(".py")


def choose(mutant: Mutant, tests: Mapping[str, Any]) -> list[str]:
    """The tests to run for a change: those that call it, the quickest first, then its folder's."""
    called = [t for t in tests if f"{mutant.path}:{mutant.function}" in tests[t]["hits"]]
    if not called:  # a class, a module, or only called in other processes
        start = f"{mutant.path}:"
        called = [t for t in tests if any(hit.startswith(start) for hit in tests[t]["hits"])]
    called = [t for t in called if not tests[t]["failed"]]
    inside = mutant.path.removeprefix(f"{PACKAGE}/")
    folders = next(found for start, found in TESTS.items() if inside.startswith(start))
    is_enough = len(called) >= 3 and folders[0].rpartition("/")[2] not in UNMEASURED
    called.sort(key=lambda t: tests[t]["seconds"])
    return called if is_enough else [*called, *folders]


# ------------------------------------------------------------------------------------- the changes


class Limit:
    """A plugin of pytest: no test begins when the processor time is used up."""

    def __init__(self, seconds: float) -> None:
        self._end = seconds_used() + seconds
        self.is_over = False

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Says which test runs, for the log of one that hangs."""
        os.write(2, f"begins {nodeid}\n".encode())

    def pytest_runtest_teardown(self, item: Any) -> None:
        """Ends the session."""
        if seconds_used() > self._end:
            self.is_over = True
            item.session.shouldstop = "the time is used up"


def job_of(name: str, mutant: Mutant, tests: Sequence[str], cpu_seconds: float) -> Job:
    """Runs the tests of a change; exits with 0 where none failed."""

    def prepare(copy: Path) -> Callable[[], None]:
        file = copy / mutant.path
        source = (ROOT / mutant.path).read_bytes()
        file.write_bytes(mutant.apply(source))

        def undo() -> None:
            file.write_bytes(source)

        return undo

    def work() -> int:
        import pytest

        limit = Limit(cpu_seconds)
        options = ["-x", "-q", "-p", "no:cacheprovider", "--tb=line"]
        code = int(pytest.main([*tests, *options], plugins=[limit]))
        return 0 if limit.is_over and code == pytest.ExitCode.INTERRUPTED else code

    return Job(name, work, prepare)


def run_mutants(
    mutants: Sequence[Mutant], tests: Mapping[str, Any], work: Path, options: argparse.Namespace
) -> list[tuple[Mutant, str]]:
    """Runs each change's tests; returns what came of it: killed, hung, survived, or equivalent."""
    known = {tuple(each["change"]): each["reason"] for each in json.loads(KNOWN.read_text())}
    outcomes: list[tuple[Mutant, str]] = []
    jobs: list[Job] = []
    by_name: dict[str, Mutant] = {}
    for number, mutant in enumerate(mutants):
        if mutant.key in known:
            outcomes.append((mutant, "equivalent"))
            continue
        name = f"{number:04}.{label(mutant.path)}.{mutant.line}.{mutant.kind}"
        by_name[name] = mutant
        jobs.append(job_of(name, mutant, choose(mutant, tests), options.seconds))

    def done(job: Job, code: int | None) -> None:
        outcome = "hung" if code is None else "survived" if code == 0 else "killed"
        mutant = by_name[job.name]
        outcomes.append((mutant, outcome))
        print(f"{outcome:9}{mutant.path}:{mutant.line} {mutant.kind} {mutant.function}", flush=True)
        if outcome == "survived":
            print(diff(mutant), flush=True)
        with (work / "results.jsonl").open("a") as file:
            file.write(json.dumps({"outcome": outcome, "change": mutant.key}) + "\n")

    run_jobs(jobs, copies_in(work), work, options.wall, done)
    return outcomes


def diff(mutant: Mutant) -> str:
    """The change, as `diff -U2` shows it."""
    old = (ROOT / mutant.path).read_bytes()
    lines = [each.decode().splitlines(keepends=True) for each in (old, mutant.apply(old))]
    return "".join(difflib.unified_diff(lines[0], lines[1], mutant.path, "changed", n=2))


def copies_in(work: Path) -> list[Path]:
    """The copies of the repository."""
    return sorted(work.glob("copy*"))


def make_copies(work: Path, count: int) -> None:
    """Copies what git tracks, as it is in the working tree, and what is new in it."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for number in range(count):
        copy = work / f"copy{number}"
        shutil.rmtree(copy, ignore_errors=True)
        for name in filter(None, listing.split("\0")):
            if (ROOT / name).exists():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, copy / name)


def main() -> int:
    """Prints what survived, and how many of each; exits with 1 below the share asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=200, help="how many changes to draw")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--module", action="append", help="only paths that contain this")
    parser.add_argument("--measure", action="store_true", help="find out which test calls what")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time")
    parser.add_argument("--seconds", type=float, default=30, help="processor time for a change")
    parser.add_argument("--wall", type=float, default=300, help="when a change hangs")
    parser.add_argument("--share", type=float, default=0.95, help="how many must be caught")
    parser.add_argument("--work", type=Path, default=Path("/tmp/mutants"), help="copies and logs")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    make_copies(options.work, options.jobs)
    preload()
    coverage = options.work / "coverage.json"
    if options.measure:
        measure(copies_in(options.work), options.work, coverage, options.seconds)
    tests = json.loads(coverage.read_text()) if coverage.exists() else {}
    found: list[Mutant] = []
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        name = str(path.relative_to(ROOT))
        wanted = not options.module or any(part in name for part in options.module)
        if wanted and not name.startswith(f"{PACKAGE}/testing/"):
            found += mutate_sites.find(name, path.read_bytes())
    drawn = mutate_sites.sample(found, options.sample, options.seed)
    outcomes = run_mutants(drawn, tests, options.work, options)
    counts = Counter(outcome for _, outcome in outcomes)
    caught = counts["killed"] + counts["hung"]
    share = caught / max(1, len(outcomes) - counts["equivalent"])
    print(f"{dict(counts)}: {share:.1%} of the changes that matter were caught")
    return 0 if share >= options.share else 1


if __name__ == "__main__":
    sys.exit(main())
