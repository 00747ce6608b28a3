"""Orbax's metadata files as data: written next to native records, read if these are absent. Pure.

Free of torch. Facts were read off files written by orbax-checkpoint 0.12.8, and tried on its
readers.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from json.encoder import encode_basestring_ascii
from typing import Any, TypeAlias, cast

from functional_ckpt import errors
from functional_ckpt.core.arrays.spec import ArraySpec
from functional_ckpt.core.tree import plain_json, structure

Json: TypeAlias = Any

CHECKPOINT_METADATA_FILE = "_CHECKPOINT_METADATA"
TREE_METADATA_FILE = "_METADATA"
STRINGS_FILE = "_strings.json"
COMMIT_FILE = "commit_success.txt"
MANIFEST = "manifest.ocdbt"
TMP_SUFFIX = ".orbax-checkpoint-tmp"
_HANDLERS = "orbax.checkpoint._src.handlers."
_TREE_HANDLER = _HANDLERS + "standard_checkpoint_handler.StandardCheckpointHandler"
_JSON_HANDLER = _HANDLERS + "json_checkpoint_handler.JsonCheckpointHandler"
_SEQUENCE_KEY, _DICT_KEY = 1, 2
_EMPTY = {"list": "List", "deque": "List", "tuple": "Tuple", "torch_size": "Tuple", "none": "None"}
_SCALAR_DTYPES = {"int": "int64", "float": "float64", "bool": "bool", "complex": "complex128"}


def checkpoint_metadata(
    items: Mapping[str, str],
    *,
    init_time_ns: int,
    commit_time_ns: int,
    custom_metadata: Mapping[str, Json],
    metrics: Mapping[str, Json] | None,
) -> bytes:
    """Orbax's `_CHECKPOINT_METADATA`: which handler opens which item (`tree` or `json`)."""
    handlers = {
        name: _TREE_HANDLER if kind == "tree" else _JSON_HANDLER for name, kind in items.items()
    }
    if metrics is not None:
        handlers["metrics"] = _JSON_HANDLER
    record = {
        "item_handlers": handlers,
        "metrics": dict(metrics or {}),
        "performance_metrics": {},
        "init_timestamp_nsecs": init_time_ns,
        "commit_timestamp_nsecs": commit_time_ns,
        "custom_metadata": dict(custom_metadata),
    }
    return json.dumps(record).encode()


def _stored_as(leaf: structure.Node) -> str:
    """Orbax's type of a leaf: `array`, `scalar`, `string` or the name of an empty."""
    if isinstance(leaf, structure.ArrayNode):
        return "array"
    if isinstance(leaf, structure.BranchNode):
        return _EMPTY.get(leaf.kind, "Dict")
    if leaf.kind in structure.NUMBERS:
        return "array"
    if leaf.kind in _SCALAR_DTYPES:
        is_big = leaf.kind == "int" and not -(2**63) <= cast("int", leaf.value) < 2**63
        return "string" if is_big else "scalar"
    return _EMPTY.get(leaf.kind, "string")


def tree_metadata(root: structure.Node) -> bytes:
    """Orbax's `_METADATA` for a structure.

    Put together from the texts of its parts: of ten thousands of leaves most are alike.
    """
    tree: list[str] = []
    for path, leaf in structure.iter_leaves(root):
        path = path or (structure.Key(structure.ROOT_NAME),)
        if isinstance(leaf, structure.ArrayNode):
            value = _array_metadata(leaf.spec.shape)
        elif structure.is_numbers(leaf):
            value = _array_metadata(_spec_of_numbers(leaf).shape)
        else:
            value = json.dumps(_value_metadata(leaf))
        name = encode_basestring_ascii(str(tuple([str(key.value) for key in path])))
        keys = ", ".join([_key_metadata(str(key.value), key.kind) for key in path])
        tree.append(f'{name}: {{"key_metadata": [{keys}], "value_metadata": {value}}}')
    record = {
        "use_ocdbt": True,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    text = f'{{"tree_metadata": {{{", ".join(tree)}}}, {json.dumps(record)[1:]}'
    return text.encode()


@functools.lru_cache(maxsize=4096)
def _array_metadata(shape: tuple[int, ...]) -> str:
    return json.dumps(
        {"value_type": "np.ndarray", "skip_deserialize": False, "write_shape": list(shape)}
    )


def _value_metadata(leaf: structure.Node) -> Json:
    stored_as = _stored_as(leaf)
    if isinstance(leaf, structure.ValueNode) and leaf.kind == "complex":
        return {"value_type": "np.ndarray", "skip_deserialize": False}
    is_empty = stored_as in ("None", "Dict", "List", "Tuple")
    return {"value_type": stored_as, "skip_deserialize": is_empty}


def _key_metadata(key: str, kind: str) -> str:
    key_type = _SEQUENCE_KEY if kind == "index" else _DICT_KEY
    return f'{{"key": {encode_basestring_ascii(key)}, "key_type": {key_type}}}'


def strings(root: structure.Node) -> dict[str, str]:
    """Leaf name -> text, for the leaves that Orbax reads from `_strings.json`."""
    found: dict[str, str] = {}
    for path, leaf in structure.iter_leaves(root):
        if isinstance(leaf, structure.ValueNode) and _stored_as(leaf) == "string":
            text = hex(leaf.value) if isinstance(leaf.value, int) else str(leaf.value)
            # Orbax requires valid Unicode; the exact text is in the native record.
            text = text.encode("utf-8", "replace").decode()
            found[structure.leaf_name(path)] = text
    return found


def scalar_leaves(root: structure.Node) -> Iterator[tuple[str, ArraySpec, object]]:
    """Name, spec and value of the plain numbers, which Orbax reads as arrays of one chunk."""
    for path, leaf in structure.iter_leaves(root):
        if structure.is_numbers(leaf):
            yield structure.leaf_name(path), _spec_of_numbers(leaf), leaf.value
        elif isinstance(leaf, structure.ValueNode) and _stored_as(leaf) == "scalar":
            yield structure.leaf_name(path), ArraySpec((), _SCALAR_DTYPES[leaf.kind]), leaf.value


def only_chunk(spec: ArraySpec) -> str:
    """Returns the key, relative to the array, of the only chunk of one of `scalar_leaves`."""
    return "/".join(["c", *("0" for _ in spec.shape)])


def _spec_of_numbers(leaf: structure.ValueNode) -> ArraySpec:
    dtype = _SCALAR_DTYPES[structure.NUMBERS[leaf.kind]]
    return ArraySpec((len(structure.numbers_of(leaf)),), dtype)


def zarr3_metadata(spec: ArraySpec, chunk_shape: tuple[int, ...]) -> dict[str, Json]:
    """Returns the `zarr.json` of an uncompressed array with little-endian chunks in C order."""
    fill: Json = 0
    if spec.dtype == "bool":
        fill = False
    elif spec.dtype.startswith("complex"):
        fill = [0.0, 0.0]
    elif "float" in spec.dtype:
        fill = 0.0
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(spec.shape),
        "data_type": spec.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk_shape)}},
        "chunk_key_encoding": {"name": "default"},
        "fill_value": fill,
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
    }


