"""Structures as JSON and back: one record per node, parents before children. Free of torch.

The list is flat, so that neither writing nor reading a deep tree needs a deep stack. A branch says
how many children follow it (sequences) or their keys (all others):

    {"a": [1, t]}  ->  [{"dict": ["a"]}, {"list": 2}, {"int": 1}, {"tensor": ["float32", [3]]}]
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any, TypeAlias

from functional_ckpt.core.arrays.spec import CARRIED_BY, ArraySpec
from functional_ckpt.core.tree import plain_json, structure, walk
from functional_ckpt.core.tree.plain_json import integer, string

Json: TypeAlias = Any

_SEQUENCES = ("list", "tuple", "torch_size", "deque")
_MAPPINGS = (
    *("dict", "ordered_dict", "default_dict", "counter", "named_tuple", "registered"),
    "per_rank",
)
_PARTS = ("sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc", "quantized")
_BRANCHES = (*_MAPPINGS, *_PARTS, "subclass", "per_rank")
# `numpy.dtype` accepts far more than the names written here, through a parser of Python.
_NUMPY_DTYPE = re.compile(r"[<>|=][SUMmiufcb]\d{0,9}(\[\d{0,9}[A-Za-z]{1,8}\])?")
_ARRAYS = ("tensor", "ndarray", "numpy_scalar", "bytes")


def to_json(root: structure.Node) -> list[Json]:
    """Returns the records of a structure."""
    records: list[Json] = []
    todo = [root]
    while todo:
        node = todo.pop()
        records.append(_record(node))
        if isinstance(node, structure.BranchNode):
            todo.extend(reversed(node.children))
    return records


def _record(node: structure.Node) -> Json:
    if isinstance(node, structure.ValueNode):
        return {node.kind: plain_json.encode(node.value)}
    record: dict[str, Json]
    if isinstance(node, structure.ArrayNode):
        record = {node.kind: [node.spec.dtype, list(node.spec.shape)]}
        if node.tied_to is not None:
            record["tied_to"] = node.tied_to
    elif node.kind in _SEQUENCES:
        record = {node.kind: len(node.children)}
    else:
        record = {node.kind: [_key_to_json(key) for key in node.keys]}
    if node.detail:
        record["detail"] = dict(node.detail)
    return record


_Entry: TypeAlias = tuple[structure.Key | None, int]
"""The key of a node (None for the root) and its depth."""


def from_json(records: Json) -> structure.Node:
    """Returns the structure that records describe.

    Raises:
        ValueError, TypeError, KeyError, UsageError: The records are malformed.
    """
    if not isinstance(records, list) or not records:
        raise ValueError("the structure is not a list of records")
    remaining: Iterator[Json] = iter(records)
    trail: walk.Trail[structure.Key] = walk.Trail()

    def visit(entry: _Entry) -> walk.Visit[_Entry, structure.Node]:
        key, depth = entry
        trail.enter(depth, key)
        record = next(remaining, None)
        if record is None:
            raise ValueError("the structure ends before all children were described")
        kind = string(next(iter(record), None))
        payload, detail = record[kind], record.get("detail", {})
        if type(detail) is not dict:
            raise ValueError(f"{detail!r:.80} for a detail")
        if kind in _ARRAYS:
            return None, _array(kind, payload, detail, record.get("tied_to"), trail.path())
        if kind in _SEQUENCES:
            if not 0 <= integer(payload) <= len(records):
                raise ValueError(f"a {kind} of {payload} children in {len(records)} records")
            keys = tuple(structure.Key(index, "index") for index in range(payload))
        elif kind in _BRANCHES:
            keys = tuple(_key_from_json(key) for key in payload)
        else:
            return walk.leaf(structure.ValueNode(kind=kind, value=plain_json.decode(kind, payload)))
        if len({str(key.value) for key in keys}) != len(keys):
            raise ValueError(f"a key occurs twice under {structure.pretty(trail.path())}")
        return [(key, depth + 1) for key in keys], lambda children: structure.BranchNode(
            kind=kind, keys=keys, children=tuple(children), detail=detail
        )

    root = walk.fold((None, 0), visit)
    if next(remaining, None) is not None:
        raise ValueError("the structure continues after its last leaf")
    return root


def _array(
    kind: str, payload: Json, detail: dict[str, object], tied_to: Json, path: structure.KeyPath
) -> structure.ArrayNode:
    dtype, sizes = payload
    spec = _spec(shape(sizes), string(dtype))
    if not detail:
        pass
    elif kind == "tensor":
        _check_tensor(spec, detail)
    elif (dtype := detail.get("dtype")) is not None and not _NUMPY_DTYPE.fullmatch(string(dtype)):
        raise ValueError(f"{dtype!r:.80} is not a stored numpy dtype")
    return structure.ArrayNode(
        kind=kind,
        spec=spec,
        name=structure.leaf_name(path),
        detail=detail,
        tied_to=None if tied_to is None else string(tied_to),
    )


_spec = functools.lru_cache(maxsize=4096)(ArraySpec)


def _check_tensor(spec: ArraySpec, detail: dict[str, object]) -> None:
    """A problem that would make a tensor exceed its stored bytes."""
    carried = detail.get("dtype")
    if carried is not None and CARRIED_BY.get(string(carried)) != spec.dtype:
        raise ValueError(f"{spec.dtype} does not carry {carried}")
    if (strides := detail.get("strides")) is not None:
        expected = 1
        for stride, size in sorted(zip(shape(strides), spec.shape, strict=True)):
            if size != 1 and stride != expected:
                raise ValueError(f"strides {strides} do not fit the shape {spec.shape}")
            expected *= size


def shape(value: Json) -> tuple[int, ...]:
    """Returns a shape of JSON as a tuple of integers."""
    return tuple(map(integer, value))


def _key_to_json(key: structure.Key) -> Json:
    if key.kind == "index":
        return ["index", key.value]
    return key.value if isinstance(key.value, str) else plain_json.tag(key.value)


def _key_from_json(record: Json) -> structure.Key:
    if isinstance(record, str):
        return structure.Key(record)
    if record[0] == "index":
        return structure.Key(integer(record[1]), "index")
    value = plain_json.untag(record)
    hash(value)  # a TypeError here, not when a dict is made of it
    return structure.Key(value)
