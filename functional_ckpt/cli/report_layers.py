"""The relative change of each array between two steps, region by region."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

from functional_ckpt.cli import compare
from functional_ckpt.cli.report_record import Comparison, LayerChange
from functional_ckpt.core.tree import structure
from functional_ckpt.format.checkpoint_dir import OpenCheckpoint, OpenItem
from functional_ckpt.format.stored_arrays import OpenArrays, StoredArray

_SLAB_BYTES = 16 * 2**20


def compare_steps(
    a: OpenCheckpoint, b: OpenCheckpoint, advance: Callable[[int], None]
) -> Comparison:
    """Compares the arrays that two steps have in common."""
    changes: dict[str, tuple[LayerChange, ...]] = {}
    num_equal = 0
    for name, kind in a.items.items():
        if not kind == b.items.get(name) == "tree":
            continue
        found = list(_changes(a.tree(name), b.tree(name), advance))
        num_equal += sum(each is None for each in found)
        differing = [each for each in found if each is not None]
        if differing:
            changes[name] = tuple(
                sorted(
                    differing,
                    key=lambda each: -1.0 if each.relative is None else each.relative,
                    reverse=True,
                )
            )
    return Comparison(before=a.step or 0, after=b.step or 0, changes=changes, num_equal=num_equal)


def _changes(
    a: OpenItem, b: OpenItem, advance: Callable[[int], None]
) -> Iterator[LayerChange | None]:
    """Yields each array that differs, and None for one that is equal."""
    others = {structure.leaf_name(path): leaf for path, leaf in structure.iter_leaves(b.root)}
    with contextlib.ExitStack() as files:
        first, second = OpenArrays(a, files), OpenArrays(b, files)
        for path, leaf in structure.iter_leaves(a.root):
            name = structure.leaf_name(path)
            other = others.get(name)
            if not isinstance(leaf, structure.ArrayNode) or leaf.tied_to is not None:
                continue
            if not isinstance(other, structure.ArrayNode) or other.tied_to is not None:
                continue
            advance(leaf.spec.size_bytes)
            if leaf.spec != other.spec or leaf.dtype != other.dtype:
                yield LayerChange(name=name, relative=None)
            else:
                yield _change(name, StoredArray(first, leaf), StoredArray(second, other))


def _change(name: str, a: StoredArray, b: StoredArray) -> LayerChange | None:
    spec = a.node.spec
    regions = compare._regions(spec, a.digests, b.digests)
    if a.digests is not None and all(is_same for _, is_same in regions):
        return None
    import numpy as np

    kind = np.complex128 if "complex" in spec.dtype else np.float64
    norm = gap = 0.0
    is_equal = True
    for box in spec.slabs(_SLAB_BYTES):
        x, y = a.read(box), b.read(box)
        is_equal = is_equal and x.tobytes() == y.tobytes()
        if a.is_numeric:
            x, y = x.astype(kind), y.astype(kind)
            with np.errstate(all="ignore"):
                norm += float(np.square(np.abs(x)).sum())
                gap += float(np.square(np.abs(y - x)).sum())
    if is_equal:
        return None
    relative = math.sqrt(gap / norm) if norm > 0 and math.isfinite(gap / norm) else None
    return LayerChange(name=name, relative=relative)
