"""Reads a run for its report."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from functional_ckpt import errors
from functional_ckpt.cli import compare, output, prune, run_policies, step_words, targets, trees
from functional_ckpt.cli import report_layers as layers
from functional_ckpt.cli.report_record import (
    Comparison,
    ConfigChange,
    Health,
    ModuleSize,
    ReportStep,
    RunReport,
)
from functional_ckpt.core.tree import structure
from functional_ckpt.format.checkpoint_dir import OpenCheckpoint
from functional_ckpt.policies.base import StepInfo
from functional_ckpt.steps import history, run_log
from functional_ckpt.storage import commit, queries
from functional_ckpt.verify.checkpoint import verify_checkpoint

# Up to this many bytes, steps are verified and the last two are compared without being asked to.
_CHEAP_BYTES = 256 * 2**20
_MAX_CHANGES, _MAX_CHILDREN, _MAX_JSON_BYTES = 200, 40, 2**20


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The data that a report reads besides the records.

    Attributes:
        compare: The two steps to compare; None for the last two if that is cheap.
        verify: Whether to verify each step however large it is.
    """

    compare: Sequence[step_words.StepWord] | None = None
    verify: bool = False


def gather(root: targets.Root, options: Options) -> RunReport:
    """Reads a run; at most a few MiB of arrays are in memory at a time."""
    infos = root.history()
    past = run_log.read(root.storage, os.path.join(root.path, commit.HIDDEN))
    sizes = {
        step: queries.total_bytes(root.storage, root.checkpoint(step).path) for step in root.steps
    }
    is_cheap = sum(sizes.values()) <= _CHEAP_BYTES
    policies = run_policies.read(root.storage, root.path) or run_policies.RunPolicies((), {})
    reasons = _reasons(root, infos, policies)
    waiting = prune.waiting_for_upload(root)
    opened = {step: each for step in root.steps if (each := _opened(root, step)) is not None}
    logged = {(each.info.step, each.info.time): each for each in past}
    steps: list[ReportStep] = []
    with output.progress_bar("verifying") as progress:
        done = 0
        for info in infos:
            health, problem = _health(root, info.step, reads=is_cheap or options.verify)
            done += sizes.get(info.step, 0)
            progress(done, sum(sizes.values()))
            known = logged.get((info.step, info.time))
            steps.append(
                ReportStep(
                    step=info.step,
                    time=info.time,
                    metrics=dict(history.finite_metrics(info.metrics or {})),
                    size_bytes=sizes.get(info.step),
                    seconds=known.seconds if known else _seconds(opened.get(info.step)),
                    is_abandoned=info.is_abandoned,
                    is_uploading=info.step in waiting,
                    reasons=tuple(reasons.get(info.step, ())),
                    health=health,
                    problem=problem,
                )
            )
    metrics = {each.step: each.metrics for each in steps}
    modes = root.ranked()
    for name in {name for each in steps for name in each.metrics}.difference(modes):
        if (mode := step_words.mode_of(name)) is not None:
            modes[name] = mode
    last = opened.get(root.latest) if root.latest is not None else None
    return RunReport(
        path=root.path,
        time=datetime.datetime.now(datetime.UTC),
        steps=tuple(sorted([*steps, *_removed(past, root.steps)], key=lambda each: each.step)),
        latest=root.latest,
        best={name: step for name, (_, step) in step_words.best_steps(metrics, modes).items()},
        policies=policies.texts,
        unfinished=root.unfinished,
        modules=() if last is None else tuple(_modules(last)),
        changes=tuple(itertools.islice(_config_changes(opened), _MAX_CHANGES)),
        comparison=_comparison(root, options, is_cheap=is_cheap),
    )


def _opened(root: targets.Root, step: int) -> OpenCheckpoint | None:
    """Opens a step; None if it is damaged or was removed, which `_health` reports."""
    try:
        return root.checkpoint(step).open()
    except errors.CheckpointError:
        return None


def _removed(past: Iterable[run_log.PastStep], steps: Iterable[int]) -> list[ReportStep]:
    """Returns the steps of the log that are gone."""
    here = set(steps)
    return [
        ReportStep(
            step=each.info.step,
            time=each.info.time,
            metrics=dict(history.finite_metrics(each.info.metrics or {})),
            size_bytes=each.size_bytes,
            seconds=each.seconds,
            is_kept=False,
            reasons=("no policy kept it",) if each.is_pruned else ("removed",),
        )
        for each in past
        if each.info.step not in here
    ]


def _reasons(
    root: targets.Root, infos: list[StepInfo], policies: run_policies.RunPolicies
) -> dict[int, list[str]]:
    """Returns why each step stays, by the keep policies of the last commit."""
    reasons, gone = prune.judged(root, infos, policies.known)
    for info in infos:
        if policies.unknown and (info.step in gone or not reasons[info.step]):
            reasons[info.step].append(f"maybe {', '.join(policies.unknown)}")
        elif info.step in gone:
            reasons[info.step].append("goes at the next commit")
    return reasons


