"""Steps as the command line names them: a number, `latest`, or `best:METRIC[:min|max]`."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Literal, TypeAlias

from functional_ckpt import errors

Mode: TypeAlias = Literal["min", "max"]
StepWord: TypeAlias = int | str

# A metric is best when lowest if its name has one of these words ...
_LOWEST = frozenset(
    [
        *("loss", "losses", "error", "errors", "err", "nll", "ce", "xent", "perplexity", "ppl"),
        *("mse", "mae", "rmse", "wer", "cer", "fid", "bpb", "bits", "kl", "divergence", "regret"),
    ]
)
# ... and when highest if it has one of these. Others, such as a learning rate, have no best value.
_HIGHEST = frozenset(
    [
        *("accuracy", "acc", "top1", "top5", "f1", "auc", "auroc", "precision", "recall", "map"),
        *(
            "iou",
            "miou",
            "dice",
            "bleu",
            "rouge",
            "psnr",
            "ssim",
            "score",
            "reward",
            "return",
            "r2",
        ),
    ]
)


def parse(text: str) -> StepWord:
    """Checks the form of a step on the command line, for `argparse`."""
    if text.isascii() and text.isdigit():
        return int(text)
    if text == "latest" or (text.startswith("best:") and len(text) > len("best:")):
        return text
    raise argparse.ArgumentTypeError(
        f"expected a step's number, latest, or best:METRIC[:min|max]; got {text!r}"
    )


def step_of(text: str) -> StepWord | None:
    """Returns the step that a text names, unless it names a file or directory, or neither."""
    if os.path.exists(text):
        return None
    with contextlib.suppress(argparse.ArgumentTypeError):
        return parse(text)
    return None


def split_mode(text: str) -> tuple[str, Mode | None]:
    """Splits `METRIC[:min|max]`."""
    name, _, mode = text.rpartition(":")
    if name and mode == "min":
        return name, "min"
    if name and mode == "max":
        return name, "max"
    return text, None


def mode_of(metric: str) -> Mode | None:
    """Returns which value of a metric is best, judged by its name; None where that is unclear."""
    words = re.split(r"[^a-z0-9]+", metric.lower())
    if not _LOWEST.isdisjoint(words):
        return "min"
    return None if _HIGHEST.isdisjoint(words) else "max"


def mode_in(ranked: Mapping[str, Mode], metric: str) -> Mode:
    """Returns which value of a metric is best: by the run's policies, else judged by its name."""
    return ranked.get(metric) or mode_of(metric) or "max"


def find_metric(text: str, names: Collection[str]) -> tuple[str, Mode | None]:
    """Returns the metric that the user means by `METRIC[:min|max]`.

    Raises:
        UsageError: No step has it.
    """
    name, mode = (text, None) if text in names else split_mode(text)
    if name not in names:
        known = ", ".join(sorted(names)) or "none"
        message = f"No step has the metric {name!r}; they have: {known}."
        base, _, end = name.rpartition(":")
        if base in names:
            message += f" If {end!r} is the mode of {base!r}, expected min or max."
        raise errors.UsageError(message)
    return name, mode


def best_steps(
    metrics: Mapping[int, Mapping[str, float]],
    ranked: Mapping[str, Mode],
    chosen: Sequence[str] = (),
) -> dict[str, tuple[Mode, int]]:
    """Returns the mode and the best step of each metric that ranks steps; of equal ones the last.

    Args:
        metrics: Step -> its finite metrics.
        ranked: The metrics that rank steps, with the modes; those that no step has are left out.
        chosen: More metrics, as the user gave them: `METRIC[:min|max]`.

    Raises:
        UsageError: No step has one of the chosen metrics.
    """
    names = dict.fromkeys(name for each in metrics.values() for name in each)
    modes: dict[str, Mode] = {name: ranked[name] for name in names if name in ranked}
    for text in chosen:
        name, mode = find_metric(text, names)
        modes[name] = mode or mode_in(ranked, name)
    return {name: (mode, best_step(metrics, name, mode)) for name, mode in modes.items()}


def best_step(metrics: Mapping[int, Mapping[str, float]], name: str, mode: Mode) -> int:
    """Returns the step with the best value of a metric that some step has; of equals the last."""
    sign = 1 if mode == "max" else -1
    return max((sign * each[name], step) for step, each in metrics.items() if name in each)[1]
