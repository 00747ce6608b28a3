"""The result of matching, as data: the action for each leaf and container."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from functional_ckpt import errors
from functional_ckpt.core.tree import structure

_MAX_LINES, _MAX_SHOWN = 200, 3


@dataclasses.dataclass(frozen=True, slots=True)
class Given:
    """A leaf whose value is known without reading."""

    value: Any


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ReadArray:
    """An array to be read.

    Attributes:
        node: The stored node.
        form: Its restored form: `as_saved`, `tensor` (new), `ndarray` (new), or `fill`.
        like: The tensor to fill or imitate, for `fill` and `tensor`.
    """

    node: structure.ArrayNode
    form: Literal["as_saved", "tensor", "ndarray", "fill"]
    like: Any = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """A container to be built from its children.

    Attributes:
        node: The stored node, or a node with the target's own keys.
        children: Their bindings.
        like: The target's container, or None to build the saved type.
        into: A tensor that receives the built value by `copy_`, for tensors made of parts.
        result: The DTensor whose part `into` is; None for `into` itself.
    """

    node: structure.BranchNode
    children: tuple[Binding, ...]
    like: Any = None
    into: Any = None
    result: Any = None


Binding: TypeAlias = Given | ReadArray | Build


class Filled(NamedTuple):
    """A target's own tensor that is filled, or given memory on the meta device."""

    item: str
    path: structure.KeyPath
    read: ReadArray

    @property
    def where(self) -> str:
        """The leaf, for messages."""
        return structure.pretty(self.path, self.item)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """The outcome of `match`."""

    binding: Binding
    report: RestoreReport
    filled: tuple[Filled, ...] = ()
    is_nested: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RestoreReport:
    """The differences of a restore, as `item['key']` texts; all empty if there are none.

    Attributes:
        missing: Expected by the target, absent from the checkpoint; the target kept its own value.
        unexpected: In the checkpoint but not in the target; not read.
        mismatched: Different in kind, shape or dtype; the target kept its own value.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.mismatched)

    def __repr__(self) -> str:
        parts = {name: getattr(self, name) for name in ("missing", "unexpected", "mismatched")}
        facts = [f"{name}={_first(leaves)}" for name, leaves in parts.items() if leaves]
        return f"RestoreReport({', '.join(facts)})"

    def __str__(self) -> str:
        parts = {
            "missing from the checkpoint": self.missing,
            "not expected by the target": self.unexpected,
            "different": self.mismatched,
        }
        lines = [f"  {what}: {leaf}" for what, found in parts.items() for leaf in found]
        return "\n".join(lines) or "  everything matched"


def _first(leaves: Sequence[str]) -> str:
    """Returns a few leaves, and how many more there are."""
    more = len(leaves) - _MAX_SHOWN
    shown = ", ".join(leaves[:_MAX_SHOWN])
    return f"[{shown}, and {more:,} more]" if more > 0 else f"[{shown}]"


def merge(reports: Sequence[RestoreReport]) -> RestoreReport:
    """Several reports as one."""
    return RestoreReport(
        missing=tuple(leaf for report in reports for leaf in report.missing),
        unexpected=tuple(leaf for report in reports for leaf in report.unexpected),
        mismatched=tuple(leaf for report in reports for leaf in report.mismatched),
    )


def raise_report(reports: Mapping[str, RestoreReport], *, step: int | None, path: str) -> None:
    """Raises one `MismatchError` for everything that did not fit, in all items."""
    every = merge(list(reports.values()))
    if not every:
        return
    body = "\n".join(str(report) for report in reports.values() if report)
    where = "checkpoint" if step is None else f"step {step}"
    raise errors.MismatchError(
        f"Cannot restore {where} of {path} into the target; nothing was touched.\n"
        f"{_shorten(body)}\n"
        "Fix the target, select leaves with only=, or pass strict=False to keep the "
        "target's own values for these.",
        missing=every.missing,
        unexpected=every.unexpected,
        mismatched=every.mismatched,
        step=step,
        path=path,
    )


def _shorten(text: str) -> str:
    lines = text.splitlines()
    if len(lines) <= _MAX_LINES:
        return text
    more = f"  ... and {len(lines) - _MAX_LINES} more (see the error's fields)"
    return "\n".join([*lines[:_MAX_LINES], more])
