"""`key_map`: a structure whose leaves have the target's names.

Names are `item.leaf.name`, as everywhere in a restore; a leaf stays in its item.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeAlias

from functional_ckpt import errors
from functional_ckpt.core.tree import composite, structure
from functional_ckpt.core.tree.structure import Key, KeyPath

KeyMap: TypeAlias = (
    Mapping[str, str] | Sequence[tuple[str | re.Pattern[str], str]] | Callable[[str], str | None]
)
"""How stored names become the target's.

A mapping renames leaves, and all leaves below a name; the longest name counts. A sequence of
`(regular expression, replacement)` pairs is applied one after the other, as `re.sub` does. A
function is given each name and returns the new one, or None to leave the leaf out.
"""

_Leaf: TypeAlias = tuple[KeyPath, structure.Node]
# Where names of parameters stand in an optimizer: param_groups, the group's index, params.
_NAMES_DEPTH = 3


class Renaming:
    """Renames leaves, and remembers which of its rules did: a typo must not pass in silence.

    Raises:
        UsageError: They are no rules.
    """

    def __init__(self, key_map: KeyMap) -> None:
        self._rules = _rules(key_map)
        self._used: set[int] = set()

    def rename(self, root: structure.Node, item: str) -> structure.Node | None:
        """Returns an item's structure with renamed leaves; None if no leaf is left.

        Raises:
            UsageError: Two leaves would get one name, or a leaf would leave its item or its list.
        """
        branches: dict[KeyPath, structure.BranchNode] = {}
        leaves = list(_leaves(root, branches))
        renamed: dict[KeyPath, tuple[structure.Node, KeyPath]] = {}
        optimizers = {path[:-_NAMES_DEPTH] for path, node in leaves if structure.is_names(node)}
        for path, node in leaves:
            new_path = self._new_path(path, item, optimizers=optimizers)
            if new_path is None:
                continue
            if new_path in renamed:
                first, second = (
                    f"{item}.{structure.leaf_name(each)}" for each in (renamed[new_path][1], path)
                )
                raise errors.UsageError(
                    f"key_map gives {first!r} and {second!r} one name, "
                    f"{item + '.' + structure.leaf_name(new_path)!r}.",
                    key_path=second,
                )
            _note_moved(branches, path, new_path)
            renamed[new_path] = (self._with_names(node, path, item), path)
        if all(renamed.get(path) == (node, path) for path, node in leaves):
            return root  # nothing was renamed, or left out
        if not renamed:
            return None
        entries = [(path, node) for path, (node, _) in renamed.items()]
        return _grow(entries, (), branches, item)

    def name(self, old: str) -> str:
        """Returns the new name of a prefix of leaves' names."""
        return self._rules.apply(old)[0] or old

    def check_used(self) -> None:
        """Raises `UsageError` for a rule that renamed nothing, once everything was renamed."""
        unused = [n for index, n in enumerate(self._rules.names) if index not in self._used]
        if unused or not self._rules.names:
            raise errors.UsageError(
                f"key_map: {', '.join(unused) or 'no rule'} renames no leaf of the checkpoint. A "
                "rule is given names such as 'item.leaf.name'."
            )

    def _with_names(self, node: structure.Node, path: KeyPath, item: str) -> structure.Node:
        """Returns a list of parameters' names under the new names that their state has."""
        if not structure.is_names(node):
            return node
        start = structure.join((Key(item), *path[:-_NAMES_DEPTH], Key("state"), Key("")))
        children: list[structure.Node] = []
        for child in node.children:
            old = f"{start}{child.value if isinstance(child, structure.ValueNode) else ''}"
            new, used = self._rules.apply(old)
            self._used |= used
            if new is None:
                continue
            if not new.startswith(start) or new == start:
                raise errors.UsageError(
                    f"key_map renames the parameter {old!r} to {new!r}; expected a name that "
                    f"starts with {start!r}.",
                    key_path=old,
                )
            children.append(structure.ValueNode(kind="str", value=new.removeprefix(start)))
        if len(set(children)) < len(children):
            raise errors.UsageError(f"key_map gives two parameters of {item!r} one name.")
        keys = tuple(Key(index, "index") for index in range(len(children)))
        return dataclasses.replace(node, keys=keys, children=tuple(children))

    def _new_path(
        self, path: KeyPath, item: str, *, optimizers: Collection[KeyPath]
    ) -> KeyPath | None:
        name = f"{item}.{structure.leaf_name(path)}"
        new, used = self._rules.apply(name)
        self._used |= used
        if new is None or new == name:
            return None if new is None else path
        if not new or not new.startswith(f"{item}.") or len(new) == len(item) + 1 or not path:
            raise errors.UsageError(
                f"key_map renames {name!r} to {new!r}: a leaf stays in its item; expected a name "
                f"that starts with {item + '.'!r}.",
                key_path=name,
            )
        new = new.removeprefix(f"{item}.")
        for start in optimizers:
            if path[: len(start)] != start or not new.startswith(_prefix(start)):
                continue
            moved = _renamed_parameter(path[len(start) :], new.removeprefix(_prefix(start)))
            if moved is not None:
                return (*start, *moved)
        return _respelled(path, new, name)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Rules:
    """A key map of whatever form.

    Attributes:
        names: The name of each rule in messages.
        apply: Returns the new name of a leaf, and the indices of the rules that made it.
    """

    names: tuple[str, ...]
    apply: Callable[[str], tuple[str | None, set[int]]]


