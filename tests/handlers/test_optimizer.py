from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from functional_ckpt import errors
from functional_ckpt.core.tree.placeholders import Fill
from functional_ckpt.handlers import Module, Optimizer

O = torch.optim  # noqa: E741


class Net(nn.Module):
    """Weights only of two dims for Muon, with biases for the others."""

    def __init__(self, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5, bias=bias, dtype=dtype)
        self.second = nn.Linear(5, 4, bias=bias, dtype=dtype)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.EmbeddingBag(8, 3, sparse=True, mode="sum")

    def forward(self, x):
        return self.embed((x.abs() * 3).long().clamp(max=7))


def batch(step: int, dtype: torch.dtype = torch.float32):
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(step), dtype=dtype)


def step_once(model, optimizer, step: int) -> None:
    x = batch(step, next(model.parameters()).dtype)

    def closure():
        optimizer.zero_grad()
        loss = (model(x) ** 2).mean()
        if loss.requires_grad:
            loss.backward()
        return loss

    if isinstance(optimizer, O.LBFGS):
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


def train(model, optimizer, start: int, stop: int) -> None:
    for step in range(start, stop):
        step_once(model, optimizer, step)


def assert_same(left, right, where: str = "") -> None:
    assert type(left) is type(right), (where, left, right)
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype and left.device == right.device, where
        assert left.stride() == right.stride(), where
        assert torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_same(left[key], right[key], f"{where}[{key!r}]")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), where
        for index, pair in enumerate(zip(left, right, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    else:
        assert left == right, where


def assert_same_run(model, optimizer, other_model, other_optimizer) -> None:
    assert_same(dict(model.state_dict()), dict(other_model.state_dict()), "model")
    assert_same(optimizer.state_dict(), other_optimizer.state_dict(), "optimizer")


def check_resume(save, make, *, used_target: bool = False, steps: int = 3) -> None:
    """Saves at a step and continues; a restored pair that continues ends with the same bits."""
    model, optimizer = make()
    train(model, optimizer, 0, steps)
    stored = save(Module(model)), save(Optimizer(optimizer, model))
    train(model, optimizer, steps, steps + 5)

    torch.manual_seed(99)
    fresh_model, fresh_optimizer = make()
    if used_target:
        train(fresh_model, fresh_optimizer, 50, 52)
    stored[0].restore(fresh_model)
    restored = stored[1].restore(Optimizer(fresh_optimizer, fresh_model))
    assert restored is fresh_optimizer
    train(fresh_model, fresh_optimizer, steps, steps + 5)
    assert_same_run(model, optimizer, fresh_model, fresh_optimizer)


OPTIMIZERS = {
    "Adadelta": lambda p: O.Adadelta(p, rho=0.8),
    "Adafactor": lambda p: O.Adafactor(p, lr=0.05),
    "Adagrad": lambda p: O.Adagrad(p, lr=0.05, lr_decay=0.01, initial_accumulator_value=0.1),
    "Adam": lambda p: O.Adam(p, lr=0.01, amsgrad=True),
    "Adam single": lambda p: O.Adam(p, lr=0.01, foreach=False),
    "Adam foreach": lambda p: O.Adam(p, lr=0.01, foreach=True),
    "Adam fused": lambda p: O.Adam(p, lr=0.01, fused=True),
    "Adam tensor lr": lambda p: O.Adam(p, lr=torch.tensor(0.01)),
    "Adam tensor betas": lambda p: O.Adam(
        p, lr=torch.tensor(0.01), betas=(torch.tensor(0.8), torch.tensor(0.99)), foreach=False
    ),
    "AdamW": lambda p: O.AdamW(p, lr=0.01, weight_decay=0.1, maximize=True),
    "Adamax": lambda p: O.Adamax(p, lr=0.01),
    "ASGD": lambda p: O.ASGD(p, lr=0.05, t0=2),
    "LBFGS": lambda p: O.LBFGS(p, lr=0.1, history_size=4, max_iter=3),
    "LBFGS wolfe": lambda p: O.LBFGS(p, line_search_fn="strong_wolfe", max_iter=2),
    "Muon": lambda p: O.Muon(p, lr=0.01),
    "NAdam": lambda p: O.NAdam(p, lr=0.01),
    "RAdam": lambda p: O.RAdam(p, lr=0.01),
    "RMSprop": lambda p: O.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "Rprop": lambda p: O.Rprop(p, lr=0.01),
    "SGD": lambda p: O.SGD(p, lr=0.05),
    "SGD momentum": lambda p: O.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "SparseAdam": lambda p: O.SparseAdam(p, lr=0.05),
}


def test_every_optimizer_of_torch_is_tested():
    known = {n for n, kind in vars(O).items() if isinstance(kind, type)} - {"Optimizer"}
    assert {name.split()[0] for name in OPTIMIZERS} == known


@pytest.mark.matrix(2)
@pytest.mark.parametrize("used_target", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumes_bit_for_bit(save, name, used_target):
    def make():
        if name == "SparseAdam":
            model = Sparse()
        else:
            model = Net(bias=name != "Muon")
        return model, OPTIMIZERS[name](model.parameters())

    check_resume(save, make, used_target=used_target)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumes_from_before_the_first_step(save, name):
    def make():
        model = Sparse() if name == "SparseAdam" else Net(bias=name != "Muon")
        return model, OPTIMIZERS[name](model.parameters())

    check_resume(save, make, used_target=True, steps=0)


def test_float32_state_of_bfloat16_parameters_is_not_rounded(save):
    def make():
        model = Net(dtype=torch.bfloat16)
        optimizer = O.Adam(model.parameters(), lr=0.01, foreach=False)
        for parameter in model.parameters():
            optimizer.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter, dtype=torch.float32),
                "exp_avg_sq": torch.zeros_like(parameter, dtype=torch.float32),
            }
        return model, optimizer

    model, optimizer = make()
    for state in optimizer.state.values():
        state["exp_avg"].normal_()
    fresh = Net(dtype=torch.bfloat16)
    target = O.Adam(fresh.parameters(), lr=0.5)
    save(Optimizer(optimizer, model)).restore(Optimizer(target, fresh))
    for left, right in zip(optimizer.state.values(), target.state.values(), strict=True):
        assert right["exp_avg"].dtype == torch.float32
        assert torch.equal(left["exp_avg"], right["exp_avg"])


def test_several_groups_empty_groups_and_strings(save):
    def make():
        model = Net()
        optimizer = O.SGD(
            [
                {"params": model.first.parameters(), "lr": 0.1, "name": "body"},
                {"params": [], "lr": 0.3, "name": "none"},
                {"params": model.second.parameters(), "momentum": 0.5},
            ],
            lr=0.01,
        )
        return model, optimizer

    check_resume(save, make)
    model, optimizer = make()
    optimizer.param_groups[0]["lr"] = 7.0
    optimizer.param_groups[1]["lr"] = 8.0
    fresh, target = make()
    save(Optimizer(optimizer, model)).restore(Optimizer(target, fresh))
    assert [g["lr"] for g in target.param_groups] == [7.0, 8.0, 0.01]
    assert [g.get("name") for g in target.param_groups] == ["body", "none", None]


def test_on_disk_it_is_keyed_by_name(save):
    model = Net()
    optimizer = O.AdamW(model.named_parameters(), lr=0.01)
    train(model, optimizer, 0, 1)
    restored = save(Optimizer(optimizer, model)).restore(None)
    assert list(restored) == ["state", "param_groups"]
    assert list(restored["state"]) == ["first.weight", "first.bias", "second.weight", "second.bias"]
    assert set(restored["state"]["first.bias"]) == {"step", "exp_avg", "exp_avg_sq"}
    (group,) = restored["param_groups"]
    assert group["params"] == list(restored["state"])
    assert "param_names" not in group
    assert group["betas"] == (0.9, 0.999)


def test_names_are_without_wrappers_and_tied_parameters_have_their_first(save):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
            self.b.weight = self.a.weight

    model = Tied()
    wrapped = nn.DataParallel(torch.compile(model))
    optimizer = O.SGD(wrapped.parameters(), lr=0.1)
    lowered = _lowered(Optimizer(optimizer, wrapped))
    assert lowered["param_groups"][0]["params"] == ["a.weight"]
    pairs = Optimizer(optimizer, ((f"x.{n}", p) for n, p in model.named_parameters()))
    for _ in range(2):  # a generator of pairs is read once, when the item is made
        lowered = pairs.handler.lower(pairs.value)
        assert lowered["param_groups"][0]["params"] == ["x.a.weight"]


def test_state_of_frozen_parameters_is_kept(save):
    model = Net()
    optimizer = O.Adam(model.parameters(), lr=0.01)
    train(model, optimizer, 0, 2)
    model.first.requires_grad_(False)
    model.first.weight.grad = model.first.bias.grad = None
    train(model, optimizer, 2, 3)
    fresh = Net()
    fresh.first.requires_grad_(False)
    target = O.Adam(fresh.parameters(), lr=0.01)
    save(model).restore(fresh)
    save(Optimizer(optimizer, model)).restore(Optimizer(target, fresh))
    assert target.state[fresh.first.weight]["step"].item() == 2
    for net, opt in ((model, optimizer), (fresh, target)):
        net.first.requires_grad_(True)
        train(net, opt, 3, 6)
    assert_same_run(model, optimizer, fresh, target)


def test_optimizer_with_groups_added_later_restores_equal(save):
    def make():
        model = Net()
        return model, O.Adam(model.first.parameters(), lr=0.01)

    model, optimizer = make()
    train(model, optimizer, 0, 2)
    stored_early = save(Optimizer(optimizer, model))
    optimizer.add_param_group({"params": model.second.parameters(), "lr": 0.2})
    train(model, optimizer, 2, 4)
    stored = save(model), save(Optimizer(optimizer, model))

    fresh, target = make()
    with pytest.raises(errors.MismatchError) as caught:
        stored[1].restore(Optimizer(target, fresh))
    assert caught.value.unexpected == ("second.weight", "second.bias")
    assert "param_groups: 2 in the checkpoint, 1 here" in str(caught.value)
    assert not target.state
    target.add_param_group({"params": fresh.second.parameters()})
    with pytest.raises(errors.MismatchError, match=r"not in the checkpoint: second\.weight"):
        stored_early.restore(Optimizer(target, fresh))
    stored[0].restore(fresh)
    stored[1].restore(Optimizer(target, fresh))
    assert_same_run(model, optimizer, fresh, target)


def test_parameters_in_other_groups_are_a_mismatch(save):
    model = Net()

    def make(*sizes: int):
        parameters = iter(model.parameters())
        return O.SGD([{"params": list(itertools.islice(parameters, n))} for n in sizes], lr=0.1)

    stored = save(Optimizer(make(1, 3), model))
    with pytest.raises(errors.MismatchError) as caught:
        stored.restore(Optimizer(make(2, 2), model))
    assert caught.value.mismatched == ("first.bias: in group 1 of the checkpoint, in group 0 here",)


def test_order_within_a_group_matters_to_lbfgs_only(save):
    model = Net()
    forward, backward = list(model.parameters()), list(model.parameters())[::-1]
    optimizer = O.SGD(forward, lr=0.1, momentum=0.9)
    train(model, optimizer, 0, 2)
    target = O.SGD(backward, lr=0.1, momentum=0.9)
    save(Optimizer(optimizer, model)).restore(Optimizer(target, model))
    for parameter in forward:
        assert_same(target.state[parameter], optimizer.state[parameter])
    stored = save(Optimizer(O.LBFGS(forward), model))
    with pytest.raises(errors.MismatchError, match="LBFGS flattens them in order"):
        stored.restore(Optimizer(O.LBFGS(backward), model))


def test_not_strict_restores_what_both_know(save):
    model = Net()
    optimizer = O.SGD(list(model.parameters())[:3], lr=0.1, momentum=0.9)
    train(model, optimizer, 0, 2)
    stored = save(Optimizer(optimizer, model))
    target = O.SGD(list(model.parameters())[1:], lr=0.5, momentum=0.9)
    train(model, target, 0, 1)
    mine = target.state[model.second.bias]["momentum_buffer"].clone()
    item = Optimizer(target, model)
    wanted = item.handler.target(item.value, stored.saved(), strict=False)
    item.handler.lift(item.value, stored._fill(stored.root, wanted, {}, strict=False))
    assert target.param_groups[0]["lr"] == 0.1
    assert torch.equal(target.state[model.second.bias]["momentum_buffer"], mine)
    assert_same(target.state[model.first.bias], optimizer.state[model.first.bias])
    assert model.first.weight not in target.state


def _lowered(item):
    return item.handler.lower(item.value)


def test_parameters_the_model_does_not_have():
    model, other = Net(), nn.Linear(2, 3)
    optimizer = O.SGD([*model.parameters(), other.bias], lr=0.1)
    with pytest.raises(errors.UsageError, match=r"param_groups\[0\]\['params'\]\[4\] \(3,\)"):
        _lowered(Optimizer(optimizer, model))
    with pytest.raises(errors.UsageError, match="Two parameters are named 'w'"):
        pairs = [("w", model.first.weight), ("w", model.second.weight)]
        _lowered(Optimizer(optimizer, pairs))
    with pytest.raises(errors.UsageError, match="are the two exchanged"):
        Optimizer(other, model)


def test_state_of_parameters_that_left():
    model = Net()
    optimizer = O.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, 0, 1)
    del optimizer.param_groups[0]["params"][1]
    with pytest.raises(errors.UsageError, match=r"state for first\.bias, which is in none of its"):
        _lowered(Optimizer(optimizer, model))


