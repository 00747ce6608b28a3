"""Every message in docs/troubleshooting.md is one of the code, and every error class is there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from functional_ckpt import errors

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
MESSAGES = re.findall(r"^### `(.*)`$", PAGE, flags=re.MULTILINE)


def texts(path: Path) -> Iterator[str]:
    """The strings of a module; values that are formatted into them are `…`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            parts = [each.value if isinstance(each, ast.Constant) else "…" for each in node.values]
            yield "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@pytest.fixture(scope="module")
def written() -> str:
    """All strings of the package."""
    files = (ROOT / "functional_ckpt").rglob("*.py")
    return "\n".join(text for path in files for text in texts(path))


@pytest.mark.parametrize("message", MESSAGES, ids=range(len(MESSAGES)))
def test_message_is_one_of_the_code(message: str, written: str) -> None:
    missing = [part for part in message.split("…") if part.strip() not in written]
    assert missing == []


def test_every_error_class_is_in_the_table() -> None:
    classes = re.findall(r"^\| `(\w+)` \| `(\w+)` \|", PAGE, flags=re.MULTILINE)
    for name, builtin in classes:
        assert builtin in {base.__name__ for base in getattr(errors, name).__mro__}
    named = {name for name, _ in classes}
    public = {name for name in errors.__all__ if name.endswith("Error")}
    assert public - {"CheckpointError"} == named
