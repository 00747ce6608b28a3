from __future__ import annotations

import enum

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from functional_ckpt import errors
from functional_ckpt.handlers import Json, JsonHandler

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
    import json

    lowered = JsonHandler().lower(value)
    assert lowered is value
    assert json.loads(json.dumps(lowered, allow_nan=False)) == value


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


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [1, float("nan")]}, r"\['a'\]\[1\] is nan, which JSON has no word for"),
        (-float("inf"), r"the value is -inf"),
        ({"betas": (0.9, 0.99)}, r"\['betas'\] is a tuple, which would come back as a list"),
        ({"a": {3: "x"}}, r"\['a'\] has the key 3, which would come back as a str"),
        ({"x": np.float64(1)}, r"\['x'\] is a float64; pass value\.tolist\(\)"),
        ({"x": np.ones(2)}, r"\['x'\] is a ndarray; pass value\.tolist\(\)"),
        ([Color.RED], r"\[0\] is a Color, which JSON cannot hold"),
        ({"x": b"1"}, r"\['x'\] is a bytes"),
        (SELF, r"\[0\]\['again'\] contains itself"),
    ],
)
def test_json_item_refuses_values_that_would_change(value, message):
    with pytest.raises(errors.UnsupportedLeafError, match=message):
        JsonHandler().lower(value)


def test_the_same_list_twice_is_no_cycle():
    shared = [1]
    assert JsonHandler().lower([shared, shared]) == [[1], [1]]
