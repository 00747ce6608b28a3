"""Long lists of numbers: one leaf on disk, equal lists when restored."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import functional_ckpt as fc
from functional_ckpt.cli import app
from functional_ckpt.core.tree import encode
from functional_ckpt.testing import differences


def values() -> dict[str, Any]:
    return {
        "ints": list(range(-100, 400)),
        "limits": [2**63 - 1, -(2**63)] * 100,
        "floats": tuple([-0.0, math.nan, math.inf, -math.inf, 5e-324, 0.1] * 50),
        "bools": [True, False] * 100,
        "nested": [{"a": [0.5] * 200}, (list(range(200)),)],
        # These are no numbers of one type that an array could hold.
        "big": [2**63] + [1] * 200,
        "mixed": [1, 2.0] * 100,
        "bools and ints": [True, 1] * 100,
        "texts": ["a"] * 200,
        "a tensor": [*range(150), torch.ones(2)],
        "short": list(range(5)),
    }


class Sampler:
    """A stateful object such as a sampler."""

    def __init__(self, order: list[int]) -> None:
        self.order = order

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order, "next": 3}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order = state["order"]


def test_they_come_back_equal(tmp_path: Path) -> None:
    live = values()
    fc.save(tmp_path / "a", {"state": live, "bare": live["ints"]})
    restored = fc.restore(tmp_path / "a")
    assert differences(restored["state"], live) == []
    assert restored["bare"] == live["ints"]
    assert app.main(["verify", str(tmp_path / "a")]) == 0


def test_they_come_back_into_a_target_of_any_numbers(tmp_path: Path) -> None:
    live = values()
    fc.save(tmp_path / "a", {"state": live})
    target = values()
    target |= {"ints": [0] * 500, "limits": [0.5, 1] * 100, "floats": [0.0] * 300}
    restored = fc.restore(tmp_path / "a", into={"state": target})["state"]
    expected = {**live, "floats": list(live["floats"])}  # the target's kind of container
    assert differences(restored, expected) == []
    target["ints"] = [0] * 499
    with pytest.raises(fc.errors.MismatchError, match=r"\['ints'\]\[499\]"):
        fc.restore(tmp_path / "a", into={"state": target})
    target["ints"] = torch.zeros(500)
    with pytest.raises(fc.errors.MismatchError, match="a list of 500"):
        fc.restore(tmp_path / "a", into={"state": target})


def test_a_step_with_a_leaf_for_each_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Older steps, and those saved by a process that has shorter lists."""
    live = values()
    fc.save(tmp_path / "new", {"state": live})
    with monkeypatch.context() as patch:
        patch.setattr(encode, "_LONG", 10**9)
        fc.save(tmp_path / "old", {"state": live})
    for into in (None, {"state": values()}):
        assert differences(fc.restore(tmp_path / "old", into=into)["state"], live) == []
    assert app.main(["diff", str(tmp_path / "old"), str(tmp_path / "new")]) == 0
    capsys.readouterr()


@pytest.mark.parametrize("into", [False, True])
def test_each_number_has_a_name_for_patterns(into: bool, tmp_path: Path) -> None:
    live = values()
    fc.save(tmp_path / "a", {"state": live})
    target = {"state": {**values(), "ints": [7] * 500}} if into else None
    restored = fc.restore(tmp_path / "a", into=target, only="state.ints.*")["state"]
    assert restored["ints"] == live["ints"]
    if target is None:
        assert list(restored) == ["ints"]
        return
    restored = fc.restore(tmp_path / "a", into=target, ignore="state.ints.3")["state"]
    assert restored["ints"] == [*live["ints"][:3], 7, *live["ints"][4:]]
    restored = fc.restore(tmp_path / "a", into=target, ignore="state.ints.*")["state"]
    assert restored["ints"] == [7] * 500


def test_stateful_objects_and_later_changes(tmp_path: Path) -> None:
    sampler = Sampler(list(range(1000)))
    with fc.CheckpointManager(tmp_path) as manager:
        handle = manager.save(1, {"sampler": sampler, "state": {"order": sampler.order}})
        sampler.order.reverse()
        handle.result()
        manager.save(2, {"sampler": sampler, "state": {"order": sampler.order}}).result()
        for step, order in ((1, list(range(1000))), (2, list(range(999, -1, -1)))):
            fresh = Sampler([])
            restored = manager.restore(step, into={"sampler": fresh, "state": None})
            assert fresh.order == restored["state"]["order"] == order
            assert fresh.order is not restored["state"]["order"]


def test_the_time_of_a_hundred_thousand(tmp_path: Path) -> None:
    numbers = list(range(100_000))
    fc.save(tmp_path / "warm", {"state": {"x": numbers[:200]}})
    start = time.process_time()
    fc.save(tmp_path / "a", {"state": {"x": numbers}})
    assert fc.restore(tmp_path / "a")["state"]["x"] == numbers
    assert time.process_time() - start < 5  # as a leaf each, it took more than 20 s
