"""The mean of checkpoints: a model soup, or the last steps of a run."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np

from functional_ckpt import errors
from functional_ckpt.core.arrays.rounding import is_floating
from functional_ckpt.core.arrays.spec import Array
from functional_ckpt.core.tree import composite, structure
from functional_ckpt.events import Shown
from functional_ckpt.format import checkpoint_dir
from functional_ckpt.transform import rewriting
from functional_ckpt.transform.rewriting import Combine, Input, NewArray, NewItem

_Arrays: TypeAlias = "dict[str, structure.ArrayNode]"


def merge(
    checkpoints: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    items: Sequence[str] | None = None,
    report: Shown | None = None,
) -> None:
    """Writes the mean of checkpoints: complete and durable when it returns, absent when it raises.

    Floating-point and complex arrays are averaged, in float64 or complex128, and rounded once.
    Everything else is that of the last checkpoint: integers and booleans, plain values, JSON items
    and the progress. Metrics are left out.

    Args:
        checkpoints: Paths or URIs, at least two, of any format that `fc.restore` reads.
        output: The checkpoint to create, a path or a URI; must not exist.
        weights: The weight of each checkpoint; their sum need not be one. None weighs all alike.
        items: Names of the items to write; None for all.
        report: Called with the bytes that were read so far, and those to be read.

    Raises:
        MismatchError: The checkpoints have other items or arrays, which are named; or arrays that
            have no mean (sparse, quantized and the like) differ.
        CorruptCheckpointError: Damaged bytes.
        StepExistsError: Something is at `output`.
        UsageError: Fewer than two checkpoints, wrong weights, or a mean out of its dtype's range.
    """
    if isinstance(checkpoints, (str, os.PathLike)) or len(checkpoints) < 2:
        raise errors.UsageError(f"Give at least two checkpoints to merge; got {checkpoints!r}.")
    if weights is not None:
        _check_weights(weights, len(checkpoints))
    with contextlib.ExitStack() as files:
        inputs = [Input(path, files) for path in checkpoints]
        last = inputs[-1].opened
        names = _common_items(inputs, items)
        made = [
            rewriting.json_item(last, name)
            if last.items[name] == "json"
            else _mean_item(inputs, name, weights)
            for name in names
        ]
        recipe: dict[str, object] = {"checkpoints": [each.opened.path for each in inputs]}
        recipe |= {} if weights is None else {"weights": list(weights)}
        rewriting.write(output, last, made, report, custom_metadata={"merged": recipe})


def _check_weights(weights: Sequence[float], count: int) -> None:
    if len(weights) != count:
        raise errors.UsageError(
            f"Expected {count} weights, one per checkpoint; got {len(weights)}."
        )
    if not all(map(math.isfinite, weights)) or sum(weights) == 0:
        raise errors.UsageError(
            f"Weights must be finite, and their sum not 0; got {list(weights)}."
        )


def _common_items(inputs: Sequence[Input], wanted: Sequence[str] | None) -> list[str]:
    last = inputs[-1].opened
    for name in wanted or ():
        if name not in last.items:
            raise checkpoint_dir.missing_item(last.path, name, last.items)
    names = list(last.items if wanted is None else dict.fromkeys(wanted))
    for each in inputs[:-1]:
        found = each.opened.items
        chosen = names if wanted is not None else list({**last.items, **found})
        for name in chosen:
            if found.get(name) != last.items.get(name):
                kinds = [found.get(name, "absent"), last.items.get(name, "absent")]
                raise errors.MismatchError(
                    f"Item {name!r} is {kinds[0]} in {each.opened.path} and {kinds[1]} in "
                    f"{last.path}. Choose the items to merge ({', '.join(names)}).",
                    key_path=name,
                )
    return names


def _mean_item(inputs: Sequence[Input], name: str, weights: Sequence[float] | None) -> NewItem:
    last = inputs[-1]
    root = last.tree(name).root
    expected, whole = rewriting.arrays_of(root), _parts(root)
    found = [rewriting.arrays_of(each.tree(name).root) for each in inputs]
    for each, nodes in zip(inputs, found, strict=True):
        _check_alike(name, each.opened.path, nodes, last.opened.path, expected)
    arrays: dict[str, NewArray] = {}
    for leaf, node in expected.items():
        if node.tied_to is not None:
            continue
        sources = [each.array(name, nodes[leaf]) for each, nodes in zip(inputs, found, strict=True)]
        where = f"{name}.{leaf}"
        if leaf in whole:
            combine = functools.partial(_same, where=where)
        elif _has_mean(node):
            combine = _mean_of(node.dtype, where, len(sources), weights)
        else:
            sources, combine = sources[-1:], next
        arrays[leaf] = NewArray(sources, combine)
    return NewItem(name, root, arrays, last.tree(name))


def _has_mean(node: structure.ArrayNode) -> bool:
    is_number = is_floating(node.dtype) or node.dtype.startswith("complex")
    return is_number and node.kind in ("tensor", "ndarray")


def _parts(root: structure.Node) -> set[str]:
    """Returns the names of arrays that have no mean: parts of a tensor, and bits of its numbers."""
    leaves = list(structure.iter_leaves(root, leaf_kinds=composite.KINDS))
    inside = [
        part.name
        for _, leaf in leaves
        if isinstance(leaf, structure.BranchNode)
        for part in structure.iter_arrays(leaf)
    ]
    carried = [
        leaf.name
        for _, leaf in leaves
        if isinstance(leaf, structure.ArrayNode)
        and leaf.dtype != leaf.spec.dtype
        and _has_mean(leaf)
    ]
    return {*inside, *carried}


def _check_alike(item: str, path: str, found: _Arrays, last: str, expected: _Arrays) -> None:
    """Raises `MismatchError` that names the arrays in which two checkpoints differ."""

    def told(nodes: _Arrays, name: str) -> str:
        node = nodes.get(name)
        if node is None:
            return "nothing"
        tie = "" if node.tied_to is None else f", tied to {node.tied_to}"
        return f"{structure.describe(node)}{tie}"

    pairs = {name: (told(found, name), told(expected, name)) for name in {**found, **expected}}
    wrong = [f"{item}.{name}: {was}, and {now}" for name, (was, now) in pairs.items() if was != now]
    if wrong:
        more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise errors.MismatchError(
            f"{path} and {last} hold different arrays: {'; '.join(wrong[:8])}{more}.",
            key_path=wrong[0].partition(":")[0],
        )


def _mean_of(dtype: str, where: str, count: int, weights: Sequence[float] | None) -> Combine:
    """Returns a function that makes the mean of pieces, as NumPy does: one added to the other."""
    kind = np.complex128 if dtype.startswith("complex") else np.float64

    def weighted(piece: Array, weight: float) -> Array:
        wide = piece.astype(kind)
        wide *= weight
        return wide

    def mean(pieces: Iterator[Array]) -> Array:
        parts = pieces if weights is None else map(weighted, pieces, weights)
        with np.errstate(invalid="ignore", over="ignore"):
            total = next(parts).astype(kind)
            for part in parts:
                np.add(total, part, out=total)
            total /= count if weights is None else sum(weights)
        return rewriting.narrowed(total, dtype, where)

    return mean


def _same(pieces: Iterator[Array], *, where: str) -> Array:
    """Returns a piece that all checkpoints have; raises `MismatchError` if it differs."""
    first = next(pieces).copy()
    for piece in pieces:
        if piece.tobytes() != first.tobytes():
            raise errors.MismatchError(
                f"{where} differs, and is a part of a tensor that has no mean (sparse, quantized, "
                "or a subclass). Choose other items, or leave it out with fc.transform.edit.",
                key_path=where,
            )
    return first
