"""Plain values as JSON and back, exactly: values that JSON lacks are tagged.

Free of torch. A value whose kind is known from where it stands is written bare (`encode`,
`decode`); dict keys and the contexts of registered nodes carry their kinds with them (`tag`,
`untag`).
"""

from __future__ import annotations

import base64
import collections
import json
import struct
from typing import Any, TypeAlias, cast

__all__ = ["Json", "decode", "encode", "is_plain", "parse", "tag", "untag"]

Json: TypeAlias = Any

_SCALARS = (bool, int, float, complex, str, bytes, type(None))
# Tagged values are small: a context must not contain a tree of data.
_MAX_DEPTH = 100


def parse(data: bytes) -> Json:
    """JSON text in UTF-8; `ValueError` for anything else.

    Of bytes, `json.loads` would guess other encodings, and load the codecs for them.
    """
    return json.loads(data.decode())


def encode(value: object) -> Json:
    """A plain scalar as JSON: large integers as hex, non-finite floats as the hex of their bits."""
    if type(value) is int and not -(2**53) < value < 2**53:
        return hex(value)
    if type(value) is float:
        # NaN payloads and infinities have no JSON; finite floats survive through repr.
        is_finite = value - value == 0
        return value if is_finite else struct.pack(">d", value).hex()
    if type(value) is complex:
        return [encode(value.real), encode(value.imag)]
    if type(value) is bytes:
        return base64.b64encode(value).decode()
    if type(value) is str and not value.isascii() and _has_surrogates(value):
        return {"utf-16": value.encode("utf-16-le", "surrogatepass").hex()}
    return value


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def decode(kind: str, payload: Json) -> Any:
    """The opposite of `encode` for a value of the given kind; `ValueError` for anything else."""
    if kind == "none" and payload is None:
        return None
    if kind == "bool" and type(payload) is bool:
        return payload
    if kind == "int":
        return int(payload, 16) if isinstance(payload, str) else integer(payload)
    if kind == "float":
        return _float(payload)
    if kind == "complex":
        real, imag = payload
        return complex(_float(real), _float(imag))
    if kind == "bytes":
        return base64.b64decode(payload, validate=True)
    if kind == "str" and isinstance(payload, dict):
        return bytes.fromhex(cast("Json", payload)["utf-16"]).decode("utf-16-le", "surrogatepass")
    if kind in ("str", "torch_dtype", "torch_device"):
        return string(payload)
    raise ValueError(f"{payload!r:.100} is not a value of kind {kind!r:.100}")


def _float(payload: Json) -> float:
    if isinstance(payload, str):
        bits = bytes.fromhex(payload)
        if len(bits) != 8:
            raise ValueError(f"{payload!r:.100} is not the bits of a float")
        return float(struct.unpack(">d", bits)[0])
    if type(payload) not in (int, float):
        raise ValueError(f"{payload!r:.100} is not a float")
    return float(payload)


def string(value: Json) -> str:
    """Returns the value, if it is a string; else `ValueError`."""
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.100} is not a string")
    return value


def integer(value: Json) -> int:
    """Returns the value, if it is an integer; else `ValueError`."""
    if type(value) is not int:
        raise ValueError(f"{value!r:.100} is not an integer")
    return value


# ------------------------------------------------------------------------------------ tagged values


def is_plain(value: object, depth: int = _MAX_DEPTH) -> bool:
    """Returns whether `tag` can write a value: scalars, and tuples, lists and dicts of such."""
    if type(value) in _SCALARS:
        return True
    if depth == 0:
        return False
    if type(value) in (tuple, list):
        return all(is_plain(part, depth - 1) for part in cast("list[object]", value))
    if type(value) in (dict, collections.OrderedDict):
        parts = (part for pair in cast("dict[object, object]", value).items() for part in pair)
        return all(is_plain(part, depth - 1) for part in parts)
    return False


def tag(value: object) -> Json:
    """Returns a plain value as `[kind, payload]`.

    >>> tag((1, "a", None))
    ['tuple', [['int', 1], ['str', 'a'], ['none', None]]]
    """
    kind = "none" if value is None else type(value).__name__
    if type(value) is collections.OrderedDict:
        kind = "ordered_dict"
    if isinstance(value, (tuple, list)):
        return [kind, [tag(part) for part in cast("list[object]", value)]]
    if isinstance(value, dict):
        pairs = cast("dict[object, object]", value).items()
        return [kind, [[tag(key), tag(part)] for key, part in pairs]]
    return [kind, encode(value)]


def untag(record: Json) -> Any:
    """Returns the opposite of `tag`; `ValueError`, `TypeError` or `KeyError` for anything else."""
    kind, payload = record
    if kind == "tuple":
        return tuple(untag(part) for part in payload)
    if kind == "list":
        return [untag(part) for part in payload]
    if kind in ("dict", "ordered_dict"):
        pairs = [(untag(key), untag(part)) for key, part in payload]
        return dict(pairs) if kind == "dict" else collections.OrderedDict(pairs)
    return decode(string(kind), payload)
