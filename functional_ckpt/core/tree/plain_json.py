"""Plain values as JSON and back, exactly: values that JSON lacks are tagged.

Free of torch. A value whose kind is known from where it stands is written bare (`encode`,
`decode`); dict keys and the contexts of registered nodes carry their kinds with them (`tag`,
`untag`). Besides scalars these are the plain values of Python's library: paths, times, sets and
such, of exactly the classes listed here.
"""

from __future__ import annotations

import base64
import collections
import functools
import importlib
import json
import re
import struct
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias, cast

from functional_ckpt.core.tree.structure import NUMBERS

Json: TypeAlias = Any

_SCALARS = (bool, int, float, complex, str, bytes, type(None))
_SURROGATE = re.compile("[\ud800-\udfff]")
_SURROGATE_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
# Tagged values are small: a context must not contain a tree of data.
_MAX_DEPTH = 100


def parse(data: bytes) -> Json:
    """JSON text in UTF-8; `ValueError` for anything else.

    Of bytes, `json.loads` would guess other encodings, and load the codecs for them.
    """
    return json.loads(data.decode())


def encode(value: object) -> Json:
    """Returns a plain scalar as JSON: large integers and the bits of non-finite floats as hex."""
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
    if type(value) is str and not value.isascii() and _SURROGATE.search(value):
        if is_joined_by_json(value):
            return {"utf-8": value.encode("utf-8", "surrogatepass").hex()}
        return {"utf-16": value.encode("utf-16-le", "surrogatepass").hex()}
    if type(value) in (list, tuple, collections.deque):  # of numbers
        numbers = [encode(part) for part in cast("list[object]", value)]
        limit = [value.maxlen] if isinstance(value, collections.deque) else []
        return [type(value).__name__, numbers, *limit]
    if (kind := kind_of(value)) is not None:
        return _STANDARD[kind][0](value)
    return value


def is_joined_by_json(text: str) -> bool:
    """Returns whether JSON, as UTF-16, would return two surrogates as one character."""
    return not text.isascii() and _SURROGATE_PAIR.search(text) is not None


def decode(kind: str, payload: Json) -> Any:
    """Reverts `encode` for a value of the given kind; raises `ValueError` for anything else."""
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
        ((encoding, digits),) = cast("dict[str, Json]", payload).items()
        codec = {"utf-16": "utf-16-le", "utf-8": "utf-8"}[encoding]
        return bytes.fromhex(digits).decode(codec, "surrogatepass")
    if kind in ("str", "torch_dtype", "torch_device", "plain_list"):
        return string(payload)
    if kind in _STANDARD:
        return _decode_standard(kind, payload)
    if kind in NUMBERS:
        return _decode_numbers(NUMBERS[kind], *payload)
    raise ValueError(f"{payload!r:.100} is not a value of kind {kind!r:.100}")


def _decode_numbers(kind: str, container: Json, payload: Json, *maxlen: Json) -> Any:
    numbers = [decode(kind, part) for part in payload]
    if container not in ("list", "tuple", "deque") or len(maxlen) != (container == "deque"):
        raise ValueError(f"{container!r:.100} is not a list, tuple or deque")
    if kind == "int" and not all(-(2**63) <= number < 2**63 for number in numbers):
        raise ValueError("an integer beyond 64 bits in a list of numbers")
    if container == "deque":
        return collections.deque(numbers, *maxlen)
    return numbers if container == "list" else tuple(numbers)


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


Special: TypeAlias = Callable[[Any], "tuple[str, Json] | None"]
"""Returns kind and payload of a value of another kind; None for other values."""
Unspecial: TypeAlias = Callable[[str, Json], Any]
"""The opposite; `NotImplemented` for a kind that it does not know."""


def is_plain(value: object, depth: int = _MAX_DEPTH) -> bool:
    """Returns whether `tag` can write a value: scalars, and containers of plain values."""
    if type(value) in _SCALARS:
        return True
    if depth == 0:
        return False
    if type(value) in (tuple, list, set, frozenset):
        return all(is_plain(part, depth - 1) for part in cast("list[object]", value))
    if type(value) in (dict, collections.OrderedDict):
        parts = (part for pair in cast("dict[object, object]", value).items() for part in pair)
        return all(is_plain(part, depth - 1) for part in parts)
    kind = kind_of(value)
    if kind == "namespace":
        return is_plain(vars(value), depth - 1)
    if kind == "slice":
        parts = cast("slice", value)
        return is_plain((parts.start, parts.stop, parts.step), depth - 1)
    if kind in ("datetime", "time"):
        return _zone(cast("Any", value).tzinfo) is not NotImplemented
    return kind is not None


