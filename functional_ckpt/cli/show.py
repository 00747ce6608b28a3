"""`fckpt show`: the contents of a checkpoint."""

from __future__ import annotations

import argparse
import datetime
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from functional_ckpt.cli import output, targets, trees
from functional_ckpt.core.tree import structure
from functional_ckpt.format import checkpoint_dir, parts
from functional_ckpt.steps import history
from functional_ckpt.steps.late_metrics import LateMetrics
from functional_ckpt.storage import commit, queries

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from functional_ckpt.interop.opened import ForeignCheckpoint

_MAX_TABLE_ROWS = 1000
# Blanks between two columns, and the least width of the names and of the values.
_GAP, _MIN_WIDTH = 3, 10
_JUSTIFY: tuple[Literal["left", "right"], ...] = ("left", "left", "left", "right", "left")


def run(arguments: argparse.Namespace) -> int:
    """Prints the checkpoint's metadata and the tree of each item."""
    step = arguments.number if arguments.step is None else arguments.step
    checkpoint = targets.checkpoint_of(
        arguments.checkpoint, step, arguments.prefix, opens_foreign=True
    )
    opened = checkpoint.open()
    names = chosen_items(opened, arguments.item)
    trees_of = {name: opened.tree(name) for name in names if opened.items[name] == "tree"}
    values = {name: opened.json(name) for name in names if opened.items[name] == "json"}
    facts = _facts(opened)
    if checkpoint.is_foreign:
        source = cast("ForeignCheckpoint", opened).source
        facts |= {"format": source.format, "left_out": list(source.left_out)}
    elif (found := parts.missing(opened.storage, opened.path)) is not None:
        facts["part"] = [f"{found}"]
    if arguments.json:
        output.as_json({**facts, "items": _item_records(names, trees_of, values)})
    else:
        _print(checkpoint, facts, names, trees_of, values, arguments.depth)
    return 0


def chosen_items(opened: checkpoint_dir.OpenCheckpoint, wanted: Sequence[str] | None) -> list[str]:
    """Returns the items named, or all; raises `StepNotFoundError` for one that is not there."""
    for name in wanted or ():
        if name not in opened.items:
            raise checkpoint_dir.missing_item(opened.path, name, opened.items)
    return [name for name in opened.items if not wanted or name in wanted]


def _facts(opened: checkpoint_dir.OpenCheckpoint) -> dict[str, Any]:
    """Facts about the checkpoint besides its items."""
    root = os.path.dirname(opened.path)
    late = LateMetrics(opened.storage, root)
    if opened.step is not None and queries.exists(
        opened.storage, os.path.join(root, commit.HIDDEN)
    ):
        late.look(opened.step)
    info = history.sound_info(opened.files)
    late.of(info, opened.path)  # raises where some of it is damaged
    info = late.added_to(info)
    size_bytes = (
        queries.total_bytes(opened.storage, opened.path)
        if queries.is_directory(opened.storage, opened.path)
        else os.path.getsize(opened.path)
    )
    return {
        "schema": "fckpt.show/1",
        "path": opened.path,
        "step": opened.step,
        "time": output.utc(info.time),
        "writer": "other" if opened.record is None else "functional_ckpt",
        "size_bytes": size_bytes,
        "metrics": None if info.metrics is None else dict(info.metrics),
        "progress": None if info.progress is None else info.progress.to_json(),
        "custom_metadata": dict(opened.custom_metadata),
    }


def _item_records(
    names: Sequence[str], trees_of: Mapping[str, checkpoint_dir.OpenItem], values: Mapping[str, Any]
) -> dict[str, Any]:
    records: dict[str, Any] = {}
    for name in names:
        if name in values:
            records[name] = {"format": "json", "value": values[name]}
            continue
        item = trees_of[name]
        num_arrays, size_bytes = trees.totals(item.root)
        records[name] = {
            "format": "tree",
            "handler": None if item.record is None else item.record.handler,
            "num_arrays": num_arrays,
            "size_bytes": size_bytes,
            "leaves": trees.leaf_records(item.root),
        }
    return records


# ------------------------------------------------------------------------------------ for people


def _print(
    checkpoint: targets.Checkpoint,
    facts: Mapping[str, Any],
    names: Sequence[str],
    trees_of: Mapping[str, checkpoint_dir.OpenItem],
    values: Mapping[str, Any],
    depth: int | None,
) -> None:
    from rich.text import Text

    printer = output.Printer()
    printer.print(output.styled(checkpoint.path, "bold"))
    printer.print(output.styled(_summary(printer, checkpoint, facts), "dim"))
    for title, words in (
        ("metrics", _pairs(facts["metrics"] or {})),
        ("progress", _pairs({k: v for k, v in (facts["progress"] or {}).items() if v})),
        ("custom metadata", _pairs(facts["custom_metadata"])),
        ("left out", facts.get("left_out", ())),
        ("part", facts.get("part", ())),
    ):
        if words:
            line = Text(f"{title}  ", "dim")
            printer.print(line.append(output.printable(", ".join(words)), "default not dim"))
    for name in names:
        printer.print(Text())
        if name in values:
            printer.print(_heading(name, "JSON"))
            text = json.dumps(values[name], indent=2, ensure_ascii=printer.is_ascii)
            for line in text.splitlines():
                printer.print(output.styled(f"  {line}"))
            continue
        item = trees_of[name]
        num_arrays, size_bytes = trees.totals(item.root)
        of = f"{_arrays(num_arrays)}, {output.size(size_bytes)}"
        printer.print(_heading(name, of))
        _print_tree(printer, item.root, depth)


