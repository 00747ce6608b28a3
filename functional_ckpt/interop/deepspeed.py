"""Checkpoints of DeepSpeed: ZeRO folders (stages 1 to 3), and universal checkpoints.

Files of a folder of ZeRO, of one tensor-parallel rank:
    latest                                             the name of the tag
    <tag>/mp_rank_00_model_states.pt                   stages 1 and 2: modules, names, counters
    <tag>/zero_pp_rank_0_mp_rank_00_model_states.pt    stage 3: one for each rank
    <tag>/zero_pp_rank_0_mp_rank_00_optim_states.pt    one for each rank; bf16_zero_pp_..., too
A universal checkpoint has the files of models, and for each parameter, complete:
    <tag>/zero/<name>/fp32.pt  exp_avg.pt  exp_avg_sq.pt  step.pt
    <tag>/zero/optimizer_state.pt
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from functional_ckpt import errors
from functional_ckpt.interop import hostile, torch_save
from functional_ckpt.interop.file_names import match_files
from functional_ckpt.interop.pickles import plain
from functional_ckpt.interop.source import Format, Source

_LATEST = ("latest", "latest_universal")
_MODEL = re.compile(r"(?:zero_pp_rank_(?P<dp>\d+)_)?mp_rank_(?P<mp>[\d_]+)_model_states\.pt")
_OPTIMIZER = re.compile(
    r"(?:bf16_|fp16_)?zero_pp_rank_(?P<dp>\d+)_mp_rank_(?P<mp>[\d_]+)_optim_states\.pt"
)
_CUT = re.compile(r"layer_.*|expp_rank_.*_optim_states\.pt")
_WEIGHT = "fp32"
# Keys of a model's file whose values are in `model`, `optimizer` and `scheduler`.
_USED = frozenset(
    {"module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes"}
    | {"frozen_param_fragments", "shared_params", "lr_scheduler"}
)
_UNIVERSAL_ADVICE = (
    "Convert it with DeepSpeed's own tool, python -m deepspeed.checkpoint.ds_to_universal, and "
    "open the result."
)


@dataclasses.dataclass(frozen=True, slots=True)
class _Parameters:
    """The parameters of an optimizer.

    Attributes:
        names: The names of each group of parameters, by the number that the optimizer gives it.
        values: Name -> `fp32`, the weight, and the optimizer's values.
        groups: The optimizer's `param_groups`.
        scaler: The fields of the loss scaler.
    """

    names: Sequence[Sequence[str]]
    values: Mapping[str, dict[str, Any]]
    groups: Sequence[Mapping[str, Any]]
    scaler: Any


def _tag(path: str) -> str | None:
    """Returns the folder of a tag: the path, or the one that its file `latest` names."""
    if match_files(path, lambda name: _MODEL.fullmatch(name) is not None):
        return path
    for file in (os.path.join(path, name) for name in _LATEST):
        if os.path.isfile(file):
            name = hostile.read_small(file).decode(errors="replace").strip()
            folder = os.path.join(path, os.path.basename(name))
            if match_files(folder, lambda name: _MODEL.fullmatch(name) is not None):
                return folder
    return None


def _open(path: str) -> Source:
    folder = _tag(path) or path
    if cut := match_files(folder, lambda name: _CUT.fullmatch(name) is not None):
        raise errors.UsageError(
            f"{folder}: {cut[0]} holds layers of a pipeline or experts. {_UNIVERSAL_ADVICE}",
            path=folder,
        )
    is_universal = os.path.isdir(os.path.join(folder, "zero"))
    files = _files(folder, _MODEL, is_universal=is_universal)
    shards = () if is_universal else _files(folder, _OPTIMIZER)

    @functools.cache
    def models() -> list[dict[str, Any]]:
        return [_load(file) for file in files]

    @functools.cache
    def parameters() -> _Parameters:
        return _read_universal(folder, models()) if is_universal else _read(shards, models())

    is_zero = bool(is_universal or shards)
    openers: dict[str, Callable[[], Any]] = {
        "model": lambda: _model(models(), parameters() if is_zero else None, folder)
    }
    if is_zero:
        openers["optimizer"] = lambda: _optimizer(parameters(), folder)
    elif models()[0].get("optimizer") is not None:
        openers["optimizer"] = lambda: plain(models()[0]["optimizer"])
    if models()[0].get("lr_scheduler") is not None:
        openers["scheduler"] = lambda: models()[0]["lr_scheduler"]
    openers["training"] = lambda: {
        **{key: plain(value) for key, value in models()[0].items() if key not in _USED},
        **({"loss_scaler": parameters().scaler} if is_zero else {}),
    }
    return Source(folder, "deepspeed", openers)


def _files(folder: str, pattern: re.Pattern[str], *, is_universal: bool = False) -> list[str]:
    """Returns the files of all data-parallel ranks, in order."""
    found: dict[tuple[str, int], str] = {}
    for name in match_files(folder, lambda name: pattern.fullmatch(name) is not None):
        match = pattern.fullmatch(name)
        if match is not None:
            found[match["mp"], int(match["dp"] or 0)] = os.path.join(folder, name)
    if len({mp for mp, _ in found}) > 1 and not is_universal:
        raise errors.UsageError(
            f"{folder}: it has the files of several tensor-parallel ranks, which do not say how "
            f"its parameters were cut. {_UNIVERSAL_ADVICE}",
            path=folder,
        )
    ranks = sorted(dp for mp, dp in found if mp == min(mp for mp, _ in found))
    if ranks != list(range(len(ranks))):
        raise _broken(folder, f"of the ranks' files only those of {ranks} are there")
    return [found[key] for key in sorted(found)]


def _load(file: str) -> Any:
    return torch_save.load(file, allowed=torch_save.RECORDS)


# ------------------------------------------------------------------------------------------- items


def _model(
    models: Sequence[Mapping[str, Any]], parameters: _Parameters | None, folder: str
) -> dict[str, Any]:
    """Returns the state dict of the model; parameters that were trained are the fp32 weights."""
    first = models[0]
    # With stage 3 each rank has placeholders without elements for parameters.
    stored = {
        name: value
        for name, value in first["module"].items()
        if parameters is None or not isinstance(value, torch.Tensor) or value.numel()
    }
    for name, shape in (first.get("frozen_param_shapes") or {}).items():
        pieces = [each["frozen_param_fragments"][name] for each in models]
        pieces = pieces[:1] if pieces[0].shape == tuple(shape) else pieces
        stored[name] = _joined(pieces, shape, f"{folder}, {name}")
    if parameters is not None:
        trained = {name for names in parameters.names for name in names}
        for name, values in parameters.values.items():
            if name in trained or name not in stored:
                stored[name] = values[_WEIGHT]
    for name, other in (first.get("shared_params") or {}).items():
        if other in stored:
            stored[name] = stored[other]
    order = {name: at for at, name in enumerate(first["module"])}
    return dict(sorted(stored.items(), key=lambda entry: order.get(entry[0], len(order))))


def _optimizer(parameters: _Parameters, folder: str) -> dict[str, Any]:
    """Returns the state by parameter name, as `fc.Optimizer` stores it."""
    state: dict[str, dict[str, Any]] = {}
    for names in parameters.names:
        found = [parameters.values.get(name, {}) for name in names]
        keys = sorted({key for each in found for key in each}, key=lambda key: (key != "step", key))
        for name, each in zip(names, found, strict=True):
            if missing := [key for key in keys if key not in each]:
                raise _broken(folder, f"{name!r} has no {missing[0]}")
            state[name] = {key: each[key] for key in keys if key != _WEIGHT}
    return {
        "state": state,
        "param_groups": [
            {**group, "params": [name for at in group["params"] for name in parameters.names[at]]}
            for group in parameters.groups
        ],
    }


# -------------------------------------------------------------------------------------------- ZeRO


def _read(files: Sequence[str], models: Sequence[Mapping[str, Any]]) -> _Parameters:
    """Joins the pieces of all ranks."""
    states = [_load(file)["optimizer_state_dict"] for file in files]
    first, folder = states[0], os.path.dirname(files[0])
    counts = first.get("partition_count", len(states))
    if {len(states)} != {*(counts if isinstance(counts, list) else [counts])}:
        raise _broken(folder, f"{len(states)} of {counts} ranks' files are there")
    shapes: Sequence[Mapping[str, Any]] = models[0]["param_shapes"]
    if "fp32_flat_groups" in first:
        pieces, inner, weights = _pieces_3, "optimizer_state_dict", "fp32_flat_groups"
    elif "param_slice_mappings" in first:
        pieces, inner, weights = _pieces, "base_optimizer_state", "single_partition_of_fp32_groups"
    else:
        raise errors.UsageError(
            f"{files[0]}: its layout is that of DeepSpeed before 0.7, or of other optimizers than "
            f"ZeRO's. {_UNIVERSAL_ADVICE}",
            path=files[0],
        )
    if not isinstance(first[inner], Mapping):
        raise errors.UsageError(
            f"{files[0]}: saved with elastic_checkpoint, which is not read. Save without it.",
            path=files[0],
        )
    if len(shapes) != len(first[weights]):
        raise _broken(folder, f"{len(first[weights])} groups of values for {len(shapes)} of names")
    values: dict[str, dict[str, Any]] = {}
    for at, named in enumerate(shapes):
        flat = [{_WEIGHT: each[weights][at], **each[inner]["state"].get(at, {})} for each in states]
        for name, parts in pieces(named, states, at):
            values[name] = {
                key: copy.deepcopy(value)  # an optimizer counts in it
                if not isinstance(value, torch.Tensor) or value.shape != flat[0][_WEIGHT].shape
                else _joined(
                    [flat[rank][key][start:end] for rank, start, end in parts],
                    named[name],
                    f"{folder}, {name}, {key}",
                )
                for key, value in flat[0].items()
            }
    return _Parameters(
        [list(named) for named in shapes],
        values,
        first[inner]["param_groups"],
        plain(first.get("loss_scaler")),
    )


def _pieces(
    named: Mapping[str, Any], states: Sequence[Mapping[str, Any]], at: int
) -> Iterator[tuple[str, list[tuple[int, int, int]]]]:
    """Yields each parameter's pieces (rank, start, end) as the ranks' mappings have them."""
    for name in named:
        parts: list[tuple[int, int, int]] = []
        for rank, each in enumerate(states):
            part: Any = each["param_slice_mappings"][at].get(name)
            if part is not None:
                parts.append((rank, part.start, part.start + part.numel))
        yield name, parts


def _pieces_3(
    named: Mapping[str, Any], states: Sequence[Mapping[str, Any]], at: int
) -> Iterator[tuple[str, list[tuple[int, int, int]]]]:
    """Yields each parameter's pieces: stage 3 cuts each evenly, and the last may be padded."""
    start = 0
    for name, shape in named.items():
        end = start + -(-math.prod(shape) // len(states))
        yield name, [(rank, start, end) for rank in range(len(states))]
        start = end
    if any(each["fp32_flat_groups"][at].numel() != start for each in states):
        raise _broken("param_shapes", f"group {at} has other sizes than its values")


def _joined(pieces: Sequence[torch.Tensor], shape: Sequence[int], what: str) -> torch.Tensor:
    nothing = torch.empty(0, device="cpu")
    full = torch.cat([each.detach().reshape(-1) for each in pieces]) if pieces else nothing
    num_elements = math.prod(shape)
    if not num_elements <= full.numel() < num_elements + max(1, len(pieces)):
        raise _broken(what, f"its pieces have {full.numel()} of {num_elements} elements")
    return full[:num_elements].reshape(tuple(shape))


# --------------------------------------------------------------------------------------- universal


def _read_universal(folder: str, models: Sequence[Mapping[str, Any]]) -> _Parameters:
    here = os.path.join(folder, "zero")
    state = _load(os.path.join(here, "optimizer_state.pt"))
    names: list[list[str]] = []
    shapes: dict[str, Any] = {}
    for each in models:  # the stages of a pipeline have other parameters
        for at, named in enumerate(each["param_shapes"]):
            names += [[]] if at == len(names) else []
            names[at] += [name for name in named if name not in shapes]
            shapes |= named
    values: dict[str, dict[str, Any]] = {}
    for name in match_files(here, lambda name: os.path.isdir(os.path.join(here, name))):
        files = match_files(os.path.join(here, name), lambda file: file.endswith(".pt"))
        read = {file[:-3]: _load(os.path.join(here, name, file)) for file in files}
        values[name] = {
            key: _shaped(each["param"] if isinstance(each, Mapping) else each, shapes.get(name))
            for key, each in read.items()
        }
    # Of stage 3 the number of steps is here only.
    steps = state.get("optimizer_state_dict", {}).get("state", {})
    for at, group in enumerate(names):
        for name in group:
            if name in values and "step" in steps.get(at, {}):
                values[name].setdefault("step", copy.deepcopy(steps[at]["step"]))
    return _Parameters(names, values, state["param_groups"], plain(state.get("loss_scaler")))


def _shaped(value: Any, shape: Sequence[int] | None) -> Any:
    """Returns a value in the shape of its parameter: of stage 3 it is flat."""
    if not isinstance(value, torch.Tensor):
        return value
    is_flat = shape is not None and value.dim() == 1 and value.numel() == math.prod(shape)
    return value.detach().reshape(tuple(shape) if shape is not None and is_flat else value.shape)


def _broken(what: str, why: str) -> errors.CheckpointError:
    return errors.CorruptCheckpointError(f"{what}: {why}.", path=what)


FORMAT = Format(
    name="deepspeed",
    description="a checkpoint of DeepSpeed",
    matches=lambda path: _tag(path) is not None,
    open=_open,
)