def tag(value: object, special: Special | None = None) -> Json:
    """Returns a plain value as `[kind, payload]`.

    Args:
        value: A value that `is_plain` or `special` accepts.
        special: Asked first.

    >>> tag((1, "a", None))
    ['tuple', [['int', 1], ['str', 'a'], ['none', None]]]
    """
    if special is not None and (found := special(value)) is not None:
        return list(found)
    kind = "none" if value is None else type(value).__name__
    if type(value) is collections.OrderedDict:
        kind = "ordered_dict"
    if type(value) in (tuple, list):
        return [kind, [tag(part, special) for part in cast("list[object]", value)]]
    if isinstance(value, dict):
        pairs = cast("dict[object, object]", value).items()
        return [kind, [[tag(key, special), tag(part, special)] for key, part in pairs]]
    return [kind_of(value) or kind, encode(value)]


def untag(record: Json, special: Unspecial | None = None) -> Any:
    """Returns the opposite of `tag`; `ValueError`, `TypeError` or `KeyError` for anything else."""
    kind, payload = record
    if special is not None and (found := special(string(kind), payload)) is not NotImplemented:
        return found
    if kind == "tuple":
        return tuple(untag(part, special) for part in payload)
    if kind == "list":
        return [untag(part, special) for part in payload]
    if kind in ("dict", "ordered_dict"):
        pairs = [(untag(key, special), untag(part, special)) for key, part in payload]
        return dict(pairs) if kind == "dict" else collections.OrderedDict(pairs)
    return decode(string(kind), payload)


# ------------------------------------------------------------------------------------ JSON items

TYPE = "functional_ckpt.type"
"""Key of an object in a JSON item that stands for a value which JSON has no form for."""


def pack(value: Any, special: Special | None = None) -> Json:
    """Returns a plain value as JSON: itself if JSON can represent it, else an object with `TYPE`.

    >>> pack({"a": [1, (2, 3)]})
    {'a': [1, {'functional_ckpt.type': 'tuple', 'value': [['int', 2], ['int', 3]]}]}
    """
    kind = type(value)
    if kind is list:
        return [pack(part, special) for part in value]
    if kind is dict and TYPE not in value and all(map(_is_json_text, value)):
        return {key: pack(part, special) for key, part in value.items()}
    is_finite = kind is float and value - value == 0
    if value is None or kind in (bool, int) or is_finite or _is_json_text(value):
        return value
    kind, payload = tag(value, special)
    return {TYPE: kind, "value": payload}


def _is_json_text(value: object) -> bool:
    return type(value) is str and not is_joined_by_json(value)


def unpack(value: Json, special: Unspecial | None = None) -> Any:
    """Returns the opposite of `pack`."""
    if isinstance(value, list):
        return [unpack(part, special) for part in cast("list[Json]", value)]
    if not isinstance(value, dict):
        return value
    known = cast("dict[str, Json]", value)
    if is_packed(known):
        return untag([known[TYPE], known["value"]], special)
    return {key: unpack(part, special) for key, part in known.items()}


def is_packed(value: Json) -> bool:
    """Returns whether an object stands for a value which JSON has no form for."""
    return isinstance(value, dict) and value.keys() == {TYPE, "value"}


# ------------------------------------------------------------------------------------ the library


_KINDS: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(
            (f"pathlib.{n}Path" for n in ("Posix", "Windows", "PurePosix", "PureWindows")), "path"
        ),
        "datetime.datetime": "datetime",
        "datetime.date": "date",
        "datetime.time": "time",
        "datetime.timedelta": "timedelta",
        "uuid.UUID": "uuid",
        "decimal.Decimal": "decimal",
        "fractions.Fraction": "fraction",
        "builtins.range": "range",
        "builtins.slice": "slice",
        "builtins.set": "set",
        "builtins.frozenset": "frozenset",
        "argparse.Namespace": "namespace",
        "types.SimpleNamespace": "namespace",
    }
)
"""The dotted name of a class -> its kind."""


