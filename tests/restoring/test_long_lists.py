"""Long lists of plain values: one leaf on disk, equal lists when restored."""

from __future__ import annotations

import collections
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import functional_ckpt as fc
from functional_ckpt.cli import app
from functional_ckpt.core.tree import long_lists, structure
from functional_ckpt.testing import differences
from tests.support.full import IS_FULL


def values() -> dict[str, Any]:
    return {
        "ints": list(range(-100, 400)),
        "limits": [2**63 - 1, -(2**63)] * 100,
        "floats": tuple([-0.0, math.nan, math.inf, -math.inf, 5e-324, 0.1] * 50),
        "bools": [True, False] * 100,
        "nested": [{"a": [0.5] * 200}, (list(range(200)),)],
        "queue": collections.deque([0.5, -0.0] * 100, maxlen=300),
        # No numbers of one type that an array could hold.
        "big": [2**63, -(2**80)] + [1] * 200,
        "just too big": [2**63] + [1] * 200,
        "just too small": [-(2**63) - 1] + [1] * 200,
        "mixed": [1, 2.0, math.nan, -math.inf, None, -0.0] * 30,
        "bools and ints": (True, 1) * 100,
        "texts": ["a", "", "\u00fc", "\ud83d\ude00", "\ud800", '"'] * 30,
        "log": log(150),
        "pairs": collections.deque(((index, f"{index}") for index in range(140)), maxlen=140),
        "nothing": [[], {}, (), "x"] * 50,
        # These are a leaf each: a key that is no string, an integer without end.
        "by number": [{1: 0.5}] * 130,
        "huge": [2**5000, "a"] * 70,
        "paths": [Path("a")] * 130,
        "a tensor": [*range(150), torch.ones(2)],
        "short": list(range(5)),
    }


def log(length: int) -> list[dict[str, Any]]:
    """Returns a history as trainers have it."""
    names = {"functional_ckpt.type": "float", "value": "0" * 16}
    return [
        {"step": step, "loss": 1 / (step + 1), "eval/a.b": [step, "x", names]}
        for step in range(length)
    ]


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
    target |= {"queue": [0] * 200, "mixed": [0.0] * 180, "texts": tuple("b" * 180)}
    restored = fc.restore(tmp_path / "a", into={"state": target})["state"]
    # The target's kinds of containers.
    expected = {**live, "floats": list(live["floats"]), "queue": list(live["queue"])}
    expected["texts"] = tuple(live["texts"])
    assert differences(restored, expected) == []
    target["ints"] = [0] * 499
    with pytest.raises(fc.errors.MismatchError, match=r"\['ints'\]\[499\]"):
        fc.restore(tmp_path / "a", into={"state": target})
    for wrong, message in (
        ({"ints": torch.zeros(500)}, "a list of 500"),
        ({"ints": ["a"] * 500}, r"\['ints'\]\[0\]: the target expects str 'a'.* has int -100"),
        ({"texts": [1] * 180}, r"\['texts'\]\[0\]: the target expects int 1.* has str 'a'"),
        ({"log": [{**entry, "more": 1} for entry in log(150)]}, r"\['log'\]\[149\]\['more'\]"),
        ({"log": log(149)}, r"\['log'\]\[149\]\['loss'\]"),
    ):
        with pytest.raises(fc.errors.MismatchError, match=message):
            fc.restore(tmp_path / "a", into={"state": {**values(), **wrong}})


def test_a_step_with_a_leaf_for_each_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Older steps, and those saved by a process that has shorter lists."""
    live = values()
    fc.save(tmp_path / "new", {"state": live})
    with monkeypatch.context() as patch:
        patch.setattr(long_lists, "_LONG", 10**9)
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
    logged = fc.restore(tmp_path / "a", only="state.log.*.loss")["state"]["log"]
    assert logged == [{"loss": entry["loss"]} for entry in live["log"]]
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


@pytest.mark.parametrize("kind", ["ints", "texts", "mixed", "log", "queue"])
def test_the_time_of_many(kind: str, tmp_path: Path) -> None:
    number = 100_000 if IS_FULL else 20_000
    many: Any = {
        "ints": list(range(number)),
        "texts": [f"sample {index}" for index in range(number)],
        "mixed": [1, 0.5] * (number // 2),
        "log": [{"step": index, "loss": 0.5} for index in range(number)],
        "queue": collections.deque(range(number), maxlen=number),
    }[kind]
    fc.save(tmp_path / "warm", {"state": {"x": list(range(200))}})
    start = time.process_time()
    fc.save(tmp_path / "a", {"state": {"x": many}})
    assert fc.restore(tmp_path / "a")["state"]["x"] == many
    assert time.process_time() - start < 5  # as a leaf each, 100,000 took more than 20 s


TAG = '[{"functional_ckpt.type":'


@pytest.mark.parametrize(
    "text",
    ["", "1", "{}", "[NaN", "[" * 5000, f'{TAG}"x","value":1}}]', f'{TAG}"deque","value":1}}]'],
    ids=["empty", "number", "dict", "cut", "deep", "unknown", "deque"],
)
def test_text_that_is_no_list_is_corrupt(text: str) -> None:
    node = structure.ValueNode(kind=long_lists.PLAIN_LIST, value=text)
    with pytest.raises(fc.errors.CorruptCheckpointError, match="Not "):
        long_lists.value_of(node)
