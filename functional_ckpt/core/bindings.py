"""What a restore does for each leaf and container, as data: the outcome of matching."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, TypeAlias

from functional_ckpt.core import structure
from functional_ckpt.core.report import RestoreReport

__all__ = ["Binding", "Bound", "Build", "Given", "ReadArray"]


@dataclasses.dataclass(frozen=True, slots=True)
class Given:
    """A leaf whose value is known without reading."""

    value: Any


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ReadArray:
    """An array to be read.

    Attributes:
        node: What is stored.
        form: What becomes of it: `as_saved`, `tensor` (new), `ndarray` (new), or `fill`.
        like: The tensor to fill or imitate, for `fill` and `tensor`.
    """

    node: structure.ArrayNode
    form: Literal["as_saved", "tensor", "ndarray", "fill"]
    like: Any = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """A container to be built from its children.

    Attributes:
        node: What is stored, or a node of the target's own keys.
        children: Their bindings.
        like: The target's container, or None to build what was saved.
        into: A tensor that receives the built value by `copy_`, for tensors made of parts.
    """

    node: structure.BranchNode
    children: tuple[Binding, ...]
    like: Any = None
    into: Any = None


Binding: TypeAlias = Given | ReadArray | Build


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """The outcome of `match`.

    Attributes:
        binding: What to do for the whole item.
        report: What did not fit.
    """

    binding: Binding
    report: RestoreReport
