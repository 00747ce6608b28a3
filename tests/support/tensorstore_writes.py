"""Local items written by TensorStore, as those of object stores are."""

from __future__ import annotations

import pytest

from functional_ckpt.format import backends

__all__ = ["force_tensorstore"]


def force_tensorstore(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has TensorStore write and merge the arrays of local items."""
    never = property(lambda arrays: False, lambda arrays, value: None)
    monkeypatch.setattr(backends.Arrays, "_is_direct", never, raising=False)
