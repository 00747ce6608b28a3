"""The records on disk and their JSON: our extension of Orbax's format. Pure; free of torch.

`docs/format.md` is normative; `core/orbax_format.py` has what Orbax itself reads and writes.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import struct
from collections.abc import Mapping
from typing import Any, TypeAlias, cast

import xxhash

from functional_ckpt import errors
from functional_ckpt.core import spec as spec_lib
from functional_ckpt.core import structure
from functional_ckpt.core.chunks import DIGEST_BLOCK_BYTES, ChunkGrid, digest_offsets

__all__ = [
    "EXTENSION_FILE",
    "ArrayRecord",
    "FileRecord",
    "ItemRecord",
    "StepRecord",
    "digest_hex",
    "parse_item",
    "parse_step",
    "seal",
    "unseal",
]

Json: TypeAlias = Any

EXTENSION_FILE = "_FUNCTIONAL_CKPT"
_FORMAT = "functional_ckpt"
_VERSION = 1
_SEAL = ', "xxh3": "{}"}}'
_SEAL_BYTES = len(_SEAL.format("0" * 16))
_SEQUENCES = ("list", "tuple", "torch_size", "deque")
_BRANCHES = (
    *("dict", "ordered_dict", "default_dict", "counter", "named_tuple", "registered"),
    *(
        "sparse_coo",
        "sparse_csr",
        "sparse_csc",
        "sparse_bsr",
        "sparse_bsc",
        "quantized",
        "subclass",
    ),
)
_ARRAYS = ("tensor", "ndarray", "numpy_scalar", "bytes")
_HEX = re.compile(r"[0-9a-f]*")


def digest_hex(data: Any) -> str:
    """xxh3 (64 bits, seed 0) of a bytes-like object as 16 hex digits."""
    return xxhash.xxh3_64_hexdigest(data)


@dataclasses.dataclass(frozen=True, slots=True)
class FileRecord:
    """What a file of a checkpoint must be.

    Attributes:
        size_bytes: Its size.
        xxh3: Digest of its content, 16 hex digits.
    """

    size_bytes: int
    xxh3: str


@dataclasses.dataclass(frozen=True, slots=True)
class ArrayRecord:
    """How one array is cut and what its bytes must be.

    Attributes:
        chunk_shape: Shape of one chunk.
        xxh3: For every chunk in C order, for every `DIGEST_BLOCK_BYTES` of its valid region, 16 hex
            digits; all in one string.
    """

    chunk_shape: tuple[int, ...]
    xxh3: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ItemRecord:
    """Everything about a tree item except the bytes of its arrays.

    Attributes:
        item: The item's name.
        handler: Name of the handler that lowered it, for people.
        root: The structure.
        arrays: For each array that holds bytes, by name: its grid and digests.
        files: Every other file of the item's directory.
    """

    item: str
    handler: str
    root: structure.Node
    arrays: Mapping[str, ArrayRecord]
    files: Mapping[str, FileRecord] = dataclasses.field(default_factory=dict)

    def to_json(self) -> bytes:
        """The sealed text of the item's extension file."""
        record = {
            "format": _FORMAT,
            "version": _VERSION,
            "item": self.item,
            "handler": self.handler,
            "digest_block_bytes": DIGEST_BLOCK_BYTES,
            "structure": _node_to_json(self.root),
            "arrays": {
                name: [list(array.chunk_shape), array.xxh3] for name, array in self.arrays.items()
            },
            "files": _files_to_json(self.files),
        }
        return seal(record)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """What a whole checkpoint must be.

    Attributes:
        step: The step, or None for a checkpoint without steps.
        items: Name of each item -> its format, `tree` or `json`.
        files: Every file outside the tree items' directories, and each tree item's extension file.
    """

    step: int | None
    items: Mapping[str, str]
    files: Mapping[str, FileRecord]

    def to_json(self) -> bytes:
        """The sealed text of the checkpoint's extension file."""
        return seal(
            {
                "format": _FORMAT,
                "version": _VERSION,
                "step": self.step,
                "items": dict(self.items),
                "files": _files_to_json(self.files),
            }
        )


# ------------------------------------------------------------------------------------ sealed text


def seal(record: Mapping[str, Json]) -> bytes:
    """JSON text of a record whose last member is the digest of everything before it."""
    body = json.dumps(record, separators=(",", ":"), allow_nan=False)[:-1]
    return (body + _SEAL.format(digest_hex(body.encode()))).encode()


