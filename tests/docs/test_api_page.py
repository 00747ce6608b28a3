"""docs/api.md renders every public name, and each has an example and documented arguments."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_docs_examples import python_blocks

import functional_ckpt as fc

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
MODULES = (
    *("errors", "flags", "handlers", "hooks", "interop", "listeners", "policies", "protocols"),
    *("step_names", "transform"),
)
BLOCKS = set(re.findall(r"^::: ([\w.]+)$", PAGE, flags=re.MULTILINE))
CODE = "\n".join(code for _, code in python_blocks(PAGE))


def public_names() -> Iterator[str]:
    yield from (name for name in fc.__all__ if name not in MODULES)
    for module in MODULES:
        own = [name for name in getattr(fc, module).__all__ if name not in fc.__all__]
        yield from (f"{module}.{name}" for name in own)


NAMES = list(public_names())


def find(name: str) -> Any:
    value: Any = fc
    for part in name.split("."):
        value = getattr(value, part)
    return value


def rendered(block: str) -> Any:
    """The object that a block renders."""
    try:
        return importlib.import_module(block)
    except ModuleNotFoundError:
        module, _, name = block.rpartition(".")
        return getattr(importlib.import_module(module), name)


RENDERED = [rendered(block) for block in sorted(BLOCKS)]


@pytest.mark.parametrize("name", NAMES)
def test_public_name_is_rendered(name: str) -> None:
    value = find(name)
    is_error = getattr(value, "__module__", None) == fc.errors.__name__  # one block for all
    assert is_error or any(value is each for each in RENDERED), f"docs/api.md lacks {name}"


@pytest.mark.parametrize("name", [name for name in NAMES if "errors." not in name])
def test_public_name_has_an_example_that_runs(name: str) -> None:
    is_shown = re.search(rf"\bfc\.{re.escape(name)}\b", CODE) is not None
    # Handlers are made by items: the page lists them by name.
    is_listed = f'"{name.rpartition(".")[2]}"' in CODE
    assert is_shown or is_listed or ">>>" in (find(name).__doc__ or "")


def arguments(value: Any) -> Iterator[str]:
    is_made_by_users = value is not fc.Commit and not getattr(value, "_is_protocol", False)
    if not callable(value) or not is_made_by_users:
        return
    for parameter in inspect.signature(value).parameters.values():
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            yield parameter.name


def documentation(value: Any) -> str:
    """The docstring of a value, and those of its base classes, which document inherited fields."""
    classes = value.__mro__[:-1] if isinstance(value, type) else [value]
    return "\n".join(inspect.getdoc(each) or "" for each in classes)


@pytest.mark.parametrize("name", NAMES)
def test_public_name_documents_its_arguments(name: str) -> None:
    value = find(name)
    text = documentation(value)
    missing = [each for each in arguments(value) if not re.search(rf"`?\b{each}\b`?", text)]
    assert missing == []
    assert text or not callable(value)
