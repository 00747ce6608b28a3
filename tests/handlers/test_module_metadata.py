"""Versions in `_metadata` of state dicts: modules that load in their own way see those saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import functional_ckpt as fc


class Scaled(nn.Module):
    """Its second version stores twice the weight: older checkpoints are converted on loading."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any
    ) -> None:
        version = local_metadata.get("version")
        if version is None or version < 2:
            state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"] * 2
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


class Old(Scaled):
    _version = 1


def net(kind: type[Scaled] = Scaled) -> nn.Module:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Sequential(kind()))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(5.0)
    return model


def weight(model: Any) -> list[float]:
    return model[1][0].weight.tolist()


@pytest.mark.parametrize("nested", [False, True])
def test_the_saved_version_is_seen(nested: bool, tmp_path: Path) -> None:
    def items(model: nn.Module) -> dict[str, Any]:
        return {"state": {"nets": [model]}} if nested else {"model": model}

    fc.save(tmp_path / "c", items(net()))
    model = net()
    nn.init.zeros_(model[1][0].weight)  # pyright: ignore[reportIndexIssue, reportArgumentType]
    fc.restore(tmp_path / "c", items(model))
    assert weight(model) == [5.0] * 3


def test_an_older_version_is_converted(tmp_path: Path) -> None:
    class Both(nn.Module):
        def __init__(self, kind: type[Scaled]) -> None:
            super().__init__()
            self.old, self.new = kind(), Scaled()

    both = Both(Old)
    fc.save(tmp_path / "c", {"model": nn.Sequential(both)})
    target = Both(Scaled)
    fc.restore(tmp_path / "c", {"model": nn.Sequential(target)})
    assert (target.old.weight.tolist(), target.new.weight.tolist()) == ([2.0] * 3, [1.0] * 3)


def test_a_state_dict_of_torch_save_has_its_own(tmp_path: Path) -> None:
    torch.save(net().state_dict(), tmp_path / "model.pt")
    model = net(Scaled)
    fc.restore(tmp_path / "model.pt", {"model": model})
    assert weight(model) == [5.0] * 3


def test_a_compiled_module_has_clean_names(tmp_path: Path) -> None:
    fc.save(tmp_path / "c", {"model": torch.compile(net())})
    model = net()
    fc.restore(tmp_path / "c", {"model": model})
    assert weight(model) == [5.0] * 3
    fc.restore(tmp_path / "c", {"model": torch.compile(model)})
    assert weight(model) == [5.0] * 3


def test_batch_norm_alone_stores_nothing(tmp_path: Path) -> None:
    fc.save(tmp_path / "c", {"model": nn.BatchNorm1d(3)})
    assert b"metadata" not in (tmp_path / "c" / "model" / "_FUNCTIONAL_CKPT").read_bytes()
