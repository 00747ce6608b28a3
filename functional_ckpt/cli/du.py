"""`fckpt du`: the disk space of each step, where steps share files."""

from __future__ import annotations

import argparse

from functional_ckpt.cli import output, rm
from functional_ckpt.storage import queries


def run(arguments: argparse.Namespace) -> int:
    """Prints the sizes; 0."""
    root = rm.root_of(arguments.directory, arguments.prefix)
    known: set[object] = set()
    spaces = {
        step: queries.space(root.storage, root.checkpoint(step).path, known) for step in root.steps
    }
    total_bytes = sum(space.added_bytes for space in spaces.values())
    if arguments.json:
        output.as_json(
            {
                "schema": "fckpt.du/1",
                "path": root.path,
                "total_bytes": total_bytes,
                "steps": [{"step": step, **space._asdict()} for step, space in spaces.items()],
            }
        )
        return 0
    from rich.text import Text

    table = output.table("step", "size", "adds", "frees")
    for column in table.columns:
        column.justify = "right"
    for step, space in spaces.items():
        table.add_row(Text(str(step), "bold cyan"), *(Text(output.size(each)) for each in space))
    printer = output.Printer()
    printer.print(
        output.styled(root.path, "bold"), Text(f"{output.size(total_bytes)}", "dim"), Text(), table
    )
    return 0