def _health(root: targets.Root, step: int, *, reads: bool) -> tuple[Health, str]:
    checkpoint = root.checkpoint(step)
    if not reads:
        try:
            checkpoint.open()
        except errors.CheckpointError as error:
            return "damaged", error.message
        return "not verified", ""
    try:
        findings = verify_checkpoint(root.storage, checkpoint.path, step)
    except errors.CheckpointError as error:
        return "damaged", error.message
    damage = [each for each in findings if each.is_damage]
    if damage:
        first = damage[0]
        text = f"{first.file}: {first.problem}: expected {first.expected}, got {first.got}"
        return "damaged", text
    return ("readable" if findings else "intact"), ""


def _seconds(opened: OpenCheckpoint | None) -> float | None:
    metadata: Mapping[str, Any] = (opened.files.metadata or {}) if opened is not None else {}
    start, end = metadata.get("init_timestamp_nsecs"), metadata.get("commit_timestamp_nsecs")
    if type(start) is int and type(end) is int and 0 < start <= end:
        return (end - start) / 1e9
    return None


# ------------------------------------------------------------------------------------ modules


def _modules(opened: OpenCheckpoint) -> Iterable[ModuleSize]:
    """Yields each tree item by module: the parts of the leaves' names between dots."""
    for name, kind in opened.items.items():
        if kind != "tree":
            continue
        top: dict[str, Any] = {}
        for path, leaf in structure.iter_leaves(opened.tree(name).root):
            if not isinstance(leaf, structure.ArrayNode) or leaf.tied_to is not None:
                continue
            branch = top
            *modules, last = structure.leaf_name(path).split(".")
            for part in modules:
                branch = branch.setdefault(part, {})
            branch[f"{last} "] = leaf.spec.size_bytes  # a module may have the name of an array
        yield _module(name, top)


def _module(name: str, content: Mapping[str, Any] | int) -> ModuleSize:
    if isinstance(content, int):
        return ModuleSize(name=name.rstrip(), size_bytes=content, num_arrays=1)
    children = [_module(key, each) for key, each in content.items()]
    children.sort(key=lambda each: each.size_bytes, reverse=True)
    size_bytes = sum(each.size_bytes for each in children)
    num_arrays = sum(each.num_arrays for each in children)
    shown, rest = children[:_MAX_CHILDREN], children[_MAX_CHILDREN:]
    if rest:
        more = f"{len(rest)} smaller"
        sizes = sum(each.size_bytes for each in rest)
        arrays = sum(each.num_arrays for each in rest)
        shown.append(ModuleSize(name=more, size_bytes=sizes, num_arrays=arrays))
    return ModuleSize(
        name=name, size_bytes=size_bytes, num_arrays=num_arrays, children=tuple(shown)
    )


# ------------------------------------------------------------------------------------ changes


def _config_changes(opened: Mapping[int, OpenCheckpoint]) -> Iterable[ConfigChange]:
    """Yields what differs between the JSON items and custom metadata of consecutive steps."""
    before: tuple[int, dict[str, Any]] | None = None
    for step, each in opened.items():
        config = _config(each)
        if before is not None:
            for found in compare.compare_json(before[1], config):
                if found is not None:
                    yield ConfigChange(
                        before=before[0],
                        after=step,
                        name=found.leaf,
                        old="absent" if found.a is None else found.a,
                        new="absent" if found.b is None else found.b,
                    )
        before = step, config


def _config(opened: OpenCheckpoint) -> dict[str, Any]:
    """Returns JSON items, plain values of other items, and custom metadata."""
    config: dict[str, Any] = {}
    for name, kind in opened.items.items():
        try:
            if kind == "json":
                value = opened.json(name)
                if len(json.dumps(value)) <= _MAX_JSON_BYTES:
                    config[name] = value
            elif name in ("config", "args", "hparams"):
                leaves = structure.iter_leaves(opened.tree(name).root)
                config[name] = {
                    structure.leaf_name(path): trees.describe(leaf)
                    for path, leaf in leaves
                    if isinstance(leaf, structure.ValueNode)
                }
        except errors.CheckpointError:
            continue  # the step is damaged, and listed as such
    if opened.custom_metadata:
        config["custom_metadata"] = dict(opened.custom_metadata)
    return config


def _comparison(root: targets.Root, options: Options, *, is_cheap: bool) -> Comparison | None:
    present = [step for step in root.steps if step not in root.abandoned]
    words: Sequence[step_words.StepWord] = options.compare or (present[-2:] if is_cheap else ())
    if len(words) != 2:
        return None
    try:
        a, b = (root.checkpoint(word).open() for word in words)
        with output.progress_bar("comparing") as progress:
            total = sum(trees.totals(a.tree(n).root)[1] for n, k in a.items.items() if k == "tree")
            done = 0

            def advance(num_bytes: int) -> None:
                nonlocal done
                done += num_bytes
                progress(done, total)

            return layers.compare_steps(a, b, advance)
    except errors.CorruptCheckpointError:
        if options.compare:
            raise
        return None  # one is damaged, and listed as such
