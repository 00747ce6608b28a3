from __future__ import annotations

import json
import math
import struct
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from functional_ckpt.core.tree import context, plain_json

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers().map(lambda n: n**40),
    st.floats(),
    st.integers(0, 2**64 - 1).map(lambda n: struct.unpack(">d", struct.pack(">Q", n))[0]),
    st.complex_numbers(),
    st.text(st.characters()),
    st.binary(),
)
HASHABLE = st.recursive(SCALARS, lambda part: st.lists(part, max_size=3).map(tuple), max_leaves=5)
PLAIN = st.recursive(
    SCALARS,
    lambda part: st.one_of(
        st.lists(part, max_size=3),
        st.lists(part, max_size=3).map(tuple),
        st.dictionaries(HASHABLE, part, max_size=3),
    ),
    max_leaves=8,
)


def _exact(value: Any) -> Any:
    """A picture in which equal means equal to the bit and in type."""
    if isinstance(value, float):
        return ("float", struct.pack(">d", value))
    if isinstance(value, complex):
        return ("complex", _exact(value.real), _exact(value.imag))
    if isinstance(value, dict):
        return ("dict", [(_exact(key), _exact(part)) for key, part in value.items()])
    if isinstance(value, (list, tuple)):
        return (type(value), [_exact(part) for part in value])
    return (type(value), value)


def _through_json(record: Any) -> Any:
    return json.loads(json.dumps(record, allow_nan=False))


@given(value=PLAIN)
def test_tagged_values_come_back_to_the_bit(value: Any) -> None:
    assert plain_json.is_plain(value)
    assert _exact(plain_json.untag(_through_json(plain_json.tag(value)))) == _exact(value)


@given(value=SCALARS)
def test_bare_values_come_back_to_the_bit(value: Any) -> None:
    kind = "none" if value is None else type(value).__name__
    assert _exact(plain_json.decode(kind, _through_json(plain_json.encode(value)))) == _exact(value)


@pytest.mark.parametrize("value", [object(), {1, len}, [object()], {"a": len}, (b"x", bytearray())])
def test_plain_json_refuses_other_values(value: Any) -> None:
    assert not plain_json.is_plain(value)


def test_neither_is_what_contains_itself() -> None:
    value: list[Any] = []
    value.append(value)
    assert not plain_json.is_plain(value)


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        ("none", 0),
        ("bool", 1),
        ("int", True),
        ("int", 1.0),
        ("int", "zz"),
        ("int", None),
        ("float", True),
        ("float", "00"),
        ("float", [1.0]),
        ("complex", [1.0]),
        ("complex", "ab"),
        ("str", 1),
        ("str", {"utf-7": "00"}),
        ("str", {"utf-8": "00", "utf-16": "00"}),
        ("str", {"utf-16": "0"}),
        ("bytes", "*"),
        ("bytes", "AA==!"),
        ("bytes", "A*A=="),
        ("bytes", 3),
        ("torch_dtype", None),
        ("code", "print()"),
    ],
)
def test_a_value_of_another_kind_is_refused(kind: str, payload: Any) -> None:
    with pytest.raises((ValueError, TypeError, KeyError)):
        plain_json.decode(kind, payload)


def test_large_integers_keep_every_digit() -> None:
    for value in (2**53 - 1, 2**53, -(2**53), 10**5_000):
        assert plain_json.decode("int", _through_json(plain_json.encode(value))) == value


def test_json_never_holds_what_json_has_not() -> None:
    assert plain_json.encode(math.inf) == "7ff0000000000000"


@pytest.mark.parametrize("name", ["float33", "nn", "Tensor"])
def test_a_name_that_is_no_dtype_of_this_torch_is_refused(name: str) -> None:
    assert context.untag(["torch", "float16"]) is torch.float16
    with pytest.raises(ValueError, match=f"this torch has no '{name}'"):
        context.untag(["torch", name])


def test_a_context_that_contains_itself_is_not_storable() -> None:
    endless: list[Any] = [torch.float32]
    endless.append(endless)
    assert context.is_storable([torch.float32, {"device": torch.device("cpu")}])
    assert not context.is_storable(endless)
