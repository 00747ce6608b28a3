"""The tests to run for a change: those that call the changed function, and those of its folder."""

from __future__ import annotations

import ast
import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mutate_jobs import Job, Limits, run_jobs, seconds_used
from mutate_sites import Mutant

__all__ = ["choose", "label", "measure"]

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "functional_ckpt"
_MAX_TESTS = 24  # pytest takes seconds to find hundreds by name
# Not measured: separate programs, servers, many processes, documentation.
UNMEASURED_FILES = ("test_sigkill.py", "test_soak.py", "test_syscalls.py")
UNMEASURED = ("benchmarks", "distributed", "docs", "examples", "flags", "interop", "remote")
# By a prefix of the module's path in the package: the tests to run without a measurement.
TESTS = {
    "storage/buckets": ("tests/remote",),
    "storage/object_store": ("tests/remote",),
    "storage/commit_marker": ("tests/remote",),
    "storage": ("tests/storage", "tests/faults/test_power_cut.py", "tests/manager"),
    "format": ("tests/format", "tests/verify", "tests/checkpoint"),
    "core/restore_plan": ("tests/core", "tests/restoring"),
    "core/tree/decode": ("tests/core", "tests/restoring", "tests/checkpoint"),
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


class Coverage:
    """A pytest plugin: for each test the functions it calls, its seconds, whether it failed."""

    def __init__(self, limit_seconds: float) -> None:
        import builtins

        self.tests: dict[str, dict[str, Any]] = {}
        self._hits: set[str] = set()
        self._began, self._limit = 0.0, seconds_used() + limit_seconds
        builtins.__dict__["__mutation_hit__"] = self._hits.add

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Starts to count."""
        self._hits.clear()
        self._began = seconds_used()
        self.tests[nodeid] = {"failed": False}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Notes a failure."""
        self.tests[report.nodeid]["failed"] |= report.failed

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Stops counting."""
        seconds = round(seconds_used() - self._began, 3)
        self.tests[nodeid] |= {"seconds": seconds, "hits": sorted(self._hits)}

    def pytest_runtest_teardown(self, item: Any) -> None:
        """Skips the rest of a slow file."""
        if seconds_used() > self._limit:
            item.session.shouldstop = "long enough"


def instrument(path: str, source: str) -> str:
    """Returns the module with a call at the start of every function that reports its name."""
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
    """Runs each test once and records the functions it calls; earlier results are kept."""
    base = copies[0].parent / "base"
    folders = [each for each in sorted((base / "tests").iterdir()) if each.name not in UNMEASURED]
    names = [
        str(path.relative_to(base))
        for each in folders
        for path in sorted(each.glob("test_*.py"))
        if path.name not in UNMEASURED_FILES
    ]
    found: dict[str, Any] = {}

    def instrumented(copy: Path) -> Callable[[], None]:
        for path in copy.glob(f"{PACKAGE}/**/*.py"):
            if (text := (copy.parent / "base" / path.relative_to(copy)).read_text()).strip():
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

    jobs: list[Job] = []
    for name in names:
        if (result := logs / f"{label(name)}.json").exists():
            found.update(json.loads(result.read_text()))
        else:
            jobs.append(Job(label(name), work(name), instrumented))
    run_jobs(jobs, copies, logs, Limits(300.0, 300.0), done)
    file.write_text(json.dumps(found))
    for copy in copies:
        shutil.rmtree(copy / PACKAGE)
        shutil.copytree(copy.parent / "base" / PACKAGE, copy / PACKAGE)


def label(name: str) -> str:
    """Returns the file name for a test or a change."""
    return name.replace("/", ".").removesuffix(".py")


def choose(mutant: Mutant, tests: Mapping[str, Any]) -> list[str]:
    """Returns the tests to run for a change: the quickest that call it, then its folder's."""
    called = [t for t in tests if f"{mutant.path}:{mutant.function}" in tests[t]["hits"]]
    if not called:  # in a class, in a module, or called in other processes only
        start = f"{mutant.path}:"
        called = [t for t in tests if any(hit.startswith(start) for hit in tests[t]["hits"])]
    called = [t for t in called if not tests[t]["failed"]]
    inside = mutant.path.removeprefix(f"{PACKAGE}/")
    folders = next(found for start, found in TESTS.items() if inside.startswith(start))
    is_enough = len(called) >= 3 and folders[0].rpartition("/")[2] not in UNMEASURED
    called.sort(key=lambda t: tests[t]["seconds"])
    cases = Counter[str]()  # one case of each test first, then a second one, and so on
    turns: dict[str, int] = {}
    for test in called:
        function = test.partition("[")[0]
        turns[test] = cases[function]
        cases[function] += 1
    called = sorted(called, key=turns.__getitem__)[:_MAX_TESTS]
    if is_enough:
        return called
    # Single files, because pytest would order those of a folder; the files named after the module
    # come first.
    files: list[Path] = []
    for folder in folders:
        path = ROOT / folder
        files += [path] if path.is_file() else sorted(path.glob("test_*.py"))
    stem = Path(mutant.path).stem
    files.sort(key=lambda path: stem not in path.stem)
    return [*called, *dict.fromkeys(str(path.relative_to(ROOT)) for path in files)]
