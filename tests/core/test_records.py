from __future__ import annotations

import json
from typing import Any

import pytest
import rebuild
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functional_ckpt import errors
from functional_ckpt.core.arrays.spec import ArraySpec
from functional_ckpt.core.records import file_list, orbax, records
from functional_ckpt.core.restore_plan.match import match
from functional_ckpt.core.tree import flatten
from functional_ckpt.core.tree.placeholders import AS_SAVED
from functional_ckpt.testing import differences, strategies

HEX = "0123456789abcdef"
STEP = records.StepRecord(
    step=3, items={"a": "tree", "b": "json"}, files={"b/metadata": records.FileRecord(2, HEX)}
)


@settings(max_examples=100)
@given(value=strategies.pytrees())
def test_a_record_through_json(value: Any) -> None:
    flat = flatten.flatten(value)
    record = rebuild.record(flat)
    parsed = records.parse_item(record.to_json(), "x")
    assert (parsed.item, parsed.handler) == (record.item, record.handler)
    assert (parsed.arrays, parsed.files) == (record.arrays, record.files)
    assert parsed.to_json() == record.to_json()
    binding = match(parsed.root, AS_SAVED, item="v").binding
    assert differences(rebuild.build(binding, rebuild.stored(flat)), value) == []


def test_a_step_through_json() -> None:
    assert records.parse_step(STEP.to_json(), "x") == STEP
    without = records.StepRecord(step=None, items={"a": "tree"}, files={})
    assert records.parse_step(without.to_json(), "x") == without


