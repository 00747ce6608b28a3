"""Fake tensors, and all tensors in their mode, have no values: saves and restores refuse them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import functional_ckpt as fc
from functional_ckpt import errors


def trained() -> dict[str, Any]:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": fc.Optimizer(optimizer, model), "rng": fc.Rng()}


ITEMS: dict[str, Any] = {
    "tensor": {"x": {"a": torch.ones(3)}},
    "training": trained(),
    "json": {"x": fc.Json({"a": 1})},
}


@pytest.mark.parametrize("real", [False, True], ids=["strict", "real inputs"])
@pytest.mark.parametrize("name", ITEMS)
def test_nothing_is_saved_or_restored_in_the_mode(name: str, real: bool, tmp_path: Path) -> None:
    items = ITEMS[name]
    fc.save(tmp_path / "whole", items)
    with fc.CheckpointManager(tmp_path / "run") as manager:
        with FakeTensorMode(allow_non_fake_inputs=real):
            with pytest.raises(errors.UsageError, match="outside of its `with` block"):
                manager.save(1, items)
            with pytest.raises(errors.UsageError, match="outside of its `with` block"):
                fc.save(tmp_path / "fake", items)
            for target in (None, items):
                with pytest.raises(errors.UsageError, match="outside of its `with` block"):
                    fc.restore(tmp_path / "whole", target)
        manager.save(1, items)
    assert not (tmp_path / "fake").exists()
    fc.restore(tmp_path / "run" / "1", items)


@pytest.mark.parametrize("strict", [True, False])
def test_a_fake_tensor_is_refused_by_name(strict: bool, tmp_path: Path) -> None:
    with FakeTensorMode():
        fake = {"x": {"a": torch.ones(3)}}
    with pytest.raises(errors.UnsupportedLeafError, match=r"x\['a'\]: .*FakeTensor has no values"):
        fc.save(tmp_path / "fake", fake)
    fc.save(tmp_path / "whole", {"x": {"a": torch.ones(3)}})
    if strict:
        with pytest.raises(errors.MismatchError, match="FakeTensor has no values"):
            fc.restore(tmp_path / "whole", fake)
    else:
        report = fc.restore(tmp_path / "whole", fake, strict=False).report
        assert report.mismatched
