"""A foreign checkpoint opened as items by name, each read on access."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch

from functional_ckpt import errors
from functional_ckpt.interop import hostile
from functional_ckpt.saving import lower


class Source(Mapping[str, Any]):
    """Items by name, for `fc.save` or to look into; an item is opened when it is first asked for.

    Tensors are memory-mapped where the format allows: unused tensors are not read, and saved
    tensors need no second copy.

    Attributes:
        path: The file or directory.
        format: Name of the format.
        items: Item name -> function that opens it.
        left_out: Files next to the opened ones that are in no item.
    """

    def __init__(
        self,
        path: str,
        format: str,
        items: Mapping[str, Callable[[], Any]],
        left_out: Sequence[str] = (),
    ) -> None:
        self.path = path
        self.format = format
        self.left_out = tuple(left_out)
        self._openers = dict(items)
        self._opened: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._openers:
            raise KeyError(name)
        if name not in self._opened:
            with hostile.clear_failures(f"{self.path}, item {name!r}"):
                self._opened[name] = self._openers[name]()
        return self._opened[name]

    def __contains__(self, name: object) -> bool:
        return name in self._openers

    def __iter__(self) -> Iterator[str]:
        return iter(self._openers)

    def __len__(self) -> int:
        return len(self._openers)

    def __repr__(self) -> str:
        return f"Source({self.path!r}, format={self.format!r}, items={list(self._openers)})"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A format that can be opened.

    Attributes:
        name: Its name for users.
        description: One line for users.
        matches: Whether the file or directory at a path has this format; reads no more than names
            and headers.
        open: Opens it.
        supersedes: Names of more general formats that match wherever this one does.
    """

    name: str
    description: str
    matches: Callable[[str], bool]
    open: Callable[[str], Source]
    supersedes: tuple[str, ...] = ()


def source_of(path: str, format: str, items: Mapping[str, Any]) -> Source:
    """Returns a source of values that were read; state dicts keep the versions of their modules."""

    def same(value: Any) -> Any:
        return value

    openers = {name: functools.partial(same, value) for name, value in items.items()}
    return Source(path, format, openers)


def items_of(
    content: Any, path: str, is_tensor: Callable[[Any], bool] = torch.is_tensor
) -> dict[str, Any]:
    """Returns the items in one file.

    A mapping of names to tensors is one item, `model`. In any other mapping each entry is an item,
    and anything but a mapping, or with a key that is not a valid item name, is one item, `state`.
    """
    if not isinstance(content, Mapping):
        return {"state": content}
    entries = cast("Mapping[Any, Any]", content)
    if not entries:
        raise errors.CorruptCheckpointError(f"{path}: it holds nothing.", path=path)
    if all(is_tensor(value) for value in entries.values()):
        return {"model": content if isinstance(content, dict) else dict(entries)}
    if all(_is_item_name(name) for name in entries):
        return dict(entries)
    return {"state": dict(entries)}


def _is_item_name(name: object) -> bool:
    try:
        lower.check_item_name(name)
    except errors.UsageError:
        return False
    return True


def numbered(name: str, values: Sequence[Any]) -> dict[str, Any]:
    """Returns one item under its name, several under the name and a number."""
    if len(values) == 1:
        return {name: values[0]}
    return {f"{name}_{number}": value for number, value in enumerate(values)}
