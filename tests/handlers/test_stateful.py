from __future__ import annotations

import collections
import copy
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import stateful as dcp_stateful
from torch.optim import lr_scheduler as schedulers

import functional_ckpt as fc
from functional_ckpt import errors
from functional_ckpt.handlers import Optimizer, Stateful, StatefulHandler
from functional_ckpt.testing import differences

with warnings.catch_warnings():  # torchdata calls a deprecated function of torch when imported
    warnings.simplefilter("ignore")
    from torchdata.stateful_dataloader import StatefulDataLoader


class Warmup:
    """A callable object with state, which LambdaLR saves."""

    def __init__(self) -> None:
        self.scale = 1.0

    def __call__(self, epoch: int) -> float:
        return self.scale * min(1.0, (epoch + 1) / 6)


def _sequential(optimizer):
    parts = [
        schedulers.LinearLR(optimizer, 0.1, total_iters=3),
        schedulers.CosineAnnealingLR(optimizer, T_max=9),
        schedulers.ExponentialLR(optimizer, 0.8),
    ]
    return schedulers.SequentialLR(optimizer, parts, milestones=[3, 7])


SCHEDULERS = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda epoch: 0.9**epoch),
    "LambdaLR object": lambda o: schedulers.LambdaLR(o, Warmup()),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 5, 5, 8], 0.5),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.3, total_iters=6),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.1, total_iters=8),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "SequentialLR": _sequential,
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 12, power=2.0),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 9, eta_min=0.001),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ExponentialLR(o, 0.9), schedulers.ConstantLR(o, 0.5, total_iters=6)], o
    ),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1, cooldown=1),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=3, mode="exp_range"),
    "CyclicLR custom": lambda o: schedulers.CyclicLR(
        o, 0.01, 0.1, step_size_up=3, scale_fn=lambda x: 0.5**x
    ),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3, 2),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=15, three_phase=True),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=6),
}


def test_every_scheduler_of_torch_is_tested():
    known = {
        name
        for name, kind in vars(schedulers).items()
        if isinstance(kind, type) and issubclass(kind, schedulers.LRScheduler)
    } - {"LRScheduler", "_LRScheduler"}
    assert {name.split()[0] for name in SCHEDULERS} == known | {"SWALR"}


@pytest.mark.matrix(4)
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["lr", "tensor lr"])
@pytest.mark.parametrize("num_steps", [0, 1, 4, 8])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_resume_exactly(save, name, num_steps, tensor_lr):
    def make():
        model = nn.Linear(2, 2)
        lr = torch.tensor(0.05) if tensor_lr else 0.05
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SequentialLR builds its parts before the first step
            return model, optimizer, SCHEDULERS[name](optimizer)

    def advance(run, steps):
        _, optimizer, scheduler = run
        seen = []
        for step in steps:
            optimizer.step()
            if isinstance(scheduler, schedulers.ReduceLROnPlateau):
                scheduler.step([5.0, 4.0, 4.5, 4.0, 3.9, 6.0, 7.0, 8.0, 3.0][step % 9])
            else:
                scheduler.step()
            seen.append([float(group["lr"]) for group in optimizer.param_groups])
        return seen

    run, fresh = make(), make()
    advance(run, range(num_steps))
    if name == "LambdaLR object":
        run[2].lr_lambdas[0].scale = 3.0
    stored = save(Optimizer(run[1], run[0])), save(run[2])
    wanted = advance(run, range(num_steps, num_steps + 5))

    stored[0].restore(Optimizer(fresh[1], fresh[0]))
    assert stored[1].restore(fresh[2]) is fresh[2]
    assert advance(fresh, range(num_steps, num_steps + 5)) == wanted
    left, right = (r[2].state_dict() for r in (run, fresh))
    assert str(left) == str(right)


def test_a_counter_comes_back_a_counter(save):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    restored = save(schedulers.MultiStepLR(optimizer, [2, 2, 3])).restore(None)
    assert type(restored["milestones"]) is collections.Counter
    assert restored["milestones"] == {2: 2, 3: 1}