def test_state_under_other_keys(save):
    model = Net()
    optimizer, target = (O.SGD(model.parameters(), lr=0.1) for _ in range(2))
    optimizer.state["calls"] = {"n": 3, "mean": torch.ones(2)}
    target.state["stale"] = 1
    save(Optimizer(optimizer, model)).restore(Optimizer(target, model))
    assert target.state["calls"]["n"] == 3
    assert "stale" not in target.state
    assert torch.equal(target.state["calls"]["mean"], torch.ones(2))
    optimizer.state[3] = {}
    with pytest.raises(errors.UsageError, match="under the key 3"):
        _lowered(Optimizer(optimizer, model))


def test_optimizer_refuses_state_without_names(save):
    model = Net()
    optimizer = O.SGD(model.parameters(), lr=0.1)
    with pytest.raises(
        errors.MismatchError, match=r"Not an optimizer saved by parameter name.*'a'"
    ):
        save({"a": 1}).restore(Optimizer(optimizer, model))


# ------------------------------------------------------------ in place


def test_live_state_is_filled_where_it_lies(save):
    model, fresh = Net(), Net()
    optimizer, target = (O.Adam(m.parameters(), lr=0.01) for m in (model, fresh))
    train(model, optimizer, 0, 3)
    train(fresh, target, 7, 8)
    held = target.state[fresh.first.weight]["exp_avg"]
    save(Optimizer(optimizer, model)).restore(Optimizer(target, fresh))
    assert target.state[fresh.first.weight]["exp_avg"] is held
    assert torch.equal(held, optimizer.state[model.first.weight]["exp_avg"])


