"""The tests to run for a change: those that run the changed line, the quickest first."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mutate_lines
import pytest
from mutate_jobs import Job, Limits, run_jobs, seconds_used
from mutate_sites import Mutant

__all__ = ["OPTIONS", "PACKAGE", "ROOT", "Map", "label", "measure"]

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "functional_ckpt"
# The plugins that rewrite assertions were imported before.
_NO_WARNING = ("-W", "ignore::pytest.PytestAssertRewriteWarning")
OPTIONS = ("-q", "-p", "no:cacheprovider", "--tb=line", *_NO_WARNING)
_CASES = 2  # that are measured of a test with parameters
# Not measured: documentation, and programs that run for minutes.
UNMEASURED_FILES = (
    "test_sigkill.py",
    "test_soak.py",
    "test_syscalls.py",
    "test_mutants.py",
    "test_ranks.py",
)
UNMEASURED = ("benchmarks", "docs", "examples", "golden", "resume")
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
    """A pytest plugin: for each test the lines it runs, its seconds, whether it failed."""

    def __init__(self, lines: mutate_lines.Lines, limit_seconds: float) -> None:
        self.tests: dict[str, dict[str, Any]] = {}
        self._lines = lines
        self._began, self._limit = 0.0, seconds_used() + limit_seconds

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Leaves all but the first few cases of a test out."""
        cases = Counter[str]()
        found: list[Any] = []
        for item in items:
            function = item.nodeid.partition("[")[0]
            cases[function] += 1
            if cases[function] <= _CASES:
                found.append(item)
        items[:] = found

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Starts to count."""
        self._lines.reset()
        self._began = seconds_used()
        self.tests[nodeid] = {"failed": False}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Notes a failure."""
        self.tests[report.nodeid]["failed"] |= report.failed

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Stops counting."""
        seconds = round(seconds_used() - self._began, 3)
        self.tests[nodeid] |= {"seconds": seconds, "lines": self._lines.found()}

    def pytest_runtest_teardown(self, item: Any) -> None:
        """Skips the rest of a slow file."""
        if seconds_used() > self._limit:
            item.session.shouldstop = "long enough"


def measure(copy: Path, logs: Path, kept: Path, limit_seconds: float) -> None:
    """Runs each test once and keeps the lines it runs; a test file is measured again if it changed.

    Args:
        copy: A copy of the repository, beside its `base`.
        logs: The directory of logs.
        kept: The directory of the measurements.
        limit_seconds: The processor time for a file; the tests after it are not measured.
    """
    base = copy.parent / "base"
    paths = [
        str(path.relative_to(base))
        for path in sorted((base / PACKAGE).rglob("*.py"))
        if not path.is_relative_to(base / PACKAGE / "testing")
    ]
    modules: dict[str, str] = {}
    (kept / "sources").mkdir(parents=True, exist_ok=True)
    for path in paths:
        source = (base / path).read_bytes()
        modules[path] = mutate_lines.digest(source)
        (kept / "sources" / modules[path]).write_bytes(source)

    def work(name: str, digest: str) -> Callable[[], int]:
        def run() -> int:
            coverage = Coverage(mutate_lines.Lines(hits, sites), limit_seconds)
            pytest.main([name, *OPTIONS], plugins=[coverage])
            tests = {k: v for k, v in coverage.tests.items() if "lines" in v}
            result = {"digest": digest, "modules": modules, "tests": tests}
            (kept / f"{label(name)}.json").write_text(json.dumps(result))
            return 0

        return run

    jobs: list[Job] = []
    for file in sorted((base / "tests").glob("*/test_*.py")):
        if file.parent.name in UNMEASURED or file.name in UNMEASURED_FILES:
            continue
        name, digest = str(file.relative_to(base)), mutate_lines.digest(file.read_bytes())
        result = kept / f"{label(name)}.json"
        if not result.exists() or json.loads(result.read_text())["digest"] != digest:
            jobs.append(Job(label(name), work(name, digest)))
    if not jobs:
        return
    hits, sites = mutate_lines.instrument_all(base, copy, paths, PACKAGE)

    def done(job: Job, code: int | None) -> None:
        if code != 0:
            print(f"not measured: {job.name}", flush=True)

    run_jobs(jobs, [copy], logs, Limits(300.0, 300.0), done)
    shutil.rmtree(copy / PACKAGE)
    shutil.copytree(base / PACKAGE, copy / PACKAGE)


def label(name: str) -> str:
    """Returns the file name for a test or a change."""
    return name.replace("/", ".").removesuffix(".py")


class Map:
    """Which lines each test runs, as `measure` kept it.

    Args:
        kept: The directory of the measurements; it may be missing.
        base: The repository.
    """

    def __init__(self, kept: Path, base: Path) -> None:
        self._base, self._sources = base, kept / "sources"
        self._files = [json.loads(path.read_text()) for path in sorted(kept.glob("*.json"))]
        self._folders = sorted((base / "tests").glob("*/test_*.py"))

    def choose(self, mutant: Mutant, seconds: float) -> list[str]:
        """Returns tests for a change: those that run its line, as many as the time allows.

        Tests of files that are named like the module are first, then the quickest, and one case of
        each test before a second one. In a module that has changed since it was measured, the tests
        that ran the function take the part of those that ran the line. The files of its folders
        follow where fewer than three tests are found.
        """
        found: dict[str, float] = {}
        masks: dict[str, int] = {}
        for file in self._files:
            digest = file["modules"].get(mutant.path)
            if digest is None:
                continue
            if digest not in masks:
                masks[digest] = self._mask(mutant, digest)
            for name, test in file["tests"].items():
                lines = int(test["lines"].get(mutant.path, "0"), 16)
                if lines & masks[digest] and not test["failed"]:
                    found[name] = test["seconds"]
        cases = Counter[str]()
        turns: dict[str, int] = {}
        for test in sorted(found, key=found.__getitem__):
            function = test.partition("[")[0]
            turns[test] = cases[function]
            cases[function] += 1
        chosen: list[str] = []
        for test in sorted(turns, key=lambda test: (turns[test], not _is_named(test, mutant))):
            if (seconds := seconds - found[test]) < 0 and chosen:
                break
            chosen.append(test)
        if len(found) < 3:
            return [*chosen, *self._named(mutant)]
        named = (test.partition("[")[0] for test in chosen if _is_named(test, mutant))
        return [*chosen, *dict.fromkeys(named)]  # with the cases that were not measured

    def _mask(self, mutant: Mutant, digest: str) -> int:
        source = (self._sources / digest).read_bytes()
        is_same = source == (self._base / mutant.path).read_bytes()
        return mutate_lines.mask(source, mutant.function, mutant.line if is_same else None)

    def _named(self, mutant: Mutant) -> list[str]:
        """Returns test files by the path of the module; those that have its name are first."""
        inside = mutant.path.removeprefix(f"{PACKAGE}/")
        files: list[Path] = []
        for folder in next(found for start, found in TESTS.items() if inside.startswith(start)):
            path = self._base / folder
            files += [path] if path.is_file() else [p for p in self._folders if p.parent == path]
        files.sort(key=lambda path: Path(mutant.path).stem not in path.stem)
        return list(dict.fromkeys(str(path.relative_to(self._base)) for path in files))


def _is_named(test: str, mutant: Mutant) -> bool:
    """Returns whether a test's file, or its folder, has a word of the module's name."""
    words = {word.rstrip("s") for word in Path(mutant.path).stem.split("_")}
    names = test.partition("::")[0].removesuffix(".py").replace("/", "_").split("_")
    return not words.isdisjoint(name.rstrip("s") for name in names)
