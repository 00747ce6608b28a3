"""`scripts/mutants`: the changes it can make, and how it draws them."""

from __future__ import annotations

import ast
import builtins
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


NAMES = ("mutate_sites", "mutate_jobs", "mutate_tests", "mutate")


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


def test_an_instrumented_module_says_which_functions_are_called(
    scripts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "class A:\n    def f(self):\n        'Said.'\n        return g()\n"
    source += "\n\ndef g():\n    return 3\n"
    changed = scripts["mutate_tests"].instrument("m.py", source)
    place: dict[str, Any] = {}
    exec(changed, place)
    assert place["A"]().f() == 3
    called: list[str] = []
    monkeypatch.setitem(builtins.__dict__, "__mutation_hit__", called.append)
    assert place["A"]().f() == 3 and called == ["m.py:A.f", "m.py:g"]


def test_the_tests_of_a_change_are_those_that_call_it_or_bear_its_name(
    scripts: dict[str, Any], sites: Any
) -> None:
    choose = scripts["mutate_tests"].choose
    path = "functional_ckpt/handlers/stateful.py"
    mutant = sites.Mutant(path, "f", "cmp", 1, 0, 1, "<", "<=")
    assert choose(mutant, {})[0] == "tests/handlers/test_stateful.py"
    tests = {
        f"t{number}": {"seconds": 9 - number, "failed": number == 3, "hits": [f"{path}:f"]}
        for number in range(5)
    }
    assert choose(mutant, tests) == ["t4", "t2", "t1", "t0"]


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
    limits = jobs.Limits(asleep_seconds=2.0, active_seconds=2.0)
    jobs.run_jobs(todo, copies, tmp_path, limits, lambda job, code: found.update({job.name: code}))
    assert found == {"hangs": None, "ends": 5}
    assert {file.name for copy in copies for file in copy.iterdir()} == {"hangs", "ends"}
