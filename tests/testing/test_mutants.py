"""`scripts/mutants`: the changes it can make, and how it draws them."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


NAMES = ("mutate_sites", "mutate_jobs", "mutate_lines", "mutate_tests", "mutate")


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield {name: importlib.import_module(name) for name in NAMES}
    for name in NAMES:
        sys.modules.pop(name)


@pytest.fixture
def sites(scripts: dict[str, Any]) -> Any:
    return scripts["mutate_sites"]


SOURCE = b'''"""A module."""
def f(a, b):
    """A function."""
    if a is None or b < 3:
        raise ValueError(f"{a + 1}")
    with lock:
        g(a, b)
    try:
        _log.info("said", a)
    finally:
        close()
    return min(a, b) + 1
'''


def test_each_kind_of_change_is_found_once_and_leaves_a_module(sites: Any) -> None:
    found = sites.find("m.py", SOURCE)
    assert [(each.kind, each.line, each.new) for each in found] == [
        ("drop_if", 4, "False"),
        ("neg_if", 4, "not (a is None or b < 3)"),
        ("boolop", 4, "and"),
        ("cmp", 4, "is not"),
        ("cmp", 4, "<="),
        ("const_int", 4, "4"),
        ("del_raise", 5, "pass"),
        ("del_lock", 6, '__import__("contextlib").nullcontext()'),
        ("del_call", 7, "pass"),
        ("swap_args", 7, "b, a"),
        ("del_finally", 11, "pass"),
        ("del_call", 11, "pass"),
        ("ret_none", 12, "return None"),
        ("binop", 12, "-"),
        ("minmax", 12, "max"),
        ("const_int", 12, "2"),
    ]
    assert {each.function for each in found} == {"f"}
    for each in found:
        changed = each.apply(SOURCE)
        assert changed != SOURCE
        ast.parse(changed)


def test_a_draw_is_repeatable_and_repeats_nothing(sites: Any) -> None:
    found = sites.find("m.py", SOURCE)
    drawn = sites.sample(found, 100, 7)
    assert drawn == sites.sample(list(found), 100, 7)
    assert sorted(drawn, key=str) == sorted(found, key=str)
    assert len(sites.sample(found, 3, 7)) == 3


CALLED = """\"\"\"A module.\"\"\"
from __future__ import annotations


class A:
    def f(self, x):
        'Said.'
        if x:
            return g()
        elif (
            x is None
        ):
            return 4

    @property
    def h(self):
        return 5


def g():
    return 3
