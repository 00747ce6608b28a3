"""`fckpt edit`: writes a checkpoint with leaves dropped, cast or renamed."""

from __future__ import annotations

import argparse

from functional_ckpt.cli import output, targets


def run(arguments: argparse.Namespace) -> int:
    """Edits, and prints a summary."""
    from functional_ckpt import transform  # late: torch

    checkpoint = targets.checkpoint_of(
        arguments.checkpoint, arguments.step, arguments.prefix, opens_foreign=True
    )
    casts = (text.partition(":") for text in arguments.cast)
    with output.progress_bar("writing") as progress:
        transform.edit(
            checkpoint.path,
            arguments.output,
            only=arguments.keep,
            ignore=arguments.drop,
            key_map=dict(arguments.rename) or None,
            cast={pattern or "*": dtype for dtype, _, pattern in casts},
            report=progress,
        )
    output.summary("edit", arguments, checkpoint.path, arguments.output)
    return 0
