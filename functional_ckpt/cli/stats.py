"""`fckpt stats`: range, mean, deviation, norm and non-finite values of each array."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fnmatch
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from functional_ckpt import errors
from functional_ckpt.cli import output, targets
from functional_ckpt.cli.show import chosen_items
from functional_ckpt.core.tree import structure
from functional_ckpt.format import checkpoint_dir
from functional_ckpt.format.stored_arrays import SLAB_BYTES, OpenArrays, StoredArray

if TYPE_CHECKING:
    import numpy as np
    from rich.table import Table

# Longer names of leaves are folded where the terminal is narrow.
_MIN_NAME = 24


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Stats:
    """Statistics of one array.

    `min`, `mean`, `std`, `max` and `norm` are those of the finite values, computed in float64; None
    where there is none, and for values that are no real numbers.
    """

    item: str
    leaf: str
    dtype: str
    shape: list[int]
    num_elements: int
    min: float | None = None
    mean: float | None = None
    std: float | None = None
    max: float | None = None
    norm: float | None = None
    num_nan: int = 0
    num_inf: int = 0
    num_zeros: int = 0


def run(arguments: argparse.Namespace) -> int:
    """Prints the statistics; 1 if a value is NaN or infinite."""
    checkpoint = targets.checkpoint_of(
        arguments.checkpoint, arguments.step, arguments.prefix, opens_foreign=True
    )
    opened = checkpoint.open()
    names = [name for name in chosen_items(opened, arguments.item) if opened.items[name] == "tree"]
    with output.progress_bar("reading") as progress:
        found = list(_all_stats(opened, names, arguments.leaf, progress))
    if not found:
        raise errors.UsageError(f"{opened.path}: no array is named like {arguments.leaf!r}.")
    if arguments.json:
        record = {"schema": "fckpt.stats/1", "path": opened.path, "step": opened.step}
        output.as_json({**record, "arrays": [dataclasses.asdict(each) for each in found]})
    else:
        _print(found)
    return 1 if any(each.num_nan or each.num_inf for each in found) else 0


def _all_stats(
    opened: checkpoint_dir.OpenCheckpoint,
    names: list[str],
    pattern: str,
    progress: Callable[[int, int], None],
) -> Iterator[_Stats]:
    arrays = [
        (name, item, structure.leaf_name(path), leaf)
        for name in names
        for item in [opened.tree(name)]
        for path, leaf in structure.iter_leaves(item.root)
        if isinstance(leaf, structure.ArrayNode)
        and leaf.tied_to is None
        and fnmatch.fnmatchcase(f"{name}.{structure.leaf_name(path)}", pattern)
    ]
    total, done = sum(leaf.spec.size_bytes for *_, leaf in arrays), 0
    with contextlib.ExitStack() as files:
        open_items = {name: OpenArrays(item, files) for name, item, _, _ in arrays}
        for name, _, leaf_name, leaf in arrays:
            yield _stats(name, leaf_name, StoredArray(open_items[name], leaf))
            done += leaf.spec.size_bytes
            progress(done, total)


def _stats(item: str, name: str, array: StoredArray) -> _Stats:
    spec = array.node.spec
    stats = _Stats(
        item=item,
        leaf=name,
        dtype=array.node.dtype,
        shape=list(spec.shape),
        num_elements=spec.num_elements,
    )
    if not array.is_numeric or spec.dtype.startswith("complex"):
        return stats
    import numpy as np

    count, total, squares, deviation = 0, 0.0, 0.0, 0.0
    low, high = math.inf, -math.inf
    num_nan = num_inf = num_zeros = 0
    for box in spec.slabs(SLAB_BYTES):
        values = array.read(box).astype(np.float64).ravel()
        finite = values[np.isfinite(values)]
        num_nan += int(np.isnan(values).sum())
        num_inf += int(np.isinf(values).sum())
        num_zeros += int((values == 0).sum())
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
            deviation = _merged(deviation, count, total, finite)
            count, total = count + finite.size, total + float(finite.sum())
            squares += float(np.square(finite).sum())
    return dataclasses.replace(
        stats,
        min=low if count else None,
        mean=total / count if count else None,
        std=math.sqrt(deviation / count) if count else None,
        max=high if count else None,
        norm=math.sqrt(squares) if count else None,
        num_nan=num_nan,
        num_inf=num_inf,
        num_zeros=num_zeros,
    )


def _merged(deviation: float, count: int, total: float, more: np.ndarray[Any, Any]) -> float:
    """Returns the sum of squared deviations from the common mean of the values so far and more.

    Chan, Golub and LeVeque's update: the difference of two large sums would lose every digit.
    """
    mean = float(more.mean())
    own = float(((more - mean) ** 2).sum())
    if not count:
        return own
    gap = mean - total / count
    return deviation + own + gap * gap * count * more.size / (count + more.size)


# ------------------------------------------------------------------------------------ for people


def _print(found: list[_Stats]) -> None:
    printer = output.Printer()
    counts = {"zeros": "num_zeros", "NaN": "num_nan", "Inf": "num_inf"}
    shown = ["dtype", "min", "mean", "std", "max", "norm"]
    shown += [name for name, field in counts.items() if any(getattr(s, field) for s in found)]
    left_out: list[str] = []
    for name in ("dtype", "norm", "std"):  # left out where the terminal is too narrow
        table = _table(found, shown)
        if printer.is_pipe or printer.width_of(table) <= printer.console.width:
            break
        shown.remove(name)
        left_out.append(name)
    printer.print(_table(found, shown))
    if left_out:
        printer.print(f"not shown: {', '.join(reversed(left_out))} (--json, or a wider terminal)")


def _table(found: list[_Stats], shown: list[str]) -> Table:
    from rich.text import Text

    table = output.table("leaf", *shown)
    table.columns[0].no_wrap, table.columns[0].overflow = False, "fold"
    longest = max(len(f"{each.item}.{each.leaf}") for each in found)
    table.columns[0].min_width = min(_MIN_NAME, longest)
    for column in table.columns[1:]:
        column.justify = "left" if str(column.header) == "dtype" else "right"
    for each in found:
        cells = {
            "dtype": output.styled(each.dtype, "green"),
            "zeros": Text(
                f"{each.num_zeros / each.num_elements:.0%}" if each.num_zeros else "", "dim"
            ),
            "NaN": Text(f"{each.num_nan:,}" if each.num_nan else "", "bold red"),
            "Inf": Text(f"{each.num_inf:,}" if each.num_inf else "", "bold red"),
        }
        for name in ("min", "mean", "std", "max", "norm"):
            value = getattr(each, name)
            cells[name] = Text("" if value is None else output.number(value))
        table.add_row(output.styled(f"{each.item}.{each.leaf}"), *(cells[name] for name in shown))
    return table
