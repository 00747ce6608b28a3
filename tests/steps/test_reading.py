"""A step that is being restored is not pruned; one that was restored is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import functional_ckpt as fc
from functional_ckpt import errors


@pytest.mark.parametrize("is_refused", [False, True])
def test_a_step_that_was_restored_may_be_pruned(is_refused: bool, tmp_path: Path) -> None:
    state = {"w": torch.arange(4)}
    with fc.CheckpointManager(tmp_path, keep_policy=fc.policies.LatestN(1)) as manager:
        manager.save(1, {"state": state}).result()  # type: ignore[union-attr]
        if is_refused:
            with pytest.raises(errors.MismatchError):
                manager.restore(1, {"state": {"other": torch.zeros(4)}})
        else:
            manager.restore(1)
        manager.save(2, {"state": state}).result()  # type: ignore[union-attr]
        assert manager.all_steps() == [2]
        assert not (tmp_path / "1").exists()
