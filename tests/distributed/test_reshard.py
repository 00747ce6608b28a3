"""Saved on any mesh, restored on any other: every element, on every rank, from every rank."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import meshes
import pytest
import torch
from gloo_workers import Workers

import functional_ckpt as fc
from functional_ckpt.restoring import shared_read

SAVED: tuple[meshes.Layout, ...] = ((), (1,), (2,), (4,), (2, 2), (6,), (2, 3), (3, 2))
RESTORED: tuple[meshes.Layout, ...] = ((), (1,), (2,), (3,), (4,), (2, 2))


def save(directory: Path, layout: meshes.Layout) -> None:
    with fc.CheckpointManager(directory / _name(layout)) as manager:
        handle = manager.save(0, {"tree": meshes.tree(layout, filled=True)})
        assert handle is not None
        handle.result(60)


def restore(
    directory: Path, saved: meshes.Layout, layout: meshes.Layout, **options: Any
) -> list[str]:
    into = meshes.tree(layout, filled=False)
    pointers = {name: _memory(tensor) for name, tensor in into.items()}
    # Half of the tensors are filled in place, half are new.
    filled = set(list(into)[::2])
    target = {name: fc.handlers.Fill(t) if name in filled else t for name, t in into.items()}
    with fc.CheckpointManager(directory / _name(saved), read_only=True) as manager:
        got = manager.restore(None, {"tree": target}, **options)["tree"]
    moved = [name for name in filled if got[name] is not into[name]]
    moved += [name for name in filled if _memory(got[name]) != pointers[name]]
    touched = [name for name in into if name not in filled and _local(into[name]).any()]
    return [*meshes.wrong(got, layout), *moved, *touched]


def _local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _memory(tensor: Any) -> int:
    return _local(tensor).data_ptr()


def _name(layout: meshes.Layout) -> str:
    return "mesh_" + "x".join(map(str, layout))


def _size(layout: meshes.Layout) -> int:
    return math.prod(layout)


@pytest.fixture(scope="module")
def checkpoints(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints")
    for layout in SAVED:
        workers.run(_size(layout), save, directory, layout)
    return directory


@pytest.mark.matrix(3)
@pytest.mark.parametrize("layout", RESTORED, ids=_name)
@pytest.mark.parametrize("saved", SAVED, ids=_name)
def test_every_rank_gets_its_part(
    saved: meshes.Layout, layout: meshes.Layout, checkpoints: Path, workers: Workers
) -> None:
    assert workers.run(_size(layout), restore, checkpoints, saved, layout) == [[]] * _size(layout)


def restore_sharing(directory: Path, saved: meshes.Layout, layout: meshes.Layout) -> list[str]:
    size_bytes, shared_read.ROUND_BYTES = shared_read.ROUND_BYTES, 100  # many rounds
    try:
        return restore(directory, saved, layout, share_reads=True)
    finally:
        shared_read.ROUND_BYTES = size_bytes


@pytest.mark.parametrize("layout", [(2,), (3,), (2, 2)], ids=_name)
@pytest.mark.parametrize("saved", [(), (4,), (2, 3)], ids=_name)
def test_ranks_that_read_for_each_other_get_the_same(
    saved: meshes.Layout, layout: meshes.Layout, checkpoints: Path, workers: Workers
) -> None:
    found = workers.run(_size(layout), restore_sharing, checkpoints, saved, layout)
    assert found == [[]] * _size(layout)


@pytest.mark.parametrize("saved", SAVED, ids=_name)
def test_process_without_a_group_restores_full_tensors(
    saved: meshes.Layout, checkpoints: Path
) -> None:
    restored = fc.restore(checkpoints / _name(saved) / "0")
    assert meshes.wrong(restored["tree"], ()) == []
    with fc.CheckpointManager(checkpoints / _name(saved), read_only=True) as manager:
        assert meshes.wrong(manager.restore()["tree"], ()) == []