def unseal(data: bytes, path: object) -> dict[str, Json]:
    """The record of a sealed text.

    Raises:
        CorruptCheckpointError: The text was changed, cut, or is of a version this package does not
            know.
    """
    body, mark = data[:-_SEAL_BYTES], data[-_SEAL_BYTES:]
    if mark != _SEAL.format(digest_hex(body)).encode():
        raise errors.CorruptCheckpointError(
            f"{path}: its content does not match its own digest; the file was changed or cut short.",
            path=path,
        )
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise errors.CorruptCheckpointError(f"{path}: not JSON ({error}).", path=path) from error
    if not isinstance(record, dict) or cast("Json", record).get("format") != _FORMAT:
        raise errors.CorruptCheckpointError(f"{path}: not a {_FORMAT} record.", path=path)
    known = cast("dict[str, Json]", record)
    if known.get("version") != _VERSION:
        raise errors.CorruptCheckpointError(
            f"{path}: format version {known.get('version')!r}; this package reads version {_VERSION}. "
            "Use the version of functional_ckpt that wrote it, or a later one.",
            path=path,
        )
    return known


def parse_item(data: bytes, path: object) -> ItemRecord:
    """The record in an item's extension file; `CorruptCheckpointError` for anything else."""
    record = unseal(data, path)
    with _Parsing(path):
        if record["digest_block_bytes"] != DIGEST_BLOCK_BYTES:
            raise ValueError(f"digest blocks of {record['digest_block_bytes']!r} bytes")
        root = _node_from_json(record["structure"], ())
        arrays = {
            _string(name): ArrayRecord(_shape(shape), _hex(digests))
            for name, (shape, digests) in record["arrays"].items()
        }
        _check_arrays(root, arrays)
        return ItemRecord(
            item=_string(record["item"]),
            handler=_string(record["handler"]),
            root=root,
            arrays=arrays,
            files=_files_from_json(record["files"]),
        )


def parse_step(data: bytes, path: object) -> StepRecord:
    """The record in a checkpoint's extension file; `CorruptCheckpointError` for anything else."""
    record = unseal(data, path)
    with _Parsing(path):
        step = record["step"]
        if step is not None and (type(step) is not int or step < 0):
            raise ValueError(f"step {step!r}")
        items = {_item_name(name): _string(kind) for name, kind in record["items"].items()}
        if not set(items.values()) <= {"tree", "json"}:
            raise ValueError(f"items {items!r}")
        return StepRecord(step=step, items=items, files=_files_from_json(record["files"]))


class _Parsing:
    """Turns whatever a malformed record raises into one clear error."""

    def __init__(self, path: object) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        expected = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)
        if isinstance(error, expected):
            raise errors.CorruptCheckpointError(
                f"{self.path}: malformed record ({type(error).__name__}: {error}).", path=self.path
            ) from error


