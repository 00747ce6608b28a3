"""Items as HTML for notebooks: a tree that folds, with types, shapes and sizes of the leaves."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from functional_ckpt import errors
from functional_ckpt.core.arrays.spec import ArraySpec
from functional_ckpt.core.tree import containers

_MAX_CHILDREN = 50
_MAX_DEPTH = 50
_MAX_TEXT = 60
_ARRAYS = (ArraySpec, torch.Tensor, np.ndarray)
_PLAIN = (str, bytes, int, float, complex, bool, type(None))


def page(caption: str, items: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Returns items below a caption, with facts that are known (not None) of them.

    Of each container the first 50 members are shown, and the others are counted.
    """
    known = "".join(
        f"<li>{html.escape(name)}: <code>{html.escape(str(value))}</code></li>"
        for name, value in facts.items()
        if value is not None
    )
    trees = "".join(_node(name, value).text for name, value in items.items())
    return (
        f"<details open><summary><code>{html.escape(caption)}</code></summary>"
        f"<ul>{known}{trees}</ul></details>"
    )


class _Shown(NamedTuple):
    text: str
    num_arrays: int = 0
    num_bytes: int = 0


def _node(name: str, value: Any, depth: int = 0) -> _Shown:
    name = html.escape(name)
    node = _opened(value) if depth < _MAX_DEPTH else None
    if node is None:
        text, num_bytes = _leaf(value)
        shown = f"<li>{name}: <code>{html.escape(text)}</code></li>"
        return _Shown(shown, int(isinstance(value, _ARRAYS)), num_bytes)
    pairs = zip(node.keys, node.children, strict=True)
    children = [_node(str(key.value), child, depth + 1) for key, child in pairs]
    num_arrays = sum(child.num_arrays for child in children)
    num_bytes = sum(child.num_bytes for child in children)
    more = len(children) - _MAX_CHILDREN
    inside = "".join(child.text for child in children[:_MAX_CHILDREN])
    inside += f"<li>and {more:,} more</li>" if more > 0 else ""
    what = _counted(num_arrays, "array") if num_arrays else _counted(len(children), "value")
    what += f", {num_bytes:,} bytes" if num_arrays else ""
    return _Shown(
        f"<li><details><summary>{name}: {what}</summary><ul>{inside}</ul></details></li>",
        num_arrays,
        num_bytes,
    )


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _opened(value: Any) -> containers.FlatNode | None:
    try:
        return containers.flatten_one_level(value)
    except errors.UnsupportedLeafError:
        return None  # shown by its type


def _leaf(value: Any) -> tuple[str, int]:
    if isinstance(value, ArraySpec):
        return f"{value.dtype}{list(value.shape)}", value.size_bytes
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)} ndarray", value.nbytes
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype}{list(value.shape)} {value.device}", value.nbytes
    text = repr(value) if isinstance(value, _PLAIN) else type(value).__qualname__
    return text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 3]}...", 0
