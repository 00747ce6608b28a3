"""A model of a checkpoint directory, as plain data, to test a manager against.

Every method returns a new model. A step has the last values saved under its number, whatever
happened to the disk; a failed or killed save leaves a *set* of models, of which the disk must match
one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SavedStep:
    """A step that was committed.

    Attributes:
        content: Whatever the test knows its content by.
        metrics: Saved with it and recorded later, together; None for none.
    """

    content: Any
    metrics: Mapping[str, float] | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ManagerModel:
    """The committed steps of a directory under keep policies `LatestN` and `BestN`, together.

    Attributes:
        steps: The committed steps.
        keep_latest: The `n` of `LatestN`; None where nothing is pruned.
        keep_best: The `n` of `BestN(n, metric)`, the highest being best; 0 for no such policy.
        metric: The metric that ranks.
    """

    steps: Mapping[int, SavedStep] = dataclasses.field(
        default_factory=lambda: MappingProxyType[int, SavedStep]({})
    )
    keep_latest: int | None = None
    keep_best: int = 0
    metric: str = "score"

    @property
    def latest(self) -> int | None:
        """The highest step: no save here follows a rollback."""
        return max(self.steps, default=None)

    @property
    def best(self) -> int | None:
        """The step with the highest metric, the later of two equals; None where none has it."""
        ranked = self._ranked()
        return ranked[0] if ranked else None

    def saved(self, step: int, content: Any, metrics: Mapping[str, float] | None) -> ManagerModel:
        """After a save that committed, and the pruning that follows it."""
        return self.replaced(step, content, metrics).pruned(committed=step)

    def replaced(
        self, step: int, content: Any, metrics: Mapping[str, float] | None
    ) -> ManagerModel:
        """After a save that committed and was cut before it pruned."""
        return self._with({**self.steps, step: SavedStep(content=content, metrics=metrics)})

    def pruned(self, *, committed: int | None = None) -> ManagerModel:
        """After the keep policies were applied, as they are after the commit of a step."""
        kept = {*self._kept(), committed}
        return self._with({step: held for step, held in self.steps.items() if step in kept})

    def deleted(self, step: int) -> ManagerModel:
        """Without a step."""
        return self._with({each: held for each, held in self.steps.items() if each != step})

    def measured(self, step: int, metrics: Mapping[str, float]) -> ManagerModel:
        """After metrics were recorded for a step."""
        held = self.steps[step]
        merged = {**(held.metrics or {}), **metrics}
        return self._with({**self.steps, step: dataclasses.replace(held, metrics=merged)})

    def cut_save(
        self, step: int, content: Any, metrics: Mapping[str, float] | None
    ) -> Iterator[ManagerModel]:
        """Yields every model that a save, failed or killed at any instant, may leave."""
        yield self
        current = self.replaced(step, content, metrics)
        yield current
        doomed = sorted(set(current.steps) - current._kept() - {step})
        for gone in doomed:  # pruned one by one, the oldest first
            current = current.deleted(gone)
            yield current

    def _with(self, steps: Mapping[int, SavedStep]) -> ManagerModel:
        return dataclasses.replace(self, steps=MappingProxyType(dict(sorted(steps.items()))))

    def _kept(self) -> set[int]:
        if self.keep_latest is None and self.keep_best == 0:
            return set(self.steps)
        newest = sorted(self.steps)[-max(1, self.keep_latest or 0) :]
        unmeasured = sorted(set(self.steps) - set(self._ranked()), reverse=True)
        return {*newest, *[*self._ranked(), *unmeasured][: self.keep_best]}

    def _ranked(self) -> list[int]:
        """Returns the steps with the metric, the best first; of equal ones the newer first."""
        scored = [
            (value, step)
            for step, held in self.steps.items()
            if (value := (held.metrics or {}).get(self.metric)) is not None
            and not math.isnan(value)
        ]
        return [step for _, step in sorted(scored, reverse=True)]
