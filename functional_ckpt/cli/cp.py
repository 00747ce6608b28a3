"""`fckpt cp`: copies a checkpoint, verified."""

from __future__ import annotations

import argparse

from functional_ckpt.cli import output, targets


def run(arguments: argparse.Namespace) -> int:
    """Copies, and prints a summary."""
    from functional_ckpt import transform  # late: torch

    checkpoint = targets.checkpoint_of(arguments.source, arguments.step, arguments.prefix)
    with output.progress_bar("copying") as progress:
        transform.copy(checkpoint.path, arguments.destination, report=progress)
    output.summary("cp", arguments, checkpoint.path, arguments.destination)
    return 0