@pytest.mark.parametrize("enabled", [True, False])
def test_grad_scaler_state_is_restored(save, enabled):
    def make():
        return torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3, enabled=enabled)

    def train(scaler, steps):
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in steps:
            loss = model(torch.ones(1, 2)).sum() * (float("inf") if step == 1 else 1.0)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

    scaler, fresh = make(), make()
    train(scaler, range(4))
    stored = save(scaler)
    train(scaler, range(4, 9))
    stored.restore(fresh)
    train(fresh, range(4, 9))
    assert fresh.state_dict() == scaler.state_dict()


class Squares(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int):
        return torch.tensor(float(index) ** 2)


class Numbers(torch.utils.data.IterableDataset):
    """A dataset with a state of its own, in each worker."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self):
        while self.position < 40:
            self.position += 1
            yield torch.tensor(float(self.position))

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state) -> None:
        self.position = state["position"]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", ["shuffled", "in order", "iterable"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_data_loader_resumes_exactly(save, kind, num_workers):
    def make(seed: int):
        generator = torch.Generator().manual_seed(seed) if kind == "shuffled" else None
        return StatefulDataLoader(
            Numbers() if kind == "iterable" else Squares(),
            batch_size=4,
            shuffle=kind == "shuffled",
            num_workers=num_workers,
            generator=generator,
        )

    loader = make(1)
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    stored = save(loader)
    wanted = [b.tolist() for b in batches]
    fresh = make(2)
    stored.restore(fresh)
    assert [b.tolist() for b in fresh] == wanted
    assert len(wanted) >= 7


def test_stateful_accepts_objects_with_both_methods():
    class Both:
        def state_dict(self):
            return {}

        def load_state_dict(self, state) -> None: ...

    assert Stateful(Both()).handler == StatefulHandler()
    assert not Stateful(Both()).handler.per_rank
    assert Stateful(Both(), per_rank=True).handler == StatefulHandler(per_rank=True)
    loader = StatefulDataLoader(Squares())
    assert Stateful(loader).handler.per_rank
    assert not Stateful(loader, per_rank=False).handler.per_rank
    for wrong in (Both, {}, object()):
        with pytest.raises(errors.UsageError, match=r"state_dict\(\) and load_state_dict\(\), got"):
            Stateful(wrong)


def test_state_is_captured_not_referenced(save):
    class Holder:
        def __init__(self) -> None:
            self.tensor = torch.zeros(3)

        def state_dict(self):
            return {"tensor": self.tensor, "deque": collections.deque([1, 2], maxlen=2)}

        def load_state_dict(self, state) -> None:
            self.loaded = state

    holder = Holder()
    stored = save(holder)
    holder.tensor.add_(1)
    loaded = stored.restore(copy.copy(holder)).loaded
    assert loaded["tensor"].tolist() == [0, 0, 0]
    assert loaded["deque"] == collections.deque([1, 2], maxlen=2)
    assert loaded["deque"].maxlen == 2


class Container(torch.optim.Optimizer, dcp_stateful.Stateful):
    """Several optimizers whose state has one flat layout, as torchtitan's are."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers
        super().__init__([p for o in optimizers for g in o.param_groups for p in g["params"]], {})

    def state_dict(self):
        return {
            f"{index}.{name}": value
            for index, optimizer in enumerate(self.optimizers)
            for name, value in optimizer.state_dict().items()
        }

    def load_state_dict(self, state_dict):
        for index, optimizer in enumerate(self.optimizers):
            names = ("state", "param_groups")
            optimizer.load_state_dict({name: state_dict[f"{index}.{name}"] for name in names})


def test_a_container_of_optimizers_has_a_state_of_its_own(tmp_path):
    model = nn.Linear(3, 2)
    first = [torch.optim.Adam([model.weight]), torch.optim.SGD([model.bias], momentum=0.9)]
    model(torch.ones(3)).sum().backward()
    for optimizer in first:
        optimizer.step()
    fc.save(tmp_path / "a", {"model": model, "optimizer": Container(*first)})
    second = [torch.optim.Adam([model.weight]), torch.optim.SGD([model.bias], momentum=0.1)]
    fc.restore(tmp_path / "a", into={"model": model, "optimizer": Container(*second)})
    for one, other in zip(first, second, strict=True):
        assert differences(one.state_dict(), other.state_dict()) == []
