#!/usr/bin/env python3
"""Change the code a little, many times, and see whether a test fails each time.

Run ``scripts/mutants --sample 200 --seed 1``. It measures once which test runs which lines, and
keeps that in the work directory, by the content of the files. Each change then runs the tests that
run the changed line, the quickest first, in a copy of the repository, until one fails. A change
that survives is printed with its diff: it needs a test, or an entry in ``scripts/mutants.json``
that says why it changes nothing. ``--again`` runs those that the last run did not catch.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mutate_sites
import pytest
from mutate_jobs import Job, Limits, preload, run_jobs, seconds_used
from mutate_sites import Mutant
from mutate_tests import OPTIONS, PACKAGE, ROOT, Map, label, measure

KNOWN = ROOT / "scripts" / "mutants.json"
# By pytest's exit status: 2 is that of a module that cannot be imported any more.
_UNFINISHED = 7
_CAUGHT = ("killed", "hung")
_QUICK = 8  # a first look takes this part of the time
_TIMES = itertools.count(1_000_000_000)  # of changed files
_OUTCOMES = {0: "survived", 1: "killed", 2: "killed", None: "hung", _UNFINISHED: "unfinished"}


# ------------------------------------------------------------------------------------- the changes


class Chosen:
    """A pytest plugin that runs chosen tests, and starts none when the processor time is used up.

    Args:
        tests: Their names; a file, or a test without its parameters, means all of it.
        end: The processor time at which it ends.
    """

    def __init__(self, tests: Sequence[str], end: float) -> None:
        self._places = {test: number for number, test in enumerate(tests)}
        self.files = list(dict.fromkeys(test.partition("::")[0] for test in tests))
        self._end = end
        self.is_over = False

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Leaves the other tests of the files out; the tests of one file stay together."""

        def place(item: Any) -> tuple[int, int]:
            file, function = (item.nodeid.partition(each)[0] for each in ("::", "["))
            found = map(self._places.get, (item.nodeid, function, file))
            return self.files.index(file), next((n for n in found if n is not None), -1)

        found = [(place(item), item) for item in items]
        found = [each for each in found if each[0][1] >= 0]
        items[:] = [item for _, item in sorted(found, key=lambda each: each[0])]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Writes the name of the test to the log, which shows the one that hangs."""
        os.write(2, f"test {nodeid}\n".encode())

    def pytest_runtest_teardown(self, item: Any) -> None:
        """Stops the session when the time is used up."""
        if seconds_used() > self._end:
            self.is_over = True
            item.session.shouldstop = "the time is used up"


def run_tests(tests: Sequence[str], seconds: float) -> int:
    """Runs tests until one fails: two, then four, and so on, so that few files are imported.

    Returns:
        0 where none failed, 1 or 2 where one did, as pytest's exit status.
    """
    codes: list[int] = []
    start, size, end = 0, 2, seconds_used() + seconds
    while some := tests[start : start + size]:
        start, size = start + size, 2 * size
        chosen = Chosen(some, end)
        codes.append(int(pytest.main([*chosen.files, *OPTIONS, "-x"], plugins=[chosen])))
        if chosen.is_over and codes[-1] == pytest.ExitCode.INTERRUPTED:
            return _UNFINISHED
        if codes[-1] not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            return codes[-1]
    return min(codes)


def job_of(name: str, mutant: Mutant, tests: Sequence[str], base: Path, cpu_seconds: float) -> Job:
    """Returns the job that runs the tests of a change."""

    def prepare(copy: Path) -> Callable[[], None]:
        repair(base, copy)
        file = copy / mutant.path
        file.write_bytes(mutant.apply((base / mutant.path).read_bytes()))
        when = next(_TIMES)  # the bytecode of another change may have the same size
        os.utime(file, (when, when))

        def undo() -> None:
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(base / mutant.path, file)

        return undo

    return Job(name, lambda: run_tests(tests, cpu_seconds), prepare)


def run_mutants(
    names: Mapping[str, Mutant], tests: Map, options: argparse.Namespace, seconds: float
) -> dict[str, tuple[Mutant, str]]:
    """Runs the tests of each change, by name; returns its outcome: killed, hung or survived."""
    work: Path = options.work
    outcomes: dict[str, tuple[Mutant, str]] = {}

    def done(job: Job, code: int | None) -> None:
        mutant = names[job.name]
        outcome = _OUTCOMES.get(code, "broken")
        outcomes[job.name] = mutant, outcome
        print(
            f"{outcome:11}{mutant.path}:{mutant.line} {mutant.kind} {mutant.function}", flush=True
        )
        if outcome not in _CAUGHT and seconds == options.seconds:
            print(diff(mutant, work / "base"), flush=True)

    base = work / "base"
    jobs = [
        job_of(name, each, tests.choose(each, seconds), base, 2 * seconds)
        for name, each in names.items()
    ]
    run_jobs(jobs, copies_in(work), work, Limits(options.asleep, 10 * seconds), done)
    return outcomes


class Failures:
    """A pytest plugin that collects the tests that fail."""

    def __init__(self) -> None:
        self.found: set[str] = set()

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Notes a failure."""
        if report.failed:
            self.found.add(report.nodeid)

    pytest_collectreport = pytest_runtest_logreport


