"""Restore targets: filled, new, refused and reported, through the manager."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from managing import Counter
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import functional_ckpt as fc
from functional_ckpt import errors, testing


def make_model(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Linear(16, 16))


def tree() -> dict[str, Any]:
    return {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": [torch.ones(2, dtype=torch.int64), np.arange(3)],
        "c": 5,
    }


def saved_items() -> dict[str, Any]:
    return {"model": make_model(1), "tree": tree(), "config": fc.Json({"lr": 0.5})}


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[fc.CheckpointManager]:
    with fc.CheckpointManager(tmp_path) as opened:
        opened.save(1, saved_items(), metrics={"m": 1})
        opened.wait_until_finished()
        yield opened


def state_of(module: nn.Module) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


EXPECTED = {name: tensor.detach() for name, tensor in make_model(1).state_dict().items()}


# ------------------------------------------------------------------------------ as saved


def test_without_items_everything_comes_back_as_it_was_saved(manager: fc.CheckpointManager) -> None:
    restored = manager.restore()
    assert sorted(restored) == ["config", "model", "tree"]
    assert testing.differences(restored["tree"], tree()) == []
    assert testing.differences(restored["model"], EXPECTED) == []
    assert restored["config"] == {"lr": 0.5}
    assert (restored.step, restored.metrics) == (1, {"m": 1})
    assert not restored.report
    assert repr(restored) == "Restored(step=1, items=['config', 'model', 'tree'])"


def test_none_and_as_saved_stand_for_whatever_is_there(manager: fc.CheckpointManager) -> None:
    assert repr(fc.handlers.AS_SAVED) == "AS_SAVED"
    model = make_model(2)
    restored = manager.restore(1, {"model": model, "tree": None, "config": fc.handlers.AS_SAVED})
    assert restored["model"] is model
    assert testing.differences(restored["tree"], tree()) == []
    assert restored["config"] == {"lr": 0.5}
    target = {
        "a": fc.handlers.AS_SAVED,
        "b": [torch.zeros(2, dtype=torch.int64), fc.handlers.AS_SAVED],
        "c": 0,
    }
    restored = manager.restore(1, {"tree": target, "model": fc.handlers.AS_SAVED})
    assert testing.differences(restored["tree"], tree()) == []
    assert testing.differences(restored["model"], EXPECTED) == []


def test_missing_item_is_named_with_the_existing_ones(
    manager: fc.CheckpointManager, tmp_path: Path
) -> None:
    with pytest.raises(errors.StepNotFoundError, match="no step 7; the latest are: 1") as caught:
        manager.restore(7)
    assert (caught.value.step, isinstance(caught.value, KeyError)) == (7, True)
    with pytest.raises(errors.StepNotFoundError, match=r"no item 'modle'.*config, model, tree"):
        manager.restore(1, {"modle": None})
    with (
        fc.CheckpointManager(tmp_path / "empty") as empty,
        pytest.raises(errors.StepNotFoundError, match="empty has no step yet"),
    ):
        empty.restore()


def test_the_step_of_a_managers_directory_is_known_without_the_manager(
    manager: fc.CheckpointManager, tmp_path: Path
) -> None:
    restored = fc.restore(tmp_path / "1", {"tree": tree()})
    assert (restored.step, restored.next_step) == (1, 2)
    assert fc.metadata(tmp_path / "1").step == 1
    fc.save(tmp_path / "single", {"tree": tree()})
    restored = fc.restore(tmp_path / "single")
    assert restored.step is None
    with pytest.raises(errors.UsageError, match="does not record a step"):
        _ = restored.next_step
    begun = fc.restore(tmp_path / "1", only="tree").with_defaults({"model": 0})
    assert (begun.step, begun.next_step) == (1, 0)


# ------------------------------------------------------------------------------ into memory


def test_module_is_filled_in_place(manager: fc.CheckpointManager) -> None:
    model = make_model(2)
    model[0].weight.requires_grad_(False)
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    pointers = {name: tensor.data_ptr() for name, tensor in held.items()}
    restored = manager.restore(1, {"model": model})
    assert restored["model"] is model
    for name, tensor in (dict(model.named_parameters()) | dict(model.named_buffers())).items():
        assert tensor is held[name]
        assert tensor.data_ptr() == pointers[name]
    assert testing.differences(state_of(model), EXPECTED) == []
    assert not model[0].weight.requires_grad


def test_memory_formats_and_strides_of_the_target_stay(manager: fc.CheckpointManager) -> None:
    model = make_model(2).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    strides = model[0].weight.stride()
    manager.restore(1, {"model": model})
    assert model[0].weight.stride() == strides != EXPECTED["0.weight"].stride()
    assert torch.equal(model[0].weight, EXPECTED["0.weight"])
    base = torch.full((2, 6), -1.0)
    transposed = torch.zeros(3, 2).t()
    for target in (base[:, ::2], transposed):
        restored = manager.restore(1, {"tree": {**tree(), "a": fc.handlers.Fill(target)}})
        assert restored["tree"]["a"] is target
        assert torch.equal(target, tree()["a"])
    assert torch.equal(base[:, 1::2], torch.full((2, 3), -1.0)), "the columns between are others'"


def test_an_expanded_tensor_cannot_be_filled(manager: fc.CheckpointManager) -> None:
    model = make_model(2)
    before = state_of(model)
    expanded = torch.zeros(3).expand(2, 3)
    with pytest.raises(errors.MismatchError, match=r"tree\['a'\].*clone\(\) it"):
        manager.restore(1, {"model": model, "tree": {**tree(), "a": fc.handlers.Fill(expanded)}})
    assert testing.differences(state_of(model), before) == []


def test_items_that_are_no_mapping(manager: fc.CheckpointManager) -> None:
    with pytest.raises(errors.UsageError, match="mapping of item names to targets; got Linear"):
        manager.restore(1, nn.Linear(1, 1))  # pyright: ignore[reportArgumentType]


def test_a_pytree_is_imitated_and_not_touched(manager: fc.CheckpointManager) -> None:
    target: dict[str, Any] = {**tree(), "a": nn.Parameter(torch.zeros(2, 3)), "c": 0}
    target["b"][0].zero_()
    before = copy.deepcopy(target)
    restored = manager.restore(1, {"tree": target})["tree"]
    assert testing.differences(target, before) == []
    assert isinstance(restored["a"], nn.Parameter)
    assert testing.differences({**restored, "a": restored["a"].detach()}, tree()) == []


def test_a_module_on_the_meta_device_is_materialised(manager: fc.CheckpointManager) -> None:
    with torch.device("meta"):
        model = make_model(2)
    weight = model[0].weight
    manager.restore(1, {"model": model})
    assert model[0].weight is weight
    assert isinstance(weight, nn.Parameter)
    assert testing.differences(state_of(model), EXPECTED) == []


def test_wrappers_on_either_side_leave_no_trace(manager: fc.CheckpointManager) -> None:
    wrapped = nn.Sequential(*(checkpoint_wrapper(layer) for layer in make_model(2)))
    manager.restore(1, {"model": wrapped})
    manager.save(2, {"model": wrapped})
    manager.wait_until_finished()
    plain = make_model(3)
    manager.restore(2, {"model": plain})
    assert testing.differences(state_of(plain), EXPECTED) == []


# ------------------------------------------------------------------------------ what does not fit


def test_a_mismatch_names_everything_and_touches_nothing(manager: fc.CheckpointManager) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Linear(16, 8))
    model.register_parameter("extra", nn.Parameter(torch.ones(1)))
    filled = torch.zeros(2, 3)
    target = {"a": fc.handlers.Fill(filled), "b": [torch.zeros(3), np.arange(3)], "d": 1}
    before = state_of(model)
    with pytest.raises(errors.MismatchError, match="nothing was touched") as caught:
        manager.restore(1, {"model": model, "tree": target})
    error = caught.value
    assert error.missing == ("model['extra']", "tree['d']")
    assert error.unexpected == ("tree['c']",)
    heads = [line.split(":")[0] for line in error.mismatched]
    assert heads == ["model['2.weight']", "model['2.bias']", "tree['b'][0]"]
    assert "float32[8, 16]" in error.mismatched[0]
    assert "float32[16, 16]" in error.mismatched[0]
    for named in (*error.missing, *error.unexpected, *error.mismatched):
        assert named in str(error)
    assert (error.step, isinstance(error, ValueError)) == (1, True)
    assert testing.differences(state_of(model), before) == []
    assert not filled.any()


def test_a_mismatch_in_one_item_leaves_the_others_alone(tmp_path: Path) -> None:
    model, counter = make_model(1), Counter()
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with fc.CheckpointManager(tmp_path) as manager:
        items = {"counter": counter, "optimizer": fc.Optimizer(optimizer, model), "rng": fc.Rng()}
        manager.save(1, {**items, "tree": tree()})
        manager.wait_until_finished()
        optimizer.step()
        counter.num_captures = 77
        before = copy.deepcopy(optimizer.state_dict())
        rng = torch.get_rng_state()
        with pytest.raises(errors.MismatchError):
            manager.restore(1, {**items, "tree": {**tree(), "a": torch.zeros(9)}})
        assert testing.differences(optimizer.state_dict(), before) == []
        assert counter.num_captures == 77
        assert torch.equal(torch.get_rng_state(), rng)


def test_without_strict_the_rest_is_restored_and_reported(manager: fc.CheckpointManager) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Linear(16, 8), nn.Linear(1, 1))
    before = state_of(model)
    target = {"a": torch.zeros(2, 3), "b": [torch.full((3,), 9.0)], "d": 1}
    restored = manager.restore(1, {"model": model, "tree": target}, strict=False)
    assert restored.report.missing == ("model['3.weight']", "model['3.bias']", "tree['d']")
    assert restored.report.unexpected == ("tree['c']", "tree['b'][1]")
    assert [line.split(":")[0] for line in restored.report.mismatched] == [
        *("model['2.weight']", "model['2.bias']", "tree['b'][0]")
    ]
    assert "missing from the checkpoint: tree['d']" in str(restored.report)
    for name, tensor in model.state_dict().items():
        own = name.startswith(("2", "3"))
        assert torch.equal(tensor, (before if own else EXPECTED)[name]), name
    expected = {"a": tree()["a"], "b": [torch.full((3,), 9.0)], "d": 1}
    assert testing.differences(restored["tree"], expected) == []
    assert not manager.restore(1, {"tree": tree()}, strict=False).report


def test_a_cast_is_asked_for_by_name(manager: fc.CheckpointManager) -> None:
    model = make_model(2).to(torch.bfloat16)
    before = state_of(model)
    items = {"model": model, "tree": {**tree(), "a": torch.zeros(2, 3, dtype=torch.float64)}}
    with pytest.raises(errors.MismatchError, match="pass cast=True") as caught:
        manager.restore(1, items)
    assert any(line.startswith("tree['a']") for line in caught.value.mismatched)
    assert testing.differences(state_of(model), before) == []
    weight: Any = model[0].weight
    pointer = weight.data_ptr()
    restored = manager.restore(1, items, cast=True)
    assert (model[0].weight is weight, weight.data_ptr()) == (True, pointer)
    assert torch.equal(weight, EXPECTED["0.weight"].to(torch.bfloat16))
    assert testing.differences(restored["tree"]["a"], tree()["a"].double()) == []
    with pytest.raises(errors.UsageError, match="cast must be"):
        manager.restore(1, items, cast="bfloat16")  # pyright: ignore[reportArgumentType]


# ------------------------------------------------------------------------------ a part of it


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        ("tree", {"tree": ["a", "b", "c"]}),
        (["config", "tree.b.*"], {"config": ["lr"], "tree": ["b"]}),
        ("*.0.weight", {"model": ["0.weight"]}),
        ("m*", {"model": list(EXPECTED)}),
        ("*weight", {"model": ["0.weight", "1.weight", "2.weight"]}),
    ],
)
def test_only_some_of_what_was_saved(
    only: Any, expected: dict[str, list[str]], manager: fc.CheckpointManager
) -> None:
    restored = manager.restore(1, only=only)
    assert {name: list(value) for name, value in restored.items()} == expected


def test_only_some_of_a_target(manager: fc.CheckpointManager) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Linear(16, 8), nn.Linear(1, 1))
    before = state_of(model)
    restored = manager.restore(1, {"model": model, "tree": tree()}, only=["model.0.*", "model.1.*"])
    assert list(restored) == ["model"]
    for name, tensor in model.state_dict().items():
        chosen = name.startswith(("0", "1"))
        assert torch.equal(tensor, (EXPECTED if chosen else before)[name]), name


def test_only_some_of_what_a_target_takes_as_saved(manager: fc.CheckpointManager) -> None:
    targets = {"model": None, "config": None, "tree": tree()}
    restored = manager.restore(1, targets, only=["*.0.weight"])
    assert {name: list(value) for name, value in restored.items()} == {"model": ["0.weight"]}


def test_what_is_wanted_and_missing_is_no_typo(manager: fc.CheckpointManager) -> None:
    target = {**tree(), "new": 1}
    with pytest.raises(errors.MismatchError) as caught:
        manager.restore(1, {"tree": target}, only="tree.new")
    assert caught.value.missing == ("tree['new']",)


@pytest.mark.parametrize("only", ["modle", "model.layers.*", ["tree", "modle"], []])
@pytest.mark.parametrize("has_target", [False, True])
def test_a_pattern_that_matches_nothing_is_an_error(
    only: Any, has_target: bool, manager: fc.CheckpointManager
) -> None:
    items = {"model": make_model(2), "tree": tree()} if has_target else None
    with pytest.raises(errors.UsageError, match="only="):
        manager.restore(1, items, only=only)


def test_leaves_of_an_item_with_a_dot_in_its_name(manager: fc.CheckpointManager) -> None:
    manager.save(2, {"v1.5": {"x": 1, "y": 2}})
    manager.wait_until_finished()
    assert dict(manager.restore(None, only="v1.5.y")) == {"v1.5": {"y": 2}}


# ------------------------------------------------------------------------------ damaged bytes


# Small values are compressed inside the metadata; this one is stored separately.
LARGE = torch.arange(600.0)


def flip_a_byte(directory: Path, tensor: torch.Tensor) -> None:
    """Damages the last stored byte of a tensor."""
    pattern = tensor.contiguous().numpy().tobytes()
    found = [path for path in directory.rglob("*") if path.is_file()]
    holders = [path for path in found if pattern in path.read_bytes()]
    assert len(holders) == 1
    data = bytearray(holders[0].read_bytes())
    data[data.index(pattern) + len(pattern) - 1] ^= 1
    holders[0].write_bytes(data)


@pytest.mark.parametrize("verify", ["first", "stream", False])
@pytest.mark.parametrize("in_place", [False, True])
def test_restore_of_a_flipped_byte_raises_corrupt(
    verify: Literal["first", "stream", False],
    in_place: bool,
    manager: fc.CheckpointManager,
    tmp_path: Path,
) -> None:
    large = nn.Module()
    large.register_buffer("table", LARGE)
    manager.save(2, {"model": large, "tree": tree()})
    manager.wait_until_finished()
    flip_a_byte(tmp_path / "2" / "model", LARGE)
    table = torch.zeros(600)
    large.register_buffer("table", table)
    items: dict[str, Any] = {"model": large if in_place else {"table": table}}
    if verify is False:
        restored = manager.restore(2, items, verify=verify)["model"]
        got = table if in_place else restored["table"]
        assert int((got != LARGE).sum()) == 1, "nothing is checked, and all else is right"
        return
    with pytest.raises(errors.CorruptCheckpointError) as caught:
        manager.restore(2, items, verify=verify)
    error = caught.value
    assert error.touched == (verify == "stream" and in_place)
    assert ("partly modified" if error.touched else "not touched") in str(error)
    assert error.key_path is not None
    assert "table" in error.key_path
    assert (error.step, isinstance(error, ValueError)) == (2, True)
    assert error.touched or not table.any()
    manager.restore(2, {"tree": tree()}, verify=verify)  # the other items are intact


def test_ways_to_verify_have_names(manager: fc.CheckpointManager) -> None:
    with pytest.raises(errors.UsageError, match="verify must be"):
        manager.restore(1, verify="after")  # pyright: ignore[reportArgumentType]
