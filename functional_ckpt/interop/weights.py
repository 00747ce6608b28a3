"""Named tensors, in memory or in a step: known at once, fetched in parts to be written.

Torch is imported when tensors are: to know those of a step takes none.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from functional_ckpt import errors
from functional_ckpt.core.arrays import sharding
from functional_ckpt.core.arrays.spec import STORAGE_DTYPES
from functional_ckpt.core.tree import structure
from functional_ckpt.format import checkpoint_dir
from functional_ckpt.interop.plain_files import stream_bytes

if TYPE_CHECKING:
    import torch

FLOATS = ("float16", "bfloat16", "float32", "float64")
"""The dtypes that an export converts."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Tensors by name; tensors that share memory have the first of their names.

    Attributes:
        sizes: Name -> bytes, of each tensor that holds its own bytes, in order.
        dtypes: Name -> torch dtype, of the same.
        shapes: Name -> shape, of the same.
        tied: Other name -> the name of its bytes.
        fetch: Names -> their tensors on the CPU.
        stream: Names -> their elements, one tensor after the other, as flat tensors on the CPU. Of
            a step they are of 8 MiB at most, in memory that the next ones overwrite.
        arrays: Name -> the array of a step that holds these bytes; None if they are made.
    """

    sizes: Mapping[str, int]
    dtypes: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, str]
    fetch: Callable[[Collection[str]], dict[str, torch.Tensor]]
    stream: Callable[[Sequence[str]], Iterator[torch.Tensor]]
    arrays: Mapping[str, str] | None = None

    def renamed(self, names: Mapping[str, str]) -> Weights:
        """Returns the same tensors, some under other names."""
        if not names:
            return self
        own = {names.get(name, name): name for name in self.sizes}

        def fetch(wanted: Collection[str]) -> dict[str, torch.Tensor]:
            found = self.fetch([own[name] for name in wanted])
            return {name: found[own[name]] for name in wanted}

        def stream(wanted: Sequence[str]) -> Iterator[torch.Tensor]:
            return self.stream([own[name] for name in wanted])

        return Weights(
            sizes={new: self.sizes[old] for new, old in own.items()},
            dtypes={new: self.dtypes[old] for new, old in own.items()},
            shapes={new: self.shapes[old] for new, old in own.items()},
            tied={names.get(a, a): names.get(name, name) for a, name in self.tied.items()},
            fetch=fetch,
            stream=stream,
            arrays=self.arrays and {new: self.arrays[old] for new, old in own.items()},
        )

    def cast(self, dtype: str) -> Weights:
        """Returns the same tensors, those of 16 to 64 bits of floating point as another dtype."""
        from functional_ckpt.core.tree import encode

        new = encode.torch_dtype(dtype)
        cast = {each for each, its in self.dtypes.items() if its in FLOATS}
        kinds = tuple(map(encode.torch_dtype, FLOATS))

        def convert(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(new) if tensor.dtype in kinds else tensor

        def fetch(names: Collection[str]) -> dict[str, torch.Tensor]:
            return {each: convert(tensor) for each, tensor in self.fetch(names).items()}

        def stream(names: Sequence[str]) -> Iterator[torch.Tensor]:
            return map(convert, self.stream(names))

        return dataclasses.replace(
            self,
            sizes={
                each: math.prod(self.shapes[each]) * STORAGE_DTYPES[dtype] if each in cast else size
                for each, size in self.sizes.items()
            },
            dtypes={each: dtype if each in cast else its for each, its in self.dtypes.items()},
            fetch=fetch,
            stream=stream,
            arrays=None,
        )


def stream_tensors(
    fetch: Callable[[Collection[str]], Mapping[str, torch.Tensor]], names: Sequence[str]
) -> Iterator[torch.Tensor]:
    """Yields the elements of tensors in memory, fetched one at a time."""
    for name in names:
        yield fetch([name])[name].detach().cpu().contiguous().reshape(-1)


def of_value(value: Any, *, keep: Callable[[str], bool] = lambda name: True) -> Weights:
    """Returns the tensors of a module, of a state dict or of any tree of tensors, by dotted name.

    Args:
        value: The value of an item.
        keep: Which of several names of one memory to know it by; the first that is kept.

    Raises:
        UnsupportedLeafError: It has values other than complete tensors.
    """
    from functional_ckpt.core.tree import encode, flatten
    from functional_ckpt.handlers import default_registry

    item = default_registry().bind(value)
    lowered = item.handler.lower(item.value)
    if isinstance(lowered, Mapping):  # names to keep come first, and so own tied tensors
        first = [name for name in lowered if keep(str(name))]
        lowered = {name: lowered[name] for name in [*first, *lowered]}
    flat = flatten.flatten(lowered)
    owned = dict(zip((node.name for node, _ in flat.arrays), flat.arrays, strict=True))
    spread = [name for name, (_, array) in owned.items() if sharding.sharding_of(array)]
    if spread:
        raise errors.UnsupportedLeafError(
            f"{spread[0]} is a DTensor, of which each rank has a part: save a step with every "
            "rank, then export that.",
            key_path=spread[0],
        )

    def fetch(names: Collection[str]) -> dict[str, torch.Tensor]:
        return {name: encode.source_of(owned[name][1], owned[name][0]) for name in names}

    stream = functools.partial(stream_tensors, fetch)
    return _weights(flat.root, fetch, stream, "the value")


def of_step(opened: checkpoint_dir.OpenCheckpoint, item: str) -> Weights:
    """Returns the tensors of one item of a step, local or in an object store, read on access.

    Raises:
        StepNotFoundError: There is no such item.
        UnsupportedLeafError: The item holds something else than tensors.
    """
    if opened.items.get(item) != "tree":
        trees = [name for name, kind in opened.items.items() if kind == "tree"]
        raise errors.StepNotFoundError(
            f"{opened.path} has no item {item!r} that holds arrays; it has {', '.join(trees)}.",
            path=opened.path,
            key_path=item,
        )
    saved = opened.tree(item)

    def fetch(names: Collection[str]) -> dict[str, torch.Tensor]:
        from functional_ckpt.core.restore_plan import select
        from functional_ckpt.core.restore_plan.match import match
        from functional_ckpt.core.tree import encode, flatten
        from functional_ckpt.core.tree.placeholders import AS_SAVED
        from functional_ckpt.restoring import read

        wanted = frozenset(names)
        root = select.prune(saved.root, wanted.__contains__)
        if root is None:
            return {}
        binding = match(root, AS_SAVED, item=item).binding
        touched = read.TargetState()
        (value,) = read.read_all([(saved, binding)], verify="stream", touched=touched)
        found = {node.name: (node, array) for node, array in flatten.flatten(value).arrays}
        return {name: encode.source_of(found[name][1], found[name][0]) for name in names}

    nodes = {node.name: node for node in saved.array_nodes()}

    def stream(names: Sequence[str]) -> Iterator[torch.Tensor]:
        import torch

        from functional_ckpt.core.tree import encode

        for node, data in stream_bytes(saved, [nodes[name] for name in names]):
            yield torch.from_numpy(data).view(encode.torch_dtype(node.dtype))

    found = _weights(saved.root, fetch, stream, f"{opened.path}, item {item}")
    return dataclasses.replace(found, arrays={name: name for name in found.sizes})


def _weights(
    root: structure.Node,
    fetch: Callable[[Collection[str]], dict[str, torch.Tensor]],
    stream: Callable[[Sequence[str]], Iterator[torch.Tensor]],
    what: str,
) -> Weights:
    sizes: dict[str, int] = {}
    dtypes: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    tied: dict[str, str] = {}
    others: list[str] = []
    for path, node in structure.iter_leaves(root):
        if isinstance(node, structure.BranchNode):
            continue  # an empty container holds no weights
        if not isinstance(node, structure.ArrayNode) or node.kind not in ("tensor", "ndarray"):
            others.append(structure.leaf_name(path))
        elif node.tied_to is not None:
            tied[node.name] = node.tied_to
        else:
            sizes[node.name] = node.spec.size_bytes
            dtypes[node.name] = node.dtype
            shapes[node.name] = node.spec.shape
    if others or not sizes:
        named = f": {', '.join(others[:8])} hold none" if others else ""
        raise errors.UnsupportedLeafError(
            f"{what}: expected tensors under names and nothing else{named}. Choose the item that "
            "holds the weights.",
            key_path=others[0] if others else None,
        )
    return Weights(sizes=sizes, dtypes=dtypes, shapes=shapes, tied=tied, fetch=fetch, stream=stream)