def test_live_state_that_shares_memory_is_not_filled(save):
    model, fresh = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    optimizer, target = (O.SGD(m.parameters(), lr=0.1) for m in (model, fresh))
    optimizer.state[model.weight] = {"a": torch.zeros(2), "b": torch.ones(2)}
    both = torch.full((2,), 5.0)
    target.state[fresh.weight] = {"a": both, "b": both}
    save(Optimizer(optimizer, model)).restore(Optimizer(target, fresh))
    assert target.state[fresh.weight]["a"].tolist() == [0, 0]
    assert target.state[fresh.weight]["b"].tolist() == [1, 1]
    assert both.tolist() == [5, 5]


def test_tensor_lr_stays_the_runs_tensor(save):
    model = Net()

    def make(lr):
        return O.Adam(model.parameters(), lr=lr, foreach=False)

    lr = torch.tensor(0.5)
    target = make(lr)
    save(Optimizer(make(torch.tensor(0.25)), model)).restore(Optimizer(target, model))
    assert target.param_groups[0]["lr"] is lr
    assert lr.item() == 0.25
    save(Optimizer(make(0.125), model)).restore(Optimizer(target, model))
    assert target.param_groups[0]["lr"] is lr
    assert lr.item() == 0.125
    target = make(1.0)
    save(Optimizer(make(torch.tensor(0.25)), model)).restore(Optimizer(target, model))
    assert type(target.param_groups[0]["lr"]) is float
    assert target.param_groups[0]["lr"] == 0.25