"""


def test_an_instrumented_module_says_which_lines_run(
    scripts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines, sites = scripts["mutate_lines"], list[tuple[str, int]]()
    changed = lines.instrument("p/m.py", CALLED, sites)
    hits = bytearray(len(sites))
    monkeypatch.setitem(sys.modules, "p", types.ModuleType("p"))
    module = types.ModuleType("p._mutation_hits")
    module.__dict__["HITS"] = hits
    monkeypatch.setitem(sys.modules, "p._mutation_hits", module)
    place: dict[str, Any] = {"__name__": "p.m"}
    exec(changed, place)
    assert not any(hits)
    assert place["A"]().f(1) == 3
    assert [sites[n][1] for n, hit in enumerate(hits) if hit] == [8, 9, 21]
    assert place["A"]().f(None) == 4 and place["A"]().h == 5
    assert sorted(sites[n][1] for n, hit in enumerate(hits) if hit) == [8, 9, 13, 17, 21]

    def first_line(line: int) -> int:
        return lines.mask(CALLED.encode(), "A.f", line).bit_length() - 1

    assert [first_line(line) for line in (8, 9, 11, 13)] == [8, 9, 8, 13]
    assert lines.mask(CALLED.encode(), "g", None) == 0b11 << 20
    assert lines.mask(CALLED.encode(), "A", None) == -1, "any line of the module"


def test_the_tests_of_a_change_are_those_that_run_its_line_or_bear_its_name(
    scripts: dict[str, Any], sites: Any, tmp_path: Path
) -> None:
    lines, tests_of = scripts["mutate_lines"], scripts["mutate_tests"]
    path, kept, base = "functional_ckpt/handlers/stateful.py", tmp_path / "map", tmp_path / "base"
    for file, text in ((path, CALLED), ("tests/handlers/test_stateful.py", "")):
        (base / file).parent.mkdir(parents=True)
        (base / file).write_text(text)
    (kept / "sources").mkdir(parents=True)
    digest = lines.digest(CALLED.encode())
    (kept / "sources" / digest).write_text(CALLED)
    mutant = sites.Mutant(path, "A.f", "cmp", 9, 0, 1, "<", "<=")
    assert tests_of.Map(tmp_path / "none", base).choose(mutant, 30.0) == [
        "tests/handlers/test_stateful.py"
    ]
    tests = {
        f"t[{number}]": {
            "seconds": 9 - number,
            "failed": number == 3,
            "lines": {path: f"{1 << 9:x}"},
        }
        for number in range(5)
    }
    tests["other"] = {"seconds": 0, "failed": False, "lines": {path: f"{1 << 8:x}"}}
    tests["slow"] = {"seconds": 10, "failed": False, "lines": {path: f"{1 << 9:x}"}}
    (kept / "t.json").write_text(json.dumps({"modules": {path: digest}, "tests": tests}))
    choose = tests_of.Map(kept, base).choose
    assert choose(mutant, 60.0) == ["t[4]", "slow", "t[2]", "t[1]", "t[0]"]
    assert choose(mutant, 16.0) == ["t[4]", "slow"]
    (base / path).write_text(CALLED.replace("return 4", "return 5"))
    assert choose(mutant, 30.0)[0] == "other", "the module has changed since it was measured"


def test_a_change_runs_its_tests_until_one_fails(scripts: dict[str, Any], tmp_path: Path) -> None:
    for name in ("a", "b"):
        text = "def test_1():\n    pass\ndef test_2():\n    assert not __file__.endswith('b.py')\n"
        (tmp_path / f"test_mutated_{name}.py").write_text(text)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    script = (
        "import os, sys, mutate; os.chdir(sys.argv[1]); print(mutate.run_tests(sys.argv[2:], 60))"
    )

    def run(*tests: str) -> list[str]:
        named = [f"test_mutated_{test[0]}.py{test[1:]}" for test in tests]
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script, str(tmp_path), *named],
            env={**os.environ, "PYTHONPATH": str(SCRIPTS)},
            capture_output=True,
            text=True,
        )
        started = re.findall(r"^test test_mutated_(\w)\.py(\S*)", done.stderr, re.MULTILINE)
        return [*(name + rest for name, rest in started), done.stdout.splitlines()[-1]]

    assert run("b::test_1", "a") == ["b::test_1", "a::test_1", "a::test_2", "0"]
    assert run("b::test_2", "a") == ["b::test_2", "1"]
    assert run("a::gone") == ["5"]


@pytest.mark.parametrize("hang", ["sleeps", "spins"])
def test_a_job_runs_in_a_copy_and_one_that_hangs_is_killed(
    scripts: dict[str, Any], tmp_path: Path, hang: str
) -> None:
    jobs, found = scripts["mutate_jobs"], dict[str, int | None]()

    def work(name: str) -> Callable[[], int]:
        def run() -> int:
            (Path.cwd() / name).touch()
            if name == "hangs":
                while hang == "spins":
                    pass
                time.sleep(100)
            return 5

        return run

    copies = [tmp_path / "a", tmp_path / "b"]
    for copy in copies:
        copy.mkdir()
    todo = [jobs.Job(name, work(name)) for name in ("hangs", "ends")]
    limits = jobs.Limits(asleep_seconds=2.0, running_seconds=2.0)
    jobs.run_jobs(todo, copies, tmp_path, limits, lambda job, code: found.update({job.name: code}))
    assert found == {"hangs": None, "ends": 5}
    assert {file.name for copy in copies for file in copy.iterdir()} == {"hangs", "ends"}
