"""The arguments of each command."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeAlias

from functional_ckpt.cli import step_words

_FLOATS = ("float16", "bfloat16", "float32", "float64")
_A_STEP = "a number, latest, or best:METRIC[:min|max]"
_A_CHECKPOINT = "a checkpoint, or a manager's directory (its latest step)"
_NEW = "the checkpoint to create, a path or a URI; must not exist"

_Add: TypeAlias = Callable[[str, str, str], argparse.ArgumentParser]
"""Adds a command: name, summary, example."""


def add_all(add: _Add) -> None:
    """Adds every command."""
    _add_listings(add)
    _add_readers(add)
    _add_removals(add)
    _add_transforms(add)
    _add_conversions(add)


def _add_listings(add: _Add) -> None:
    ls = add("ls", "List the steps in a directory", "runs/digits --sort loss --last 5")
    ls.add_argument("directory", help="a manager's directory, or one checkpoint")
    ls.add_argument(
        "--best",
        metavar="METRIC[:min|max]",
        action="append",
        default=[],
        help="mark the best value of this metric, too; by default those of the metrics that the "
        "run's keep policies rank are marked",
    )
    ls.add_argument("-l", "--long", action="store_true", help="show the time of each save, too")
    ls.add_argument(
        "--metrics", metavar="A,B", help="show these metrics; all: every one, however wide"
    )
    ls.add_argument("--sort", metavar="KEY", help="sort by step, size, time or a metric")
    ls.add_argument("--reverse", action="store_true", help="reverse the order")
    ls.add_argument("--last", type=_count, metavar="N", help="only the last N rows")
    du = add("du", "Show the disk space of each step", "runs/digits")
    du.add_argument("directory", help="a manager's directory")
    watch = add("watch", "Show the steps of a run as they are saved", "runs/digits")
    watch.add_argument("directory", help="a manager's directory")
    watch.add_argument(
        "--interval", type=_seconds, default=2.0, metavar="SECONDS", help="how often to look"
    )
    watch.add_argument("--last", type=_count, default=10, metavar="N", help="only the last N steps")
    report = add("report", "Write a report of a run as one HTML file", "runs/digits -o report.html")
    report.add_argument("directory", help="a manager's directory")
    report.add_argument(
        "-o", "--output", default="report.html", metavar="FILE", help="default: report.html"
    )
    report.add_argument(
        "--compare",
        nargs=2,
        type=step_words.parse,
        metavar="STEP",
        help="two steps whose arrays are compared; by default the last two, of a small run",
    )
    report.add_argument("--verify", action="store_true", help="verify every step, however large")


def _add_readers(add: _Add) -> None:
    show = add("show", "Show the items and leaves of a checkpoint", "runs/digits latest --depth 2")
    show.add_argument("checkpoint", help=_A_CHECKPOINT)
    show.add_argument("number", nargs="?", type=step_words.parse, metavar="STEP", help=_A_STEP)
    _add_choice(show)
    show.add_argument(
        "--depth", type=_count, metavar="N", help="summarise containers nested more than N deep"
    )
    cat = add("cat", "Print the value of an item or a leaf", "runs/digits config.lr")
    cat.add_argument("checkpoint", help=_A_CHECKPOINT)
    cat.add_argument("name", metavar="ITEM[.LEAF]", help="as fckpt show prints them")
    cat.add_argument("--step", type=step_words.parse, metavar="STEP", help=_A_STEP)
    stats = add(
        "stats", "Show range, mean, norm and NaNs of each array", "runs/digits --item model"
    )
    stats.add_argument("checkpoint", help=_A_CHECKPOINT)
    _add_choice(stats)
    stats.add_argument(
        "--leaf", default="*", metavar="PATTERN", help="only ITEM.LEAF like this: '*.weight'"
    )
    verify = add("verify", "Check every byte against its digest", "runs/digits")
    verify.add_argument(
        "checkpoint", nargs="+", help="a checkpoint, or a manager's directory (all its steps)"
    )
    verify.add_argument(
        "--step", type=step_words.parse, metavar="STEP", action="append", help=f"only: {_A_STEP}"
    )
    diff = add("diff", "Compare two checkpoints", "runs/digits 80 latest")
    diff.add_argument("a", help=_A_CHECKPOINT)
    diff.add_argument("b", help="the other checkpoint; or a step of A")
    diff.add_argument(
        "number",
        nargs="?",
        type=step_words.parse,
        metavar="STEP",
        help="another step of A; its latest by default",
    )
    diff.add_argument("--item", metavar="NAME", action="append", help="only this item")
    diff.add_argument("--all", action="store_true", help="list every leaf that differs")


def _add_choice(command: argparse.ArgumentParser) -> None:
    command.add_argument("--step", type=step_words.parse, metavar="STEP", help=_A_STEP)
    command.add_argument("--item", metavar="NAME", action="append", help="only this item")


def _add_removals(add: _Add) -> None:
    rm = add("rm", "Remove steps", "runs/digits 10 20")
    rm.add_argument("directory", help="a manager's directory, with no live writer")
    rm.add_argument("steps", nargs="+", type=step_words.parse, metavar="STEP", help=_A_STEP)
    rm.add_argument("--latest-too", action="store_true", help="allow removing the latest step")
    prune = add(
        "prune",
        "Remove the steps that no policy keeps",
        "runs/digits --keep-latest 3 --keep-best loss:min:2 --dry-run",
    )
    prune.add_argument("directory", help="a manager's directory, with no live writer")
    prune.add_argument("--keep-latest", type=_count, metavar="N", help="keep the N latest steps")
    prune.add_argument("--keep-every", type=_count, metavar="N", help="keep multiples of N")
    prune.add_argument(
        "--keep-best",
        action="append",
        default=[],
        metavar="METRIC[:min|max][:N]",
        help="keep the N (1) steps with the best value of the metric",
    )
    for command in (rm, prune):
        command.add_argument(
            "--dry-run", action="store_true", help="remove nothing; list the steps that would go"
        )


def _add_transforms(add: _Add) -> None:
    merge = add(
        "merge", "Write the mean of checkpoints", "runs/digits --last 5 -o runs/digits_mean"
    )
    merge.add_argument(
        "checkpoint",
        nargs="+",
        help="checkpoints; or a manager's directory, and steps of it: runs/digits 10 20 best:loss",
    )
    _add_output(merge)
    merge.add_argument(
        "--weights",
        type=float,
        nargs="+",
        metavar="W",
        help="the weight of each; their sum need not be one",
    )
    merge.add_argument("--item", metavar="NAME", action="append", help="only this item")
    chosen = merge.add_mutually_exclusive_group()
    chosen.add_argument(
        "--last", type=_count, metavar="N", help="the last N steps of the directory"
    )
    chosen.add_argument(
        "--best",
        nargs=2,
        metavar=("N", "METRIC[:min|max]"),
        help="its N steps with the best value of the metric",
    )
    edit = add(
        "edit",
        "Drop, cast or rename leaves, in a new checkpoint",
        "runs/digits -o small --keep model --cast bfloat16 --rename model.body=model.encoder",
    )
    edit.add_argument("checkpoint", help=_A_CHECKPOINT)
    _add_output(edit)
    edit.add_argument("--step", type=step_words.parse, metavar="STEP", help=_A_STEP)
    edit.add_argument(
        "--keep",
        action="append",
        metavar="PATTERN",
        help="keep only the items (model) or leaves ('model.*.weight') like this",
    )
    edit.add_argument(
        "--drop", action="append", metavar="PATTERN", help="leave out items or leaves like this"
    )
    edit.add_argument(
        "--cast",
        action="append",
        default=[],
        metavar="DTYPE[:PATTERN]",
        help="convert floating-point arrays (like this), each number rounded once",
    )
    edit.add_argument(
        "--rename",
        action="append",
        default=[],
        type=_renaming,
        metavar="OLD=NEW",
        help="rename an item, a leaf, or all leaves below a name",
    )
    cp = add("cp", "Copy a checkpoint, verified", "runs/digits s3://bucket/digits --step best:loss")
    cp.add_argument("source", help=_A_CHECKPOINT)
    cp.add_argument("destination", help=_NEW)
    cp.add_argument("--step", type=step_words.parse, metavar="STEP", help=_A_STEP)


def _add_output(command: argparse.ArgumentParser) -> None:
    command.add_argument("-o", "--output", required=True, metavar="OUT", help=_NEW)


def _add_conversions(add: _Add) -> None:
    convert = add(
        "convert", "Convert a foreign checkpoint to a step", "pytorch_model.bin runs/new --step 0"
    )
    convert.add_argument("source", help="a file or directory of any known format")
    convert.add_argument("destination", help="the checkpoint to create; must not exist")
    convert.add_argument(
        "--format", metavar="NAME", help="the source's format, where it is unclear"
    )
    convert.add_argument("--item", metavar="NAME", action="append", help="only this item")
    convert.add_argument(
        "--step", type=_step, metavar="N", help="add step N to a directory of steps instead"
    )
    export = add("export", "Export a step in a foreign format", "runs/digits out --to hf")
    export.add_argument("checkpoint", help=_A_CHECKPOINT)
    export.add_argument(
        "destination", help="the file or directory to create (hf: also in S3); must not exist"
    )
    export.add_argument("--to", required=True, choices=("safetensors", "torch", "hf", "dcp"))
    _add_choice(export)
    export.add_argument(
        "--max-shard-size", metavar="SIZE", help="maximum size of a file (hf), such as 2GB"
    )
    export.add_argument(
        "--like", metavar="FILE", help="an index (hf), whose files the tensors go to"
    )
    export.add_argument("--dtype", choices=_FLOATS, help="of the floating-point tensors (hf)")
    export.add_argument(
        "--workers", type=_count, metavar="N", help="processes that write files (hf)"
    )
    export.add_argument("--key-prefix", metavar="TEXT", help="prefix of every name (hf)")
    export.add_argument("--variant", metavar="NAME", help="variant in the file names (hf)")
    export.add_argument("--config", metavar="FILE", help="copied as config.json (hf)")
    zero = add(
        "convert_zero",
        "Reshard a ZeRO-1 optimizer state",
        "--input_dir a --output_dir b --convert_to_full",
    )
    zero.add_argument("--input_dir", required=True, metavar="DIR", help="a tag's folder, or a step")
    zero.add_argument("--output_dir", required=True, metavar="DIR", help="must not exist")
    zero.add_argument("--num_workers", type=_count, default=1, metavar="N", help="threads")
    zero.add_argument(
        "--dp_size", type=_count, metavar="N", help="data-parallel size to reshard to"
    )
    kind = zero.add_mutually_exclusive_group(required=True)
    kind.add_argument("--convert_to_full", action="store_true", help="merge all shards")
    kind.add_argument(
        "--convert_to_sharded", action="store_true", help="reshard to --dp_size ranks"
    )


def _step(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"expected a step's number, got {text!r}")
    return int(text)


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number above zero, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0.1 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"expected seconds, at least 0.1, got {text!r}")
    return seconds


def _renaming(text: str) -> tuple[str, str]:
    old, sign, new = text.partition("=")
    if not (old and sign and new):
        raise argparse.ArgumentTypeError(f"expected OLD=NEW; got {text!r}")
    return old, new
