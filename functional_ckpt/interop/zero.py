"""Merges and reshards ZeRO-1 optimizer states, sharded along dim 0 over data-parallel ranks. Pure.

A shard is the state of neuronx-distributed's ZeRO-1 optimizer on one rank: `base_state` (parameter
number -> its sharded state), `shape_info` (parameter number -> the full shape),
`sharded_master_weights` if there are any, and `param_groups` and other values that are equal on
every rank. The full state is the same with full tensors. Each tensor is padded with zeros so that
it divides evenly; merging removes the padding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from functional_ckpt import errors

# By parameter number: cut tensors, or dicts of them.
_CUT = ("base_state", "sharded_master_weights")
# Optimizers count in it; it is complete on every rank.
_WHOLE = ("step",)


def merge(shards: Sequence[Mapping[str, Any]], what: str) -> dict[str, Any]:
    """Returns the full state of which each data-parallel rank has a shard.

    Raises:
        CorruptCheckpointError: The shards do not fit together.
    """
    full = dict(shards[0])
    shapes = _shapes(full, what)
    for section in _CUT:
        if section not in full:
            continue
        whole: dict[Any, Any] = {}
        for number in full[section]:
            if number not in shapes:
                raise _broken(what, f"{section} has parameter {number}, which has no shape")
            values = [_entry(shard, section, number, what) for shard in shards]
            whole[number] = _join(values, shapes[number], f"{what}, {section}[{number}]")
        full[section] = whole
    return full


def split(full: Mapping[str, Any], dp_size: int, what: str) -> list[dict[str, Any]]:
    """Returns the shards of a full state for `dp_size` ranks; they share no memory with it."""
    _shapes(full, what)
    shards: list[dict[str, Any]] = []
    for rank in range(dp_size):
        shard = dict(full)
        for section in _CUT:
            if section in full:
                shard[section] = {
                    number: _map(value, functools.partial(_cut, dp_size=dp_size, rank=rank))
                    for number, value in full[section].items()
                }
        shards.append(shard)
    return shards


def _shapes(state: Mapping[str, Any], what: str) -> dict[Any, tuple[int, ...]]:
    missing = [name for name in ("base_state", "shape_info") if name not in state]
    if missing:
        raise _broken(what, f"it has no {' and no '.join(missing)}: not a ZeRO-1 optimizer's state")
    return {number: tuple(shape) for number, shape in state["shape_info"].items()}


def _entry(shard: Mapping[str, Any], section: str, number: Any, what: str) -> Any:
    try:
        return shard[section][number]
    except (KeyError, TypeError) as error:
        raise _broken(what, f"a rank has no {section}[{number}]") from error


def _join(values: Sequence[Any], shape: tuple[int, ...], what: str) -> Any:
    first = values[0]
    if isinstance(first, torch.Tensor):
        return _join_tensors(values, shape, what)
    if isinstance(first, dict):
        if any(not isinstance(value, dict) or value.keys() != first.keys() for value in values):
            raise _broken(what, "the ranks hold different entries")
        return {
            key: first[key]
            if key in _WHOLE
            else _join([value[key] for value in values], shape, f"{what}[{key!r}]")
            for key in first
        }
    return first


def _join_tensors(values: Sequence[Any], shape: tuple[int, ...], what: str) -> torch.Tensor:
    first = values[0]
    if any(
        not isinstance(value, torch.Tensor)
        or value.dtype != first.dtype
        or value.shape != first.shape
        for value in values
    ):
        raise _broken(what, "the ranks' pieces differ in shape or dtype")
    if not shape:  # nothing to shard: each rank has all of it
        return first
    joined = torch.cat(list(values)) if first.dim() else first
    fits = joined.dim() == len(shape) and joined.shape[1:] == torch.Size(shape[1:])
    # a cut that is even pads less than one row to each rank
    if not fits or not shape[0] <= joined.shape[0] < shape[0] + len(values):
        raise _broken(
            what,
            f"{len(values)} pieces of {list(first.shape)} do not make up the shape {list(shape)}; "
            "was it written by another number of ranks?",
        )
    return joined[: shape[0]].clone()


def _cut(tensor: torch.Tensor, *, dp_size: int, rank: int) -> torch.Tensor:
    if not tensor.dim():
        return tensor.clone()
    num_rows = -(-tensor.shape[0] // dp_size)
    rows = tensor[rank * num_rows : (rank + 1) * num_rows]
    padding = tensor.new_zeros((num_rows - rows.shape[0], *tensor.shape[1:]))
    return torch.cat([rows, padding])


def _map(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {k: v if k in _WHOLE else _map(v, function) for k, v in value.items()}
    return value


def _broken(what: str, why: str) -> errors.CheckpointError:
    return errors.CorruptCheckpointError(f"{what}: {why}.", path=what)
