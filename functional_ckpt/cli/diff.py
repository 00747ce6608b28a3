"""`fckpt diff`: what differs between two checkpoints."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from functional_ckpt import errors
from functional_ckpt.cli import output, step_words, targets, trees
from functional_ckpt.cli.compare import Difference, compare_items, compare_json
from functional_ckpt.format import checkpoint_dir

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


# Of more differences, the largest are listed, unless --all asks for every one.
_MAX_ROWS = 5


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _ItemDiff:
    """The outcome for one item; `only_in` where the other has none of this name."""

    only_in: str | None = None
    num_equal: int = 0
    differences: tuple[Difference, ...] = ()

    @property
    def is_equal(self) -> bool:
        return self.only_in is None and not self.differences


def run(arguments: argparse.Namespace) -> int:
    """Prints the differences; 1 if there are any. Times, metrics and metadata are not compared."""
    pair = _pair(arguments)
    a, b = (each.open() for each in pair)
    names = _names(a, b, arguments.item)
    with output.progress_bar("comparing") as progress:
        diffs = _compare(a, b, names, progress)
    is_equal = all(diff.is_equal for diff in diffs.values())
    if arguments.json:
        output.as_json(_record(pair, diffs, is_equal=is_equal))
    else:
        _print(pair, diffs, is_equal=is_equal, lists_all=arguments.all)
    return 0 if is_equal else 1


def _pair(arguments: argparse.Namespace) -> list[targets.Checkpoint]:
    """`diff A B`; two steps of one directory, `diff DIR 15 19`; one and the latest, `diff DIR 15`.

    Raises:
        UsageError: The second of three arguments is no step.
    """
    named: list[tuple[str, step_words.StepWord | None]] = [(arguments.a, None), (arguments.b, None)]
    if arguments.number is not None:
        try:
            word = step_words.parse(arguments.b)
        except argparse.ArgumentTypeError as error:
            raise errors.UsageError(f"diff DIR STEP STEP: {error}.") from error
        named = [(arguments.a, word), (arguments.a, arguments.number)]
    elif (word := step_words.step_of(arguments.b)) is not None:
        named = [(arguments.a, word), (arguments.a, "latest")]
    return [
        targets.checkpoint_of(text, step, arguments.prefix, opens_foreign=True)
        for text, step in named
    ]


def _names(
    a: checkpoint_dir.OpenCheckpoint, b: checkpoint_dir.OpenCheckpoint, wanted: Sequence[str] | None
) -> list[str]:
    names = list({**a.items, **b.items})
    for name in wanted or ():
        if name not in names:
            raise errors.StepNotFoundError(
                f"neither has an item {name!r}; they have {', '.join(names)}."
            )
    return [name for name in names if not wanted or name in wanted]


def _compare(
    a: checkpoint_dir.OpenCheckpoint,
    b: checkpoint_dir.OpenCheckpoint,
    names: Sequence[str],
    progress: Callable[[int, int], None],
) -> dict[str, _ItemDiff]:
    common = [name for name in names if name in a.items and name in b.items]
    is_tree = {name: a.items[name] == b.items[name] == "tree" for name in common}
    opened = {name: (a.tree(name), b.tree(name)) for name in common if is_tree[name]}
    total = sum(trees.totals(first.root)[1] for first, _ in opened.values())
    done = 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress(done, total)

    diffs: dict[str, _ItemDiff] = {}
    for name in names:
        if name not in common:
            diffs[name] = _ItemDiff(only_in="a" if name in a.items else "b")
        elif is_tree[name]:
            diffs[name] = _summarise(list(compare_items(*opened[name], advance)))
        elif a.items[name] == b.items[name]:
            diffs[name] = _summarise(list(compare_json(a.json(name), b.json(name))))
        else:
            formats = (a.items[name], b.items[name])
            whole = Difference(leaf="(the item itself)", kind="kind", a=formats[0], b=formats[1])
            diffs[name] = _ItemDiff(differences=(whole,))
    return diffs


def _summarise(outcomes: Sequence[Difference | None]) -> _ItemDiff:
    found = tuple(each for each in outcomes if each is not None)
    return _ItemDiff(num_equal=len(outcomes) - len(found), differences=found)


def _record(
    pair: Sequence[targets.Checkpoint], diffs: Mapping[str, _ItemDiff], *, is_equal: bool
) -> dict[str, Any]:
    a, b = ({"path": each.path, "step": each.step} for each in pair)
    items = {
        name: {"equal": diff.is_equal, **dataclasses.asdict(diff)} for name, diff in diffs.items()
    }
    return {"schema": "fckpt.diff/1", "equal": is_equal, "a": a, "b": b, "items": items}


# ------------------------------------------------------------------------------------ for people


def _print(
    pair: Sequence[targets.Checkpoint],
    diffs: Mapping[str, _ItemDiff],
    *,
    is_equal: bool,
    lists_all: bool,
) -> None:
    from rich.text import Text

    printer = output.Printer()
    for letter, each in zip("ab", pair, strict=True):
        printer.print(Text.assemble((f"{letter}  ", "bold"), output.printable(each.path)))
    for name, diff in diffs.items():
        printer.print(Text(), _heading(printer, name, diff))
        data = [each for each in diff.differences if each.kind == "data"]
        others = [each for each in diff.differences if each.kind != "data"]
        shown_others, shown_data = others, data
        if not lists_all:
            shown_others = others[:_MAX_ROWS]
            shown_data = sorted(data, key=_size_of, reverse=True)[:_MAX_ROWS]
        if others:
            printer.print(_structure_table(printer, shown_others))
        if data:
            printer.print(*([Text()] if others else []), _data_table(printer, shown_data))
        num_hidden = len(others) + len(data) - len(shown_others) - len(shown_data)
        if num_hidden:
            least = " with smaller differences" if len(shown_others) == len(others) else ""
            printer.print(Text(f"and {_leaves(num_hidden)}{least} (--all)", "dim"))
    if is_equal:
        printer.print(Text(), Text("Every leaf is equal.", "green"))


def _heading(printer: output.Printer, name: str, diff: _ItemDiff) -> Text:
    from rich.text import Text

    if diff.only_in is not None:
        what, style = f"only in {diff.only_in}", "yellow"
    elif diff.is_equal:
        what, style = f"equal, {_leaves(diff.num_equal)}", "green"
    else:
        what, style = (
            f"{len(diff.differences)} of {_leaves(diff.num_equal + len(diff.differences))} differ",
            "red",
        )
    mark = printer.sign("= ", "= ") if diff.is_equal else printer.sign("≠ ", "! ")
    return Text.assemble((mark, style), (output.printable(name), "bold cyan"), (f"  {what}", style))


def _size_of(difference: Difference) -> float:
    """Orders differences of data: not-a-number first, values that are no numbers last."""
    if difference.max_abs is None:
        return -1.0
    return math.inf if math.isnan(difference.max_abs) else difference.max_abs


def _leaves(count: int) -> str:
    return f"{count} {'leaf' if count == 1 else 'leaves'}"


def _structure_table(printer: output.Printer, differences: Sequence[Difference]) -> Table:
    from rich.text import Text

    table = output.table("leaf", "difference", "a", "b")
    for column in (table.columns[0], *table.columns[2:]):
        column.no_wrap, column.overflow = False, "fold"
    nothing = Text(printer.sign("–", "-"), "dim")
    for each in differences:
        table.add_row(
            output.styled(each.leaf),
            Text(each.kind, "yellow"),
            nothing if each.a is None else output.styled(each.a),
            nothing if each.b is None else output.styled(each.b),
        )
    return table


def _data_table(printer: output.Printer, differences: Sequence[Difference]) -> Table:
    """Returns a table of the numbers of different elements, and their differences."""
    from rich.text import Text

    table = output.table("leaf", "array", "differing", printer.sign("max |a−b|", "max |a-b|"))
    table.columns[0].no_wrap, table.columns[0].overflow = False, "fold"
    table.columns[2].justify = table.columns[3].justify = "right"
    for each in differences:
        count, total = each.num_different or 0, each.num_elements or 0
        largest = "" if each.max_abs is None else output.number(float(each.max_abs))
        table.add_row(
            output.styled(each.leaf),
            output.styled(each.a or "", "green"),
            Text(f"{count:,}" if count == total else f"{count:,} of {total:,}"),
            Text(largest, "yellow"),
        )
    return table