# ------------------------------------------------------------------------------ reading Orbax's


def parse_tree(
    data: bytes, path: object, *, spec_of: Callable[[str], ArraySpec], texts: Mapping[str, str]
) -> structure.Node:
    """Returns the structure that Orbax's `_METADATA` describes.

    `spec_of` reads shape and dtype of an array from the store; `texts` is the content of
    `_strings.json`.

    Returns:
        The structure. Its arrays are tensors, or numbers if Orbax was given Python numbers;
        containers are as Orbax stores them: dicts with string keys, and lists.
    """
    try:
        record = plain_json.parse(data)
        leaves: list[tuple[structure.KeyPath, structure.Node]] = []
        for entry in record["tree_metadata"].values():
            keys = tuple(_key(key) for key in entry["key_metadata"])
            leaves.append((keys, _leaf(keys, entry["value_metadata"], spec_of, texts)))
        return _assemble(leaves)
    except (ArithmeticError, AttributeError, LookupError, RecursionError) as error:
        raise _malformed(path, error) from error
    except (TypeError, ValueError) as error:
        if isinstance(error, errors.CheckpointError):
            raise
        raise _malformed(path, error) from error


def _malformed(path: object, error: Exception) -> errors.CorruptCheckpointError:
    return errors.CorruptCheckpointError(
        f"{path}: not Orbax tree metadata ({type(error).__name__}: {error}).", path=path
    )


def _key(record: Json) -> structure.Key:
    if not isinstance(record["key"], str):
        raise ValueError(f"key {record['key']!r}")
    if record["key_type"] == _SEQUENCE_KEY:
        return structure.Key(int(record["key"]), "index")
    return structure.Key(record["key"])


def _leaf(
    keys: structure.KeyPath,
    value: Json,
    spec_of: Callable[[str], ArraySpec],
    texts: Mapping[str, str],
) -> structure.Node:
    name, kind = structure.join(keys), value["value_type"]
    if kind == "string":
        return structure.ValueNode(kind="str", value=texts[name])
    if kind == "None":
        return structure.ValueNode(kind="none", value=None)
    empties = {"Dict": "dict", "List": "list", "Tuple": "tuple", "NamedTuple": "tuple"}
    if kind in empties:
        return structure.BranchNode(kind=empties[kind], keys=(), children=())
    spec = spec_of(name)
    kind = "number" if kind == "scalar" and spec.shape == () else "tensor"
    return structure.ArrayNode(kind=kind, spec=spec, name=name)


def _assemble(leaves: list[tuple[structure.KeyPath, structure.Node]]) -> structure.Node:
    """Nested branches out of leaves and their key paths."""
    if len(leaves) == 1 and not leaves[0][0]:
        return leaves[0][1]
    groups: dict[structure.Key, list[tuple[structure.KeyPath, structure.Node]]] = {}
    for keys, leaf in leaves:
        if not keys:
            raise ValueError("a leaf and a container share one key path")
        groups.setdefault(keys[0], []).append((keys[1:], leaf))
    keys = tuple(groups)
    is_list = bool(keys) and all(key.kind == "index" for key in keys)
    if is_list:
        keys = tuple(sorted(keys, key=lambda key: cast("int", key.value)))
        if [key.value for key in keys] != list(range(len(keys))):
            raise ValueError(f"a sequence with the indices {[key.value for key in keys]}")
    children = tuple(_assemble(groups[key]) for key in keys)
    return structure.BranchNode(kind="list" if is_list else "dict", keys=keys, children=children)
