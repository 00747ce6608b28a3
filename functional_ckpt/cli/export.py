"""`fckpt export`: exports a step in a foreign format."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from functional_ckpt import errors
from functional_ckpt.cli import output, targets
from functional_ckpt.cli.show import chosen_items

if TYPE_CHECKING:
    from functional_ckpt.format import checkpoint_dir
    from functional_ckpt.interop.source import Source

_HF_OPTIONS = ("max_shard_size", "like", "dtype", "variant", "config", "key_prefix", "workers")


def run(arguments: argparse.Namespace) -> int:
    """Writes the selected items and prints a summary."""
    from functional_ckpt.interop import atomic_output, part_files

    if arguments.to != "hf" or not part_files.is_s3(arguments.destination):
        atomic_output.check_destination(arguments.destination)
    checkpoint = targets.checkpoint_of(arguments.checkpoint, arguments.step, arguments.prefix)
    atomic_output.check_disjoint(checkpoint.path, arguments.destination)
    _check_options(arguments)
    opened = checkpoint.open()
    chosen_items(opened, arguments.item)
    if arguments.to in ("hf", "safetensors"):
        items = [_weights_item(arguments, opened)]
        _export_weights(arguments, opened, items[0])
    else:
        from functional_ckpt.interop import native  # late: torch

        source = native.open_step(checkpoint.storage, checkpoint.path)
        items = list(arguments.item or source)
        _export_tree(arguments, source, items)
    facts = {"path": arguments.destination, "format": arguments.to, "items": items}
    if arguments.json:
        output.as_json({"schema": "fckpt.export/1", "checkpoint": checkpoint.path, **facts})
    else:
        text = f"{checkpoint.path} -> {arguments.destination} ({arguments.to}): "
        print(output.printable(text + f"items {', '.join(items)}"))
    return 0


def _check_options(arguments: argparse.Namespace) -> None:
    """Refuses options of the hf format for other formats."""
    for name in _HF_OPTIONS:
        if arguments.to != "hf" and getattr(arguments, name) is not None:
            option = name.replace("_", "-")
            raise errors.UsageError(f"--{option} is for --to hf, not for --to {arguments.to}.")


def _weights_item(arguments: argparse.Namespace, opened: checkpoint_dir.OpenCheckpoint) -> str:
    named = arguments.item or (["model"] if "model" in opened.items else list(opened.items))
    if len(named) != 1:
        raise errors.UsageError(
            f"--to {arguments.to} writes the weights of one item: choose one with --item of "
            f"{', '.join(opened.items)}.",
            path=opened.path,
        )
    return str(named[0])


def _export_weights(
    arguments: argparse.Namespace, opened: checkpoint_dir.OpenCheckpoint, item: str
) -> None:
    from functional_ckpt.interop import (
        atomic_output,
        hub_export,
        plain_files,
        stored_files,
        weights,
    )

    if arguments.to == "hf":
        hub_export.export(
            opened.path,
            arguments.destination,
            item=item,
            max_shard_size=arguments.max_shard_size,
            like=arguments.like,
            dtype=arguments.dtype,
            key_prefix=arguments.key_prefix or "",
            variant=arguments.variant,
            config=arguments.config,
            num_workers=arguments.workers or 1,
        )
        return
    given = weights.of_step(opened, item)
    plain_files.require(given.dtypes.items(), arguments.destination)
    stored = stored_files.of_item(opened, item)
    with atomic_output.atomic_output(arguments.destination) as tmp:
        if stored is not None and stored.is_one_of(given.sizes):
            stored.copy(next(iter(stored.files)), tmp)
        else:
            names = {name: name for name in given.sizes}
            plain = plain_files.PlainFile(tmp, names, given.dtypes, given.shapes, given.tied)
            plain_files.write_files(opened.path, item, [plain])


def _export_tree(arguments: argparse.Namespace, source: Source, items: list[str]) -> None:
    from functional_ckpt.interop import dcp, torch_save

    content: dict[str, Any] = {name: source[name] for name in items}
    if arguments.to == "dcp":
        dcp.save(content, arguments.destination)
    else:
        # load_state_dict takes a single item
        alone = arguments.item and len(items) == 1
        torch_save.save(content[items[0]] if alone else content, arguments.destination)
