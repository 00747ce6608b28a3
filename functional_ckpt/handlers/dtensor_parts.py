"""DTensors: new memory with the sharding of one; each rank's part of those over subclasses.

Such a part is taken apart as a tensor of the subclass is. The parts of a quantized tensor (codes,
scales) cannot be merged over ranks: they depend on how the tensor was cut. Each rank saves its own
parts; only the same sharding restores them.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch

from functional_ckpt import errors
from functional_ckpt.core.arrays import sharding
from functional_ckpt.core.arrays.spec import ArraySpec
from functional_ckpt.core.tree import encode, memory, structure
from functional_ckpt.core.tree.placeholders import AS_SAVED, Fill, Refused
from functional_ckpt.handlers.base import CheckpointItem, Handler, Item


@dataclasses.dataclass(frozen=True, slots=True)
class DTensorPartsHandler(Handler):
    """Saves this rank's part of a DTensor over a tensor subclass, and its sharding."""

    per_rank: bool = True

    def lower(self, value: Any) -> dict[str, Any]:
        """Returns the local tensor, and mesh and placements in words."""
        return {structure.LOCAL: sharding.local_of(value), structure.SHARDING: _sharding(value)}

    def target(self, value: Any, saved: Any, *, strict: bool = True) -> Any:
        """Returns the local tensor as saved.

        Raises:
            MismatchError: It was sharded in another way.
        """
        known = cast("dict[str, Any]", saved) if isinstance(saved, dict) else {}
        if (found := known.get(structure.SHARDING)) != (expected := _sharding(value)):
            problem = f"the target is {expected}, the checkpoint has {found}"
            raise errors.MismatchError(
                f"A DTensor over a tensor subclass must keep its sharding: {problem}.",
                mismatched=[problem],
            )
        return dict.fromkeys(known, AS_SAVED)

    def lift(self, value: Any, tree: Any) -> Any:
        """Returns a new DTensor, sharded as `value` is."""
        kind: Any = type(value.detach())
        return kind.from_local(
            tree[structure.LOCAL].to(value.device_mesh.device_type),
            value.device_mesh,
            value.placements,
            run_check=False,
            shape=value.shape,
            stride=value.stride(),
        )


def parts_item(value: object) -> Item | None:
    """Returns the item of a DTensor over a tensor subclass; None for anything else."""
    local = getattr(value, "_local_tensor", None)
    if local is None or not memory.is_wrapper(local) or memory.is_opaque(local):
        return None
    if not memory.is_wrapper(sharding.local_of(value)):
        return None  # it was only a redistribution that nothing had waited for
    return CheckpointItem(value, DTensorPartsHandler())


def shard_like(tensor: torch.Tensor, saved: ArraySpec) -> Any:
    """New memory for a stored array, sharded as a DTensor of its shape; `AS_SAVED` for another."""
    if tuple(tensor.shape) != saved.shape or saved.dtype in encode.NUMPY_ONLY:
        return AS_SAVED
    new = torch.empty_like(tensor.detach(), dtype=encode.torch_dtype(saved.dtype))
    # One on the meta device is imitated on the device of its mesh.
    return new if new.is_meta else Fill(new)


def made_like(parameter: torch.Tensor | None, saved: structure.Handled) -> Any:
    """Returns the target of state that a parameter lacks so far: sharded as the parameter is."""
    if parameter is None or sharding.sharding_of(parameter) is None:
        return Refused("no DTensor")
    item = CheckpointItem(parameter, DTensorPartsHandler())
    try:
        tree = item.handler.target(parameter, saved.tree)
    except errors.MismatchError as error:
        return Refused(error.mismatched[0])
    return structure.Handled(tree, saved.detail, item)


def _sharding(value: Any) -> str:
    return structure.sharding_text(sharding.sharding_of(value), tuple(value.shape))
