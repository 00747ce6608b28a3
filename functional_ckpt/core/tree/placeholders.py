"""Placeholders in restore targets: `Fill`, `AS_SAVED` and `Refused`.

Free of torch.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any, Final


@dataclasses.dataclass(frozen=True, slots=True)
class Fill:
    """A leaf of a target tree: restore writes into this tensor's own memory and returns it.

    A tensor that stands in a target without `Fill` is imitated: its shape, dtype and device are
    wanted, in new memory.
    """

    tensor: Any

    def __repr__(self) -> str:
        dtype = str(getattr(self.tensor, "dtype", "")).removeprefix("torch.")
        shape = list(getattr(self.tensor, "shape", ()))
        return f"Fill({type(self.tensor).__name__} {dtype}{shape})"


class AsSaved(enum.Enum):
    """Type of `AS_SAVED`."""

    AS_SAVED = "as saved"

    def __repr__(self) -> str:
        return "AS_SAVED"


AS_SAVED: Final = AsSaved.AS_SAVED
"""Placeholder in a target tree: the stored subtree is restored as it was saved."""


class Nothing(enum.Enum):
    """Type of `NOTHING`."""

    NOTHING = "nothing"


NOTHING: Final = Nothing.NOTHING
"""No value: the key is left out of the restored dict."""


@dataclasses.dataclass(frozen=True, slots=True)
class Refused:
    """A part of a target that accepts no stored value: a mismatch.

    Attributes:
        expected: The expected value, in words.
        own: The value kept if mismatches are not errors; `NOTHING` leaves the key out.
    """

    expected: str
    own: Any = NOTHING
