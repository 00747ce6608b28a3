"""The public testing tools: drawn values round-trip, faults occur as injected."""

from __future__ import annotations

import errno
import math
import tempfile
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import functional_ckpt as fc
from functional_ckpt import testing
from functional_ckpt.storage import queries
from functional_ckpt.testing import strategies


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    st.dictionaries(strategies.item_names(), strategies.pytrees(), min_size=1, max_size=3)
)
def test_every_drawn_item_comes_back_bit_for_bit(items: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        fc.save(path, items)
        restored = fc.restore(path)
    assert testing.differences(_plain(dict(restored)), _plain(items)) == []


def _plain(items: dict[str, Any]) -> dict[str, Any]:
    return dict(sorted(items.items()))


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        (1, True),
        (1.0, 1),
        (0.0, -0.0),
        ({"a": 1}, {"a": 2}),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({1: 0}, {"1": 0}),
        ([1], (1,)),
        (torch.zeros(2), torch.zeros(3)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        (torch.zeros(2), -torch.zeros(2)),
        (torch.zeros(2), torch.nn.Parameter(torch.zeros(2))),
        (torch.zeros(2), torch.zeros(2, requires_grad=True)),
        (torch.zeros(2), torch.zeros(2).numpy()),
        (torch.eye(2).to_sparse(), torch.eye(2)),
    ],
)
def test_a_difference_is_seen(got: Any, expected: Any) -> None:
    assert testing.differences(got, expected)
    assert testing.differences(expected, got)
    assert not testing.differences(expected, expected)


def test_equal_bits_are_no_difference() -> None:
    value = {"nan": math.nan, "t": torch.tensor([math.nan, 1.0]), "s": torch.eye(3).to_sparse()}
    assert testing.differences(value, {key: value[key] for key in value}) == []


def test_a_fault_strikes_once_at_its_operation(tmp_path: Path) -> None:
    storage = testing.FaultyStorage()
    storage.inject(testing.Fault(at=1, errno=errno.ENOSPC))
    storage.write(str(tmp_path / "a"), b"a")
    with pytest.raises(
        fc.errors.StorageError, match=r"write .*b: No space left on device"
    ) as caught:
        storage.write(str(tmp_path / "b"), b"b")
    assert caught.value.errno == errno.ENOSPC
    assert storage.has_failed
    storage.write(str(tmp_path / "c"), b"c")
    assert [(each.kind, Path(each.path).name) for each in storage.operations] == [
        ("write", "a"),
        ("write", "b"),
        ("write", "c"),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c"]


def test_a_lasting_fault_spares_reading(tmp_path: Path) -> None:
    storage = testing.FaultyStorage()
    storage.write(str(tmp_path / "a"), b"a")
    storage.inject(testing.Fault(mode="lasting", where=lambda op: op.kind in testing.CHANGES))
    for _ in range(2):
        with pytest.raises(fc.errors.StorageError):
            storage.remove(str(tmp_path / "a"))
    assert storage.read(str(tmp_path / "a")) == b"a"
    storage.heal()
    storage.remove(str(tmp_path / "a"))
    assert not queries.exists(storage, str(tmp_path / "a"))


def test_after_a_crash_nothing_reaches_the_store(tmp_path: Path) -> None:
    storage = testing.FaultyStorage(testing.Fault(at=0, mode="crash"))
    for _ in range(2):
        with pytest.raises(testing.Crash):
            storage.write(str(tmp_path / "a"), b"a")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(fc.errors.UsageError):
        testing.Fault(at=-1)


def test_the_model_prunes_as_the_policies_say() -> None:
    model = testing.ManagerModel(keep_latest=2, keep_best=1)
    for step, score in enumerate([0.5, 0.9, None, 0.1, math.nan]):
        model = model.saved(step, f"content {step}", None if score is None else {"score": score})
    assert sorted(model.steps) == [1, 3, 4]
    assert (model.latest, model.best) == (4, 1)
    outcomes = [sorted(each.steps) for each in model.cut_save(9, "new", None)]
    assert outcomes == [[1, 3, 4], [1, 3, 4, 9], [1, 4, 9]]
