"""`fc.restore` and `fc.metadata` of other paths: the error describes the path."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import functional_ckpt as fc
from functional_ckpt import errors


@pytest.fixture(params=["local", "store"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where nothing is yet, on a disk and in a store."""
    return str(tmp_path) if request.param == "local" else f"memory://bucket-{uuid.uuid4().hex[:8]}"


@pytest.mark.parametrize("read", [fc.restore, fc.metadata, fc.interop.open])
def test_of_a_directory_of_steps_the_error_names_the_steps(
    read: Callable[[Any], Any], place: str
) -> None:
    run = f"{place}/run"
    with fc.CheckpointManager(run) as manager:
        for step in range(12):
            manager.save(step, {"x": step}, force=True)
    with pytest.raises(errors.CheckpointError) as caught:
        read(run)
    message = str(caught.value)
    assert f"{run}: not a checkpoint: it is a directory of steps" in message
    assert "the last of 12: 2, 3, 4, 5, 6, 7, 8, 9, 10, 11). Give one of them" in message
    assert f"such as {run}/11," in message
    assert "fc.CheckpointManager" in message
    assert read(f"{run}/11") is not None


def test_steps_are_named_below_a_folder_that_is_called_like_an_unfinished_step(
    tmp_path: Path,
) -> None:
    run = tmp_path / "old.orbax-checkpoint-tmp" / "run"
    with fc.CheckpointManager(run) as manager:
        manager.save(7, {"x": 1})
    with pytest.raises(errors.CheckpointError, match=r"a directory of steps \(7\)"):
        fc.restore(run)


def test_of_a_manager_without_a_step_the_error_says_so(tmp_path: Path) -> None:
    with fc.CheckpointManager(tmp_path / "run"):
        pass
    with pytest.raises(errors.CheckpointError, match="holds no step yet"):
        fc.restore(tmp_path / "run")


def test_foreign_files_are_opened_and_unknown_ones_are_an_error(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "x.pt")
    fc.interop.huggingface.save({"w": torch.ones(2)}, tmp_path / "hf")
    for name in ("x.pt", "hf"):
        assert list(fc.restore(tmp_path / name)) == ["model"]
        assert list(fc.metadata(tmp_path / name).items) == ["model"]
    (tmp_path / "unknown").mkdir()
    for read in (fc.restore, fc.metadata):
        with pytest.raises(errors.CheckpointError, match=r"of no format that fc\.interop\.open"):
            read(tmp_path / "unknown")
    with pytest.raises(errors.StepNotFoundError, match="There is no checkpoint at"):
        fc.restore(tmp_path / "nothing")


def test_a_damaged_checkpoint_is_still_called_damaged(tmp_path: Path) -> None:
    fc.save(tmp_path / "one", {"x": {"w": torch.ones(2)}})
    (tmp_path / "one" / "_FUNCTIONAL_CKPT").unlink()
    with pytest.raises(errors.CorruptCheckpointError, match="the file is missing"):
        fc.restore(tmp_path / "one")
