"""Progress: counted by hand, in every unit, written as JSON and read back."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from functional_ckpt.errors import UsageError
from functional_ckpt.policies.progress import Progress

BATCHES = st.tuples(
    st.integers(0, 512), st.integers(0, 10**6), st.floats(0, 1e4), st.booleans(), st.booleans()
)


@given(st.lists(BATCHES, max_size=30))
def test_progress_counts_batches_epochs_and_samples(
    batches: list[tuple[int, int, float, bool, bool]],
) -> None:
    progress = Progress()
    epochs: list[list[tuple[int, int]]] = [[]]
    num_iterations = 0
    for samples, tokens, seconds, ends_epoch, ends_iteration in batches:
        before = progress
        progress = progress.next_batch(samples=samples, tokens=tokens, seconds=seconds)
        assert before.batch == progress.batch - 1  # the record before is left as it was
        epochs[-1].append((samples, tokens))
        assert progress.batch_seconds == seconds
        if ends_epoch:
            progress = progress.next_epoch()
            epochs.append([])
            assert progress.epoch_seconds == 0
        if ends_iteration:
            progress = progress.next_iteration()
            num_iterations += 1
    everything = [batch for epoch in epochs for batch in epoch]
    assert progress.epoch == len(epochs) - 1
    assert progress.iteration == num_iterations
    assert progress.batch == len(everything)
    assert progress.sample == sum(samples for samples, _ in everything)
    assert progress.token == sum(tokens for _, tokens in everything)
    assert progress.batch_in_epoch == len(epochs[-1])
    assert progress.sample_in_epoch == sum(samples for samples, _ in epochs[-1])
    assert progress.token_in_epoch == sum(tokens for _, tokens in epochs[-1])
    assert progress.total_seconds == pytest.approx(sum(batch[2] for batch in batches))
    assert Progress.from_json(progress.to_json()) == progress


@pytest.mark.parametrize(
    ("progress", "expected"),
    [
        (Progress(max_duration="10ep", epoch=5), 0.5),
        (
            Progress(max_duration="2ep", epoch=1, batch=15, batch_in_epoch=5, batches_per_epoch=10),
            0.75,
        ),
        (Progress(max_duration="100ba", batch=25), 0.25),
        (Progress(max_duration="3e4tok", token=15_000, batch=1), 0.5),
        (Progress(max_duration="1h", total_seconds=900), 0.25),
        (Progress(max_duration="1h", total_seconds=7200), 2.0),
        (Progress(max_duration="3e4tok", batch=1), None),  # tokens were not counted
        (Progress(batch=100), None),
    ],
)
def test_how_much_of_the_training_is_over(progress: Progress, expected: float | None) -> None:
    assert progress.duration == expected


@pytest.mark.parametrize(("batches", "expected"), [(0, 2), (5, 2.5), (10, 3), (12, 3)])
def test_an_epoch_is_over_after_its_last_batch(batches: int, expected: float) -> None:
    progress = Progress(epoch=2, batch=50, batch_in_epoch=batches, batches_per_epoch=10)
    assert progress.count("epoch") == expected
    assert progress.next_epoch().count("epoch") == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch": -1}, "batch of a progress: expected an int of at least 0; got -1"),
        ({"epoch": 1.5}, "epoch of a progress: expected an int of at least 0; got 1.5"),
        ({"token": True}, "token of a progress: expected an int of at least 0; got True"),
        ({"batch_in_epoch": 1}, "batch_in_epoch of a progress: expected at most batch"),
        ({"total_seconds": float("nan")}, "total_seconds of a progress: expected a finite number"),
        (
            {"batches_per_epoch": 0},
            "batches_per_epoch of a progress: expected an int of at least",
        ),
        ({"max_duration": "ten"}, "time span: expected a whole number of batches"),
        ({"max_duration": "1dur"}, "expected a time string of more than zero, in any unit but"),
        ({"max_duration": "0ep"}, "expected a time string of more than zero"),
        ({"max_duration": 10}, "expected a time string of more than zero"),
    ],
)
def test_progress_refuses_invalid_records(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        Progress(**fields)


@pytest.mark.parametrize("amount", [{"samples": -1}, {"tokens": 0.5}, {"seconds": -1.0}])
def test_progress_refuses_invalid_batches(amount: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(amount))} of a progress: expected"):
        Progress().next_batch(**amount)


def test_json_of_a_later_version_is_read_and_nonsense_is_not() -> None:
    record = {**Progress(batch=3).to_json(), "micro_batch": 12}
    assert Progress.from_json(record) == Progress(batch=3)
    with pytest.raises(UsageError, match="expected a JSON object"):
        Progress.from_json([3])
    with pytest.raises(UsageError, match="batch of a progress"):
        Progress.from_json({"batch": "3"})


def test_it_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Progress().batch = 1  # type: ignore[misc]
