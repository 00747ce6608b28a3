"""Values that would not be restored exactly are mismatches, before the target is modified."""

from __future__ import annotations

import collections
import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import functional_ckpt as fc
from functional_ckpt import errors, testing
from functional_ckpt.core.tree import composite
from functional_ckpt.format import checkpoint_dir


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)


def net(num_outputs: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, num_outputs))


class Mine(torch.optim.Optimizer):
    """An optimizer with options of one's choice."""

    def __init__(self, parameters: Any, **defaults: Any) -> None:
        super().__init__(parameters, defaults)

    def step(self, closure: Any = None) -> None:
        del closure


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.5),
    "momentum": lambda p: torch.optim.SGD(p, 0.5, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, 0.01),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
    "adafactor": torch.optim.Adafactor,
    "lbfgs": lambda p: torch.optim.LBFGS(p, max_iter=2),
    "rmsprop": torch.optim.RMSprop,
}
SAME_CLASS = {("sgd", "momentum"), ("momentum", "sgd")}
PAIRS = [(a, b) for a in OPTIMIZERS for b in OPTIMIZERS if a != b and (a, b) not in SAME_CLASS]


def without_identity(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a checkpoint look as one of before optimizers were named in it."""
    opened = checkpoint_dir.OpenItem.__init__

    def strip(node: Any) -> Any:
        if not hasattr(node, "children"):
            return node
        known = ("optimizer", "options", "shape")
        detail = {key: value for key, value in node.detail.items() if key not in known}
        return dataclasses.replace(node, detail=detail, children=tuple(map(strip, node.children)))

    def init(self: Any, *arguments: Any, **options: Any) -> None:
        opened(self, *arguments, **options)
        self.root = strip(self.root)

    monkeypatch.setattr(checkpoint_dir.OpenItem, "__init__", init)


@pytest.mark.matrix(4)
@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_another_class_of_optimizer_is_a_mismatch(old: str, new: str, tmp_path: Path) -> None:
    model = net()
    optimizer = OPTIMIZERS[old](model.parameters())
    step(model, optimizer)
    fc.save(tmp_path / "c", {"optimizer": fc.Optimizer(optimizer, model)})
    other = OPTIMIZERS[new](model.parameters())
    before = copy.deepcopy(other.state_dict())
    items = {"optimizer": fc.Optimizer(other, model)}
    names = f"the target is {type(other).__name__}, the checkpoint has {type(optimizer).__name__}"
    with pytest.raises(errors.MismatchError, match=names):
        fc.restore(tmp_path / "c", items)
    restored = fc.restore(tmp_path / "c", items, strict=False)
    assert restored["optimizer"] is other
    assert any(names in line for line in restored.report.mismatched)
    assert testing.differences(other.state_dict(), before) == []
    step(model, other)


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [("adamw", "momentum", True), ("momentum", "adafactor", True), ("adam", "adamw", False)],
)
def test_optimizer_class_is_recognised_by_its_options(
    old: str, new: str, found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = net()
    optimizer = OPTIMIZERS[old](model.parameters())
    step(model, optimizer)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 10)  # its own keys in the groups
    fc.save(tmp_path / "c", {"optimizer": fc.Optimizer(optimizer, model)})
    without_identity(tmp_path, monkeypatch)
    same = OPTIMIZERS[old](model.parameters())
    fc.restore(tmp_path / "c", {"optimizer": fc.Optimizer(same, model)})
    other = {"optimizer": fc.Optimizer(OPTIMIZERS[new](model.parameters()), model)}
    if not found:  # these two cannot be distinguished
        fc.restore(tmp_path / "c", other)
        return
    with pytest.raises(errors.MismatchError, match="an optimizer with the options"):
        fc.restore(tmp_path / "c", other)


def test_an_option_that_the_target_lacks_is_a_mismatch(tmp_path: Path) -> None:
    model = net()
    optimizer = Mine(model.parameters(), lr=0.5, alpha=3)
    optimizer.param_groups[0]["tag"] = "user"  # no option: it is restored as it is
    fc.save(tmp_path / "c", {"optimizer": fc.Optimizer(optimizer, model)})
    other = Mine(model.parameters(), lr=0.1, beta=4)
    items = {"optimizer": fc.Optimizer(other, model)}
    with pytest.raises(errors.MismatchError, match="no option 'alpha' of Mine"):
        fc.restore(tmp_path / "c", items)
    assert other.param_groups[0]["lr"] == 0.1
    restored = fc.restore(tmp_path / "c", items, strict=False)
    assert len(restored.report.mismatched) == 1
    options = {key: value for key, value in other.param_groups[0].items() if key != "params"}
    assert options == {"lr": 0.5, "beta": 4, "tag": "user"}
    fc.restore(tmp_path / "c", items, ignore="optimizer.param_groups.0.alpha")


def test_an_option_that_the_checkpoint_lacks_keeps_the_runs_value(tmp_path: Path) -> None:
    model = net()
    fc.save(tmp_path / "c", {"optimizer": fc.Optimizer(Mine(model.parameters(), lr=0.5), model)})
    newer = Mine(model.parameters(), lr=0.1, beta=4)
    fc.restore(tmp_path / "c", {"optimizer": fc.Optimizer(newer, model)})
    assert (newer.param_groups[0]["lr"], newer.param_groups[0]["beta"]) == (0.5, 4)


@pytest.mark.parametrize("kind", ["momentum", "adamw", "adafactor", "lbfgs", "rmsprop"])
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("named", [True, False])
def test_state_of_a_parameter_of_another_shape(
    kind: str, used: bool, named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = net(2)
    optimizer = OPTIMIZERS[kind](model.parameters())
    step(model, optimizer)
    fc.save(tmp_path / "c", {"model": model, "optimizer": fc.Optimizer(optimizer, model)})
    if not named:
        if kind == "adafactor":
            return  # its factors do not have the shape of anything
        without_identity(tmp_path, monkeypatch)
    wider = net(3)
    other = OPTIMIZERS[kind](wider.parameters())
    if used:
        step(wider, other)
    before = copy.deepcopy(other.state_dict())
    items = {"model": wider, "optimizer": fc.Optimizer(other, wider)}
    with pytest.raises(errors.MismatchError, match=r"shape|numbers"):
        fc.restore(tmp_path / "c", {"optimizer": items["optimizer"]})
    assert testing.differences(other.state_dict(), before) == []
    restored = fc.restore(tmp_path / "c", items, strict=False)
    assert sum("optimizer" in line or "state" in line for line in restored.report.mismatched) > 0
    step(wider, other)
    if kind == "lbfgs":
        return  # all of its state is of all parameters
    wider = net(3)
    other = OPTIMIZERS[kind](wider.parameters())
    if used:
        step(wider, other)
    items = {"model": wider, "optimizer": fc.Optimizer(other, wider)}
    fc.restore(tmp_path / "c", items, ignore=["model.1.*", "optimizer.state.1.*"])
    expected = optimizer.state_dict()["state"][0]
    assert testing.differences(other.state_dict()["state"][0], expected) == []
    step(wider, other)


# ------------------------------------------------------------------------------ tied tensors


class Tied(nn.Module):
    def __init__(self, *, tied: bool, num_rows: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_rows, 4)
        self.head = nn.Linear(4, num_rows, bias=False)
        if tied:
            self.head.weight = self.embedding.weight


@pytest.mark.parametrize("verify", ["stream", "first", False])
@pytest.mark.parametrize("num_rows", [6, 50_000])
@pytest.mark.parametrize("on_meta", [False, True])
def test_two_values_do_not_fit_one_tensor(
    verify: Any, num_rows: int, on_meta: bool, tmp_path: Path
) -> None:
    source = Tied(tied=False, num_rows=num_rows)
    fc.save(tmp_path / "c", {"model": source})
    with torch.device("meta" if on_meta else "cpu"):
        target = Tied(tied=True, num_rows=num_rows)
    before = target.head.weight.detach().clone()
    with pytest.raises(errors.MismatchError) as caught:
        fc.restore(tmp_path / "c", {"model": target}, verify=verify)
    assert (
        "model['head.weight']: the target has one tensor for it and model['embedding.weight']"
        in (str(caught.value))
    )
    restored = fc.restore(tmp_path / "c", {"model": target}, strict=False)
    assert len(restored.report.mismatched) == 1
    assert target.head.weight.is_meta or torch.equal(target.head.weight, before)
    fc.restore(tmp_path / "c", {"model": target}, ignore="model.embedding.weight")
    assert torch.equal(target.embedding.weight, source.head.weight)


@pytest.mark.parametrize("on_meta", [False, True])
def test_equal_values_fit_one_tensor(on_meta: bool, tmp_path: Path) -> None:
    source = Tied(tied=False)
    with torch.no_grad():
        source.head.weight.copy_(source.embedding.weight)
    fc.save(tmp_path / "c", {"model": source})
    with torch.device("meta" if on_meta else "cpu"):
        target = Tied(tied=True)
    assert not fc.restore(tmp_path / "c", {"model": target}).report
    assert target.head.weight is target.embedding.weight
    assert torch.equal(target.head.weight, source.head.weight)


def test_items_that_share_memory_are_compared(tmp_path: Path) -> None:
    fc.save(tmp_path / "c", {"one": nn.Linear(2, 2), "two": nn.Linear(2, 2)})
    shared = nn.Linear(2, 2)
    before = copy.deepcopy(shared.state_dict())
    with pytest.raises(errors.MismatchError, match=r"two\['weight'\].*one\['weight'\]"):
        fc.restore(tmp_path / "c", {"one": shared, "two": shared})
    assert testing.differences(shared.state_dict(), before) == []
    filled = torch.zeros(2, 2)
    with pytest.raises(errors.MismatchError):
        fc.restore(
            tmp_path / "c",
            {
                "one": {"weight": fc.handlers.Fill(filled)},
                "two": {"weight": fc.handlers.Fill(filled)},
            },
            only=["*.weight"],
        )
    assert not filled.any()


def overlapping(what: str) -> dict[str, torch.Tensor]:
    """Two views that have a part of one memory in common, and one of other memory beside."""
    buffer = torch.arange(24.0)
    grid = buffer.view(4, 6)
    views = {
        "shifted": (buffer[:10], buffer[6:]),
        "inside": (buffer, buffer[8:12]),
        "reshaped": (buffer, grid),
        "columns": (grid[:, :4], grid[:, 3:]),
        "transposed": (grid.t()[:2], grid[1:, :3]),
        "other dtype": (buffer[:10], buffer.view(torch.int16)[13:30]),
        "scalar": (buffer[4:8], buffer[7]),
    }
    return dict(zip(("a", "b"), views[what], strict=True)) | {"c": torch.ones(3)}


OVERLAPS = ("shifted", "inside", "reshaped", "columns", "transposed", "other dtype", "scalar")


def fills(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: fc.handlers.Fill(tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize("what", OVERLAPS)
def test_values_that_differ_in_common_memory_are_a_mismatch(what: str, tmp_path: Path) -> None:
    saved = {name: tensor.clone() for name, tensor in overlapping(what).items()}
    saved["b"] += 1
    fc.save(tmp_path / "c", {"t": saved})
    target = overlapping(what)
    before = copy.deepcopy(target)
    with pytest.raises(errors.MismatchError, match=r"t\['[ab]'\].*overlaps.*t\['[ab]'\]") as caught:
        fc.restore(tmp_path / "c", {"t": fills(target)})
    assert len(caught.value.mismatched) == 1
    assert testing.differences(target, before) == []
    report = fc.restore(tmp_path / "c", {"t": fills(target)}, strict=False).report
    assert len(report.mismatched) == 1
    assert testing.differences(target, before) == []
    fc.restore(tmp_path / "c", {"t": fills(target)}, ignore="t.b")
    assert torch.equal(target["a"], saved["a"])


@pytest.mark.parametrize("what", OVERLAPS)
def test_values_that_agree_in_common_memory_are_restored(what: str, tmp_path: Path) -> None:
    saved = overlapping(what)
    fc.save(tmp_path / "c", {"t": {name: tensor.clone() for name, tensor in saved.items()}})
    target = overlapping(what)
    for tensor in target.values():
        tensor.zero_()
    assert not fc.restore(tmp_path / "c", {"t": fills(target)}).report
    assert testing.differences(target, saved) == []


def test_views_that_interleave_have_no_memory_in_common(tmp_path: Path) -> None:
    fc.save(tmp_path / "c", {"t": {"a": torch.zeros(4, 2), "b": torch.ones(4, 4)}})
    grid = torch.full((4, 6), 7.0)
    assert not fc.restore(tmp_path / "c", {"t": fills({"a": grid[:, :2], "b": grid[:, 2:]})}).report
    assert torch.equal(grid, torch.tensor([0.0, 0, 1, 1, 1, 1]).expand(4, 6))


def test_every_leaf_of_a_memory_that_is_kept_is_reported(tmp_path: Path) -> None:
    names = ("flat", "one", "two", "tied")
    fc.save(
        tmp_path / "c", {"m": {name: torch.zeros(8 if name == "flat" else 4) for name in names}}
    )
    buffer = torch.ones(8)
    target = {"flat": buffer, "one": buffer[:4], "two": buffer[4:], "tied": buffer[4:]}
    assert not fc.restore(tmp_path / "c", {"m": fills(target)}).report
    values = {name: torch.full_like(tensor, name == "one") for name, tensor in target.items()}
    fc.save(tmp_path / "d", {"m": values})
    buffer.fill_(3)
    report = fc.restore(tmp_path / "d", {"m": fills(target)}, strict=False).report
    assert len(report.mismatched) == 3
    assert buffer.tolist() == [3.0] * 8


@pytest.mark.parametrize("name", ["embedding.weight", "head.weight"])
@pytest.mark.parametrize("on_meta", [False, True])
def test_one_name_of_a_tied_tensor_is_enough(name: str, on_meta: bool, tmp_path: Path) -> None:
    value = torch.rand(6, 4)
    fc.save(tmp_path / "c", {"model": {name: value}})
    with torch.device("meta" if on_meta else "cpu"):
        target = Tied(tied=True)
    assert not fc.restore(tmp_path / "c", {"model": target}).report
    assert target.head.weight is target.embedding.weight
    assert torch.equal(target.embedding.weight, value)
    with pytest.raises(errors.MismatchError) as caught:
        fc.restore(tmp_path / "c", {"model": Tied(tied=False)})
    assert len(caught.value.missing) == 1


# ------------------------------------------------------------------------------ tensor subclasses


class Plain(torch.Tensor):
    """A subclass without data of its own."""


class Scaled(torch.Tensor):
    """Codes and a scale."""

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor) -> Scaled:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, parts: Any, context: Any, size: Any, stride: Any) -> Scaled:
        return cls(parts["codes"], parts["scale"])

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, arguments: Any = (), options: Any = None
    ):
        if function is torch.ops.aten.detach.default:
            return cls(arguments[0].codes, arguments[0].scale)
        raise NotImplementedError(str(function))


class Quantizing(torch.optim.Optimizer):
    """Keeps its momentum as `Scaled` tensors."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        with torch.enable_grad():
            closure()
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            known = state["m"].codes * state["m"].scale if "m" in state else 0
            scale = (known + parameter).abs().max() / 127
            state["m"] = Scaled(((known + parameter) / scale).round().to(torch.int8), scale)


@pytest.mark.parametrize("used", [False, True])
def test_state_that_is_a_tensor_subclass_keeps_its_class(used: bool, tmp_path: Path) -> None:
    model = net()
    optimizer = Quantizing(model.parameters())
    step(model, optimizer)
    fc.save(tmp_path / "c", {"optimizer": fc.Optimizer(optimizer, model)})
    other = Quantizing(model.parameters())
    if used:
        step(model, other)
    fc.restore(tmp_path / "c", {"optimizer": fc.Optimizer(other, model)})
    for parameter in model.parameters():
        restored, saved = other.state[parameter]["m"], optimizer.state[parameter]["m"]
        assert type(restored) is Scaled
        assert torch.equal(restored.codes, saved.codes)
        assert torch.equal(restored.scale, saved.scale)
    step(model, other)


class Holder:
    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def test_a_class_that_this_process_does_not_know_is_a_mismatch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled = Scaled(torch.ones(2, dtype=torch.int8), torch.ones(()))
    fc.save(tmp_path / "c", {"holder": Holder(scaled)})
    holder = Holder(None)
    fc.restore(tmp_path / "c", {"holder": holder})
    assert type(holder.value) is Scaled
    monkeypatch.setattr(composite, "class_name", lambda kind: f"renamed.{kind.__qualname__}")
    holder = Holder(None)
    with pytest.raises(errors.MismatchError, match=r"holder\['value'\].*Scaled.*import its class"):
        fc.restore(tmp_path / "c", {"holder": holder})
    assert holder.value is None
    parts = fc.restore(tmp_path / "c")["holder"]["value"]
    assert sorted(parts) == ["codes", "scale"]


def test_a_subclass_whose_class_would_be_lost_is_refused(tmp_path: Path) -> None:
    value = torch.ones(2).as_subclass(Plain)
    for item in ({"w": value}, Holder(value), {"p": nn.Parameter(value)}):
        with pytest.raises(
            errors.UnsupportedLeafError, match=r"Plain is a subclass of torch\.Tensor"
        ):
            fc.save(tmp_path / "c", {"item": item})
    fc.save(tmp_path / "c", {"item": {"w": torch.zeros(2)}})
    with pytest.raises(errors.MismatchError, match="a Plain, whose class is not stored"):
        fc.restore(tmp_path / "c", {"item": {"w": value}})


def test_a_modules_own_tensors_keep_their_class(tmp_path: Path) -> None:
    model = nn.Module()
    model.register_buffer("table", torch.rand(3).as_subclass(Plain))
    fc.save(tmp_path / "c", {"model": model})
    other = nn.Module()
    other.register_buffer("table", torch.zeros(3).as_subclass(Plain))
    fc.restore(tmp_path / "c", {"model": other})
    assert type(other.table) is Plain
    assert other.table.tolist() == model.get_buffer("table").tolist()
    assert type(fc.restore(tmp_path / "c")["model"]["table"]) is torch.Tensor


# ------------------------------------------------------------------------------ state dicts


def test_the_metadata_of_a_state_dict_comes_back(tmp_path: Path) -> None:
    state = nn.BatchNorm1d(3).state_dict()
    expected: Any = state._metadata  # pyright: ignore[reportAttributeAccessIssue]
    assert expected[""] == {"version": 2}
    fc.save(tmp_path / "c", {"state": state, "holder": Holder(state)})
    restored = fc.restore(tmp_path / "c")
    holder = Holder(None)
    fc.restore(tmp_path / "c", {"holder": holder})
    for found in (restored["state"], restored["holder"]["value"], holder.value):
        assert type(found) is collections.OrderedDict
        assert type(found._metadata) is collections.OrderedDict
        assert found._metadata == expected
    like = fc.restore(tmp_path / "c", {"state": nn.BatchNorm1d(3).state_dict()})["state"]
    assert like._metadata == expected


def test_attributes_may_have_values_of_torch(tmp_path: Path) -> None:
    """As those of a TensorDict: its sizes and device."""
    state: Any = collections.OrderedDict(a=torch.ones(2))
    state._metadata = collections.OrderedDict(
        {"": {"batch_size": torch.Size([2]), "device": torch.device("cpu"), "dtype": torch.int8}}
    )
    fc.save(tmp_path / "c", {"state": state})
    found = fc.restore(tmp_path / "c")["state"]._metadata
    assert found == state._metadata and type(found[""]["batch_size"]) is torch.Size


def test_attributes_that_are_no_data_are_refused(tmp_path: Path) -> None:
    state: Any = collections.OrderedDict(a=1)
    state.owner = object()
    with pytest.raises(errors.UnsupportedLeafError, match="attributes that are not plain data"):
        fc.save(tmp_path / "c", {"state": state})


# -------------------------------------------------------------------------------- return values


def test_initial_values_are_the_objects_that_a_restore_returns(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    items = {"model": model, "optimizer": fc.Optimizer(optimizer, model)}
    with fc.CheckpointManager(tmp_path) as manager:
        begun = manager.restore_or(items)
        manager.save(0, items).result()
        resumed = manager.restore_or(items)
    for restored in (begun, resumed):
        assert restored["optimizer"] is optimizer
        assert restored["model"] is model
