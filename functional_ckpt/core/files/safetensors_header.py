"""The header of a `.safetensors` file as bytes and back. Pure; free of torch.

A file is a length (64 bits, little-endian), JSON of that length, and the tensors, one after the
other without a gap. https://huggingface.co/docs/safetensors describes it.
"""

from __future__ import annotations

import functools
import json
import math
import operator
from collections.abc import Iterable, Mapping
from json.encoder import encode_basestring_ascii
from types import MappingProxyType
from typing import Any, NamedTuple

from functional_ckpt.core.arrays.spec import STORAGE_DTYPES
from functional_ckpt.core.tree.plain_json import integer, string

DTYPES: Mapping[str, str] = MappingProxyType(
    {
        "bool": "BOOL",
        **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
        **{f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
        **{f"float{bits}": f"F{bits}" for bits in (16, 32, 64)},
        "bfloat16": "BF16",
        "complex64": "C64",
        "float8_e4m3fn": "F8_E4M3",
        "float8_e4m3fnuz": "F8_E4M3FNUZ",
        "float8_e5m2": "F8_E5M2",
        "float8_e5m2fnuz": "F8_E5M2FNUZ",
    }
)
"""Storage dtype -> the name of it in a header, of those that every reader of tensors knows."""

_EXPORTED = {**DTYPES, "float8_e8m0fnu": "F8_E8M0"}
METADATA = "__metadata__"
"""The member of a header that describes no tensor."""
SHARDING = "DCP_SHARDING_INFO"
"""The metadata from which torch's `HuggingFaceStorageReader` takes the offsets of tensors."""
MAX_TENSORS = 50_000
MAX_HEADER_BYTES = 8 * 2**20
"""Of a file that is written. The safetensors package refuses headers above 100 MB."""
BLOCK_BYTES = 4096
"""Headers are padded, so that the first tensor is aligned to a page."""
MAX_READABLE_BYTES = 100_000_000
_LENGTH_BYTES = 8
_STORAGE = {name: dtype for dtype, name in DTYPES.items()}


class Tensor(NamedTuple):
    """A tensor of a file.

    Attributes:
        name: Its name.
        dtype: Its storage dtype.
        shape: Its shape.
        start: Its first byte, counted from the end of the header.
        end: One past its last byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def entry_bytes(name: str, num_dims: int) -> int:
    """Returns an upper bound of the bytes of a tensor in a header, its offsets included."""
    return 3 * len(encode_basestring_ascii(name)) + 42 * num_dims + 130


def encode(tensors: Iterable[Tensor], metadata: Mapping[str, str]) -> bytes:
    """Returns the length and the header, padded with blanks to a multiple of `BLOCK_BYTES`."""
    entries = [f'"{METADATA}":{json.dumps(dict(metadata), separators=(",", ":"))}']
    entries += [
        f"{encode_basestring_ascii(name)}:{_described(dtype, shape)}{start},{end}]}}"
        for name, dtype, shape, start, end in tensors
    ]
    text = f"{{{','.join(entries)}}}".encode()
    size_bytes = -(-(_LENGTH_BYTES + len(text)) // BLOCK_BYTES) * BLOCK_BYTES - _LENGTH_BYTES
    return size_bytes.to_bytes(_LENGTH_BYTES, "little") + text.ljust(size_bytes)


@functools.lru_cache(maxsize=4096)  # thousands of tensors are alike
def _described(dtype: str, shape: tuple[int, ...]) -> str:
    sizes = ",".join(map(str, shape))
    return f'{{"dtype":"{_EXPORTED[dtype]}","shape":[{sizes}],"data_offsets":['


def decode(data: bytes, size_bytes: int) -> tuple[list[Tensor], dict[str, str]]:
    """Returns the tensors of a file in order of their bytes, and its metadata.

    Args:
        data: The length and the header.
        size_bytes: The size of the file.

    Raises:
        ValueError: It is not a header, or not of a file of this size; the message says why.
    """
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    if len(data) < _LENGTH_BYTES or length > min(MAX_READABLE_BYTES, size_bytes - _LENGTH_BYTES):
        raise ValueError(f"a header of {length:,} bytes in a file of {size_bytes:,}")
    if len(data) != _LENGTH_BYTES + length:
        raise ValueError(f"expected {length:,} bytes of header, got {len(data) - _LENGTH_BYTES:,}")
    try:
        record = json.loads(data[_LENGTH_BYTES:].decode(), object_pairs_hook=without_repeats)
        metadata = {string(key): string(value) for key, value in record.pop(METADATA, {}).items()}
        tensors = [_tensor(name, entry) for name, entry in record.items()]
    except (AttributeError, KeyError, RecursionError, TypeError) as error:
        raise ValueError(f"not a header ({type(error).__name__}: {error})") from error
    tensors.sort(key=operator.itemgetter(3, 4))
    after = 0
    for name, _, _, start, end in tensors:
        if start != after:
            kind = "overlaps the one before" if start < after else "follows a gap"
            raise ValueError(f"tensor {name!r} at byte {start:,} {kind}")
        after = end
    if _LENGTH_BYTES + length + after != size_bytes:
        raise ValueError(
            f"tensors end at byte {_LENGTH_BYTES + length + after:,} of {size_bytes:,}"
        )
    return tensors, metadata


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the members of a JSON object; raises ValueError if a name occurs twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r:.200} occurs twice")
    return found


def _tensor(name: str, entry: Any) -> Tensor:
    dtype = _STORAGE.get(string(entry["dtype"]))
    if dtype is None:
        raise ValueError(f"tensor {name!r} has the unknown dtype {entry['dtype']!r}")
    shape = tuple(map(integer, entry["shape"]))
    start, end = map(integer, entry["data_offsets"])
    size_bytes = math.prod(shape) * STORAGE_DTYPES[dtype]
    if min((start, *shape)) < 0 or end - start != size_bytes or end >= 2**62:
        raise ValueError(
            f"tensor {name!r}: {entry['dtype']}{list(shape)} at bytes {start} to {end}"
        )
    return Tensor(name, dtype, shape, start, end)
