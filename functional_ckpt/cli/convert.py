"""`fckpt convert`: converts a foreign checkpoint to a step."""

from __future__ import annotations

import argparse

from functional_ckpt import errors
from functional_ckpt.cli import output
from functional_ckpt.format import checkpoint_dir
from functional_ckpt.storage import queries


def run(arguments: argparse.Namespace) -> int:
    """Opens the source, saves its items and prints a summary."""
    from functional_ckpt import checkpoint  # late: torch, which a listing does not need
    from functional_ckpt.interop import atomic_output, detect, opened
    from functional_ckpt.manager import CheckpointManager
    from functional_ckpt.storage.open import connect

    atomic_output.check_disjoint(arguments.source, arguments.destination)
    storage, path = connect(arguments.destination)
    if arguments.step is None and queries.exists(storage, path):
        raise errors.StepExistsError(
            f"{path} exists and is never overwritten; choose another path, or --step N to add a "
            "step to a directory of steps.",
            path=path,
        )
    source = detect.recognise(arguments.source, arguments.format)
    for name in arguments.item or ():
        if name not in source:
            raise checkpoint_dir.missing_item(source.path, name, source)
    items = {name: source[name] for name in arguments.item or source}
    opened.check_bytes(items)
    if arguments.step is None:
        checkpoint.save(path, items)
    else:
        with CheckpointManager(path) as manager:
            if arguments.step in manager.all_steps():
                raise errors.StepExistsError(
                    f"{path} has step {arguments.step} already.", path=path, step=arguments.step
                )
            manager.save(arguments.step, items, force=True)
    facts = {"path": path, "step": arguments.step, "format": source.format, "items": list(items)}
    facts |= {"left_out": list(source.left_out)}
    if arguments.json:
        output.as_json({"schema": "fckpt.convert/1", **facts})
    else:
        where = path if arguments.step is None else f"{path}, step {arguments.step}"
        text = f"{source.path} ({source.format}) -> {where}: items {', '.join(items)}"
        print(output.printable(text))
        if source.left_out:
            print(output.printable(f"left out: {', '.join(source.left_out)}"))
    return 0
