"""Arguments in, exit code out. A command's own module is imported when it is run."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import os
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn, TypeAlias, cast

from functional_ckpt import errors
from functional_ckpt.cli import step_words

_DAMAGED, _FAILED = 1, 2
# Exit codes that shells report for these signals.
_INTERRUPTED, _BROKEN_PIPE = 128 + 2, 128 + 13
_EXIT_CODES = (
    "exit codes: 0 success; 1 damage, differences or NaN found; 2 usage error or not found"
)
_A_STEP = "a number, latest, or best:METRIC[:min|max]"


_Add: TypeAlias = Callable[[str, str, str], argparse.ArgumentParser]
"""Adds a command: name, summary, example."""


class _Parser(argparse.ArgumentParser):
    """Prints the error as one line.

    Attributes:
        names: The commands' parsers by name.
    """

    names: Mapping[str, _Parser] = types.MappingProxyType({})

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Prints an error of arguments that no command takes, with the option that was meant."""
        options = [name for name in self._option_string_actions if name.startswith("--")]
        first = next((each for each in unknown if each.startswith("-")), unknown[0])
        near = difflib.get_close_matches(first.partition("=")[0], options, n=1)
        advice = "".join(f"; did you mean {each}?" for each in near)
        self.error(f"there is no argument {first!r}{advice}")

    def error(self, message: str) -> NoReturn:
        if found := re.match(r"argument COMMAND: invalid choice: '([^']*)'", message):
            near = difflib.get_close_matches(found[1], self.names, n=1)
            message = f"there is no command {found[1]!r}" + "".join(
                f"; did you mean {each}?" for each in near
            )
        self.exit(_FAILED, f"{self.prog}: {message}; see {self.prog} --help\n")


class _Version(argparse.Action):
    """Looks up the version on demand, which takes longer than listing steps."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib import metadata

        try:
            version = metadata.version("functional-ckpt")
        except metadata.PackageNotFoundError:
            version = "(not installed)"
        print(f"fckpt {version}")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `fckpt`.

    Args:
        argv: The arguments; None for those of the process.

    Returns:
        0 for success, 1 for damage or differences, 2 for a usage error or a missing checkpoint.
    """
    for stream in (sys.stdout, sys.stderr):
        # Names of leaves may have characters outside of the terminal's encoding.
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        code = _run(argv)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has closed the pipe. Flushing the buffer must not fail at exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except KeyboardInterrupt:
        return _INTERRUPTED
    return code


def _run(argv: Sequence[str] | None) -> int:
    parser = _parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks; the extra `completion`
        from functional_ckpt.cli import completion

        completion.complete(parser, parser.names)
    try:
        arguments, unknown = parser.parse_known_args(argv)
        if unknown:
            parser.names.get(arguments.command, parser).refuse(unknown)
    except SystemExit as exit:  # --help, --version, or a usage error that was printed
        return exit.code if isinstance(exit.code, int) else _FAILED
    if arguments.command is None:
        parser.print_help()
        return _FAILED
    try:
        command = importlib.import_module(
            f"functional_ckpt.cli.{arguments.command.replace('-', '_')}"
        )
        return command.run(arguments)
    except BrokenPipeError:
        raise
    except errors.CorruptCheckpointError as error:
        return _fail(str(error), _DAMAGED)
    except (errors.CheckpointError, OSError) as error:
        return _fail(str(error), _FAILED)
    except MemoryError:
        return _fail("out of memory", _FAILED)


def _fail(message: str, code: int) -> int:
    from functional_ckpt.cli.output import printable

    sys.stdout.flush()
    print(f"fckpt: {printable(' '.join(message.split()))}", file=sys.stderr)
    return code


def _parser() -> _Parser:
    common = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--json", action="store_true", help="print JSON, for programs")
    prefix = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    prefix.add_argument(
        "--prefix",
        metavar="NAME",
        help="prefix of the steps' names, where a directory holds steps of several ('' for none)",
    )
    parser = _Parser(
        prog="fckpt",
        description="Inspect, verify and convert checkpoints. Example: fckpt ls runs/digits",
        epilog=f"fckpt COMMAND --help has an example of each; {_EXIT_CODES}",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.set_defaults(prefix=None)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    parser.names = cast("Mapping[str, _Parser]", commands.choices)

    def add(name: str, summary: str, example: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=summary,
            description=f"{summary}. Example: fckpt {name} {example}",
            parents=[common] if name.startswith("convert") else [common, prefix],
            aliases=[name.replace("_", "-")] if "_" in name else [],
            epilog=_EXIT_CODES,
        )

    _add_listings(add)
    _add_readers(add)
    _add_removals(add)
    _add_conversions(add)
    return parser


def _add_listings(add: _Add) -> None:
    ls = add("ls", "List the steps in a directory", "runs/digits --sort loss --last 5")
    ls.add_argument("directory", help="a manager's directory, or one checkpoint")
    ls.add_argument(
        "--best",
        metavar="METRIC[:min|max]",
        action="append",
        default=[],
        help="mark the best value of this metric, too; by default those of losses (the lowest), "
        "accuracies and the like (the highest) are marked",
    )
    ls.add_argument("-l", "--long", action="store_true", help="show the time of each save, too")
    ls.add_argument(
        "--metrics", metavar="A,B", help="show these metrics; all: every one, however wide"
    )
    ls.add_argument("--sort", metavar="KEY", help="sort by step, size, time or a metric")
    ls.add_argument("--reverse", action="store_true", help="reverse the order")
    ls.add_argument("--last", type=_count, metavar="N", help="only the last N rows")
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
    show.add_argument("checkpoint", help="a checkpoint, or a manager's directory (its latest step)")
    show.add_argument("number", nargs="?", type=step_words.parse, metavar="STEP", help=_A_STEP)
    _add_choice(show)
    show.add_argument(
        "--depth", type=_count, metavar="N", help="summarise containers nested more than N deep"
    )
    cat = add("cat", "Print the value of an item or a leaf", "runs/digits config.lr")
    cat.add_argument("checkpoint", help="a checkpoint, or a manager's directory (its latest step)")
    cat.add_argument("name", metavar="ITEM[.LEAF]", help="as fckpt show prints them")
    cat.add_argument("--step", type=step_words.parse, metavar="STEP", help=_A_STEP)
    stats = add(
        "stats", "Show range, mean, norm and NaNs of each array", "runs/digits --item model"
    )
    stats.add_argument(
        "checkpoint", help="a checkpoint, or a manager's directory (its latest step)"
    )
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
    diff.add_argument("a", help="a checkpoint, or a manager's directory (its latest step)")
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
    export.add_argument(
        "checkpoint", help="a checkpoint, or a manager's directory (its latest step)"
    )
    export.add_argument("destination", help="the file or directory to create; must not exist")
    export.add_argument("--to", required=True, choices=("safetensors", "torch", "hf", "dcp"))
    _add_choice(export)
    export.add_argument(
        "--max-shard-size", metavar="SIZE", help="maximum size of a file (hf), such as 2GB"
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
