"""Errors on their way between ranks: the others raise the class that the rank at fault raises."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeAlias

from functional_ckpt import errors

Record: TypeAlias = "dict[str, Any]"
"""An error as JSON."""

# Attributes with the same meaning on every rank; `touched` has not.
_FIELDS = ("step", "path", "key_path", "missing", "unexpected", "mismatched", "errno")


def to_record(error: BaseException) -> Record:
    """Returns the data that other ranks need to raise an equal error."""
    known = getattr(errors, type(error).__name__, None)
    is_ours = isinstance(error, errors.CheckpointError) and isinstance(known, type)
    fields = {name: getattr(error, name) for name in _FIELDS if hasattr(error, name)}
    return {
        "kind": type(error).__name__ if is_ours else "CoordinationError",
        "text": f"{type(error).__name__}: {error}",
        "fields": json.loads(json.dumps(fields, default=str)) if is_ours else {},
        # Of an error that another rank caused, who it was.
        "ranks": list(error.ranks) if isinstance(error, errors.CoordinationError) else [],
        "message": error.message if isinstance(error, errors.CoordinationError) else None,
    }


def rebuild(record: Record, message: str, ranks: Sequence[int]) -> errors.CoordinationError:
    """Returns an error of the same class, for a rank to raise because `ranks` failed."""
    kind: Any = errors.on_other_ranks(getattr(errors, record["kind"]))
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in record["fields"].items()}
    return errors.rebuild(kind, message, {**fields, "ranks": tuple(ranks)})
