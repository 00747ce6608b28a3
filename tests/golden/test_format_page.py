"""A reader written from docs/format.md: json, tensorstore and xxhash, nothing of the package."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
import xxhash

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "format.md"
CHECKPOINTS = ["run/7", "save", "spread"]
RECORD = "_FUNCTIONAL_CKPT"
BLOCKS = {"v1": 65536, "v2": 131072}
COUNTED = ("list", "tuple", "torch_size", "deque")
ARRAYS = ("tensor", "ndarray", "numpy_scalar", "bytes")
VALUES = ("none", "bool", "int", "float", "complex", "str", "torch_dtype", "torch_device")


@pytest.fixture(params=[f"{version}/{name}" for version in BLOCKS for name in CHECKPOINTS])
def checkpoint(request: pytest.FixtureRequest) -> Path:
    return HERE / request.param


def unsealed(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    assert data[-29:] == f', "xxh3": "{xxhash.xxh3_64_hexdigest(data[:-29])}"}}'.encode()
    record = json.loads(data)
    assert data.isascii() and list(record)[-1] == "xxh3"
    assert record["format"] == "functional_ckpt"
    assert f"/v{record['version']}/" in path.as_posix()
    return record


def check_files(root: Path, record: dict[str, Any]) -> None:
    for name, (size, digest) in record["files"].items():
        data = (root / name).read_bytes()
        assert (len(data), xxhash.xxh3_64_hexdigest(data)) == (size, digest), name


def files_below(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def tree_items(checkpoint: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for name, kind in unsealed(checkpoint / RECORD)["items"].items():
        if kind == "tree":
            yield checkpoint / name, unsealed(checkpoint / name / RECORD)


def leaves(nodes: Iterator[dict[str, Any]], path: tuple[str, ...] = ()) -> Iterator[Any]:
    """Name, kind and node of every array and value."""
    node = next(nodes)
    kind, payload = next(iter(node.items()))
    assert set(node) <= {kind, "detail", "tied_to"}
    if kind in ARRAYS or kind in VALUES:
        yield ".".join(path) if path else "value", kind, node
        return
    keys = range(payload) if kind in COUNTED else map(text, payload)
    for key in keys:
        yield from leaves(nodes, (*path, str(key)))


def text(key: Any) -> str:
    """The text of a key: Python's, of the value that was tagged."""
    return key if isinstance(key, str) else str(untagged(key))


def untagged(tagged: Any) -> Any:
    kind, value = tagged
    if kind == "tuple":
        return tuple(map(untagged, value))
    if kind == "bytes":
        import base64

        return base64.b64decode(value)
    assert kind in ("index", "none", "bool", "int", "float", "str")
    return value


def prefix(name: str) -> str:
    return "" if name in ("", "/") else name if name.endswith("/") else f"{name}/"


def dtype_of(name: str) -> np.dtype[Any]:
    return np.dtype(getattr(ml_dtypes, name, None) or name)


def test_one_record_fixes_every_file(checkpoint: Path) -> None:
    step = unsealed(checkpoint / RECORD)
    check_files(checkpoint, step)
    assert step["step"] == (7 if checkpoint.name == "7" else None)
    listed = {RECORD, *step["files"]}
    for item, record in tree_items(checkpoint):
        assert record["item"] == item.name
        assert record["digest_block_bytes"] == BLOCKS[f"v{record['version']}"]
        check_files(item, record)
        listed |= {f"{item.name}/{name}" for name in record["files"]}
    assert files_below(checkpoint) == listed