@given(data=st.data())
def test_any_changed_byte_breaks_the_seal(data: st.DataObject) -> None:
    text = bytearray(STEP.to_json())
    place = data.draw(st.integers(0, len(text) - 1))
    text[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(errors.CorruptCheckpointError, match="its own digest"):
        records.parse_step(bytes(text), "x")


@given(length=st.integers(0, len(STEP.to_json()) - 1))
def test_any_cut_breaks_the_seal(length: int) -> None:
    with pytest.raises(errors.CorruptCheckpointError, match="its own digest"):
        records.parse_step(STEP.to_json()[:length], "x")


def test_a_sealed_record_is_plain_json() -> None:
    text = STEP.to_json()
    assert json.loads(text)["xxh3"] == records.digest_hex(text[: text.rindex(b', "xxh3"')])


@pytest.mark.parametrize("data", [b"[1]", b"3", b"null", b'"x"'])
def test_json_that_is_no_object_is_damage(data: bytes) -> None:
    with pytest.raises(errors.CorruptCheckpointError, match="here: not a JSON object"):
        records.parse_object(data, "here")


def test_a_later_version_says_so() -> None:
    text = records.with_checksum({"format": "functional_ckpt", "version": 99})
    with pytest.raises(errors.CorruptCheckpointError, match="format version 99"):
        records.verify_checksum(text, "x")


@pytest.mark.parametrize("record", [{}, {"format": "other", "version": 1}, {"format": None}])
def test_another_format_says_so(record: dict[str, Any]) -> None:
    with pytest.raises(errors.CorruptCheckpointError, match="not a functional_ckpt record"):
        records.verify_checksum(records.with_checksum({**record, "more": 1}), "x")


def _item() -> dict[str, Any]:
    value = {"w": torch.ones(2, 3), "tied": None, "n": [1, (2.0, "x")]}
    value["tied"] = value["w"]
    record = json.loads(rebuild.record(flatten.flatten(value)).to_json())
    del record["xxh3"]
    return record


MUTATIONS: dict[str, tuple[tuple[Any, ...], Any]] = {
    "structure_missing": (("structure",), None),
    "structure_empty": (("structure",), []),
    "structure_a_dict": (("structure",), {"int": 1}),
    "record_a_list": (("structure", 0), ["dict"]),
    "record_empty": (("structure", 0), {}),
    "kind_unknown": (("structure", 0), {"code": "x"}),
    "keys_twice": (("structure", 0), {"dict": ["w", "w", "n"]}),
    "keys_read_alike": (("structure", 0), {"dict": ["1", ["int", 1], "n"]}),
    "keys_too_many": (("structure", 0), {"dict": ["w", "tied", "n", "more"]}),
    "keys_too_few": (("structure", 0), {"dict": ["w", "tied"]}),
    "key_unhashable": (("structure", 0), {"dict": ["w", "tied", ["list", []]]}),
    "key_of_no_kind": (("structure", 0), {"dict": ["w", "tied", ["code", 1]]}),
    "count_huge": (("structure", 3), {"list": 2**60}),
    "count_negative": (("structure", 3), {"list": -1}),
    "count_a_float": (("structure", 3), {"list": 1.5}),
    "shape_huge": (("structure", 1, "tensor"), ["float32", [2**61, 2**61]]),
    "shape_beyond": (("structure", 1, "tensor"), ["float32", [2**62]]),
    "shape_negative": (("structure", 1, "tensor"), ["float32", [-1]]),
    "shape_other": (("structure", 1, "tensor"), ["float32", [2, 300_000]]),
    "shape_too_long": (("structure", 1, "tensor"), ["float32", [1] * 40]),
    "dtype_raw": (("structure", 1, "tensor"), ["r16", [2, 3]]),
    "dtype_a_list": (("structure", 1, "tensor"), [["float32"], [2, 3]]),
    "tied_to_nothing": (("structure", 2, "tied_to"), "elsewhere"),
    "tied_to_another_spec": (("structure", 2, "tensor"), ["float64", [2, 3]]),
    "value_of_another_kind": (("structure", 4), {"int": "zz"}),
    "float_of_few_bits": (("structure", 6), {"float": "00"}),
    "detail_a_number": (("structure", 1, "detail"), 3),
    "detail_zero": (("structure", 1, "detail"), 0),
    "detail_a_list": (("structure", 1, "detail"), [["parameter", True]]),
    "arrays_missing": (("arrays",), {}),
    "arrays_more": (("arrays", "other"), [[1], HEX]),
    "arrays_a_list": (("arrays",), []),
    "chunk_zero": (("arrays", "w"), [[0, 3], HEX]),
    "chunk_of_other_dims": (("arrays", "w"), [[2], HEX]),
    "digest_short": (("arrays", "w"), [[2, 3], HEX[:-1]]),
    "digest_missing": (("arrays", "w"), [[2, 3], ""]),
    "digest_not_hex": (("arrays", "w"), [[2, 3], "g" * 16]),
    "digest_blocks": (("digest_block_bytes",), 1),
    "item_a_number": (("item",), 1),
    "handler_null": (("handler",), None),
    "file_outside": (("files", "../x"), [1, HEX]),
    "file_absolute": (("files", "/etc/passwd"), [1, HEX]),
    "file_size_a_string": (("files", "manifest.ocdbt"), ["1", HEX]),
    "numbered_outside": (("numbered_files",), [["../s-", 2, "", 0, [1], HEX]]),
    "numbered_twice": (("numbered_files",), [["s-", 2, "", 0, [1], HEX]] * 2),
    "numbered_of_many_digits": (("numbered_files",), [["s-", 10**9, "", 0, [1], HEX]]),
    "numbered_below_zero": (("numbered_files",), [["s-", 2, "", -1, [1], HEX]]),
    "numbered_without_digests": (("numbered_files",), [["s-", 2, "", 0, [1, 1], HEX]]),
    "numbered_sizes_a_number": (("numbered_files",), [["s-", 2, "", 0, 10**9, HEX]]),
}


@given(st.sampled_from([0, 9, 98]), st.integers(1, 150), st.integers(1, 3), st.booleans())
@settings(max_examples=30, deadline=None)
def test_thousands_of_files_are_few_bytes_each(
    first: int, count: int, digits: int, has_gap: bool
) -> None:
    files = {
        f"shard-{number:0{digits}d}-model{part}.safetensors": records.FileRecord(number, HEX)
        for number in range(first, first + count)
        for part in ("", "-00001-of-00002", "-00002-of-00002")
        if not has_gap or number != first + 1
    }
    record = file_list.to_json({**files, "index.ocdbt": records.FileRecord(3, HEX)})
    assert file_list.from_json(record) == {**files, "index.ocdbt": records.FileRecord(3, HEX)}
    if count >= 64 and digits == 3 and not has_gap:
        assert list(record["files"]) == ["index.ocdbt"]
        assert len(json.dumps(record)) < len(files) * 28 + 500


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_malformed_record_is_one_clear_error(name: str) -> None:
    place, value = MUTATIONS[name]
    record = _item()
    records.parse_item(records.with_checksum(record), "x")  # valid, before it is spoiled
    target = record
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    with pytest.raises(errors.CorruptCheckpointError, match="malformed record"):
        records.parse_item(records.with_checksum(record), "x")


@pytest.mark.parametrize(
    "change",
    [
        {"step": -1},
        {"step": "3"},
        {"step": True},
        {"items": {"../a": "tree"}},
        {"items": {"": "tree"}},
        {"items": {"a": "pickle"}},
        {"items": []},
        {"files": {"a/../../b": [1, HEX]}},
        {"files": {"a\0b": [1, HEX]}},
    ],
)
def test_a_malformed_step_is_one_clear_error(change: dict[str, Any]) -> None:
    record = json.loads(STEP.to_json())
    del record["xxh3"]
    with pytest.raises(errors.CorruptCheckpointError, match="malformed record"):
        records.parse_step(records.with_checksum({**record, **change}), "x")


def test_a_text_nested_beyond_reason_is_one_clear_error() -> None:
    body = b"[" * 200_000 + b"]" * 200_000
    text = body[:-1] + f', "xxh3": "{records.digest_hex(body[:-1])}"}}'.encode()
    with pytest.raises(errors.CorruptCheckpointError, match="not JSON"):
        records.verify_checksum(text, "x")


@pytest.mark.parametrize("order", [1, -1])
def test_a_leaf_of_orbax_that_is_a_container_too_is_refused(order: int) -> None:
    def entry(*names: str) -> dict[str, object]:
        keys = [{"key": name, "key_type": 2} for name in names]
        return {"key_metadata": keys, "value_metadata": {"value_type": "None"}}

    entries = [("a", entry("a")), ("a.b", entry("a", "b"))][::order]
    data = json.dumps({"tree_metadata": dict(entries)}).encode()
    with pytest.raises(errors.CorruptCheckpointError, match="share one key path"):
        orbax.parse_tree(data, "path", spec_of=lambda name: ArraySpec((), "int8"), texts={})