def _rules(key_map: KeyMap) -> _Rules:
    if callable(key_map):
        return _by_function(key_map)
    if isinstance(key_map, Mapping):
        return _by_prefix(key_map)
    return _by_expressions(key_map)


def _by_function(function: Callable[[str], str | None]) -> _Rules:
    def apply(name: str) -> tuple[str | None, set[int]]:
        new = function(name)
        return new, set() if new == name else {0}

    return _Rules(names=(f"{getattr(function, '__name__', function)}()",), apply=apply)


def _by_prefix(names: Mapping[str, str]) -> _Rules:
    if not all(isinstance(text, str) and text for pair in names.items() for text in pair):
        raise errors.UsageError(
            f"key_map: expected a mapping of names to names; got {names!r:.200}."
        )
    pairs = list(names.items())

    def apply(name: str) -> tuple[str | None, set[int]]:
        fitting = [
            (len(old), index)
            for index, (old, _) in enumerate(pairs)
            if f"{name}.".startswith(f"{old}.")
        ]
        if not fitting:
            return name, set()
        _, index = max(fitting)
        old, new = pairs[index]
        return new + name[len(old) :], {index}

    return _Rules(names=tuple(repr(old) for old in names), apply=apply)


def _by_expressions(key_map: Sequence[tuple[str | re.Pattern[str], str]]) -> _Rules:
    try:
        rules = [(re.compile(pattern), replacement) for pattern, replacement in key_map]
    except (TypeError, ValueError, re.error) as error:
        raise errors.UsageError(
            "key_map: expected a mapping of names to names, (regular expression, replacement) "
            f"pairs or a function; got {key_map!r:.200} ({error})."
        ) from error

    def apply(name: str) -> tuple[str | None, set[int]]:
        used: set[int] = set()
        for index, (pattern, replacement) in enumerate(rules):
            try:
                name, count = pattern.subn(replacement, name)
            except (re.error, IndexError) as error:
                raise errors.UsageError(
                    f"key_map: {replacement!r} cannot replace {pattern.pattern!r}: {error}"
                ) from error
            if count:
                used.add(index)
        return name, used

    return _Rules(names=tuple(repr(rule.pattern) for rule, _ in rules), apply=apply)


