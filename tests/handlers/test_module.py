from __future__ import annotations

import copy
import dataclasses
import weakref

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from functional_ckpt import errors
from functional_ckpt.core.tree.placeholders import Fill
from functional_ckpt.handlers import Item, Module, ModuleHandler


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 3, bias=False)
        self.register_buffer("scratch", torch.ones(2), persistent=False)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.out = nn.Linear(4, 5, bias=False)
        self.out.weight = self.embed.weight


def assert_equal(a, b):
    left, right = a.state_dict(), b.state_dict()
    assert list(left) == list(right)
    for name, value in left.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, right[name]), name
            assert value.dtype == right[name].dtype
        else:
            assert value == right[name]


def trained(model):
    for index, parameter in enumerate(model.parameters()):
        parameter.data.normal_(generator=torch.Generator().manual_seed(index))
    for buffer in model.buffers():
        buffer.add_(3)
    return model


def test_items_are_frozen_records_bound_to_a_handler():
    item = Module(nn.Linear(1, 1), only="weight", device="cpu")
    assert isinstance(item, Item)
    assert item.handler == ModuleHandler(only=("weight",), device=torch.device("cpu"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        item.value = None
    with pytest.raises((AttributeError, TypeError)):
        item.other = 1
    with pytest.raises(errors.UsageError, match=r"Expected a torch\.nn\.Module, got dict"):
        Module({})


def test_module_restore_fills_parameters_in_place(save):
    stored = save(trained(Net()))
    target = Net()
    target.eval()
    target.encoder[0].weight.requires_grad_(False)
    before = {name: (id(t), t.data_ptr()) for name, t in target.named_parameters()}
    assert stored.restore(target) is target
    assert_equal(target, trained(Net()))
    after = {name: (id(t), t.data_ptr()) for name, t in target.named_parameters()}
    assert after == before
    assert not target.training
    assert not target.encoder[0].weight.requires_grad
    assert target.encoder[1].num_batches_tracked.item() == 3
    assert torch.equal(target.scratch, torch.ones(2))


def test_lowers_live_memory_without_the_parameter_role(save):
    model = Net()
    lowered = ModuleHandler().lower(model)
    assert list(lowered) == list(model.state_dict())
    weight = lowered["head.weight"]
    assert type(weight) is torch.Tensor
    assert not weight.requires_grad
    assert weight.data_ptr() == model.head.weight.data_ptr()
    restored = save(model).restore(None)
    assert type(restored["head.weight"]) is torch.Tensor
    assert not restored["head.weight"].requires_grad


def test_module_only_selects_tensors(save):
    model = trained(Net())
    stored = save(Module(model, only="encoder.*"))
    assert set(stored.arrays) == {n for n in model.state_dict() if n.startswith("encoder.")}
    target = Net()
    head = target.head.weight.clone()
    stored.restore(Module(target, only=["encoder.0.*", "encoder.1.*"]))
    assert torch.equal(target.head.weight, head)
    assert torch.equal(target.encoder[0].weight, model.encoder[0].weight)
    handler = ModuleHandler(only=("encoder.*", "body._extra_state"))
    stored_names = ["encoder.0.weight", "head.weight", "body._extra_state.n", "body.n"]
    assert [handler.selects(name) for name in stored_names] == [True, False, True, False]
    assert ModuleHandler().selects("anything")
    with pytest.raises(errors.UsageError, match=r"only='decoder\.\*' matches no tensor of Net"):
        ModuleHandler(only=("encoder.*", "decoder.*")).lower(model)


def test_tied_parameters_are_stored_once_and_stay_tied(save):
    model = trained(Tied())
    stored = save(model)
    assert list(stored.arrays) == ["embed.weight"]
    target = stored.restore(Tied())
    assert target.out.weight is target.embed.weight
    assert_equal(target, model)
    plain = stored.restore(None)
    assert plain["out.weight"] is plain["embed.weight"]


# ------------------------------------------------------------ wrappers


def wrapped_by(kind: str, model: nn.Module) -> nn.Module:
    if kind == "compile":
        return torch.compile(model)
    if kind == "data parallel":
        return nn.DataParallel(model)
    if kind == "activation checkpoint":
        model.encoder[0] = checkpoint_wrapper(model.encoder[0])
        return model
    if kind == "compiled inside":
        model.head = torch.compile(model.head)
        return model
    if kind == "both":
        model.encoder = checkpoint_wrapper(torch.compile(model.encoder))
        return nn.DataParallel(torch.compile(model))
    raise AssertionError(kind)


KINDS = ["compile", "data parallel", "activation checkpoint", "compiled inside", "both"]


@pytest.mark.parametrize("kind", KINDS)
def test_wrappers_leave_no_trace(save, kind):
    plain = trained(Net())
    names = list(plain.state_dict())
    stored = save(wrapped_by(kind, copy.deepcopy(plain)))
    assert list(ModuleHandler().lower(wrapped_by(kind, copy.deepcopy(plain)))) == names
    assert_equal(stored.restore(Net()), plain)

    inner = Net()
    save(plain).restore(wrapped_by(kind, inner))
    for (_, got), (_, wanted) in zip(
        inner.named_parameters(), plain.named_parameters(), strict=True
    ):
        assert torch.equal(got, wanted)


def test_ddp_leaves_no_trace(save):
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        plain = trained(Net())
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
        assert all(name.startswith("module.") for name in wrapped.state_dict())
        assert_equal(save(wrapped).restore(Net()), plain)
        fresh = nn.parallel.DistributedDataParallel(Net())
        save(plain).restore(fresh)
        assert_equal(fresh.module, plain)
    finally:
        torch.distributed.destroy_process_group()


def test_a_users_own_attribute_named_module_is_kept(save):
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)
            self._orig_mod = nn.Linear(2, 2)

    model = trained(Holder())
    assert list(save(nn.DataParallel(model)).arrays) == [
        "module.weight",
        "module.bias",
        "_orig_mod.weight",
        "_orig_mod.bias",
    ]
    assert_equal(save(model).restore(Holder()), model)


def test_names_that_collide_without_prefixes_are_an_error():
    class Odd(nn.DataParallel):
        def __init__(self, module) -> None:
            super().__init__(module)
            self.weight = nn.Parameter(torch.ones(1))

    with pytest.raises(errors.NameCollisionError, match="would both be named 'weight'"):
        ModuleHandler().lower(Odd(nn.Linear(1, 1)))


# ------------------------------------------------------------ hooks and overrides


class Extra(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)
        self.note = {"calls": 0, "scale": [1.0]}

    def get_extra_state(self):
        return dict(self.note)

    def set_extra_state(self, state) -> None:
        self.note = state


def test_module_extra_state_is_restored(save):
    model = nn.Sequential(trained(Extra()), nn.ReLU())
    model[0].note = {"calls": 7, "scale": [1.0, 2.0, float("nan")]}
    target = nn.Sequential(Extra(), nn.ReLU())
    weight = target[0].weight
    save(model).restore(target)
    assert target[0].note["calls"] == 7
    assert str(target[0].note["scale"]) == "[1.0, 2.0, nan]"
    assert target[0].weight is weight
    assert torch.equal(weight, model[0].weight)


def test_extra_state_that_the_checkpoint_lacks_stands_in_the_target_for_the_error_to_name():
    model = Extra()
    wanted = ModuleHandler().target(model, {"weight": None, "bias": None})
    assert wanted["_extra_state"] == {"calls": 0, "scale": [1.0]}


def test_state_dict_hooks_that_rename_and_transform(save):
    class Renamed(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.register_state_dict_post_hook(self._out)
            self.register_load_state_dict_pre_hook(self._into)

        @staticmethod
        def _out(module, state, prefix, metadata) -> None:
            state[prefix + "kernel"] = state.pop(prefix + "weight").detach().T.contiguous()

        @staticmethod
        def _into(module, state, prefix, *rest) -> None:
            state[prefix + "weight"] = state.pop(prefix + "kernel").T.contiguous()

    model = trained(nn.Sequential(Renamed(), nn.Linear(2, 2)))
    stored = save(model)
    assert sorted(stored.arrays) == ["0.bias", "0.kernel", "1.bias", "1.weight"]
    target = stored.restore(nn.Sequential(Renamed(), nn.Linear(2, 2)))
    assert torch.equal(target[0].weight, model[0].weight)
    assert torch.equal(target[1].weight, model[1].weight)


def test_module_restore_runs_load_hooks(save):
    class Cached(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.total = 0.0
            self.register_load_state_dict_post_hook(
                lambda module, keys: setattr(module, "total", module.weight.sum().item())
            )

    model = trained(Cached())
    target = save(model).restore(Cached())
    assert target.total == model.weight.sum().item() != 0


def test_submodule_that_takes_other_shapes(save):
    class Bank(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.register_buffer("rows", torch.arange(float(size)))

        def _load_from_state_dict(self, state, prefix, *rest) -> None:
            self.rows = torch.empty_like(state[prefix + "rows"])
            super()._load_from_state_dict(state, prefix, *rest)

    target = save(nn.Sequential(Bank(5))).restore(nn.Sequential(Bank(2)))
    assert torch.equal(target[0].rows, torch.arange(5.0))


def test_module_with_overridden_state_dict_saves_its_result(save):
    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.lora = nn.Linear(2, 2), nn.Linear(2, 2)

        def state_dict(self):
            return {k: v for k, v in super().state_dict().items() if k.startswith("lora.")}

    model, target = trained(Adapter()), Adapter()
    frozen = target.frozen.weight.clone()
    stored = save(model)
    assert sorted(stored.arrays) == ["lora.bias", "lora.weight"]
    stored.restore(target)
    assert torch.equal(target.lora.weight, model.lora.weight)
    assert torch.equal(target.frozen.weight, frozen)


def test_module_with_parametrizations_restores_equal(save):
    def make():
        return nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))

    model = make()
    model(torch.ones(2, 3))
    target = save(model).restore(make())
    assert_equal(target, model)
    model.eval(), target.eval()
    assert torch.equal(model.weight, target.weight)


def test_lazy_module_is_refused_before_its_first_forward(save):
    model = nn.Sequential(nn.LazyLinear(3), nn.ReLU())
    with pytest.raises(errors.UnsupportedLeafError, match=r"lazy modules.*0\.weight, 0\.bias"):
        save(model)
    model(torch.ones(1, 5))
    target = save(model).restore(nn.Sequential(nn.LazyLinear(3), nn.ReLU()))
    assert torch.equal(target[0].weight, model[0].weight)
    assert type(target[0].weight) is nn.Parameter


def test_empty_module_is_saved_and_restored(save):
    target = nn.ReLU()
    assert save(nn.ReLU()).restore(target) is target


# ------------------------------------------------------------ the meta device


class Special(nn.Parameter):
    pass


def test_meta_modules_are_materialised(save):
    model = trained(nn.Sequential(Tied(), nn.BatchNorm1d(2)))
    with torch.device("meta"):
        target = nn.Sequential(Tied(), nn.BatchNorm1d(2))
    target[0].out.weight.requires_grad_(False)
    target[0].embed.weight.no_decay = True
    weight = target[0].embed.weight
    optimizer = torch.optim.SGD([weight], lr=0.1)
    save(model).restore(target)
    assert_equal(target, model)
    assert target[0].embed.weight is target[0].out.weight is weight
    assert optimizer.param_groups[0]["params"][0] is weight
    assert not weight.requires_grad
    assert weight.no_decay
    assert target[1].weight.requires_grad
    assert {t.device.type for t in target.state_dict().values()} == {"cpu"}
    assert target[1](torch.ones(3, 2)).shape == (3, 2)


def test_meta_parameters_keep_their_class(save):
    model = nn.Linear(2, 2, bias=False)
    target = nn.Linear(2, 2, bias=False, device="meta")
    target.weight = Special(target.weight.data)
    save(model).restore(Module(target, device="cpu"))
    assert type(target.weight) is Special
    assert torch.equal(target.weight, model.weight)


def test_meta_is_a_target_not_a_source(save):
    model = nn.Linear(2, 2, device="meta")
    with pytest.raises(errors.UnsupportedLeafError, match="materialise it first"):
        save(model)
    assert not any(isinstance(t, Fill) for t in ModuleHandler().target(model, {}).values())


def test_meta_buffers_that_no_checkpoint_holds(save):
    stored = save(Net())
    with torch.device("meta"):
        target = Net()
    with pytest.raises(errors.UsageError, match=r"not part of the state dict: scratch;"):
        stored.restore(target)
    assert target.head.weight.is_meta
    target.scratch = torch.ones(2)
    stored.restore(target)
    assert not target.head.weight.is_meta


def test_meta_tensors_that_are_watched(save):
    model = nn.Linear(2, 2, device="meta")
    watch = weakref.ref(model.weight)
    with pytest.raises(errors.UsageError, match="weakly referenced"):
        save(nn.Linear(2, 2)).restore(model)
    assert watch() is model.weight
    assert model.weight.is_meta


@pytest.mark.cuda
def test_meta_modules_are_materialised_on_a_device(save):
    model = trained(Net())
    with torch.device("meta"):
        target = Net()
    target.scratch = torch.ones(2)
    save(model).restore(Module(target, device="cuda"))
    assert {t.device.type for t in target.state_dict().values()} == {"cuda"}
    assert_equal(target.cpu(), model)
