from __future__ import annotations

import argparse
import dataclasses
import datetime
import decimal
import enum
import fractions
import json
import pathlib
import types
import uuid
import zoneinfo
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import functional_ckpt as fc
from functional_ckpt import errors
from functional_ckpt.handlers import Json, JsonHandler, PyTree

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(value=PLAIN)
def test_json_item_restores_equal(value):
    handler = JsonHandler()
    stored = json.loads(json.dumps(handler.lower(value), allow_nan=False))
    assert stored == value  # readable as it is
    assert handler.lift(None, stored) == value


@pytest.mark.parametrize("value", ["\ud83d\ude00", ["\ud83d\ude00x"], {"\ud83d\ude00": 1}])
def test_two_surrogates_stay_two(value: Any) -> None:
    handler = JsonHandler()
    assert handler.lift(None, json.loads(json.dumps(handler.lower(value)))) == value


def test_restore_needs_no_value(save):
    assert save(Json({"lr": 3e-4, "layers": [1, 2]})).restore(Json()) == {
        "lr": 3e-4,
        "layers": [1, 2],
    }
    assert JsonHandler().format == "json"


class Color(enum.IntEnum):
    RED = 1


SELF: list[object] = []
SELF.append({"again": SELF})
SUMMER = datetime.timezone(datetime.timedelta(hours=2), "CEST")
STANDARD: list[Any] = [
    *((1, (2, [3])), {1: "x", None: 2}, b"\x00", 1 + 2j, float("nan"), -float("inf"), 2**70),
    *(pathlib.Path("/a/b"), pathlib.PureWindowsPath("c:/x"), uuid.UUID(int=5), range(3, 9, 2)),
    *(datetime.timedelta(-1, 5, 7), datetime.date(2024, 2, 29), datetime.time(1, 2, 3, 4)),
    datetime.datetime(2024, 10, 27, 2, 30, fold=1),
    datetime.datetime(2024, 1, 2, tzinfo=datetime.UTC),
    datetime.datetime(2024, 1, 2, tzinfo=SUMMER),
    datetime.datetime(2024, 10, 27, 2, 30, tzinfo=zoneinfo.ZoneInfo("UTC"), fold=1),
    *(decimal.Decimal("1.10"), decimal.Decimal("-Infinity"), fractions.Fraction(-1, 3)),
    *({"b", 1, (2, 3)}, frozenset({None}), set(), slice(None, 4)),
    argparse.Namespace(lr=0.1, path=pathlib.Path("x"), tags={"a"}),
    types.SimpleNamespace(a=1),
    *(torch.bfloat16, torch.device("cuda:1"), torch.Size([2, 3])),
    {"functional_ckpt.type": "path", "value": 1},
]


IDS = [f"{number}-{type(value).__name__}" for number, value in enumerate(STANDARD)]
"""Not their `repr`: the order of a set differs between processes."""


@pytest.mark.parametrize("value", STANDARD, ids=IDS)
@pytest.mark.parametrize("kind", [Json, PyTree])
def test_plain_values_of_the_library_come_back(kind, value, tmp_path):
    fc.save(tmp_path / "c", {"config": kind({"a": [value]})})
    for target in (None, {"config": kind({"a": [value]})}):
        (found,) = fc.restore(tmp_path / "c", target)["config"]["a"]
        assert type(found) is type(value)
        assert repr(found) == repr(value) or found == value


def test_a_part_of_a_configuration(tmp_path):
    config = {"path": pathlib.PurePath("a"), "betas": (0.9, 0.99), "n": 1}
    fc.save(tmp_path / "c", {"config": fc.Json(config)})
    own = {"path": None, "betas": (0, 0), "n": 2}
    found = fc.restore(tmp_path / "c", {"config": fc.Json(own)}, ignore="config.betas")
    assert found["config"] == {**config, "betas": (0, 0)}
    assert fc.restore(tmp_path / "c", only="config.path")["config"] == {"path": config["path"]}


def test_what_is_saved_of_a_set_is_what_it_was(tmp_path):
    tags = {"a"}
    with fc.CheckpointManager(tmp_path) as manager:
        manager.save(0, {"tree": {"tags": tags}, "config": fc.Json({"tags": tags})})
        tags.add("b")
    restored = fc.restore(tmp_path / "0")
    assert restored["tree"]["tags"] == restored["config"]["tags"] == {"a"}


@dataclasses.dataclass
class Options:
    lr: float = 0.1


class Names(list[str]):
    pass


class Zone(datetime.tzinfo):
    def utcoffset(self, when):
        return datetime.timedelta(0)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"x": np.float64(1)}, r"\['x'\] is a float64; pass value\.tolist\(\)"),
        ({"x": np.ones(2)}, r"\['x'\] is a ndarray; pass value\.tolist\(\)"),
        ([Color.RED], r"\[0\] is an enum of the class Color.*pass value\.name"),
        ({"o": Options()}, r"pass dataclasses\.asdict\(value\)"),
        ({"o": (Names("a"),)}, r"\['o'\]\[0\] is a Names.*pass list\(value\)"),
        ({"f": len}, r"is code.*pass its name"),
        ({"o": object()}, r"pass str\(value\)"),
        ({"t": datetime.datetime(2024, 1, 1, tzinfo=Zone())}, "is a datetime"),
        ({Color.RED: 1}, "the key .* is an enum"),
        (SELF, r"\[0\]\['again'\] contains itself"),
    ],
)
def test_json_item_refuses_values_that_would_change(value, message):
    with pytest.raises(errors.UnsupportedLeafError, match=message):
        JsonHandler().lower(value)


def test_the_same_list_twice_is_no_cycle():
    shared = [1]
    assert JsonHandler().lower([shared, shared]) == [[1], [1]]
