"""Class tests without importing the library of the class."""

from __future__ import annotations

import functools
from collections.abc import Collection

FSDP1 = frozenset({"torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel"})


@functools.lru_cache(maxsize=1024)
def class_names(kind: type) -> tuple[str, ...]:
    """Returns the dotted names of a class and its bases, in the order of method resolution.

    >>> class_names(bool)
    ('builtins.bool', 'builtins.int', 'builtins.object')
    """
    return tuple(f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__)


def is_a(value: object, names: Collection[str]) -> bool:
    """Returns whether the value's class, or a base of it, has one of the dotted names.

    >>> is_a(True, {"builtins.int"})
    True
    """
    return any(name in names for name in class_names(type(value)))