def _leaves(root: structure.Node, branches: dict[KeyPath, structure.BranchNode]) -> list[_Leaf]:
    """Returns every leaf with its path, composite ones as one; records their containers."""
    found: list[_Leaf] = []
    todo: list[_Leaf] = [((), root)]
    while todo:
        path, node = todo.pop()
        is_branch = isinstance(node, structure.BranchNode)
        is_one = is_branch and (node.kind in composite.KINDS or structure.is_names(node))
        if is_branch and node.children and not is_one:
            branches[path] = node
            pairs = zip(reversed(node.keys), reversed(node.children), strict=True)
            todo.extend(((*path, key), child) for key, child in pairs)
        else:
            found.append((path, node))
    return found


def _note_moved(
    branches: dict[KeyPath, structure.BranchNode], path: KeyPath, new_path: KeyPath
) -> None:
    """Records that a leaf's containers move with it, as far up as the keys are equal."""
    size = 1
    while size < min(len(path), len(new_path)) and path[-size] == new_path[-size]:
        branches.setdefault(new_path[:-size], branches[path[:-size]])
        size += 1


def _prefix(path: KeyPath) -> str:
    """Returns the prefix of the names of the leaves below a path."""
    return f"{structure.join(path)}." if path else ""


def _renamed_parameter(path: KeyPath, new: str) -> KeyPath | None:
    """Returns the path of an optimizer's state, whose second key is the name of a parameter."""
    rest = "".join(f".{key.value}" for key in path[2:])
    if len(path) < 2 or path[0].value != "state" or not new.startswith("state."):
        return None
    name = new.removeprefix("state.")
    if rest and not name.endswith(rest):
        return None
    name = name.removesuffix(rest)
    return (path[0], Key(name), *path[2:]) if name else None


def _respelled(path: KeyPath, new: str, name: str) -> KeyPath:
    """Returns the keys of a renamed path; unchanged keys at both ends keep their kinds.

    The text between is one key if it was one with a dot in it, or the only one (names of a state
    dict); otherwise one key per part.
    """
    texts = [str(key.value) for key in path]
    start, end = 0, len(path)
    while start < end and new.startswith(f"{texts[start]}."):
        new = new.removeprefix(f"{texts[start]}.")
        start += 1
    while end > start and f".{new}".endswith(f".{texts[end - 1]}"):
        new = new[: -len(texts[end - 1])].removesuffix(".")
        end -= 1
    if start == end < len(path) and new and (len(path) == 1 or "." in texts[end]):
        new = f"{new}.{texts[end]}"  # a prefix of such a key belongs to it
        end += 1
    changed = path[start:end]
    if any(key.kind == "index" for key in changed):
        raise errors.UsageError(
            f"key_map renames {name!r}: the items of a list or tuple have no names to change.",
            key_path=name,
        )
    is_one = len(path) == 1 or (len(changed) == 1 and "." in texts[start])
    middle = [new] if is_one else new.split(".") if new else []
    return (*path[:start], *map(Key, middle), *path[end:])


def _grow(
    entries: Sequence[_Leaf],
    path: KeyPath,
    branches: Mapping[KeyPath, structure.BranchNode],
    item: str,
) -> structure.Node:
    """Returns the containers above some leaves: of the kind that was there, else dicts."""
    groups: dict[Key, list[_Leaf]] = {}
    for leaf_path, node in entries:
        if len(leaf_path) == len(path):
            if len(entries) > 1:
                raise errors.UsageError(
                    f"key_map makes {item + '.' + structure.leaf_name(path)!r} a leaf and a "
                    "container of leaves.",
                    key_path=structure.pretty(path, item),
                )
            return node
        groups.setdefault(leaf_path[len(path)], []).append((leaf_path, node))
    keys = tuple(groups)
    was = branches.get(path)
    if was is None:
        was = structure.BranchNode(kind="dict", keys=(), children=())
    elif not was.is_mapping and keys != was.keys:
        raise errors.UsageError(
            f"key_map changes the members of {structure.pretty(path, item)}, a {was.kind}; only "
            "those of dicts have names to change.",
            key_path=structure.pretty(path, item),
        )
    children = tuple(_grow(groups[key], (*path, key), branches, item) for key in keys)
    return dataclasses.replace(was, keys=keys, children=children)
