"""Other libraries' formats and objects; each module is the only importer of its peer.

`open` detects the format of a foreign checkpoint and opens it as items. The modules below it are
imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from functional_ckpt.interop import dcp as dcp
    from functional_ckpt.interop import huggingface as huggingface
    from functional_ckpt.interop.detect import FORMATS as FORMATS
    from functional_ckpt.interop.detect import open as open
    from functional_ckpt.interop.source import Format as Format
    from functional_ckpt.interop.source import Source as Source

_HOMES = {"FORMATS": "detect", "Format": "source", "Source": "source", "open": "detect"}

# Modules for trainers. Each imports its library, and the manager.
_TRAINERS = ("accelerate", "lightning", "ray", "torchtitan", "trainer")

__all__ = ["FORMATS", "Format", "Source", "dcp", "huggingface", "open"]


if not TYPE_CHECKING:  # type checkers know the names above, and no others

    def __getattr__(name: str) -> Any:
        if name not in __dir__():
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        home = _HOMES.get(name)
        module = importlib.import_module(f"{__name__}.{home or name}")
        return getattr(module, name) if home else module


def __dir__() -> list[str]:
    return [*__all__, *_TRAINERS]
