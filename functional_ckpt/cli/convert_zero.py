"""`fckpt convert_zero`: a ZeRO-1 optimizer's state for another number of data-parallel ranks."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from functional_ckpt import errors
from functional_ckpt.cli import output


def run(arguments: argparse.Namespace) -> int:
    """Converts, and prints the number of written states."""
    if arguments.convert_to_sharded and arguments.dp_size is None:
        raise errors.UsageError("--convert_to_sharded needs --dp_size.")
    if arguments.convert_to_full and arguments.dp_size is not None:
        raise errors.UsageError("--dp_size is for --convert_to_sharded, not for --convert_to_full.")
    from functional_ckpt import checkpoint  # late: torch
    from functional_ckpt.interop import zero_files

    def save(path: str, items: Mapping[str, Any]) -> None:
        checkpoint.save(path, items)

    num_written = zero_files.convert(
        arguments.input_dir,
        arguments.output_dir,
        dp_size=arguments.dp_size,
        save=save,
        num_workers=arguments.num_workers,
    )
    if arguments.json:
        record = {"path": arguments.output_dir, "num_states": num_written}
        output.as_json({"schema": "fckpt.convert_zero/1", **record})
    else:
        kind = "merged" if arguments.dp_size is None else "sharded"
        text = f"{arguments.input_dir} -> {arguments.output_dir}: {num_written} {kind} states"
        print(output.printable(text))
    return 0
