"""Lowers items for a save: their structures, and the live tensors that hold their bytes."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch

from functional_ckpt import errors
from functional_ckpt.core.arrays import sharding as sharding_lib
from functional_ckpt.core.arrays.spec import ArraySpec
from functional_ckpt.core.records import orbax
from functional_ckpt.core.tree import encode, flatten, memory, plain_json, structure
from functional_ckpt.format.step_files import PROGRESS_ITEM
from functional_ckpt.handlers import nested
from functional_ckpt.handlers.base import Item, Registry
from functional_ckpt.handlers.registry import for_items
from functional_ckpt.runtime import device_copies, threads
from functional_ckpt.saving import frozen
from functional_ckpt.storage import commit
from functional_ckpt.storage.paths import check_arrays_path

RESERVED_NAMES = ("metrics", "metadata", PROGRESS_ITEM)


class Source(NamedTuple):
    """An array that holds its own bytes.

    Attributes:
        node: The global array.
        tensor: This rank's part: the local tensor of a DTensor, otherwise all of it.
        sharding: The sharding; None for a plain array, which is complete on every rank that has it.
    """

    node: structure.ArrayNode
    tensor: torch.Tensor
    sharding: sharding_lib.Sharding | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoweredItem:
    """A lowered item: its structure, and its arrays, still in the caller's memory.

    Attributes:
        name: The item's name.
        handler: Name of the handler's class, for display.
        root: The structure; None for a JSON item.
        text: The text of a JSON item; None for a tree.
        file_stem: The start of the names of its data files.
        texts: Name -> content of small files to write beside them.
        stored_names: Leaf -> its name in files of complete arrays, if it differs.
        sources: Its arrays.
        tied: Leaves without bytes of their own: they share the memory of one of `sources`.
        scalars: Name, spec and value of the plain numbers, which Orbax reads as arrays.
        frozen: Names of the parameters that no optimizer of the items trains.
        optimizers: The optimizers whose steps alone change the values below `state`.
        values: The live objects: the item's, and those with handlers in its tree.
        per_rank: Whether the item is stored once per rank.
        first_rank: Arrays that may differ between ranks, of which the first rank's is saved ->
            whether to warn if they differ.
        is_checked: Whether the values of several ranks are compared.
    """

    name: str
    handler: str
    root: structure.Node | None
    text: bytes | None = None
    file_stem: str = "data"
    texts: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    stored_names: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    sources: tuple[Source, ...] = ()
    tied: tuple[structure.ArrayNode, ...] = ()
    scalars: tuple[tuple[str, ArraySpec, object], ...] = ()
    frozen: frozenset[str] = frozenset()
    optimizers: tuple[Any, ...] = ()
    values: tuple[Any, ...] = ()
    per_rank: bool = False
    first_rank: Mapping[str, bool] = dataclasses.field(default_factory=dict[str, bool])
    is_checked: bool = True

    @property
    def ties(self) -> dict[str, str]:
        """The name of each tied leaf -> the name of the array that holds its bytes."""
        return {leaf.name: leaf.tied_to for leaf in self.tied if leaf.tied_to is not None}


def check_item_name(name: object) -> str:
    """Returns the name of an item; raises `UsageError` if it is invalid."""
    if not isinstance(name, str) or not name:
        raise errors.UsageError(f"An item's name must be a non-empty str; got {name!r}.")
    if name in RESERVED_NAMES or name[0] in "_." or "/" in name or "\0" in name:
        raise errors.UsageError(
            f"Item name {name!r} is reserved: names may not contain '/', start with '_' or '.', or "
            f"be one of {', '.join(RESERVED_NAMES)} (metrics and progress are arguments of save).",
            key_path=name,
        )
    if commit.TMP_SUFFIX in name or not name.isprintable() or len(name.encode()) > 200:
        raise errors.UsageError(f"Item name {name!r} is not a valid directory name.", key_path=name)
    check_arrays_path(f"/{name}", item=name)
    return name


def lower(
    items: Mapping[str, Any], registry: Registry, *, rank: int = 0, ranks: tuple[int, ...] = (0,)
) -> tuple[LoweredItem, ...]:
    """Lowers every item, or raises before anything is written; copies nothing."""
    if not isinstance(items, Mapping) or not items:
        raise errors.UsageError(
            f"items must be a non-empty mapping of names to values; got {type(items).__name__} "
            f"{items!r:.60}. Wrap a single value: {{'state': value}}."
        )
    device_copies.check_not_capturing()
    memory.check_no_fake_mode()
    registry = for_items(registry, items)
    bound = {check_item_name(name): registry.bind(value, name) for name, value in items.items()}
    with threads.gc_paused():
        lowered = (_lower_item(name, item, registry, rank, ranks) for name, item in bound.items())
        return frozen.with_frozen(lowered)


def _lower_item(
    name: str, item: Item, registry: Registry, rank: int, ranks: tuple[int, ...]
) -> LoweredItem:
    kind = type(item.handler).__name__
    lowered = _tree_of(name, item)
    is_checked = item.replicated == "checked"
    if item.handler.format == "json":
        text = to_json(lowered, name)
        return LoweredItem(name=name, handler=kind, root=None, text=text, is_checked=is_checked)
    per_rank = item.handler.per_rank and len(ranks) > 1
    flat = flatten.flatten(
        {structure.rank_key(rank): lowered} if per_rank else lowered,
        item=name,
        open_leaf=lambda value, around: nested.lower(registry, value, around or item),
        ranks=None if per_rank else (rank, len(ranks)),
    )
    sources = tuple(_source(name, node, value, rank, ranks) for node, value in flat.arrays)
    own = [prefix for prefix, each in flat.nested if each.is_per_rank]
    for spread in (source for source in sources if source.sharding is not None):
        if not per_rank and not any(_is_below(spread.node.name, prefix) for prefix in own):
            continue
        raise errors.UnsupportedLeafError(
            f"{name}: {spread.node.name!r} is a DTensor, of which each rank has a part, but every "
            "rank has a state of its own in this item; save it with "
            "fc.Stateful(value, per_rank=False), or save tensor.to_local()",
            key_path=name,
        )
    hub = item.handler.hub(item.value, lowered)
    tied = {leaf.name: leaf.tied_to for leaf in flat.tied if leaf.tied_to is not None}
    return LoweredItem(
        name=name,
        handler=kind,
        root=flat.root,
        file_stem="data" if hub is None or not hub.has_tensors else "model",
        texts={} if hub is None else hub.texts,
        stored_names={} if hub is None else hub.stored_names(tied),
        sources=sources,
        tied=flat.tied,
        scalars=tuple(orbax.scalar_leaves(flat.root)),
        optimizers=tuple(item.handler.optimizers(item.value)),
        values=(item.value, *(each.item.value for _, each in flat.nested)),
        per_rank=per_rank,
        first_rank={} if len(ranks) == 1 or per_rank else _first_rank(item, flat, sources),
        is_checked=is_checked,
    )


def _tree_of(name: str, item: Item) -> Any:
    try:
        return item.handler.lower(item.value)
    except RecursionError as error:
        raise errors.UnsupportedLeafError(
            f"{name}: a {type(item.value).__name__} that contains itself, or is nested too deeply "
            f"for {type(item.handler).__name__}; remove the cycle, or save its parts as items.",
            key_path=name,
        ) from error


def _first_rank(
    item: Item, flat: flatten.FlatTree, sources: Sequence[Source]
) -> Mapping[str, bool]:
    """Returns the arrays of an item, and of values in its tree, that may differ between ranks."""
    found: dict[str, bool] = {}
    inside: list[tuple[str, Item]] = [(name, each.item) for name, each in flat.nested]
    for prefix, each in [("", item), *inside]:
        if each.replicated == "unchecked":
            names = [source.node.name for source in sources]
            found |= {name: False for name in names if _is_below(name, prefix)}
            continue
        start = f"{prefix}." if prefix not in ("", structure.ROOT_NAME) else ""
        leaves = each.handler.first_rank_leaves(each.value)
        found |= {f"{start}{name}": warns for name, warns in leaves.items()}
    return found


def _is_below(name: str, prefix: str) -> bool:
    """Returns whether a leaf is below a prefix; all leaves are below the empty one."""
    return prefix in ("", structure.ROOT_NAME) or f"{name}.".startswith(f"{prefix}.")


def _source(
    item: str, node: structure.ArrayNode, value: object, rank: int, ranks: tuple[int, ...]
) -> Source:
    try:
        if memory.is_plain(value):
            return Source(node, encode.source_of(value, node), None)
        sharding = sharding_lib.sharding_of(value)
        tensor = encode.source_of(value, node)
        if wrong := sharding_lib.wrong_local(value, sharding, tuple(tensor.shape)):
            raise errors.UnsupportedLeafError(f"rank {rank}: {wrong}")
        return Source(node, tensor, _in_group(sharding, ranks))
    except errors.UnsupportedLeafError as error:
        if error.key_path is not None:
            raise
        where = f"{item}.{node.name}"
        raise errors.UnsupportedLeafError(f"{where}: {error.message}", key_path=where) from error


def _in_group(
    sharding: sharding_lib.Sharding | None, ranks: tuple[int, ...]
) -> sharding_lib.Sharding | None:
    """Returns the sharding with ranks numbered within the saving group."""
    if sharding is None:
        return None
    is_within = _is_world(ranks) and max(sharding.ranks) < len(ranks)
    return sharding if is_within else sharding.to_group_ranks(ranks)


@functools.lru_cache(maxsize=16)  # asked for each array of thousands of ranks
def _is_world(ranks: tuple[int, ...]) -> bool:
    return ranks == tuple(range(len(ranks)))


def to_json(value: Any, what: str) -> bytes:
    """Returns the JSON text of a value; raises `UsageError`, which names unsupported values."""
    try:
        return json.dumps(value).encode()
    except (TypeError, ValueError, RecursionError) as error:
        wrong = [key for key in value if not _is_json(value[key])] if type(value) is dict else []
        where = f"{what}[{wrong[0]!r}]" if wrong else what
        raise errors.UsageError(f"{where} is not JSON: {error}.", key_path=what) from error


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def check_kept_by_json(value: object, where: str) -> None:
    """Raises `UsageError` for strings and keys that JSON would not return unchanged."""
    if isinstance(value, str) and plain_json.is_joined_by_json(value):
        raise errors.UsageError(
            f"{where} has a str of two surrogates that JSON returns as one character: {value!r}."
        )
    if isinstance(value, Mapping):
        for key, each in cast("Mapping[object, object]", value).items():
            if not isinstance(key, str):
                raise errors.UsageError(
                    f"{where} has the key {key!r}, which JSON returns as a str. Pass str(key)."
                )
            check_kept_by_json(key, where)
            check_kept_by_json(each, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, each in enumerate(cast("Sequence[object]", value)):
            check_kept_by_json(each, f"{where}[{index}]")


def plain_number(value: Any) -> Any:
    """Returns a tensor or numpy array of one element as a number; other values unchanged."""
    is_scalar = callable(getattr(value, "item", None)) and getattr(value, "size", None) is not None
    if not is_scalar or (value.numel() if isinstance(value, torch.Tensor) else value.size) != 1:
        return value
    return value.item()
