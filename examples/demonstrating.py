"""Shared code of the demos: output, errors, start."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from absl import app, flags
from rich.console import Console
from rich.markup import escape

import functional_ckpt as fc

TMP_SUFFIX = ".orbax-checkpoint-tmp"
console = Console(highlight=False)


class DemoError(Exception):
    """Something did not go as it must."""


def run(demo: Callable[[Path], None]) -> None:
    """Parses the flags, runs a demo in `--workdir`, and exits 1 where it fails."""

    def main(args: list[str]) -> None:
        if args[1:]:
            raise app.UsageError(f"Unknown arguments: {' '.join(args[1:])}")
        try:
            demo(Path(flags.FLAGS.workdir))
        except (DemoError, fc.CheckpointError) as error:
            console.print("[bold red]Failed.[/]", escape(str(error)))
            sys.exit(1)

    app.run(main)
