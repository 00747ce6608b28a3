"""`fckpt prune`: lists the steps that keep policies would remove, or removes them."""

from __future__ import annotations

import argparse
import datetime
import os
from collections.abc import Iterable, Mapping

from functional_ckpt import errors
from functional_ckpt.cli import output, run_policies, step_words, targets
from functional_ckpt.cli.rm import remove, root_of
from functional_ckpt.policies import keep, keep_rules, lines
from functional_ckpt.policies.base import KeepContext, KeepPolicy, StepInfo
from functional_ckpt.steps import promises
from functional_ckpt.storage import commit


def run(arguments: argparse.Namespace) -> int:
    """Prints for each step why it stays or goes; removes those that go without --dry-run."""
    root = root_of(arguments.directory, arguments.prefix)
    history = root.history()
    reasons, gone = judged(root, history, _policies(arguments, root, history))
    if gone and not arguments.dry_run:
        remove(root, sorted(gone))
    if arguments.json:
        steps = [
            {"step": step, "kept": step not in gone, "reasons": each}
            for step, each in reasons.items()
        ]
        record = {"schema": "fckpt.prune/1", "path": root.path, "dry_run": arguments.dry_run}
        output.as_json({**record, "steps": steps})
    else:
        _print(root, reasons, gone, is_dry=arguments.dry_run)
    return 0


def judged(
    root: targets.Root, history: list[StepInfo], policies: Mapping[str, KeepPolicy]
) -> tuple[dict[int, list[str]], set[int]]:
    """Returns why each step stays by these policies, by their texts, and the steps that go."""
    context = KeepContext(now=datetime.datetime.now(datetime.UTC))
    waiting = waiting_for_upload(root)
    every = list(policies.values())
    gone = set(keep_rules.steps_to_prune_after(None, every, history, context=context)) - waiting
    kept = {
        text: keep_rules.kept_by(policy, history, context=context)
        for text, policy in policies.items()
    }
    reasons = {
        info.step: [text for text, steps in kept.items() if info.step in steps] for info in history
    }
    newest = lines.newest(history)
    for info in history:
        if newest is not None and info.step == newest.step:
            reasons[info.step].insert(0, "latest")
        if info.problem is not None:
            reasons[info.step].append(f"cannot be judged: {info.problem}")
        if info.step in waiting:
            reasons[info.step].append("not uploaded yet")
        if policies and info.step not in gone and not reasons[info.step]:
            reasons[info.step].append("saved last")
    return reasons, gone


def _policies(
    arguments: argparse.Namespace, root: targets.Root, history: list[StepInfo]
) -> Mapping[str, KeepPolicy]:
    """Returns the policies that the options describe, by their text; without any, the run's own."""
    found: dict[str, KeepPolicy] = {}
    if arguments.keep_latest is not None:
        found[f"latest {arguments.keep_latest}"] = keep.LatestN(arguments.keep_latest)
    if arguments.keep_every is not None:
        found[f"every {arguments.keep_every} steps"] = keep.EveryNSteps(arguments.keep_every)
    names = {name for info in history for name in info.metrics or {}}
    for text in arguments.keep_best:
        metric, count = _split_count(text, names)
        name, mode = step_words.find_metric(metric, names)
        best = keep.BestN(count, name, mode=mode or step_words.mode_in(root.ranked(), name))
        found[f"best {count} {name}"] = best
    return found or _run_policies(root)


def _run_policies(root: targets.Root) -> Mapping[str, KeepPolicy]:
    """Returns the policies at the last commit of the run, by their text.

    Raises:
        UsageError: They are not known, or keep every step.
    """
    found = run_policies.read(root.storage, root.path)
    if found is not None and found.known and not found.unknown:
        return found.known
    if found is None:
        why = "the keep policies of the run are not known"
    elif found.unknown:
        why = f"the run has policies of its own ({', '.join(found.unknown)})"
    else:
        why = "the run keeps every step"
    raise errors.UsageError(
        f"{root.path}: {why}. Choose the steps to keep: --keep-latest N, "
        "--keep-best METRIC[:min|max][:N], --keep-every N; a step stays if any of them keeps it.",
        path=root.path,
    )


def _split_count(text: str, names: Iterable[str]) -> tuple[str, int]:
    """Splits `METRIC[:min|max][:N]` before the number."""
    metric, _, count = text.rpartition(":")
    if metric and count.isascii() and count.isdigit() and text not in names:
        return metric, int(count)
    return text, 1


def waiting_for_upload(root: targets.Root) -> set[int]:
    """Returns the steps that a writer has promised to other tiers and not yet uploaded."""
    path = os.path.join(root.path, commit.HIDDEN, promises.FILE)
    return promises.promised_steps(root.storage, path)


# ------------------------------------------------------------------------------------ for people


def _print(
    root: targets.Root, reasons: dict[int, list[str]], gone: set[int], *, is_dry: bool
) -> None:
    from rich.text import Text

    printer = output.Printer()
    table = output.table("step", "", "why")
    table.columns[0].justify = "right"
    table.columns[2].no_wrap = False
    verb = "would go" if is_dry else "removed"
    for step, why in reasons.items():
        fate = Text(verb, "yellow") if step in gone else Text("stays", "green")
        text = ", ".join(why) if step not in gone else "no policy keeps it"
        table.add_row(Text(str(step), "bold cyan"), fate, output.styled(text, "dim"))
    printer.print(output.styled(root.path, "bold"), Text(), table)
