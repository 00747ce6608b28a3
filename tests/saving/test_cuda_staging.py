"""Device memory is copied by the device, in parallel with training; the step has the state at save.

Every test runs on a CUDA device where there is one, whose copies are made late by a kernel that
sleeps before them. Without one, it runs on a device of threads with the same rules (`slow_device`).
"""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from slow_device import LaggingDevice

import functional_ckpt as fc
from functional_ckpt import errors
from functional_ckpt.runtime import device_copies
from functional_ckpt.testing import differences

SECONDS = 0.2
SLOT_BYTES = 2**19


class Device:
    """The device of the tests' tensors, and its log."""

    def __init__(self, name: str, slow_device: LaggingDevice | None) -> None:
        self.name = name
        self.locked: list[int] = []
        self.num_unlocked = 0
        self._lagging = slow_device

    @property
    def num_streams(self) -> int:
        return len(self._lagging.streams) if self._lagging else 1

    def lag(self, seconds: float) -> None:
        """Delays the copies of streams that are made from now on."""
        if self._lagging:
            self._lagging.seconds = seconds

    def check_held_back(self, num_times: int) -> None:
        """The device of threads counts who found a copy under way when asked to run after it."""
        assert self._lagging is None or self._lagging.host.num_held_back == num_times

    def check_unlocked(self, num_times: int) -> None:
        """Also releases memory held by threads that are about to end."""
        for thread in threading.enumerate():
            if thread.name.startswith("commit-"):
                thread.join()
        gc.collect()
        assert self.num_unlocked == num_times


def count_locks(device: Device, monkeypatch: pytest.MonkeyPatch, *, really: bool) -> None:
    original = device_copies.lock_pages

    def lock(address: int, size_bytes: int) -> Callable[[], None] | None:
        undo = original(address, size_bytes) if really else lambda: None
        device.locked.append(size_bytes)

        def unlock() -> None:
            device.num_unlocked += 1
            if undo is not None:
                undo()

        return unlock

    monkeypatch.setattr(device_copies, "lock_pages", lock)


def sleep_before_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    original = device_copies.Transfers.enqueue

    def enqueue(self: device_copies.Transfers, copies: Any) -> None:
        for device in self._starts:
            with torch.cuda.stream(self._streams[device]):
                torch.cuda._sleep(200_000_000)  # clock ticks: about a tenth of a second
        original(self, copies)

    monkeypatch.setattr(device_copies.Transfers, "enqueue", enqueue)


@pytest.fixture(params=["slow_device", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    if request.param == "cuda":
        found = Device("cuda", None)
        count_locks(found, monkeypatch, really=True)
        sleep_before_copies(monkeypatch)
        yield found
        return
    slow_device = LaggingDevice(SECONDS)
    found = Device("cpu", slow_device)
    count_locks(found, monkeypatch, really=False)
    monkeypatch.setattr(device_copies, "is_streamed", lambda tensor: tensor.ndim > 0)
    monkeypatch.setattr(device_copies, "_module_of", lambda device: slow_device)
    yield found
    slow_device.end()


def make_model(device: Device) -> torch.nn.Sequential:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1),
        torch.nn.BatchNorm2d(4),
        torch.nn.Flatten(),
        torch.nn.Linear(64, 5),
    )
    return model.to(device.name, memory_format=torch.channels_last)  # a kernel that is not dense


def a_step(device: Device, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(2, 3, 4, 4, device=device.name)).square().mean().backward()
    optimizer.step()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw loop": lambda p: torch.optim.AdamW(p, foreach=False),
    "adamw foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}


def trained(
    device: Device, family: str = "adamw foreach"
) -> tuple[torch.nn.Module, torch.optim.Optimizer, dict[str, Any]]:
    """A model that was trained for a step, its optimizer, and both with an average as items."""
    model = make_model(device)
    optimizer = OPTIMIZERS[family](model.parameters())
    a_step(device, model, optimizer)
    ema = copy.deepcopy(dict(model.state_dict()))
    return model, optimizer, {"model": model, "opt": fc.Optimizer(optimizer, model), "ema": ema}