def _check_arrays(root: structure.Node, arrays: Mapping[str, ArrayRecord]) -> None:
    """Every array has a record that fits it, and nothing else has one."""
    expected: set[str] = set()
    specs: dict[str, spec_lib.ArraySpec] = {}
    tied: list[structure.ArrayNode] = []
    for _, leaf in structure.iter_leaves(root):
        if not isinstance(leaf, structure.ArrayNode):
            continue
        if leaf.tied_to is not None:
            tied.append(leaf)
            continue
        expected.add(leaf.name)
        specs[leaf.name] = leaf.spec
        grid = ChunkGrid(leaf.spec.shape, arrays[leaf.name].chunk_shape)
        blocks = _num_blocks(grid, leaf.spec.itemsize_bytes, len(arrays[leaf.name].xxh3) // 16)
        if len(arrays[leaf.name].xxh3) != 16 * blocks:
            raise ValueError(
                f"array {leaf.name!r} has {len(arrays[leaf.name].xxh3)} digits of digest"
            )
    if expected != set(arrays):
        raise ValueError(f"arrays {sorted(expected ^ set(arrays))} are listed once only")
    for leaf in tied:
        if specs.get(str(leaf.tied_to)) != leaf.spec:
            raise ValueError(f"{leaf.name!r} is tied to {leaf.tied_to!r}, which is not the same")


def _num_blocks(grid: ChunkGrid, itemsize_bytes: int, recorded: int) -> int:
    if (
        grid.num_chunks > recorded
    ):  # a hostile shape may have 2^62 chunks: do not count them one by one
        return grid.num_chunks
    return digest_offsets(grid, itemsize_bytes)[-1]


# ------------------------------------------------------------------------------------ structures


def _node_to_json(node: structure.Node) -> Json:
    if isinstance(node, structure.ValueNode):
        return {node.kind: plain_to_json(node.value)}
    if isinstance(node, structure.ArrayNode):
        record: dict[str, Json] = {node.kind: [node.spec.dtype, list(node.spec.shape)]}
        if node.tied_to is not None:
            record["tied_to"] = node.tied_to
    elif node.kind in _SEQUENCES:
        record = {node.kind: [_node_to_json(child) for child in node.children]}
    else:
        record = {
            node.kind: [
                [_key_to_json(key), _node_to_json(child)]
                for key, child in zip(node.keys, node.children, strict=True)
            ]
        }
    if node.detail:
        record["detail"] = dict(node.detail)
    return record


def _node_from_json(record: Json, path: structure.KeyPath) -> structure.Node:
    kind = next(iter(record))
    payload = record[kind]
    detail = dict(record.get("detail", {}))
    if kind in _ARRAYS:
        name = structure.join(path) if path else "value"
        spec = spec_lib.ArraySpec(_shape(payload[1]), _string(payload[0]))
        tied_to = record.get("tied_to")
        return structure.ArrayNode(
            kind=kind,
            spec=spec,
            name=name,
            detail=detail,
            tied_to=None if tied_to is None else _string(tied_to),
        )
    if kind in _SEQUENCES:
        keys = tuple(structure.Key(index, "index") for index in range(len(payload)))
        children = payload
    elif kind in _BRANCHES:
        keys = tuple(_key_from_json(key) for key, _ in payload)
        children = [child for _, child in payload]
    else:
        return structure.ValueNode(kind=kind, value=plain_from_json(kind, payload))
    if len(set(map(str, keys))) != len(keys):
        raise ValueError(f"a key occurs twice under {structure.pretty(path)}")
    nodes = tuple(
        _node_from_json(child, (*path, key)) for key, child in zip(keys, children, strict=True)
    )
    return structure.BranchNode(kind=kind, keys=keys, children=nodes, detail=detail)


def _key_to_json(key: structure.Key) -> Json:
    if key.kind == "index":
        return ["index", key.value]
    return key.value if isinstance(key.value, str) else _hashable_to_json(key.value)


def _hashable_to_json(value: object) -> Json:
    if isinstance(value, tuple):
        return ["tuple", [_hashable_to_json(part) for part in cast("tuple[object, ...]", value)]]
    if isinstance(value, bytes):
        return ["bytes", base64.b64encode(value).decode()]
    kind = "none" if value is None else type(value).__name__
    return [kind, plain_to_json(value)]


def _key_from_json(record: Json) -> structure.Key:
    if isinstance(record, str):
        return structure.Key(record)
    if record[0] == "index":
        return structure.Key(_integer(record[1]), "index")
    return structure.Key(_hashable_from_json(record))


def _hashable_from_json(record: Json) -> Any:
    kind, payload = record
    if kind == "tuple":
        return tuple(_hashable_from_json(part) for part in payload)
    if kind == "bytes":
        return base64.b64decode(payload, validate=True)
    return plain_from_json(kind, payload)


def plain_to_json(value: object) -> Json:
    """A plain value as JSON, exactly: large integers and non-finite floats as hex digits of their bits."""
    if type(value) is int and not -(2**53) < value < 2**53:
        return hex(value)
    if type(value) is float:
        # NaN payloads and infinities have no JSON; finite floats survive through repr.
        finite = value - value == 0
        return value if finite else struct.pack(">d", value).hex()
    if type(value) is complex:
        return [plain_to_json(value.real), plain_to_json(value.imag)]
    if type(value) is str and not value.isascii() and _has_surrogates(value):
        return {"utf-16": value.encode("utf-16-le", "surrogatepass").hex()}
    return value


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def plain_from_json(kind: str, payload: Json) -> Any:
    """The opposite of `plain_to_json` for a value of the given kind."""
    if kind == "none" and payload is None:
        return None
    if kind == "bool" and type(payload) is bool:
        return payload
    if kind == "int":
        return int(payload, 16) if isinstance(payload, str) else _integer(payload)
    if kind == "float":
        return _float(payload)
    if kind == "complex":
        real, imag = payload
        return complex(_float(real), _float(imag))
    if kind == "str" and isinstance(payload, dict):
        return bytes.fromhex(cast("Json", payload)["utf-16"]).decode("utf-16-le", "surrogatepass")
    if kind in ("str", "torch_dtype", "torch_device"):
        return _string(payload)
    raise ValueError(f"{payload!r} is not a value of kind {kind!r}")


def _float(payload: Json) -> float:
    if isinstance(payload, str):
        return float(struct.unpack(">d", bytes.fromhex(payload))[0])
    if type(payload) not in (int, float):
        raise ValueError(f"{payload!r} is not a float")
    return float(payload)


# ------------------------------------------------------------------------------------ small parts


def _files_to_json(files: Mapping[str, FileRecord]) -> Json:
    return {name: [file.size_bytes, file.xxh3] for name, file in sorted(files.items())}


def _files_from_json(record: Json) -> dict[str, FileRecord]:
    return {
        _relative(name): FileRecord(_integer(size), _hex(digest))
        for name, (size, digest) in record.items()
    }


def _relative(name: Json) -> str:
    parts = _string(name).split("/")
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise ValueError(f"{name!r} is not a path inside the checkpoint")
    return name


def _item_name(name: Json) -> str:
    if _relative(name) != name or "/" in name:
        raise ValueError(f"{name!r} is not an item name")
    return name


def _string(value: Json) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a string")
    return value


def _integer(value: Json) -> int:
    if type(value) is not int:
        raise ValueError(f"{value!r} is not an integer")
    return value


def _hex(value: Json) -> str:
    if not _HEX.fullmatch(_string(value)):
        raise ValueError(f"{value!r} is not a digest")
    return value


def _shape(value: Json) -> tuple[int, ...]:
    return tuple(_integer(size) for size in value)
