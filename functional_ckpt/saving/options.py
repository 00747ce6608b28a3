"""The options of a manager's saves, and how a save copies the state."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from functional_ckpt import errors
from functional_ckpt.policies.base import KeepPolicy
from functional_ckpt.policies.checks import check_bool
from functional_ckpt.policies.save_rules import SaveRule
from functional_ckpt.steps.node_local import NodeLocal
from functional_ckpt.steps.run_steps import Steps
from functional_ckpt.steps.tiers import Tier


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Eager:
    """`save` copies the state into host memory; a background thread writes it. The default.

    Attributes:
        budget_bytes: The maximum host memory for copies; values beyond it are written before `save`
            returns. None for no limit.
    """

    budget_bytes: int | None = None

    def __post_init__(self) -> None:
        budget_bytes = self.budget_bytes
        if budget_bytes is not None and (type(budget_bytes) is not int or budget_bytes < 0):
            raise errors.UsageError(
                f"budget_bytes must be a number of bytes or None; got {budget_bytes!r}."
            )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Overlapped:
    """`save` returns before parameters and optimizer state are copied; the next step waits for it.

    Other changes of that state need `CheckpointManager.fence` first.

    Attributes:
        checked: Whether every byte of the copy is compared with its value when `save` was called.
            `save` reads the entire state for that, and a save whose state changed fails.
            Without it a few bytes of at most 64 leaves are compared.
    """

    checked: bool = False

    def __post_init__(self) -> None:
        check_bool("checked", self.checked)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Blocking:
    """`save` copies nothing and returns when the step is durable."""


Staging: TypeAlias = Eager | Overlapped | Blocking


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SaveOptions:
    """How a manager saves; its arguments of the same names."""

    save_rule: SaveRule | None
    keep_policies: tuple[KeepPolicy, ...]
    overwrite: bool
    on_busy: Literal["wait", "skip"]
    staging: Staging
    share_unchanged: bool

    def __post_init__(self) -> None:
        if not isinstance(self.staging, (Eager, Overlapped, Blocking)):
            raise errors.UsageError(
                "staging must be fc.Eager(), fc.Overlapped() or fc.Blocking(); got "
                f"{self.staging!r}."
            )
        check_bool("overwrite", self.overwrite)
        check_bool("share_unchanged", self.share_unchanged)
        if self.on_busy not in ("wait", "skip"):
            raise errors.UsageError(f"on_busy must be 'wait' or 'skip'; got {self.on_busy!r}.")

    def compared(
        self,
        steps: Steps,
        step_name: object,
        tiers: Sequence[Tier],
        node_local: NodeLocal | None = None,
    ) -> dict[str, Any]:
        """Returns the options that must be equal on all ranks; memory budgets may differ."""
        return {
            "node_local": node_local and dataclasses.replace(node_local, node=None),
            "read_only": steps.read_only,
            "step_name": step_name,
            "latest_link": steps.latest_link,
            "tiers": [dataclasses.replace(tier, storage=None) for tier in tiers],
            "save_policy": self.save_rule,
            "keep_policy": self.keep_policies,
            "overwrite": self.overwrite,
            "on_busy": self.on_busy,
            "share_unchanged": self.share_unchanged,
            "staging": Eager() if isinstance(self.staging, Eager) else self.staging,
        }