def moment(path: Path, items: dict[str, Any]) -> dict[str, Any]:
    """The current items, through a save that waits for everything."""
    fc.save(path, items, overwrite=True)
    return on_host(fc.restore(path))


def on_host(items: Any) -> dict[str, Any]:
    return {
        name: {key: v.cpu() if isinstance(v, torch.Tensor) else v for key, v in item.items()}
        if isinstance(item, dict)
        else item
        for name, item in dict(items).items()
    }


# ------------------------------------------------------------------------------------ the moment


@pytest.mark.parametrize("family", OPTIMIZERS)
def test_steps_run_on_while_the_device_copies(tmp_path: Path, device: Device, family: str) -> None:
    device.lag(10)
    model, optimizer, items = trained(device, family)
    expected = moment(tmp_path / "moment", items)
    with fc.CheckpointManager(tmp_path / "run", staging=fc.Overlapped()) as manager:
        commit = manager.save(1, items)
        assert commit is not None
        for _ in range(2):
            a_step(device, model, optimizer)
        for average in items["ema"].values():
            average.zero_()
        assert commit.result() == 1
        device.check_held_back(1)
        assert differences(on_host(manager.restore(1)), expected) == []
    assert differences(moment(tmp_path / "moment", items), expected) != []


def test_a_compiled_step_waits(tmp_path: Path, device: Device) -> None:
    """On the host where the compiler traces the hook, else on the device; both are right."""
    device.lag(1)
    _, optimizer, items = trained(device, "sgd")
    step = torch.compile(optimizer.step, backend="eager")
    expected = moment(tmp_path / "moment", items)
    with fc.CheckpointManager(tmp_path / "run", staging=fc.Overlapped()) as manager:
        manager.save(1, items)
        step()
        manager.wait_until_finished()
        assert differences(on_host(manager.restore(1)), expected) == []


