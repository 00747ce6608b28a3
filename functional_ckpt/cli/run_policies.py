"""The keep policies of a run, as its log names them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

from functional_ckpt.cli.step_words import Mode
from functional_ckpt.policies import keep
from functional_ckpt.policies.base import KeepPolicy
from functional_ckpt.steps import run_log
from functional_ckpt.storage import commit
from functional_ckpt.storage.base import Storage


@dataclasses.dataclass(frozen=True, slots=True)
class RunPolicies:
    """The keep policies at the last commit of a run.

    Attributes:
        texts: Each as text.
        known: Text -> policy, of those that can be made again: not of the user's own.
    """

    texts: tuple[str, ...]
    known: Mapping[str, KeepPolicy]

    @property
    def unknown(self) -> list[str]:
        """The texts of the user's own policies."""
        return [text for text in self.texts if text not in self.known]


def read(storage: Storage, root: str) -> RunPolicies | None:
    """Returns the policies of a run; None without a log, as in object stores and other programs."""
    texts = run_log.last_policies(storage, os.path.join(root, commit.HIDDEN))
    if texts is None:
        return None
    made = {text: run_log.policy_of(text) for text in texts}
    return RunPolicies(texts, {text: each for text, each in made.items() if each is not None})


def ranked(storage: Storage, root: str) -> dict[str, Mode]:
    """Returns the metrics that the policies of a run rank steps by, and which value is best."""
    found = read(storage, root)
    every = () if found is None else found.known.values()
    best = [each for each in every if isinstance(each, keep.BestN)]
    return {each.metric: each.mode for each in best if isinstance(each.metric, str)}
