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
from collections.abc import Mapping, Sequence
from typing import NoReturn, cast

from functional_ckpt import errors
from functional_ckpt.cli import commands as commands_lib

_DAMAGED, _FAILED = 1, 2
# Exit codes that shells report for these signals.
_INTERRUPTED, _BROKEN_PIPE = 128 + 2, 128 + 13
_EXIT_CODES = (
    "exit codes: 0 success; 1 damage, differences or NaN found; 2 usage error or not found"
)


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

    commands_lib.add_all(add)
    return parser