def test_run_flags_belong_to_the_new_run(save):
    model = Net()
    optimizer = O.Adam(model.parameters(), lr=0.5, foreach=True, maximize=True)
    train(model, optimizer, 0, 1)
    target = O.Adam(model.parameters(), lr=0.1, fused=True)
    save(Optimizer(optimizer, model)).restore(Optimizer(target, model))
    (group,) = target.param_groups
    assert (group["fused"], group["foreach"]) == (True, None)
    assert (group["lr"], group["maximize"]) == (0.5, True)
    step_once(model, target, 1)


def test_lower_and_target_change_nothing(save):
    model = Net()
    optimizer = O.Adam(model.parameters(), lr=0.01)
    item = Optimizer(optimizer, model)
    stored = save(item)
    assert not optimizer.state
    train(model, optimizer, 0, 2)
    before = copy.deepcopy(optimizer.state_dict())
    leaves_before = [id(t) for s in optimizer.state.values() for t in s.values()]
    item.handler.target(item.value, stored.saved())
    assert_same(optimizer.state_dict(), before)
    assert [id(t) for s in optimizer.state.values() for t in s.values()] == leaves_before


def test_state_of_another_shape_is_replaced_not_filled(save):
    model = nn.Linear(2, 2, bias=False)
    optimizer, target = (O.SGD(model.parameters(), lr=0.1) for _ in range(2))
    optimizer.state[model.weight] = {"history": torch.arange(4.0)}
    old = torch.zeros(2)
    target.state[model.weight] = {"history": old, "stale": torch.ones(1)}
    item = Optimizer(target, model)
    stored = save(Optimizer(optimizer, model))
    wanted = item.handler.target(item.value, stored.saved())
    assert not isinstance(wanted["state"]["weight"]["history"], Fill)
    stored.restore(item)
    assert_same(target.state[model.weight], {"history": torch.arange(4.0)})
    assert old.tolist() == [0, 0]


