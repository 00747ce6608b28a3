"""Edited checkpoints: some leaves, under other names, of other dtypes."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import fnmatch
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from functional_ckpt import errors
from functional_ckpt.core.arrays.rounding import is_floating
from functional_ckpt.core.arrays.spec import STORAGE_DTYPES, Array, ArraySpec
from functional_ckpt.core.restore_plan import rename as rename_lib
from functional_ckpt.core.restore_plan import select
from functional_ckpt.core.tree import composite, context, encode, structure, walk
from functional_ckpt.events import Shown
from functional_ckpt.saving.lower import LoweredItem, check_item_name
from functional_ckpt.transform import rewriting
from functional_ckpt.transform.rewriting import Input, NewArray, NewItem


def edit(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    only: Sequence[str] | None = None,
    ignore: select.Ignored | None = None,
    key_map: rename_lib.KeyMap | None = None,
    cast: Mapping[str, str] | None = None,
    report: Shown | None = None,
) -> None:
    """Writes an edited checkpoint: complete and durable when it returns, absent when it raises.

    Leaves are chosen first, then cast, then renamed; all names below are those in `checkpoint`.

    Args:
        checkpoint: A path or a URI, of any format that `fc.restore` reads.
        output: The checkpoint to create, a path or a URI; must not exist.
        only: Shell patterns of items (`model`) or leaves (`model.*.weight`) to keep.
        ignore: Patterns of those to leave out, or a function of a name.
        key_map: New names of leaves, as of `CheckpointManager.restore`; a mapping may also rename
            items.
        cast: Pattern of leaves, or of items -> dtype of their floating-point arrays. The last
            pattern that matches counts.
        report: Called with the bytes that were read so far, and those to be read.

    Raises:
        UsageError: A pattern or a name matches nothing, or a number is out of the new dtype's
            range.
        CorruptCheckpointError: Damaged bytes.
        StepExistsError: Something is at `output`.
    """
    items, names = _split(key_map)
    casts = _Casts(cast or {})
    chosen = select.Selection(only, ignore)
    renaming = None if names is None else rename_lib.Renaming(names)
    with contextlib.ExitStack() as files:
        source = Input(checkpoint, files)
        made: dict[str, NewItem | LoweredItem] = {}
        for name, kind in source.opened.items.items():
            new_name = items.pop(name, name)
            if kind == "json":
                item = (
                    rewriting.json_item(source.opened, name, new_name)
                    if chosen.includes_item(name)
                    else None
                )
            else:
                item = _edited(source, name, new_name, chosen, casts, renaming)
            if item is None:
                continue
            if new_name in made:
                raise errors.NameCollisionError(f"Two items would be {new_name!r}.")
            made[check_item_name(new_name)] = item
        chosen.check_used()
        casts.check_used()
        if renaming is not None:
            renaming.check_used()
        if items:
            raise errors.UsageError(
                f"{source.opened.path} has no item {next(iter(items))!r} to rename; it has "
                f"{', '.join(source.opened.items)}."
            )
        if not made:
            raise errors.UsageError("Nothing is left of the checkpoint.", path=source.opened.path)
        metrics = source.opened.metrics
        rewriting.write(output, source.opened, list(made.values()), report, metrics=metrics)


def _split(
    key_map: rename_lib.KeyMap | None,
) -> tuple[dict[str, str], rename_lib.KeyMap | None]:
    """Returns the new names of items, and the rules for leaves."""
    if not isinstance(key_map, Mapping):
        return {}, key_map
    items = {old: new for old, new in key_map.items() if "." not in f"{old}{new}"}
    leaves = {old: new for old, new in key_map.items() if old not in items}
    return items, None if items and not leaves else leaves


class _Casts:
    """Dtypes by pattern, which remembers those that matched.

    Raises:
        UsageError: One is no floating-point dtype.
    """

    def __init__(self, casts: Mapping[str, str]) -> None:
        known = [n for n in STORAGE_DTYPES if is_floating(n) and n not in encode.NUMPY_ONLY]
        for dtype in casts.values():
            if dtype not in known:
                near = "".join(
                    f"; did you mean {each}?" for each in difflib.get_close_matches(dtype, known, 1)
                )
                raise errors.UsageError(
                    f"Cannot cast to {dtype!r}: expected one of {', '.join(known)}{near}"
                )
        self._casts = casts
        self._used: set[str] = set()

    def dtype_of(self, item: str, name: str) -> str | None:
        """Returns the dtype of a floating-point array; None for its own."""
        found = None
        for pattern, dtype in self._casts.items():
            if any(fnmatch.fnmatchcase(each, pattern) for each in (item, f"{item}.{name}")):
                self._used.add(pattern)
                found = dtype
        return found

    def check_used(self) -> None:
        """Raises `UsageError` for a pattern without a match."""
        for pattern in self._casts:
            if pattern not in self._used:
                raise errors.UsageError(
                    f"cast: {pattern!r} matches no floating-point array that is kept. A pattern is "
                    "given names such as 'item.leaf.name'."
                )


def _edited(
    source: Input,
    item: str,
    new_item: str,
    chosen: select.Selection,
    casts: _Casts,
    renaming: rename_lib.Renaming | None,
) -> NewItem | None:
    saved = source.tree(item)
    kept = _chosen(saved.root, item, chosen.leaves_of(item))
    if kept is None:
        return None
    root = _cast(kept, item, casts)
    if renaming is not None:
        root = renaming.rename(root, item)
        if root is None:
            return None
        root = _with_metadata(root, item, renaming)
    root, old_names = _labelled(root)
    stored = rewriting.arrays_of(saved.root)
    arrays: dict[str, NewArray] = {}
    for name, node in rewriting.arrays_of(root).items():
        if node.tied_to is not None:
            continue
        was = stored[old_names[name]]
        combine = next
        if node.spec.dtype != was.spec.dtype:
            where = f"{item}.{was.name}"
            combine = functools.partial(_converted, dtype=node.spec.dtype, where=where)
        arrays[name] = NewArray([source.array(item, was)], combine)
    return NewItem(new_item, root, arrays, saved)


def _chosen(root: structure.Node, item: str, keep: Callable[[str], bool]) -> structure.Node | None:
    """Returns the chosen leaves of an item; of tied ones whose owner is gone, the first owns."""
    wanted: set[str] = set()

    def is_wanted(name: str) -> bool:
        if keep(name):
            wanted.add(name)
        return name in wanted

    found = select.prune(root, is_wanted)
    if found is None:
        return None
    for path, _ in structure.iter_leaves(found, leaf_kinds=composite.KINDS):
        if (name := structure.leaf_name(path)) not in wanted:
            raise errors.UsageError(
                f"{item}.{name} is in a list or tuple, of which no part can be left out. Leave out "
                "all of it.",
                key_path=f"{item}.{name}",
            )
    names = rewriting.arrays_of(found)
    owners: dict[str, str] = {}

    def tie(_: structure.KeyPath, node: structure.ArrayNode) -> structure.ArrayNode:
        if node.tied_to is None or node.tied_to in names:
            return node
        owner = owners.setdefault(node.tied_to, node.name)
        return dataclasses.replace(node, tied_to=None if owner == node.name else owner)

    return _mapped(found, tie)


def _cast(root: structure.Node, item: str, casts: _Casts) -> structure.Node:
    """Returns an item with the new dtypes; tied leaves have one."""
    dtypes: dict[str, str] = {}
    for _, leaf in structure.iter_leaves(root, leaf_kinds=composite.KINDS):
        if isinstance(leaf, structure.ArrayNode) and _can_cast(leaf):
            dtype = casts.dtype_of(item, leaf.name)
            if dtype is not None:
                dtypes[leaf.stored_name] = dtype

    def change(_: structure.KeyPath, node: structure.ArrayNode) -> structure.ArrayNode:
        dtype = dtypes.get(node.stored_name, node.spec.dtype)
        return dataclasses.replace(node, spec=ArraySpec(node.spec.shape, dtype))

    return _mapped(root, change)


def _can_cast(node: structure.ArrayNode) -> bool:
    is_stored_so = node.dtype == node.spec.dtype
    return is_stored_so and is_floating(node.dtype) and node.kind in ("tensor", "ndarray")


def _converted(pieces: Iterator[Array], *, dtype: str, where: str) -> Array:
    return rewriting.narrowed(next(pieces).astype(np.float64), dtype, where)


def _labelled(root: structure.Node) -> tuple[structure.Node, dict[str, str]]:
    """Returns an item whose arrays are named by their paths, and new name -> old name.

    Raises:
        NameCollisionError: Two leaves have one name.
    """
    old: dict[str, str] = {}

    def label(path: structure.KeyPath, node: structure.ArrayNode) -> structure.ArrayNode:
        name = structure.leaf_name(path)
        if name in old:
            raise errors.NameCollisionError(f"Two leaves would be {name!r}.", key_path=name)
        old[name] = node.name
        return dataclasses.replace(node, name=name)

    named = _mapped(root, label)
    new = {name: entry for entry, name in old.items()}

    def tie(_: structure.KeyPath, node: structure.ArrayNode) -> structure.ArrayNode:
        return dataclasses.replace(node, tied_to=node.tied_to and new[node.tied_to])

    return _mapped(named, tie), old


def _with_metadata(
    root: structure.Node, item: str, renaming: rename_lib.Renaming
) -> structure.Node:
    """Returns a module whose submodules' metadata have the new names."""
    if not isinstance(root, structure.BranchNode) or structure.METADATA not in root.detail:
        return root
    found = context.untag(root.detail[structure.METADATA])
    renamed = {
        renaming.name(f"{item}.{name}".removesuffix(".")).removeprefix(f"{item}.") + "."
        if name
        else name: local
        for name, local in found.items()
    }
    detail = {**root.detail, structure.METADATA: context.tag(renamed)}
    return dataclasses.replace(root, detail=detail)


_Entry: TypeAlias = tuple[structure.Node, structure.Key | None, int]


def _mapped(
    root: structure.Node,
    change: Callable[[structure.KeyPath, structure.ArrayNode], structure.ArrayNode],
) -> structure.Node:
    """Returns a structure with other arrays, given those and their paths, in order."""
    trail: walk.Trail[structure.Key] = walk.Trail()

    def visit(entry: _Entry) -> walk.Visit[_Entry, structure.Node]:
        node, key, depth = entry
        trail.enter(depth, key)
        if isinstance(node, structure.ArrayNode):
            return walk.leaf(change(trail.path(), node))
        if not isinstance(node, structure.BranchNode):
            return walk.leaf(node)
        pairs = zip(node.children, node.keys, strict=True)
        children = [(child, key, depth + 1) for child, key in pairs]
        return children, lambda made: dataclasses.replace(node, children=tuple(made))

    return walk.fold((root, None, 0), visit)