def _summary(
    printer: output.Printer, checkpoint: targets.Checkpoint, facts: Mapping[str, Any]
) -> str:
    time = datetime.datetime.fromisoformat(facts["time"])
    facts_shown = [
        *([] if checkpoint.step is None else [f"step {checkpoint.step}"]),
        f"saved {output.clock(time)} ({output.age(time, datetime.datetime.now(datetime.UTC))})",
        f"{output.size(facts['size_bytes'])} on disk",
        *([facts.get("format", "foreign")] if facts["writer"] == "other" else []),
    ]
    return printer.sign(" · ", ", ").join(facts_shown)


def _pairs(record: Mapping[str, Any]) -> list[str]:
    return [f"{key}={_plain(value)}" for key, value in record.items()]


def _plain(value: Any) -> str:
    if isinstance(value, (bool, int, float)):
        return output.number(value)
    return value if isinstance(value, str) else json.dumps(value)


def _heading(name: str, what: str) -> Text:
    from rich.text import Text

    return Text.assemble((output.printable(name), "bold cyan"), (f"  {what}", "dim"))


class _Line(NamedTuple):
    """One line of a tree: its guides, and text and style of each column."""

    guides: str
    cells: tuple[tuple[str, str], ...]


def _print_tree(printer: output.Printer, root: structure.Node, depth: int | None) -> None:
    """Prints a table; of many rows plain text, which is laid out in a hundredth of the time."""
    lines = [_line(printer, row) for row in trees.rows(root, depth)]
    if len(lines) > _MAX_TABLE_ROWS:
        printer.write(_aligned(lines))
    else:
        printer.print(_table(lines, printer.console.width))


def _table(lines: Sequence[_Line], width: int) -> Table:
    """Returns a table in which values, and then names, are cut where the terminal is narrow."""
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, _GAP, 0, 0))
    widths = [
        max(cell_len(line.cells[number][0]) + (not number) * len(line.guides) for line in lines)
        for number in range(len(_JUSTIFY))
    ]
    rest = width - sum(widths[1:4]) - (len(widths) - 1) * _GAP
    widths[4] = min(widths[4], max(_MIN_WIDTH, rest - widths[0]))
    widths[0] = min(widths[0], max(_MIN_WIDTH, rest - widths[4]))
    for justify, each in zip(_JUSTIFY, widths, strict=True):
        table.add_column(justify=justify, no_wrap=True, width=each, overflow="ellipsis")
    for line in lines:
        first, *rest = line.cells
        name = Text.assemble((line.guides, "dim"), first)
        table.add_row(name, *(Text(text, style) for text, style in rest))
    return table


def _aligned(lines: Sequence[_Line]) -> Iterator[str]:
    columns = [[line.guides + line.cells[0][0] for line in lines]]
    columns += [[line.cells[number][0] for line in lines] for number in range(1, len(_JUSTIFY))]
    widths = [max(map(len, column)) for column in columns]
    for cells in zip(*columns, strict=True):
        yield "   ".join(
            text.rjust(width) if justify == "right" else text.ljust(width)
            for text, width, justify in zip(cells, widths, _JUSTIFY, strict=True)
        ).rstrip()


def _line(printer: output.Printer, row: trees.Row) -> _Line:
    bar, blank = printer.sign("│  ", "|  "), "   "
    tee, corner = printer.sign("├─ ", "+- "), printer.sign("└─ ", "`- ")
    guides = "".join(blank if is_last else bar for is_last in row.is_last[:-1])
    if row.is_last:
        guides += corner if row.is_last[-1] else tee
    is_branch = isinstance(row.node, structure.BranchNode)
    key = row.key if row.is_last else "(the item itself)"
    name = (output.printable(key), "bold" if is_branch else "")
    return _Line("  " + guides, (name, *_cells(row)))


def _cells(row: trees.Row) -> tuple[tuple[str, str], ...]:
    """Text and style of dtype, shape, size and details."""
    node = row.node
    if isinstance(node, structure.ArrayNode):
        shape = f"[{', '.join(map(str, node.spec.shape))}]"
        size = "" if node.tied_to is not None else output.size(node.spec.size_bytes)
        kind = output.printable(node.dtype)
        return ((kind, "green"), (shape, ""), (size, ""), (output.printable(_remarks(node)), "dim"))
    if isinstance(node, structure.ValueNode):
        kind = "" if node.kind == "none" else node.kind
        return ((kind, "green"), ("", ""), ("", ""), (output.printable(trees.describe(node)), ""))
    kind = "" if node.kind == "dict" and node.children else node.kind
    if not node.children:
        return ((kind, "green dim"), ("", ""), ("", ""), ("empty", "dim"))
    if not row.is_summary:
        return ((kind, "dim"), ("", ""), ("", ""), ("", ""))
    num_arrays, size_bytes = trees.totals(node)
    return ((kind, "dim"), ("", ""), (output.size(size_bytes), ""), (_arrays(num_arrays), "dim"))


def _arrays(count: int) -> str:
    return f"{count} array{'' if count == 1 else 's'}"


def _remarks(node: structure.ArrayNode) -> str:
    if node.tied_to is not None:
        return f"tied to {node.tied_to}"
    if node.detail.get("parameter"):
        return "parameter" if node.detail.get("requires_grad", True) else "frozen parameter"
    return "" if node.kind == "tensor" else node.kind.replace("_", " ")
