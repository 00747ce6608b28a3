"""Arguments in, exit code out. A command's own module is imported when it is run."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from functional_ckpt import errors

_DAMAGED, _FAILED = 1, 2
# Exit codes that shells report for these signals.
_INTERRUPTED, _BROKEN_PIPE = 128 + 2, 128 + 13
_EXIT_CODES = "exit codes: 0 success; 1 damage or differences found; 2 usage error or not found"


class _Parser(argparse.ArgumentParser):
    """Prints the error as one line."""

    def error(self, message: str) -> NoReturn:
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
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as exit:  # --help, --version, or a usage error that was printed
        return exit.code if isinstance(exit.code, int) else _FAILED
    try:
        command = importlib.import_module(f"functional_ckpt.cli.{arguments.command}")
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


def _parser() -> argparse.ArgumentParser:
    common = _Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print JSON, for programs")
    common.add_argument(
        "--prefix",
        metavar="NAME",
        help="prefix of the steps' names, where a directory holds steps of several ('' for none)",
    )
    parser = _Parser(
        prog="fckpt", description="Inspect, verify and convert checkpoints.", epilog=_EXIT_CODES
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, summary: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=summary, description=f"{summary}.", parents=[common], epilog=_EXIT_CODES
        )

    ls = add("ls", "List the steps in a directory")
    ls.add_argument("directory", help="a manager's directory, or one checkpoint")
    ls.add_argument(
        "--best",
        metavar="METRIC[:min|max]",
        action="append",
        default=[],
        help="which value of a metric is best; by default the lowest of losses and errors, else "
        "the highest",
    )
    show = add("show", "Show the items and leaves of a checkpoint")
    show.add_argument("checkpoint", help="a checkpoint, or a manager's directory (its latest step)")
    show.add_argument("number", nargs="?", type=_step, metavar="STEP", help="this step of it")
    show.add_argument("--step", type=_step, metavar="N", help="the same, as an option")
    show.add_argument("--item", metavar="NAME", action="append", help="only this item")
    show.add_argument(
        "--depth", type=_depth, metavar="N", help="summarise containers nested more than N deep"
    )
    verify = add("verify", "Check every byte against its digest")
    verify.add_argument(
        "checkpoint", nargs="+", help="a checkpoint, or a manager's directory (all its steps)"
    )
    verify.add_argument(
        "--step", type=_step, metavar="N", action="append", help="only this step of the directory"
    )
    diff = add("diff", "Compare two checkpoints")
    diff.add_argument("a", help="a checkpoint, or a manager's directory (its latest step)")
    diff.add_argument("b", help="the other checkpoint; or a step of A, followed by")
    diff.add_argument("number", nargs="?", type=_step, metavar="STEP", help="another step of A")
    diff.add_argument("--item", metavar="NAME", action="append", help="only this item")
    _add_conversions(add)
    return parser


def _add_conversions(add: Callable[[str, str], argparse.ArgumentParser]) -> None:
    convert = add("convert", "Convert a foreign checkpoint to a step")
    convert.add_argument("source", help="a file or directory of any known format")
    convert.add_argument("destination", help="the checkpoint to create; must not exist")
    convert.add_argument(
        "--format", metavar="NAME", help="the source's format, where it is unclear"
    )
    convert.add_argument("--item", metavar="NAME", action="append", help="only this item")
    convert.add_argument(
        "--step", type=_step, metavar="N", help="add step N to a directory of steps instead"
    )
    export = add("export", "Export a step in a foreign format")
    export.add_argument(
        "checkpoint", help="a checkpoint, or a manager's directory (its latest step)"
    )
    export.add_argument("destination", help="the file or directory to create; must not exist")
    export.add_argument("--to", required=True, choices=("safetensors", "torch", "hf", "dcp"))
    export.add_argument("--step", type=_step, metavar="N", help="this step of the directory")
    export.add_argument("--item", metavar="NAME", action="append", help="only this item")
    export.add_argument(
        "--max-shard-size", metavar="SIZE", help="maximum size of a file (hf), such as 2GB"
    )
    export.add_argument("--key-prefix", metavar="TEXT", help="prefix of every name (hf)")
    export.add_argument("--variant", metavar="NAME", help="variant in the file names (hf)")
    export.add_argument("--config", metavar="FILE", help="copied as config.json (hf)")
    zero = add("convert_zero", "Reshard a ZeRO-1 optimizer state")
    zero.add_argument("--input_dir", required=True, metavar="DIR", help="a tag's folder, or a step")
    zero.add_argument("--output_dir", required=True, metavar="DIR", help="must not exist")
    zero.add_argument("--num_workers", type=_depth, default=1, metavar="N", help="threads")
    zero.add_argument(
        "--dp_size", type=_depth, metavar="N", help="data-parallel size to reshard to"
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


def _depth(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number above zero, got {text!r}")
    return int(text)
