"""Contexts of registered nodes and tensor subclasses as JSON.

Plain values, torch's own kinds, enums, dataclasses and named tuples. Classes are stored by name and
looked up among those that are loaded; nothing is imported, and none of their code runs.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import sys
import types
from typing import Any, cast

import torch

from functional_ckpt.core.tree import plain_json
from functional_ckpt.core.tree.plain_json import Json, string

_MAX_DEPTH = 20
_OF_TORCH = (torch.dtype, torch.layout, torch.memory_format)


def is_storable(context: object, depth: int = _MAX_DEPTH) -> bool:
    """Returns whether `tag` can write a context."""
    if depth == 0:
        return False
    if type(context) in (list, tuple):
        return all(is_storable(part, depth - 1) for part in cast("list[Any]", context))
    if type(context) in (dict, collections.OrderedDict):
        parts = [part for pair in cast("dict[Any, Any]", context).items() for part in pair]
        return all(is_storable(part, depth - 1) for part in parts)
    if is_of_torch(context):
        return True
    if isinstance(context, enum.Enum) or _fields(context) is not None:
        if isinstance(context, enum.Enum) and context.name not in type(context).__members__:
            return False  # a combination of flags
        fields = _fields(context) or {}
        is_found = _loaded(_name_of(type(context))) is type(context)
        return is_found and all(is_storable(part, depth - 1) for part in fields.values())
    return plain_json.is_plain(context)


def is_of_torch(value: object) -> bool:
    """Returns whether a value is a dtype, a device, a size or their like."""
    return isinstance(value, (*_OF_TORCH, torch.device, torch.Size))


def tag(context: Any) -> Json:
    """Returns a context as JSON."""
    return plain_json.tag(context, _special)


def untag(record: Json) -> Any:
    """Reverts `tag`; raises `ValueError`, `TypeError` or `KeyError` for malformed records."""
    return plain_json.untag(record, _unspecial)


def pack(value: Any) -> Json:
    """Returns a value of a JSON item; see `plain_json.pack`."""
    return plain_json.pack(value, _special)


def unpack(value: Json) -> Any:
    """Returns the opposite of `pack`."""
    return plain_json.unpack(value, _unspecial)


def _special(value: Any) -> tuple[str, Json] | None:
    if isinstance(value, _OF_TORCH):
        return "torch", str(value).removeprefix("torch.")
    if isinstance(value, torch.device):
        return "torch_device", str(value)
    if isinstance(value, torch.Size):
        return "torch_size", list(value)
    if isinstance(value, enum.Enum):
        return "enum", [_name_of(type(value)), value.name]
    if (fields := _fields(value)) is not None:
        return "record", [_name_of(type(value)), [[key, tag(part)] for key, part in fields.items()]]
    return None


def _unspecial(kind: str, payload: Json) -> Any:
    if kind == "torch":
        found = getattr(torch, string(payload), None)
        if not isinstance(found, _OF_TORCH):
            raise ValueError(f"this torch has no {payload!r:.80}")
        return found
    if kind == "torch_device":
        return torch.device(string(payload))
    if kind == "torch_size":
        return torch.Size(map(plain_json.integer, payload))
    if kind not in ("enum", "record"):
        return NotImplemented
    name, content = payload
    found = _loaded(string(name))
    if found is None:
        raise ValueError(f"{name!r:.100} is not loaded; import its module before the restore")
    if kind == "enum" and isinstance(found, enum.EnumMeta):
        return found.__members__[string(content)]
    fields = {string(key): untag(part) for key, part in content} if kind == "record" else {}
    names = _field_names(found) if isinstance(found, type) else ()
    if names != tuple(fields):
        raise ValueError(f"{name!r:.100} is no {kind} like the one that was stored")
    if dataclasses.is_dataclass(found):
        built = object.__new__(cast("Any", found))
        for key, part in fields.items():
            object.__setattr__(built, key, part)
        return built
    return tuple.__new__(cast("Any", found), fields.values())


def _field_names(kind: type) -> tuple[str, ...]:
    """Names of the fields of a dataclass or of a class of named tuples."""
    if dataclasses.is_dataclass(kind):
        return tuple(field.name for field in dataclasses.fields(kind))
    return tuple(getattr(kind, "_fields", ())) if issubclass(kind, tuple) else ()


def _fields(value: object) -> dict[str, Any] | None:
    """Returns the fields of a dataclass or a named tuple; None for anything else."""
    kind = type(value)
    is_record = dataclasses.is_dataclass(kind) or (isinstance(value, tuple) and kind is not tuple)
    if not is_record:
        return None
    return {name: getattr(value, name) for name in _field_names(kind)}


def _name_of(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _loaded(name: str) -> object:
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):  # not getattr: an attribute of a lazy module is an import
        found = vars(found).get(part) if isinstance(found, (type, types.ModuleType)) else None
    return found
