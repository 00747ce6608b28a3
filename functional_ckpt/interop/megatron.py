"""Checkpoints of Megatron-Core's `dist_checkpointing`, format `torch_dist`.

Files:
    latest_checkpointed_iteration.txt      the number of the iteration
    iter_0000010/.metadata  *.distcp       tensors and objects: those of `interop.dcp`
    iter_0000010/common.pt                 values that are equal on all ranks
    iter_0000010/metadata.json             the name of the format
"""

from __future__ import annotations

import copy
import functools
import os
import re
from collections.abc import Mapping
from typing import Any, cast

from functional_ckpt import errors
from functional_ckpt.interop import dcp, hostile, torch_save
from functional_ckpt.interop.hf_config import load_json
from functional_ckpt.interop.pickles import plain
from functional_ckpt.interop.source import Format, Source

_LATEST = "latest_checkpointed_iteration.txt"
_CONFIG, _COMMON = "metadata.json", "common.pt"
# optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight
_STATE = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.([^.]+)\.(.+)", re.DOTALL)
# The masters of parameters that are kept in fewer bits.
_MASTER = "fp32_param"
# rng_state/shard_0.0_1.2: the object of one rank
_OBJECT = re.compile(r"(.+)/shard_([\d._]+)", re.DOTALL)


def _folder(path: str) -> str | None:
    """Returns the folder of an iteration: the path, or the latest below it."""
    latest = os.path.join(path, _LATEST)
    if os.path.isfile(latest):
        text = hostile.read_small(latest).decode(errors="replace").strip()
        path = os.path.join(path, f"iter_{int(text):07d}" if text.isdecimal() else "release")
    config = os.path.join(path, _CONFIG)
    if not os.path.isfile(config) or not os.path.isfile(os.path.join(path, _COMMON)):
        return None
    return path if "sharded_backend" in load_json(config) else None


def _open(path: str) -> Source:
    folder = _folder(path) or path
    backend = load_json(os.path.join(folder, _CONFIG))["sharded_backend"]
    if backend != "torch_dist":
        raise errors.UsageError(
            f"{folder}: its format is {backend!r}; expected 'torch_dist'. Save it again with "
            "--dist-ckpt-format torch_dist.",
            path=folder,
        )
    entries = dcp.entries(folder)
    state = {name for name in entries if _STATE.fullmatch(name)}
    objects = {name: match for name in entries if (match := _OBJECT.fullmatch(name))}
    common = functools.cache(
        lambda: plain(torch_save.load(os.path.join(folder, _COMMON), allowed=torch_save.RECORDS))
    )

    def read_objects() -> dict[str, Any]:
        found: dict[str, dict[str, Any]] = {}
        for name, match in objects.items():
            value = plain(dcp.read_entry(folder, entries[name]))
            is_wrapped = isinstance(value, list) and len(cast("list[Any]", value)) == 1
            found.setdefault(match[1], {})[match[2]] = value[0] if is_wrapped else value
        return found

    openers: dict[str, Any] = {
        "model": lambda: {
            name: dcp.read_entry(folder, entry)
            for name, entry in entries.items()
            if name not in state and name not in objects
        }
    }
    if state:
        values = {name: entries[name] for name in state}
        openers["optimizer"] = lambda: _optimizer(folder, values, common())
    if objects:
        openers["objects"] = read_objects
    openers["common"] = lambda: {k: v for k, v in common().items() if k != "optimizer"}
    return Source(folder, "megatron", openers)


def _optimizer(folder: str, entries: Mapping[str, Any], common: Mapping[str, Any]) -> Any:
    """Returns the state by parameter name, and the groups, which do not say their parameters."""
    saved = common.get("optimizer", {})
    saved = saved.get("optimizer", saved)
    step = saved.get("state", {}).get("common_step")
    state: dict[str, dict[str, Any]] = {}
    masters: dict[str, Any] = {}
    for name in sorted(entries):
        match = cast("re.Match[str]", _STATE.fullmatch(name))
        value = dcp.read_entry(folder, entries[name])
        if match[1] == _MASTER:
            masters[match[2]] = value
        else:
            # A copy of its own: an optimizer counts in it.
            first = {} if step is None else {"step": copy.deepcopy(step)}
            state.setdefault(match[2], first)[match[1]] = value
    groups = [dict(group) for group in saved.get("param_groups", ())]
    if len(groups) == 1:
        groups[0]["params"] = list(state)
    found = {"state": state, "param_groups": groups}
    return {**found, _MASTER: masters} if masters else found


FORMAT = Format(
    name="megatron",
    description="a distributed checkpoint of Megatron-Core",
    matches=lambda path: _folder(path) is not None,
    open=_open,
    supersedes=("dcp",),
)
