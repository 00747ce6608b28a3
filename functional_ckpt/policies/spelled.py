"""Records that are shown as the call that makes them."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from functional_ckpt.policies.timespan import Timespan

_MAX_SHOWN = 20


class Spelled:
    """A record whose `repr` is the call that makes it, such as `LatestN(3)` or `every('1h30m')`.

    Parameters that have their default are left out.
    """

    __slots__ = ()
    _call: ClassVar[str] = ""

    def __repr__(self) -> str:
        texts: list[str] = []
        has_skipped = False
        for each in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            value = getattr(self, each.name)
            if not each.repr:
                continue
            if value == each.default:
                has_skipped = True
                continue
            name = f"{each.name}=" if each.kw_only or has_skipped else ""
            texts.append(name + _spelled(value))
        return f"{self._call or type(self).__name__}({', '.join(texts)})"


def _spelled(value: object) -> str:
    """Returns a parameter as its call accepts it; of many steps only the first ones."""
    if isinstance(value, Timespan):
        return repr(str(value))
    if isinstance(value, frozenset):
        steps: list[int] = sorted(value)
        more = ", ..." if len(steps) > _MAX_SHOWN else ""
        return f"[{', '.join(map(str, steps[:_MAX_SHOWN]))}{more}]"
    return repr(value)