def confirm(
    outcomes: dict[str, tuple[Mutant, str]], options: argparse.Namespace
) -> dict[str, tuple[Mutant, str]]:
    """Runs the tests that failed again, without a change: one that fails then proves nothing.

    Returns:
        The outcomes, with `unclear` for a change that only such tests failed for.
    """
    work: Path = options.work
    noticed = {
        name: set(re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", log.read_text(), re.MULTILINE))
        for name, (_, outcome) in outcomes.items()
        if outcome == "killed" and (log := work / f"{name}.log").exists()
    }
    tests = sorted({test for found in noticed.values() for test in found})
    result = work / "confirm.json"
    result.unlink(missing_ok=True)

    def check() -> int:
        failures, chosen = Failures(), Chosen(tests, math.inf)
        pytest.main([*chosen.files, *OPTIONS], plugins=[failures, chosen])
        result.write_text(json.dumps(sorted(failures.found)))
        return 0

    run_jobs(
        [Job("confirm", check)], copies_in(work), work, Limits(600.0, 600.0), lambda job, code: None
    )
    failed = set(json.loads(result.read_text())) if result.exists() else set[str]()
    for name, found in noticed.items():
        if found and found <= failed:
            outcomes[name] = outcomes[name][0], "unclear"
            print(f"unclear  {name}: {min(found)} fails without it too", flush=True)
    return outcomes


def diff(mutant: Mutant, base: Path) -> str:
    """Returns the change in the format of `diff -U2`."""
    old = (base / mutant.path).read_bytes()
    lines = [each.decode().splitlines(keepends=True) for each in (old, mutant.apply(old))]
    return "".join(difflib.unified_diff(lines[0], lines[1], mutant.path, "changed", n=2))


def copies_in(work: Path) -> list[Path]:
    """Returns the copies of the repository."""
    return sorted(work.glob("copy*"))


def repair(base: Path, copy: Path) -> None:
    """Copies again the files that a test of the last change removed."""
    for file in base.rglob("*"):
        if file.is_file() and not (again := copy / file.relative_to(base)).exists():
            again.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, again)


def make_copies(work: Path, count: int) -> None:
    """Copies the tracked and the new files of the working tree.

    `base` never changes, while the working tree may.
    """
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in ("base", *(f"copy{number}" for number in range(count))):
        copy = work / name
        shutil.rmtree(copy, ignore_errors=True)
        for file in filter(None, listing.split("\0")):
            if (ROOT / file).exists():
                (copy / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / file, copy / file)


def draw(base: Path, options: argparse.Namespace) -> list[Mutant]:
    """Returns the changes of a sample, or those of the last run that were not caught."""
    found: list[Mutant] = []
    for path in sorted((base / PACKAGE).rglob("*.py")):
        name = str(path.relative_to(base))
        is_wanted = not options.module or any(part in name for part in options.module)
        if is_wanted and not name.startswith(f"{PACKAGE}/testing/"):
            found += mutate_sites.find(name, path.read_bytes())
    if not options.again:
        return mutate_sites.sample(found, options.sample, options.seed)
    drawn: list[Mutant] = []
    for last in json.loads((options.work / "outcomes.json").read_text()):
        mutant = Mutant(**last["mutant"])
        if last["outcome"] not in _CAUGHT:
            same = [each for each in found if each.key == mutant.key and each.new == mutant.new]
            drawn += sorted(same, key=lambda each: abs(each.line - mutant.line))[:1]
    return drawn


def keep(outcomes: Iterable[tuple[Mutant, str]], file: Path) -> None:
    """Writes the outcomes for `--again`."""
    found = [{"mutant": dataclasses.asdict(each), "outcome": outcome} for each, outcome in outcomes]
    file.write_text(json.dumps(found, indent=1))


def main() -> int:
    """Prints the surviving changes and a summary; exits with 1 below the required share."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=200, help="how many changes to draw")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument(
        "--again", action="store_true", help="changes that the last run did not catch"
    )
    parser.add_argument("--skip-measuring", action="store_true", help="take the last measurement")
    parser.add_argument("--module", action="append", help="only paths that contain this")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument("--seconds", type=float, default=30, help="processor time for a change")
    parser.add_argument("--asleep", type=float, default=90, help="when a test of a change hangs")
    parser.add_argument("--each", type=float, default=30, help="processor time to measure a file")
    parser.add_argument("--share", type=float, default=0.95, help="required share of caught ones")
    parser.add_argument("--work", type=Path, default=Path("/tmp/mutants"), help="copies and logs")
    parser.add_argument("--equivalent", type=Path, default=KNOWN, help="changes of no effect")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    make_copies(options.work, options.jobs)
    preload()
    base, kept = options.work / "base", options.work / "map"
    if not options.skip_measuring:
        measure(copies_in(options.work)[0], options.work, kept, options.each)
    drawn = draw(base, options)
    known = {tuple(each["change"]) for each in json.loads(options.equivalent.read_text())}
    wanted = [each for each in drawn if each.key not in known]
    names = {
        f"{number:04}.{label(mutant.path)}.{mutant.line}.{mutant.kind}": mutant
        for number, mutant in enumerate(wanted)
    }
    tests, outcomes = Map(kept, base), dict[str, tuple[Mutant, str]]()
    for seconds in (options.seconds / _QUICK, options.seconds):  # most fail at their first tests
        left = {
            n: m for n, m in names.items() if n not in outcomes or outcomes[n][1] not in _CAUGHT
        }
        outcomes |= run_mutants(left, tests, options, seconds)
    outcomes = confirm(outcomes, options)
    keep(outcomes.values(), options.work / "outcomes.json")
    counts = Counter(outcome for _, outcome in outcomes.values())
    counts["equivalent"] = len(drawn) - len(wanted)
    share = sum(map(counts.__getitem__, _CAUGHT)) / max(1, len(wanted))
    print(
        f"seed {options.seed}: {dict(counts)}: {share:.1%} of the changes that matter were caught"
    )
    return 0 if share >= options.share else 1


if __name__ == "__main__":
    sys.exit(main())
