"""`staging=fc.Overlapped()`: a step has the state at `save`, while training continues."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters

import functional_ckpt as fc
from functional_ckpt import errors
from functional_ckpt.runtime import fence, host_memory
from functional_ckpt.saving import parts
from functional_ckpt.testing import differences

Step = Callable[[], None]
SECONDS = 0.15


class Halved(torch.optim.SGD):
    """A subclass with a step of its own around torch's."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                torch._foreach_mul_(group["params"], 0.5)
        return loss


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The background copy starts late, when training is well past the save."""
    copied = threading.Event()
    original = host_memory.copy_in_threads

    def late(copies: Any, *more: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(SECONDS)
            original(copies, *more)
            copied.set()
        else:
            original(copies, *more)

    monkeypatch.setattr(parts.host_memory, "copy_in_threads", late)
    yield copied


def make_model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 8, bias=False),
        torch.nn.BatchNorm1d(8),
        torch.nn.Linear(8, 3, bias=False),
    )


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    return model(torch.randn(16, 6)).square().mean()


def plain_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    def step() -> None:
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()

    return step


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw loop": lambda p: torch.optim.AdamW(p, foreach=False),
    "adamw foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "subclass": lambda p: Halved(p, lr=0.1, momentum=0.9),
    "tensor lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.1)),
}


def matrices(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.ndim == 2]


def with_muon(model: torch.nn.Module) -> tuple[torch.optim.Optimizer, Step]:
    optimizer = torch.optim.Muon(matrices(model), lr=0.1)
    return optimizer, plain_step(model, optimizer)


def with_lbfgs(model: torch.nn.Module) -> tuple[torch.optim.Optimizer, Step]:
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    return optimizer, lambda: optimizer.step(closure) and None


def with_scaler(model: torch.nn.Module) -> tuple[torch.optim.Optimizer, Step]:
    optimizer = torch.optim.AdamW(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def step() -> None:
        optimizer.zero_grad()
        scaler.scale(loss_of(model)).backward()
        scaler.step(optimizer)
        scaler.update()

    return optimizer, step


def with_compiled_step(model: torch.nn.Module) -> tuple[torch.optim.Optimizer, Step]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    compiled = torch.compile(optimizer.step, backend="eager")

    def step() -> None:
        optimizer.zero_grad()
        loss_of(model).backward()
        compiled()

    return optimizer, step


SPECIAL: dict[str, Callable[[Any], tuple[torch.optim.Optimizer, Step]]] = {
    "muon": with_muon,
    "lbfgs": with_lbfgs,
    "grad scaler": with_scaler,
    "compiled": with_compiled_step,
}


def made(family: str, model: torch.nn.Module) -> tuple[torch.optim.Optimizer, Step]:
    if family in SPECIAL:
        return SPECIAL[family](model)
    optimizer = OPTIMIZERS[family](model.parameters())
    return optimizer, plain_step(model, optimizer)


def check_saved_moment(
    path: Path, copied: threading.Event, items: dict[str, Any], step: Step
) -> None:
    """Saves, trains on before the copy starts, and compares with a save at that moment."""
    for _ in range(2):
        step()
    fc.save(path / "moment", items)
    with fc.CheckpointManager(path / "run", staging=fc.Overlapped()) as manager:
        commit = manager.save(1, items)
        assert commit is not None and not copied.is_set()
        for _ in range(2):
            step()
        assert copied.is_set(), "a step was taken before the state was copied"
        assert commit.result() == 1
        assert differences(dict(manager.restore(1)), dict(fc.restore(path / "moment"))) == []
        assert differences(dict(fc.restore(path / "moment")), _now(path, items)) != []


def _now(path: Path, items: dict[str, Any]) -> dict[str, Any]:
    fc.save(path / "now", items)
    return dict(fc.restore(path / "now"))


@pytest.mark.parametrize("family", [*OPTIMIZERS, *SPECIAL])
def test_the_moment_of_save(tmp_path: Path, slow: threading.Event, family: str) -> None:
    model = make_model()
    ema = copy.deepcopy(dict(model.state_dict()))
    optimizer, one = made(family, model)

    def step() -> None:
        one()
        for name, average in ema.items():
            average.copy_(0.9 * average + 0.1 * model.state_dict()[name])

    owned = [(n, p) for n, p in model.named_parameters()]
    if family == "muon":
        owned = [(n, p) for n, p in owned if p.ndim == 2]
    items = {
        "model": model,
        "optimizer": fc.Optimizer(optimizer, owned),
        "ema": ema,
        "rng": fc.Rng(),
    }
    check_saved_moment(tmp_path, slow, items, step)


def test_a_compiled_step_is_not_compiled_again_for_a_save(tmp_path: Path) -> None:
    model = make_model()
    optimizer, step = with_compiled_step(model)
    items = {"model": model, "optimizer": fc.Optimizer(optimizer, model)}
    with fc.CheckpointManager(tmp_path, staging=fc.Overlapped()) as manager:
        frames = []
        for number in range(4):
            step()
            manager.save(number, items)
            frames.append(counters["frames"]["total"])
    assert frames[1:] == [frames[1]] * 3  # the first save registers the hook


def test_an_optimizer_for_each_parameter_that_steps_in_backward(
    tmp_path: Path, slow: threading.Event
) -> None:
    model = make_model()
    names = dict(model.named_parameters())
    own = {name: torch.optim.SGD([p], lr=0.1, momentum=0.9) for name, p in names.items()}
    for name, parameter in names.items():

        def after(_: torch.Tensor, name: str = name) -> None:
            own[name].step()
            own[name].zero_grad()

        parameter.register_post_accumulate_grad_hook(after)
    items: dict[str, Any] = {"model": model}
    for number, (name, optimizer) in enumerate(own.items()):
        items[f"optimizer{number}"] = fc.Optimizer(optimizer, [(name, names[name])])
    check_saved_moment(tmp_path, slow, items, lambda: loss_of(model).backward())


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("kind", ["foreach", "loop", "fused"])
def test_overlapped_save_under_fsdp2_has_the_state_at_save(
    tmp_path: Path, slow: threading.Event, kind: str
) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    flags = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
    optimizer = torch.optim.AdamW(model.parameters(), **flags[kind])
    items = {"model": model, "optimizer": fc.Optimizer(optimizer, model)}
    check_saved_moment(tmp_path, slow, items, plain_step(model, optimizer))


@pytest.mark.usefixtures("group")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_overlapped_save_with_zero_redundancy_has_the_state_at_save(
    tmp_path: Path, slow: threading.Event
) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = make_model()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.1)
    items = {"model": model, "optimizer": fc.Optimizer(optimizer, model)}
    check_saved_moment(tmp_path, slow, items, plain_step(model, optimizer))


# ------------------------------------------------------------------------------------ the fence


def test_without_the_fence_the_moment_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result of the tests above without waits: the copy comes after a step."""
    has_stepped, original = threading.Event(), host_memory.copy_in_threads

    def late(copies: Any, *more: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            assert has_stepped.wait(60)
        original(copies, *more)

    monkeypatch.setattr(parts.host_memory, "copy_in_threads", late)
    monkeypatch.setattr(fence.Fence, "wait", lambda self, optimizer=None: None)
    model = make_model()
    optimizer, step = made("adamw fused", model)
    step()
    items = {"model": model, "optimizer": fc.Optimizer(optimizer, model)}
    with fc.CheckpointManager(tmp_path, staging=fc.Overlapped()) as manager:
        commit = manager.save(1, items)
        step()
        has_stepped.set()
        assert commit is not None
        with pytest.raises(errors.SaveError, match="changed while being copied"):
            commit.result()


class Interrupted(KeyboardInterrupt):
    """Simulates Ctrl-C."""


def test_interrupt_after_staging_releases_the_next_step(tmp_path: Path) -> None:
    """Nothing will be copied any more: a step that waited for it would wait forever."""

    def interrupt(event: fc.Event) -> None:
        if event.kind == "staged":
            raise Interrupted

    manager, model, optimizer, items = trained(tmp_path, on_event=interrupt)
    with pytest.raises(Interrupted):
        manager.save(1, items)
    thread = threading.Thread(target=plain_step(model, optimizer), daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    manager.close()


def trained(path: Path, **options: Any) -> tuple[Any, torch.nn.Module, Any, dict[str, Any]]:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    plain_step(model, optimizer)()
    items = {"model": model, "optimizer": fc.Optimizer(optimizer, model)}
    manager = fc.CheckpointManager(path, **{"staging": fc.Overlapped(), **options})
    return manager, model, optimizer, items


@pytest.mark.parametrize("what", ["model", "child", "optimizer", "restore", "fence"])
def test_whatever_else_changes_the_state_waits(
    tmp_path: Path, slow: threading.Event, what: str
) -> None:
    manager, model, optimizer, items = trained(tmp_path / "run")
    other = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    fc.save(tmp_path / "other", {"model": make_model()})
    child = {name: torch.zeros_like(value) for name, value in model[0].state_dict().items()}
    state = copy.deepcopy(optimizer.state_dict())
    expected = copy.deepcopy(model.state_dict())
    actions: dict[str, Callable[[], object]] = {
        "model": lambda: model.load_state_dict(other),
        "child": lambda: model[0].load_state_dict(child),
        "optimizer": lambda: optimizer.load_state_dict(state),
        "restore": lambda: fc.restore(tmp_path / "other", {"model": model}),
        "fence": lambda: manager.fence() or model[0].weight.data.zero_(),
    }
    with manager:
        manager.save(1, items)
        assert not slow.is_set()
        actions[what]()
        assert slow.is_set()
        manager.wait_until_finished()
        assert differences(manager.restore(1)["model"], dict(expected)) == []


@pytest.mark.parametrize("how", ["in place", "by data", "swapped"])
def test_a_change_that_went_around_the_fence_fails_the_save(
    tmp_path: Path, slow: threading.Event, how: str
) -> None:
    manager, model, _, items = trained(tmp_path / "run")
    manager.save(1, items)
    with torch.no_grad():
        if how == "in place":
            model[0].weight.add_(1)
        elif how == "by data":
            model[0].weight.data = torch.zeros(8, 6)
        else:
            model.double()
    with pytest.raises(errors.SaveError, match=r"changed while being copied.*manager\.fence\(\)"):
        manager.wait_until_finished()
    assert manager.all_steps() == []
    manager.save(2, items).result()
    manager.close()
    assert fc.CheckpointManager(tmp_path / "run", read_only=True).all_steps() == [2]


UNCOUNTED: dict[str, Callable[[torch.nn.Module, Any], object]] = {
    "data": lambda model, _: model[0].weight.data.clamp_(-0.01, 0.01),
    "foreach of data": lambda model, _: torch._foreach_mul_(
        [p.data for p in model.parameters()], 2
    ),
    "numpy view": lambda model, _: model[0].weight.detach().numpy().fill(7),
    "storage": lambda model, _: model[0].weight.untyped_storage().fill_(1),
    "state": lambda _, optimizer: [s["exp_avg"].data.add_(1) for s in optimizer.state.values()],
}


@pytest.mark.parametrize("staging", [fc.Overlapped(), fc.Overlapped(checked=True)], ids=str)
@pytest.mark.parametrize("how", UNCOUNTED)
def test_a_change_that_torch_does_not_count_fails_the_save(
    tmp_path: Path, slow: threading.Event, how: str, staging: fc.Overlapped
) -> None:
    manager, model, optimizer, items = trained(tmp_path / "run", staging=staging)
    manager.save(1, items)
    UNCOUNTED[how](model, optimizer)
    with pytest.raises(errors.SaveError, match=r"changed while being copied.*Everything is copied"):
        manager.wait_until_finished()
    assert manager.all_steps() == []
    fc.save(tmp_path / "moment", items)
    with manager:
        manager.save(2, items)
        UNCOUNTED[how](model, optimizer)
        manager.wait_until_finished()
        assert differences(dict(manager.restore(2)), dict(fc.restore(tmp_path / "moment"))) == []


@pytest.mark.parametrize("name", ["weight", "exp_avg"])
def test_a_single_element_that_torch_counts_fails_the_save(
    tmp_path: Path, slow: threading.Event, name: str
) -> None:
    model = torch.nn.Linear(300, 200)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(300)).sum().backward()
    optimizer.step()
    leaf = model.weight if name == "weight" else optimizer.state[model.weight][name]
    manager = fc.CheckpointManager(tmp_path / "run", staging=fc.Overlapped())
    manager.save(1, {"model": model, "optimizer": fc.Optimizer(optimizer, model)})
    with torch.no_grad():
        leaf[100, 111] += 1  # between the bytes that are compared
    with pytest.raises(errors.SaveError, match=rf"{name}.* changed while being copied"):
        manager.wait_until_finished()
    manager.close()


def test_only_the_checked_copy_sees_a_single_element(tmp_path: Path, slow: threading.Event) -> None:
    model = torch.nn.Linear(300, 200)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    items = {"model": model, "optimizer": fc.Optimizer(optimizer, model)}
    outcomes: list[bool] = []
    for checked in (False, True):
        staging = fc.Overlapped(checked=checked)
        manager = fc.CheckpointManager(tmp_path / str(checked), staging=staging)
        commit = manager.save(1, items)
        model.weight.data[100, 111] += 1
        assert commit is not None
        outcomes.append(commit.exception() is None)
        manager.close()
    assert outcomes == [True, False]


def test_a_checked_copy_of_an_ordinary_program_passes(
    tmp_path: Path, slow: threading.Event
) -> None:
    manager, model, optimizer, items = trained(tmp_path, staging=fc.Overlapped(checked=True))
    step = plain_step(model, optimizer)
    with manager:
        for number in range(3):
            manager.save(number, items)
            step()
        manager.wait_until_finished()
        assert manager.all_steps() == [0, 1, 2]


def test_leaves_changed_once_are_copied_before_save_returns(
    tmp_path: Path, slow: threading.Event
) -> None:
    manager, model, _, items = trained(tmp_path / "run")

    def save_and_change(step: int) -> None:
        manager.save(step, items)
        with torch.no_grad():
            model[0].weight.clamp_(-0.01, 0.01).add_(step)

    save_and_change(1)
    with pytest.raises(errors.SaveError, match=r"model\.0\.weight changed.*They are copied before"):
        manager.wait_until_finished()
    with manager:
        for step in (2, 3):
            moment = {"model": copy.deepcopy(dict(model.state_dict()))}
            save_and_change(step)
            manager.wait_until_finished()
            assert differences({"model": manager.restore(step)["model"]}, moment) == []


@pytest.mark.parametrize("kind", [torch.nn.Embedding, torch.nn.EmbeddingBag])
def test_an_embedding_that_a_forward_pass_shrinks(
    tmp_path: Path, slow: threading.Event, kind: Any
) -> None:
    model = torch.nn.Sequential(kind(20, 6, max_norm=0.1), torch.nn.Linear(6, 2))
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        model(torch.arange(20).reshape(4, 5)).square().sum().backward()
        optimizer.step()

    items = {"model": model, "optimizer": fc.Optimizer(optimizer, model)}
    check_saved_moment(tmp_path, slow, items, step)


class Swapping(torch.optim.SGD):
    """As schedule-free optimizers do, it has other weights for evaluation than for training."""

    def _swap(self) -> None:
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.lerp_(self.state[parameter]["momentum_buffer"], 0.5)

    def train(self) -> None:
        self._swap()

    def eval(self) -> None:
        self._swap()


def test_an_optimizer_that_swaps_weights_is_copied_at_once(
    tmp_path: Path, slow: threading.Event
) -> None:
    model = make_model()
    optimizer = Swapping(model.parameters(), lr=0.1, momentum=0.9)
    items = {"model": model, "optimizer": fc.Optimizer(optimizer, model)}
    step = plain_step(model, optimizer)
    with fc.CheckpointManager(tmp_path / "run", staging=fc.Overlapped()) as manager:
        for number in range(3):
            step()
            optimizer.eval()
            fc.save(tmp_path / f"{number}", items)
            manager.save(number, items)
            optimizer.train()
            step()
        manager.wait_until_finished()
        for number in range(3):
            moment = fc.restore(tmp_path / f"{number}")
            assert differences(dict(manager.restore(number)), dict(moment)) == []


def test_parameters_that_are_not_saved_may_change(tmp_path: Path, slow: threading.Event) -> None:
    manager, model, _, items = trained(tmp_path)
    with manager, torch.no_grad():
        manager.save(1, {"optimizer": items["optimizer"]})
        model[0].weight.clamp_(-0.01, 0.01)
        manager.wait_until_finished()
        assert manager.all_steps() == [1]


def test_without_an_optimizer_everything_is_copied_at_once(
    tmp_path: Path, slow: threading.Event
) -> None:
    model = make_model()
    expected = copy.deepcopy(model.state_dict())
    with fc.CheckpointManager(tmp_path, staging=fc.Overlapped()) as manager:
        manager.save(1, {"model": model})
        with torch.no_grad():
            model[0].weight.data.zero_()
        manager.wait_until_finished()
        assert differences(manager.restore(1)["model"], dict(expected)) == []


def test_another_optimizer_does_not_wait(tmp_path: Path, slow: threading.Event) -> None:
    manager, _, _, items = trained(tmp_path)
    stranger = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(stranger.parameters(), lr=0.1)
    with manager:
        manager.save(1, items)
        stranger(torch.randn(3, 2)).sum().backward()
        optimizer.step()
        assert not slow.is_set()


def test_a_model_with_fences_is_copied_and_closed_managers_leave_nothing(tmp_path: Path) -> None:
    manager, model, optimizer, items = trained(tmp_path)
    with manager:
        manager.save(1, items)
        copy.deepcopy(model)
        assert model._load_state_dict_pre_hooks and optimizer._optimizer_load_state_dict_pre_hooks
    assert not model._load_state_dict_pre_hooks
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    plain_step(model, optimizer)()


def test_save_returns_before_parameters_are_copied(tmp_path: Path) -> None:
    model = torch.nn.Linear(2**12, 2**11)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    items = {"model": model, "optimizer": fc.Optimizer(optimizer, model)}
    with fc.CheckpointManager(tmp_path, staging=fc.Overlapped()) as manager:
        seconds: list[float] = []
        for step in range(4):
            begun = time.thread_time()
            commit = manager.save(step, items)
            seconds.append(time.thread_time() - begun)
            assert commit is not None
            commit.result()
        assert min(seconds) < 0.01  # of this thread: a copy of 32 MiB takes more


@pytest.mark.parametrize("staging", ["overlapped", fc.Overlapped, None, True])
def test_unknown_staging_is_refused(tmp_path: Path, staging: Any) -> None:
    with pytest.raises(errors.UsageError, match=r"fc\.Eager\(\), fc\.Overlapped\(\)"):
        fc.CheckpointManager(tmp_path, staging=staging)
    with pytest.raises(errors.UsageError, match="checked must be"):
        fc.Overlapped(checked="no")  # pyright: ignore[reportArgumentType]
