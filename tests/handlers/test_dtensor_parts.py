"""DTensors over tensor subclasses: only the same sharding restores the parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from functional_ckpt import errors
from functional_ckpt.core.tree import structure
from functional_ckpt.core.tree.placeholders import AS_SAVED, Refused
from functional_ckpt.handlers import dtensor_parts

SAVED = {structure.LOCAL: "parts", structure.SHARDING: "in halves"}


def handled(tree: Any = SAVED) -> structure.Handled:
    return structure.Handled(tree, {}, None)


@pytest.fixture
def sharded(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """A tensor that the handler takes for a DTensor that is sharded in halves."""
    monkeypatch.setattr(dtensor_parts.sharding, "sharding_of", lambda value: "a sharding")
    monkeypatch.setattr(dtensor_parts, "_sharding", lambda value: "in halves")
    return torch.zeros(2)


def test_the_parts_of_the_same_sharding_are_restored_as_saved(sharded: torch.Tensor) -> None:
    target = dtensor_parts.DTensorPartsHandler().target(sharded, SAVED)
    assert target == {structure.LOCAL: AS_SAVED, structure.SHARDING: AS_SAVED}
    made = dtensor_parts.made_like(sharded, handled())
    assert made.tree == target and made.item.value is sharded


@pytest.mark.parametrize("saved", [{**SAVED, structure.SHARDING: "in thirds"}, {}, "no parts"])
def test_another_sharding_is_refused(sharded: torch.Tensor, saved: Any) -> None:
    with pytest.raises(errors.MismatchError, match="must keep its sharding") as caught:
        dtensor_parts.DTensorPartsHandler().target(sharded, saved)
    assert "the target is in halves" in caught.value.mismatched[0]
    assert isinstance(dtensor_parts.made_like(sharded, handled(saved)), Refused)


@pytest.mark.parametrize("parameter", [None, torch.zeros(2)], ids=["no parameter", "plain"])
def test_state_of_a_parameter_that_is_no_dtensor_is_refused(parameter: Any) -> None:
    made = dtensor_parts.made_like(parameter, handled())
    assert isinstance(made, Refused) and "no DTensor" in str(made)
