"""How far a training has come: an immutable count of epochs, batches, samples, tokens and seconds.

The counts are those of Composer's `Timestamp`. A loop makes the next record from the one it has and
hands it to `CheckpointManager.save(progress=...)`: interval policies decide by it, and it comes
back as `Restored.progress`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Final

from functional_ckpt import errors
from functional_ckpt.policies.checks import check_int
from functional_ckpt.policies.spelled import Spelled
from functional_ckpt.policies.timespan import Unit, parse_timespan

_COUNTS: Final = ("iteration", "epoch", "batch", "sample", "token")
_SECONDS: Final = ("total_seconds", "epoch_seconds", "batch_seconds")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Progress(Spelled):
    """How far a training has come.

    All counts are of completed units: after the first batch `batch` is 1.

    Attributes:
        iteration: Iterations, for trainings that group epochs.
        epoch: Epochs.
        batch: Batches of the entire training.
        sample: Samples of the entire training, of all ranks.
        token: Tokens of the entire training, of all ranks.
        batch_in_epoch: Batches of the epoch under way.
        sample_in_epoch: Samples of the epoch under way.
        token_in_epoch: Tokens of the epoch under way.
        total_seconds: Wall-clock time of the entire training, without pauses between runs.
        epoch_seconds: Wall-clock time of the epoch under way.
        batch_seconds: Wall-clock time of the last batch.
        batches_per_epoch: How long an epoch is, where that is known: fractions of an epoch and of
            the training are counted by it.
        max_duration: How long the training is, as a time string such as `10ep` or `3e9tok`; needed
            for spans such as `0.25dur`.

    >>> start = Progress(max_duration="2ep")
    >>> one = start.next_batch(samples=32).next_batch(samples=32).next_epoch()
    >>> one.epoch, one.batch, one.batch_in_epoch, one.sample, one.duration
    (1, 2, 0, 64, 0.5)
    """

    iteration: int = 0
    epoch: int = 0
    batch: int = 0
    sample: int = 0
    token: int = 0
    batch_in_epoch: int = 0
    sample_in_epoch: int = 0
    token_in_epoch: int = 0
    total_seconds: float = 0.0
    epoch_seconds: float = 0.0
    batch_seconds: float = 0.0
    batches_per_epoch: int | None = None
    max_duration: str | None = None

    def __post_init__(self) -> None:
        """Raises UsageError for an invalid count, time, or length of a training."""
        for name in _COUNTS:
            check_int(f"{name} of a progress", getattr(self, name))
        for name in _COUNTS[2:]:
            inside = f"{name}_in_epoch"
            check_int(f"{inside} of a progress", getattr(self, inside))
            if getattr(self, inside) > getattr(self, name):
                raise errors.UsageError(
                    f"{inside} of a progress: expected at most {name}, which is "
                    f"{getattr(self, name)}; got {getattr(self, inside)}."
                )
        for name in _SECONDS:
            _check_seconds(name, getattr(self, name))
        if self.batches_per_epoch is not None:
            check_int("batches_per_epoch of a progress", self.batches_per_epoch, at_least=1)
        if self.max_duration is not None:
            _check_duration(self.max_duration)

    def next_batch(
        self, *, samples: int = 0, tokens: int = 0, seconds: float = 0.0, batches: int = 1
    ) -> Progress:
        """Returns the progress after one more batch.

        Args:
            samples: How many samples were in it, on all ranks together.
            tokens: How many tokens.
            seconds: How long it took.
            batches: Number of batches since the last record, for loops that save at intervals.

        Raises:
            UsageError: A negative amount.
        """
        check_int("batches of a progress", batches)
        check_int("samples of a progress", samples)
        check_int("tokens of a progress", tokens)
        _check_seconds("seconds", seconds)
        return dataclasses.replace(
            self,
            batch=self.batch + batches,
            sample=self.sample + samples,
            token=self.token + tokens,
            batch_in_epoch=self.batch_in_epoch + batches,
            sample_in_epoch=self.sample_in_epoch + samples,
            token_in_epoch=self.token_in_epoch + tokens,
            total_seconds=self.total_seconds + seconds,
            epoch_seconds=self.epoch_seconds + seconds,
            batch_seconds=seconds,
        )

    def next_epoch(self) -> Progress:
        """Returns the progress after the current epoch: counts within it restart."""
        return dataclasses.replace(
            self,
            epoch=self.epoch + 1,
            batch_in_epoch=0,
            sample_in_epoch=0,
            token_in_epoch=0,
            epoch_seconds=0.0,
        )

    def next_iteration(self) -> Progress:
        """Returns the progress once the iteration under way is over."""
        return dataclasses.replace(self, iteration=self.iteration + 1)

    @property
    def duration(self) -> float | None:
        """The completed fraction of the training, from 0 to 1 (or more); None if unknown.

        It is unknown without `max_duration`.
        """
        if self.max_duration is None:
            return None
        whole = parse_timespan(self.max_duration)
        here = self.count(whole.unit)
        return None if here is None else here / whole.value

    def count(self, unit: Unit) -> int | float | None:
        """Returns how much is over in a unit of time strings; None if it is not known.

        Samples and tokens that no batch has counted are unknown, which differs from zero.
        """
        if unit == "duration":
            return self.duration
        if unit == "second":
            return self.total_seconds
        if unit == "epoch" and self.batches_per_epoch is not None:
            # After its last batch an epoch is over, whether or not `next_epoch` was called by then;
            # one that is longer than it was said to be is not over twice.
            inside = min(self.batch_in_epoch, self.batches_per_epoch)
            return (self.epoch * self.batches_per_epoch + inside) / self.batches_per_epoch
        value: int = getattr(self, unit)
        uncounted = unit in ("sample", "token") and value == 0 and self.batch > 0
        return None if uncounted else value

    def to_json(self) -> dict[str, Any]:
        """Returns the record as plain JSON; `from_json` gives it back."""
        return {
            field.name: value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) is not None
        }

    @classmethod
    def from_json(cls, record: object) -> Progress:
        """Returns the progress that `to_json` wrote.

        Members that this version does not know are left out: a later version may count more.

        Raises:
            UsageError: The record is no progress.
        """
        if not isinstance(record, Mapping):
            raise errors.UsageError(f"progress: expected a JSON object; got {record!r:.80}.")
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{str(key): value for key, value in record.items() if key in names})


def _check_seconds(name: str, value: float) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not (math.isfinite(value) and value >= 0):
        raise errors.UsageError(
            f"{name} of a progress: expected a finite number, zero or more; got {value!r}."
        )


def _check_duration(text: object) -> None:
    whole = parse_timespan(text) if isinstance(text, str) else None
    if whole is None or whole.unit == "duration" or not whole.value:
        raise errors.UsageError(
            "max_duration of a progress: expected a time string of more than zero, in any unit but "
            f"'dur', such as '10ep'; got {text!r}."
        )