# ------------------------------------------------------------ subclasses and hooks


class Averaging(O.SGD):
    """A subclass whose state dict says more than torch's, and whose loading does more."""

    def __init__(self, params, **options) -> None:
        super().__init__(params, **options)
        self.num_calls = 0

    def step(self, closure=None):
        self.num_calls += 1
        return super().step(closure)

    def state_dict(self):
        return {**super().state_dict(), "num_calls": self.num_calls}

    def load_state_dict(self, state_dict):
        state_dict = dict(state_dict)
        self.num_calls = state_dict.pop("num_calls")
        super().load_state_dict(state_dict)


def test_optimizer_with_overridden_state_dict_resumes_exactly(save):
    def make():
        model = Net()
        return model, Averaging(model.parameters(), lr=0.1, momentum=0.9)

    check_resume(save, make)
    check_resume(save, make, used_target=True)


def test_hooks(save):
    def make():
        model = Net()
        optimizer = O.SGD(model.parameters(), lr=0.1, momentum=0.9)
        extra = {"seen": 0}
        optimizer.register_step_post_hook(lambda *_: extra.update(seen=extra["seen"] + 1))

        def out(opt, state):
            # Stored doubled, so that a restore which leaves the other hook out would show.
            entries = {
                index: {k: v * 2 for k, v in entry.items()}
                for index, entry in state["state"].items()
            }
            return {**state, "state": entries, "seen": extra["seen"]}

        def back(opt, state):
            extra["seen"] = state["seen"]
            entries = {
                index: {k: v / 2 for k, v in entry.items()}
                for index, entry in state["state"].items()
            }
            return {**state, "state": entries}

        optimizer.register_state_dict_post_hook(out)
        optimizer.register_load_state_dict_pre_hook(back)
        return model, optimizer

    check_resume(save, make)
    check_resume(save, make, used_target=True)


def test_unused_extra_state_is_a_mismatch(save):
    model = Net()
    stored = save(Optimizer(Averaging(model.parameters(), lr=0.1), model))
    with pytest.raises(errors.MismatchError) as caught:
        stored.restore(Optimizer(O.SGD(model.parameters(), lr=0.1), model))
    assert caught.value.unexpected == ("num_calls",)


def test_other_layouts_are_refused():
    class Nested(O.SGD):
        def state_dict(self):
            return {"inner": super().state_dict()}

    model = Net()
    item = Optimizer(Nested(model.parameters(), lr=0.1), model)
    with pytest.raises(
        errors.UsageError, match=r"not laid out like torch\.optim's: it has \['inner"
    ):
        item.handler.lower(item.value)


def test_differentiable_state_is_taken_off_the_graph(save):
    model = Net()
    optimizer = O.SGD(model.parameters(), lr=0.1, momentum=0.9)
    hung = torch.ones(5, 6, requires_grad=True) * 2
    optimizer.state[model.first.weight] = {"momentum_buffer": hung}
    target = O.SGD(model.parameters(), lr=0.1, momentum=0.9)
    save(Optimizer(optimizer, model)).restore(Optimizer(target, model))
    restored = target.state[model.first.weight]["momentum_buffer"]
    assert torch.equal(restored, hung.detach())
    assert not restored.requires_grad


# ------------------------------------------------------------ devices


@pytest.mark.cuda
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fused": True},
        {"capturable": True},
        {"foreach": False},
        {"lr": torch.tensor(0.01), "capturable": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [O.Adam, O.AdamW, O.NAdam, O.RAdam, O.Adamax])
def test_resumes_bit_for_bit_on_cuda(save, kind, options):
    if options.get("fused") and kind in (O.NAdam, O.RAdam, O.Adamax):
        pytest.skip("not fused")

    class OnCuda(Net):
        def forward(self, x):
            return super().forward(x.cuda())

    def make():
        model = OnCuda().cuda()
        return model, kind(model.parameters(), **{"lr": 0.01, **options})

    check_resume(save, make)
    check_resume(save, make, used_target=True)