def kind_of(value: object) -> str | None:
    """Returns the kind of a plain value of Python's library; None for anything else."""
    return _kind_of_class(type(value))


@functools.lru_cache(maxsize=1024)
def _kind_of_class(kind: type) -> str | None:
    module = "pathlib" if kind.__module__.startswith("pathlib.") else kind.__module__
    return _KINDS.get(f"{module}.{kind.__qualname__}")


def _library(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _decode_standard(kind: str, payload: Json) -> Any:
    try:
        return _STANDARD[kind][1](payload)
    except (ArithmeticError, AttributeError, LookupError) as error:
        raise ValueError(f"{payload!r:.100} is not a {kind}: {error}") from error


def _decode_path(payload: Json) -> Any:
    name, text = payload
    if f"pathlib.{name}" not in _KINDS:
        raise ValueError(f"no path of the class {name!r:.80}")
    # A path of another system comes back as one that names no file here.
    is_native = "Pure" in name or type(_library("pathlib", "Path")()).__name__ == name
    return _library("pathlib", name if is_native else f"Pure{name}")(string(text))


def _zone(zone: Any) -> Json:
    """Returns a time zone as JSON: an offset in seconds, or a name; else `NotImplemented`."""
    if zone is None:
        return None
    kind = f"{type(zone).__module__}.{type(zone).__qualname__}"
    if kind == "datetime.timezone":
        # A zone without a name prints its offset.
        name = zone.__getinitargs__()[1:]
        return ["offset", _seconds(zone.utcoffset(None)), *name]
    is_named = kind.startswith("zoneinfo.") and zone.key is not None
    return ["zone", zone.key] if is_named else NotImplemented


def _seconds(delta: Any) -> list[int]:
    return [delta.days, delta.seconds, delta.microseconds]


def _decode_zone(payload: Json) -> Any:
    if payload is None:
        return None
    if payload[0] == "zone":
        return _library("zoneinfo", "ZoneInfo")(string(payload[1]))
    offset = _library("datetime", "timedelta")(*payload[1])
    return _library("datetime", "timezone")(offset, *map(string, payload[2:]))


def _encode_time(value: Any) -> Json:
    return [value.replace(tzinfo=None, fold=0).isoformat(), value.fold, _zone(value.tzinfo)]


def _decode_time(kind: str) -> Callable[[Json], Any]:
    def decode(payload: Json) -> Any:
        text, fold, zone = payload
        value = _library("datetime", kind).fromisoformat(text)
        return value.replace(fold=integer(fold), tzinfo=_decode_zone(zone))

    return decode


def _decode_namespace(payload: Json) -> Any:
    name, values = payload
    if name not in ("argparse.Namespace", "types.SimpleNamespace"):
        raise ValueError(f"no namespace of the class {name!r:.80}")
    return _library(*name.split("."))(**untag(values))


def _encode_set(value: Any) -> Json:
    return sorted((tag(part) for part in value), key=json.dumps)


_STANDARD: Mapping[str, tuple[Callable[[Any], Json], Callable[[Json], Any]]] = MappingProxyType(
    {
        "path": (lambda value: [type(value).__name__, str(value)], _decode_path),
        "datetime": (_encode_time, _decode_time("datetime")),
        "time": (_encode_time, _decode_time("time")),
        "date": (lambda value: value.isoformat(), _library("datetime", "date").fromisoformat),
        "timedelta": (_seconds, lambda payload: _library("datetime", "timedelta")(*payload)),
        "uuid": (str, lambda payload: _library("uuid", "UUID")(string(payload))),
        "decimal": (str, lambda payload: _library("decimal", "Decimal")(string(payload))),
        "fraction": (str, lambda payload: _library("fractions", "Fraction")(string(payload))),
        "range": (
            lambda value: [encode(value.start), encode(value.stop), encode(value.step)],
            lambda payload: range(*(decode("int", part) for part in payload)),
        ),
        "slice": (
            lambda value: tag((value.start, value.stop, value.step)),
            lambda payload: slice(*untag(payload)),
        ),
        "set": (_encode_set, lambda payload: {untag(part) for part in payload}),
        "frozenset": (_encode_set, lambda payload: frozenset(untag(part) for part in payload)),
        "namespace": (
            lambda value: [f"{type(value).__module__}.{type(value).__name__}", tag(vars(value))],
            _decode_namespace,
        ),
    }
)
"""Kind -> how a value is written, and read."""
