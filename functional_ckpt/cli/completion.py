"""Completion in bash, zsh and fish, by argcomplete: commands, options, files and steps."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from functional_ckpt import errors
from functional_ckpt.cli import step_words


def complete(
    parser: argparse.ArgumentParser, commands: Mapping[str, argparse.ArgumentParser]
) -> None:
    """Answers the shell, and ends the process, if a shell asks."""
    try:
        import argcomplete  # pyright: ignore[reportMissingImports]  # an extra
    except ImportError:
        return
    for command in commands.values():
        for action in command._actions:
            if action.type is step_words.parse:
                vars(action)["completer"] = _steps
    argcomplete.autocomplete(parser)


def _steps(prefix: str, parsed_args: argparse.Namespace, **_: object) -> list[str]:
    """Returns the steps of the directory that the command line names, and the words for steps."""
    from functional_ckpt.cli import targets

    given = vars(parsed_args)
    names = ("directory", "checkpoint", "source", "a")
    text = next((given[name] for name in names if given.get(name)), None)
    try:
        root = targets.find(text[0] if isinstance(text, list) else str(text), parsed_args.prefix)
    except (errors.CheckpointError, OSError):
        return []
    if not isinstance(root, targets.Root):
        return []
    metrics = dict.fromkeys(str(name) for info in root.infos for name in info.metrics or {})
    found = ["latest", *map(str, root.steps), *(f"best:{name}" for name in metrics)]
    return [each for each in found if each.startswith(prefix)]