def test_a_step_that_is_not_held_back_loses_the_moment(
    tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result of the test above if the device did not wait."""
    device.lag(2)
    monkeypatch.setattr(device_copies.Transfers, "make_stream_wait", lambda self: None)
    model, optimizer, items = trained(device)
    expected = moment(tmp_path / "moment", items)
    with fc.CheckpointManager(tmp_path / "run", staging=fc.Overlapped()) as manager:
        manager.save(1, items)
        a_step(device, model, optimizer)
        manager.wait_until_finished()
        assert differences(on_host(manager.restore(1)), expected) != []


@pytest.mark.parametrize("options", [{}, {"staging": fc.Eager(budget_bytes=2**20)}])
def test_eager_has_copied_when_save_returns(
    tmp_path: Path, device: Device, options: dict[str, Any]
) -> None:
    model, _, items = trained(device)
    expected = moment(tmp_path / "moment", items)
    with fc.CheckpointManager(tmp_path / "run", **options) as manager:
        manager.save(1, items)
        for parameter in model.parameters():
            parameter.data.zero_()  # counts up no version, and waits for nothing
        manager.wait_until_finished()
        assert differences(on_host(manager.restore(1)), expected) == []


@pytest.mark.parametrize("what", ["fence", "load_state_dict", "restore"])
def test_who_may_write_from_anywhere_waits_on_the_host(
    tmp_path: Path, device: Device, what: str
) -> None:
    model, _, items = trained(device)
    expected = moment(tmp_path / "moment", items)
    fc.save(tmp_path / "other", {"model": make_model(device)})
    other = make_model(device).state_dict()
    with fc.CheckpointManager(tmp_path / "run", staging=fc.Overlapped()) as manager:
        manager.save(1, items)
        if what == "fence":
            manager.fence()
            model[0].weight.data.zero_()
        elif what == "restore":
            fc.restore(tmp_path / "other", {"model": model})
        else:
            model.load_state_dict(other)
        manager.wait_until_finished()
        device.check_held_back(0)
        assert differences(on_host(manager.restore(1)), expected) == []


def test_a_change_before_the_step_fails_the_save(tmp_path: Path, device: Device) -> None:
    model, optimizer, items = trained(device)
    manager = fc.CheckpointManager(tmp_path, staging=fc.Overlapped())
    manager.save(1, items)
    with torch.no_grad():
        model[0].weight.add_(1)
    a_step(device, model, optimizer)
    with pytest.raises(errors.SaveError, match="changed while being copied"):
        manager.wait_until_finished()
    manager.save(2, items)
    manager.close()
    assert fc.CheckpointManager(tmp_path, read_only=True).all_steps() == [2]


def test_failed_copy_blocks_no_thread(
    tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer, items = trained(device)
    original = device_copies.Transfers.enqueue
    main = threading.main_thread()

    def fail(self: device_copies.Transfers, copies: Any) -> None:
        original(self, copies)
        if threading.current_thread() is not main:
            raise MemoryError("injected")

    monkeypatch.setattr(device_copies.Transfers, "enqueue", fail)
    manager = fc.CheckpointManager(tmp_path, staging=fc.Overlapped())
    manager.save(1, items)
    a_step(device, model, optimizer)
    with pytest.raises(errors.SaveError, match="injected"):
        manager.wait_until_finished()
    monkeypatch.setattr(device_copies.Transfers, "enqueue", original)
    expected = moment(tmp_path / "moment", items)
    manager.save(2, items).result()
    assert differences(on_host(manager.restore(2)), expected) == []
    manager.close()


# ---------------------------------------------------------------------------------- retained memory


@pytest.mark.parametrize("staging", [fc.Eager(), fc.Overlapped()], ids=str)
def test_pages_are_locked_once_and_used_again(tmp_path: Path, device: Device, staging: Any) -> None:
    model, optimizer, items = trained(device)
    with fc.CheckpointManager(tmp_path, staging=staging) as manager:
        for step in range(3):
            manager.save(step, items).result()
            a_step(device, model, optimizer)
        [size_bytes] = device.locked
        assert size_bytes >= sum(p.nbytes for p in model.parameters())
        assert device.num_unlocked == 0 and device.num_streams == 1
        manager.save(3, {**items, "more": torch.zeros(2**16, device=device.name)}).result()
        assert device.locked[1] >= size_bytes + 2**18 and len(device.locked) == 2
    del manager
    device.check_unlocked(2)


def test_pages_that_cannot_be_locked(
    tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_copies, "lock_pages", lambda address, size_bytes: None)
    model, optimizer, items = trained(device)
    expected = moment(tmp_path / "moment", items)
    with fc.CheckpointManager(tmp_path / "run", staging=fc.Overlapped()) as manager:
        manager.save(1, items)
        a_step(device, model, optimizer)
        manager.wait_until_finished()
        assert differences(on_host(manager.restore(1)), expected) == []


# ------------------------------------------------------------------------------------ back again


def all_sorts(device: Device) -> dict[str, torch.Tensor]:
    """Tensors below a slot's size and above it, of some dtypes, layouts and ranks."""
    torch.manual_seed(1)
    values = {
        "large": torch.rand(3, 50_000, 7),
        "bf16": torch.rand(999).to(torch.bfloat16),
        "flags": torch.rand(100) > 0.5,
        "complex": torch.rand(50, dtype=torch.complex64),
        "scalar": torch.rand(()),
        "none": torch.rand(0, 4),
        "strided": torch.rand(6, 8).t(),
        "uint8": torch.randint(0, 255, (4097,), dtype=torch.uint8),
    }
    return {name: value.to(device.name) for name, value in values.items()}


def a_module_of(values: dict[str, torch.Tensor]) -> torch.nn.Module:
    module = torch.nn.Module()
    for name, value in values.items():
        module.register_buffer(name, value)
    return module


@pytest.mark.parametrize("is_in_place", [True, False])
@pytest.mark.parametrize("verify", ["stream", False])
def test_device_tensors_are_restored(
    tmp_path: Path,
    device: Device,
    monkeypatch: pytest.MonkeyPatch,
    verify: Any,
    is_in_place: bool,
) -> None:
    device.lag(0.02)
    monkeypatch.setattr(device_copies, "_SLOT_BYTES", SLOT_BYTES)
    values = all_sorts(device)
    expected = {name: value.cpu().clone() for name, value in values.items()}
    fc.save(tmp_path / "all", {"all": values})
    for value in values.values():
        value.zero_()
    if is_in_place:
        fc.restore(tmp_path / "all", {"all": a_module_of(values)}, verify=verify)
        found = values
    else:
        found = dict(fc.restore(tmp_path / "all", {"all": values}, verify=verify)["all"])
        assert not any(value.any() for value in values.values())
    assert {value.device.type for value in found.values()} == {torch.device(device.name).type}
    assert differences({name: value.cpu() for name, value in found.items()}, expected) == []
    assert device.locked == [4 * SLOT_BYTES]
    device.check_unlocked(1)


def test_an_array_of_several_chunks_goes_to_a_device(tmp_path: Path, device: Device) -> None:
    value = torch.rand(11 * 2**20, device=device.name)
    fc.save(tmp_path / "all", {"all": {"value": value}})
    found = fc.restore(tmp_path / "all", {"all": {"value": torch.zeros_like(value)}})
    assert torch.equal(found["all"]["value"], value)


def test_a_damaged_array_is_found_on_the_way_to_a_device(tmp_path: Path, device: Device) -> None:
    values = {"a": torch.rand(5000, device=device.name), "b": torch.rand(99, device=device.name)}
    fc.save(tmp_path / "all", {"all": values})
    [data] = (tmp_path / "all/all").glob("*.safetensors")
    raw = bytearray(data.read_bytes())
    at = raw.find(values["a"].cpu().numpy().tobytes())
    raw[at + 12_345] ^= 1
    data.write_bytes(raw)
    with pytest.raises(errors.CorruptCheckpointError, match="'a'"):
        fc.restore(tmp_path / "all", {"all": values})


def test_a_state_is_restored_where_it_is(tmp_path: Path, device: Device) -> None:
    model, optimizer, items = trained(device)
    expected = moment(tmp_path / "moment", items)
    with fc.CheckpointManager(tmp_path / "run", staging=fc.Overlapped()) as manager:
        manager.save(1, items)
        a_step(device, model, optimizer)
        manager.wait_until_finished()
        manager.restore(1, items)
        assert differences(moment(tmp_path / "moment", items), expected) == []


# ------------------------------------------------------------------------------------ CUDA alone


@pytest.mark.cuda
def test_memory_that_the_driver_refuses_to_lock(caplog: pytest.LogCaptureFixture) -> None:
    pages = torch.zeros(2**14, dtype=torch.uint8).numpy()
    assert device_copies.lock_pages(pages.ctypes.data, 2**60) is None
    assert "cannot be page-locked" in caplog.text
    assert torch.ones(3, device="cuda").sum().item() == 3  # the error is not found by another


@pytest.mark.cuda
def test_locked_pages_are_pinned_until_they_are_given_back() -> None:
    pages = torch.zeros(2**14, dtype=torch.uint8)
    unlock = device_copies.lock_pages(pages.data_ptr(), pages.nbytes)
    assert unlock is not None and pages.is_pinned()
    unlock()
    assert not pages.is_pinned()


@pytest.mark.cuda
def test_no_save_while_a_graph_is_captured(tmp_path: Path) -> None:
    weight = torch.zeros(3, device="cuda")
    torch.cuda.synchronize()
    with fc.CheckpointManager(tmp_path) as manager:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            weight.add_(1)
            with pytest.raises(errors.UsageError, match="graph is being captured"):
                manager.save(1, {"weight": weight})
        manager.save(2, {"weight": weight}).result()
        assert manager.all_steps() == [2]