def test_every_chunk_has_the_bytes_of_its_digests(checkpoint: Path) -> None:
    num_chunks = 0
    for item, record in tree_items(checkpoint):
        spec = {"driver": "ocdbt", "base": f"file://{item}/"}
        store = ts.KvStore.open(spec).result()
        keys = {key.decode() for key in store.list().result()}
        nodes = iter(record["structure"])
        found = {name: node for name, kind, node in leaves(nodes) if kind in ARRAYS}
        assert next(nodes, None) is None
        assert {name for name, node in found.items() if "tied_to" not in node} == set(
            record["arrays"]
        )
        for name, node in found.items():
            dtype, shape = node[next(iter(node))]
            chunk_shape, digests = record["arrays"][node.get("tied_to", name)]
            metadata = json.loads(store.read(prefix(name) + "zarr.json").result().value)
            assert (metadata["shape"], metadata["data_type"]) == (shape, dtype)
            assert metadata["codecs"] == [{"name": "bytes", "configuration": {"endian": "little"}}]
            grid = [range(math.ceil(n / c)) for n, c in zip(shape, chunk_shape, strict=True)]
            expected = iter(digests[i : i + 16] for i in range(0, len(digests), 16))
            for index in itertools.product(*grid):
                key = prefix(name) + "/".join(("c", *map(str, index)))
                keys.discard(key)
                value = store.read(key).result().value
                chunk = np.frombuffer(value, dtype_of(dtype)).reshape(chunk_shape)
                valid = [
                    slice(min(c, n - i * c))
                    for c, n, i in zip(chunk_shape, shape, index, strict=True)
                ]
                block = np.ascontiguousarray(chunk[tuple(valid)]).tobytes()
                size = record["digest_block_bytes"]
                for start in range(0, len(block), size):
                    got = xxhash.xxh3_64_hexdigest(block[start : start + size])
                    assert got == next(expected), key
                num_chunks += 1
            assert next(expected, None) is None
        rest = {key for key in keys if not key.endswith("zarr.json")}
        numbers = {
            f"{prefix(n)}c" for n, kind, _ in leaves(iter(record["structure"])) if kind in VALUES
        }
        assert rest <= numbers  # Orbax's copies of plain numbers
    assert num_chunks > 1


def test_tensors_are_the_arrays_of_their_names(checkpoint: Path) -> None:
    num_tensors = 0
    for item, record in tree_items(checkpoint):
        if record["version"] == 1:
            continue
        found = {name: node for name, kind, node in leaves(iter(record["structure"]))}
        spec = {"driver": "ocdbt", "base": f"file://{item}/"}
        store = ts.KvStore.open(spec).result()
        for file in item.glob("*.safetensors"):
            data = file.read_bytes()
            start = 8 + int.from_bytes(data[:8], "little")
            header = json.loads(data[8:start])
            metadata = header.pop("__metadata__")
            assert start % 4096 == 0 and metadata.pop("format") == "pt"
            assert all(found[tied]["tied_to"] == name for tied, name in metadata.items())
            ends = sorted(tuple(tensor["data_offsets"]) for tensor in header.values())
            assert [0, *(end for _, end in ends)] == [
                *(begin for begin, _ in ends),
                len(data) - start,
            ]
            for name, tensor in header.items():
                _, shape = found[name][next(iter(found[name]))]
                assert tensor["shape"] == shape
                begin, end = (start + offset for offset in tensor["data_offsets"])
                key = prefix(name) + "/".join(("c", *("0" for _ in shape)))
                if begin < end:
                    first = store.read(key).result().value
                    assert data[begin:end].startswith(first[: end - begin])
                num_tensors += 1
    assert num_tensors > 0 or "v1" in checkpoint.parts


def test_orbaxs_files_name_the_same_leaves(checkpoint: Path) -> None:
    for item, record in tree_items(checkpoint):
        metadata = json.loads((item / "_METADATA").read_bytes())
        assert metadata["use_zarr3"] and metadata["use_ocdbt"]
        theirs = {
            ".".join(key["key"] for key in leaf["key_metadata"])
            for leaf in metadata["tree_metadata"].values()
            if leaf["value_metadata"]["value_type"] not in ("Dict", "List", "Tuple")
        }
        assert theirs == {name for name, _, _ in leaves(iter(record["structure"]))}


def test_page_names_every_kind_and_field() -> None:
    page = PAGE.read_text(encoding="utf-8")
    named = set(re.findall(r"`([A-Za-z0-9_]+)`", page))
    used: set[str] = set()
    for path in (HERE / version / name for version in BLOCKS for name in CHECKPOINTS):
        for _, record in tree_items(path):
            used |= set(record) - {"xxh3"}
            for node in record["structure"]:
                used |= set(node) | set(node.get("detail", {}))
    assert used - named == set()
    assert len(used) > 30
