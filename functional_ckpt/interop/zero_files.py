"""ZeRO-1 optimizer states on disk, converted from one number of ranks to another, offline.

Read and written: the `optim` folder of a tag of neuronx-distributed, and a native step that has
    such states under the same names (as `fckpt convert` writes it).
"""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch

from functional_ckpt import errors
from functional_ckpt.interop import native, neuronx, zero
from functional_ckpt.interop.atomic_output import atomic_output, check_disjoint
from functional_ckpt.interop.neuronx import Rank
from functional_ckpt.interop.source import Source
from functional_ckpt.storage import queries
from functional_ckpt.storage.local import LocalStorage
from functional_ckpt.storage.open import connect
from functional_ckpt.storage.paths import is_remote, resolve

_FOLDER = "optim"


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    dp_size: int | None,
    save: Callable[[str, Mapping[str, Any]], None],
    num_workers: int = 1,
) -> int:
    """Writes a new directory of the same kind as the source.

    Of a tag only the optimizer is written, as NxD's own tool does, from and to local paths; a step
    is written completely, and either path may be a URI.

    Args:
        source: A tag's folder, or a step's directory.
        destination: The directory to create.
        dp_size: Number of data-parallel ranks to cut for; None to merge.
        save: Saves items as a checkpoint at a path.
        num_workers: How many pairs of tensor- and pipeline-parallel ranks at the same time.

    Returns:
        How many ranks' states were written.

    Raises:
        UsageError: The state is merged already, or there is none.
        StepExistsError: Something is at `destination`.
        CorruptCheckpointError: The shards do not fit together; nothing was written.
    """
    path = resolve(source)
    check_disjoint(path, destination)
    storage, path = connect(path)
    if not queries.is_directory(storage, path):
        raise errors.StepNotFoundError(f"{path}: there is no such directory.", path=path)
    folder = os.path.join(path, _FOLDER)
    if not is_remote(path) and neuronx.stems(folder):
        ranks = neuronx.parse_ranks(neuronx.stems(folder), folder)
        with atomic_output(destination) as tmp:
            out = os.path.join(tmp, _FOLDER)
            LocalStorage().make_directory(out)

            return _convert(
                ranks,
                lambda rank: neuronx.load(os.path.join(folder, f"{ranks[rank]}.pt")),
                lambda rank, state: torch.save(state, os.path.join(out, f"{rank.stem}.pt")),
                dp_size,
                num_workers,
                folder,
            )
    if not native.is_step(storage, path):
        raise errors.UsageError(
            f"{path}: neither a tag of neuronx-distributed with a folder {_FOLDER!r} nor a step.",
            path=path,
        )
    step = native.open_step(storage, path)
    item, found = _find_item(step)
    ranks = neuronx.parse_ranks(found, path)
    written: dict[str, Any] = {}
    num_written = _convert(
        ranks,
        lambda rank: found[ranks[rank]],
        lambda rank, state: written.__setitem__(rank.stem, state),
        dp_size,
        num_workers,
        path,
    )
    save(
        resolve(destination),
        {**{n: step[n] for n in step if n != item}, item: dict(sorted(written.items()))},
    )
    return num_written


def _find_item(step: Source) -> tuple[str, Mapping[str, Any]]:
    for name in ("optimizer", _FOLDER):
        if name in step and isinstance(value := step[name], Mapping):
            states = cast("Mapping[Any, Any]", value)
            if states and all(isinstance(s, str) and Rank.parse(s) is not None for s in states):
                return name, states
    raise errors.UsageError(
        f"{step.path}: it has no item 'optimizer' or 'optim' with the ZeRO-1 states of ranks "
        f"(dp_rank_00_tp_rank_00_pp_rank_00, ...); it has {', '.join(step)}. States saved with "
        "fc.Optimizer are unsharded already: restore them with any number of ranks.",
        path=step.path,
    )


def _convert(
    ranks: Mapping[Rank, str],
    read: Callable[[Rank], Any],
    write: Callable[[Rank, Any], None],
    dp_size: int | None,
    num_workers: int,
    where: str,
) -> int:
    groups: dict[tuple[int, int], list[Rank]] = {}
    for rank in sorted(ranks, key=lambda rank: (rank.tp, rank.pp, rank.dp or 0)):
        groups.setdefault((rank.tp, rank.pp), []).append(rank)
    is_full = next(iter(ranks)).dp is None
    if is_full and dp_size is None:
        raise errors.UsageError(f"{where}: the states are merged already.", path=where)

    def run(key: tuple[int, int], members: list[Rank]) -> int:
        states = [read(rank) for rank in members]
        what = f"{where}, tp_rank {key[0]}, pp_rank {key[1]}"
        full = states[0] if is_full else zero.merge(states, what)
        shards = [full] if dp_size is None else zero.split(full, dp_size, what)
        for number, shard in enumerate(shards):
            write(Rank(tp=key[0], pp=key[1], dp=None if dp_size is None else number), shard)
        return len(shards)

    with concurrent.futures.ThreadPoolExecutor(num_workers) as pool:
        return sum(pool.map(run, groups, groups.values()))
