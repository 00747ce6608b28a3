"""Checkpoints of neuronx-distributed, one folder per tag.

Files:
    <tag>/model/dp_rank_00_tp_rank_00_pp_rank_00.pt    a rank's state dict
    <tag>/model/....pt.tensors/tensor_0.pt             its tensors, if xser was used
    <tag>/optim/dp_rank_01_tp_rank_00_pp_rank_00.pt    ZeRO-1: one file per rank
    <tag>/optim/full_tp_rank_00_pp_rank_00.pt          ZeRO-1: merged
    <tag>/scheduler.pt  user_content.pt  checkpoint  done
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, cast

from functional_ckpt import errors
from functional_ckpt.interop import torch_save
from functional_ckpt.interop.file_names import match_files
from functional_ckpt.interop.source import Format, Source

_FILE = re.compile(r"(?:full|dp_rank_(\d+))_tp_rank_(\d+)_pp_rank_(\d+)")
_SUFFIX = ".pt"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Rank:
    """Whose a file is. `dp` is None for the merged state of all."""

    tp: int
    pp: int
    dp: int | None

    @property
    def stem(self) -> str:
        """Its file's name, without the suffix."""
        first = "full" if self.dp is None else f"dp_rank_{self.dp:02d}"
        return f"{first}_tp_rank_{self.tp:02d}_pp_rank_{self.pp:02d}"

    @classmethod
    def parse(cls, stem: str) -> Rank | None:
        """Returns the rank in a file's name; None if there is none."""
        match = _FILE.fullmatch(stem)
        if match is None:
            return None
        dp = None if match[1] is None else int(match[1])
        return cls(tp=int(match[2]), pp=int(match[3]), dp=dp)


def parse_ranks(stems: Iterable[str], where: str) -> dict[Rank, str]:
    """Returns the ranks in file names, which form a complete grid.

    Raises:
        CorruptCheckpointError: One is missing, or full and sharded states are mixed.
    """
    found: dict[Rank, str] = {}
    for stem in stems:
        rank = Rank.parse(stem)
        if rank is not None and found.setdefault(rank, stem) != stem:
            raise errors.CorruptCheckpointError(
                f"{where}: {found[rank]} and {stem} are both of one rank.", path=where
            )
    if not found:
        raise errors.CorruptCheckpointError(
            f"{where}: there are no files of ranks, such as dp_rank_00_tp_rank_00_pp_rank_00.pt.",
            path=where,
        )
    if len({rank.dp is None for rank in found}) == 2:
        raise errors.CorruptCheckpointError(
            f"{where}: it holds merged and sharded states; keep those of one kind.", path=where
        )
    # One by one, and no more than are named: a file's name may claim any number of ranks.
    missing = list(itertools.islice((r.stem for r in _grid(found) if r not in found), 8))
    if missing:
        raise errors.CorruptCheckpointError(
            f"{where}: the files of these ranks are missing: {', '.join(missing)}.", path=where
        )
    return dict(sorted(found.items(), key=lambda entry: entry[1]))


def _grid(found: Collection[Rank]) -> Iterator[Rank]:
    """Yields every rank up to the highest of each kind."""
    is_merged = None in {rank.dp for rank in found}
    num_dp = 1 if is_merged else max(rank.dp or 0 for rank in found) + 1
    for tp in range(max(rank.tp for rank in found) + 1):
        for pp in range(max(rank.pp for rank in found) + 1):
            for dp in range(num_dp):
                yield Rank(tp=tp, pp=pp, dp=None if is_merged else dp)


def load(path: str) -> Any:
    """Returns one rank's file, with the tensors that xser put into files of their own."""
    return _resolve(torch_save.load(path), f"{path}.tensors")


def _resolve(value: Any, folder: str) -> Any:
    if isinstance(value, torch_save.TensorReference):
        return torch_save.load(os.path.join(folder, f"tensor_{int(value.tid)}.pt"))
    if isinstance(value, Mapping):
        return {key: _resolve(each, folder) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_resolve(each, folder) for each in value)
    return value


def stems(folder: str) -> list[str]:
    """Returns the names, without suffix, of the files of ranks in a folder."""
    found = match_files(folder, lambda name: name.endswith(_SUFFIX))
    names = [name.removesuffix(_SUFFIX) for name in found]
    return [name for name in names if _FILE.fullmatch(name)]


def fits(path: str) -> bool:
    """Returns whether it is the folder of a tag."""
    return any(stems(os.path.join(path, folder)) for folder in ("model", "optim"))


def _open(path: str) -> Source:
    if os.path.exists(os.path.join(path, "checkpoint")) and not os.path.exists(
        os.path.join(path, "done")
    ):
        raise errors.CorruptCheckpointError(
            f"{path}: there is no file `done`: saving it did not end. Take another tag.", path=path
        )
    openers: dict[str, Any] = {}
    for item, folder in (("model", "model"), ("optimizer", "optim")):
        here = os.path.join(path, folder)
        if found := stems(here):
            parse_ranks(found, here)  # a missing rank is found before anything is read
            read = _read_model if item == "model" else _read_ranks
            openers[item] = functools.partial(read, here)
    for item in ("scheduler", "user_content"):
        if os.path.exists(file := os.path.join(path, f"{item}.pt")):
            openers[item] = functools.partial(torch_save.load, file)
    return Source(path, "neuronx", openers)


def _read_ranks(folder: str) -> dict[str, Any]:
    ranks = parse_ranks(stems(folder), folder)
    return {stem: load(os.path.join(folder, stem + _SUFFIX)) for stem in ranks.values()}


def _read_model(folder: str) -> dict[str, Any]:
    """Returns the state dict; by rank under tensor parallelism, whose cuts are not recorded."""
    by_rank = _read_ranks(folder)
    if len({rank.tp for rank in parse_ranks(by_rank, folder)}) > 1:
        return by_rank
    whole: dict[str, Any] = {}
    for stem, state in by_rank.items():  # pipeline stages hold different names
        if not isinstance(state, Mapping):
            raise errors.CorruptCheckpointError(
                f"{folder}: {stem} holds a {type(state).__name__}, not a state dict.", path=folder
            )
        whole |= cast("Mapping[str, Any]", state)
    return whole


FORMAT = Format(
    name="neuronx", description="a tag of neuronx-distributed", matches=fits, open=_open
)
