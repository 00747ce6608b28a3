"""Type checkers know the names of the package, and report others."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import full
import pytest

ROOT = Path(__file__).resolve().parents[1]
WRONG = """import functional_ckpt as fc
fc.CheckpointManger("x")
fc.interop.opne("x")
"""


def hooks_that_checkers_see(source: str) -> list[int]:
    """Returns the lines of `__getattr__` of a module, which makes every name known, to checkers."""
    return [
        each.lineno
        for each in ast.parse(source).body
        if isinstance(each, ast.FunctionDef) and each.name == "__getattr__"
    ]


def test_a_hook_for_names_is_found() -> None:
    assert hooks_that_checkers_see("def __getattr__(name): ...\n") == [1]
    hidden = "if not TYPE_CHECKING:\n    def __getattr__(name): ...\n"
    assert hooks_that_checkers_see(hidden) == []


def test_no_module_makes_every_name_known_to_type_checkers() -> None:
    modules = sorted((ROOT / "functional_ckpt").rglob("*.py"))
    seen = {path: hooks_that_checkers_see(path.read_text(encoding="utf-8")) for path in modules}
    assert len(seen) > 100
    assert [(path, lines) for path, lines in seen.items() if lines] == []


@pytest.mark.skipif(not full.IS_FULL, reason="FUNCTIONAL_CKPT_FULL=1 runs pyright")
def test_pyright_reports_a_misspelt_name(tmp_path: Path) -> None:
    if importlib.util.find_spec("pyright") is None:
        pytest.skip("needs pyright")
    (tmp_path / "wrong.py").write_text(WRONG, encoding="utf-8")
    (tmp_path / "pyrightconfig.json").write_text(f'{{"extraPaths": ["{ROOT}"]}}', encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "wrong.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert '"CheckpointManger" is not a known attribute' in done.stdout, done.stdout + done.stderr
    assert '"opne" is not a known attribute' in done.stdout
