"""Foreign checkpoints are restored into targets from their own files, optimizers included."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext as nothing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import functional_ckpt as fc
from functional_ckpt import errors
from functional_ckpt.cli import main
from functional_ckpt.testing import equality

COMPOSER = Path(__file__).parent / "data" / "composer-ep1-ba4-rank0.pt"


def make(seed: int = 0, steps: int = 0) -> tuple[torch.nn.Module, torch.optim.AdamW]:
    """A model and its optimizer, in two groups."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    groups = [
        {"params": [model[1].bias, model[0].bias], "weight_decay": 0.0},
        {"params": [model[0].weight, model[1].weight]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01 * (seed + 1))
    for _ in range(steps):
        model(torch.randn(2, 4)).sum().backward()
        optimizer.step()
    return model, optimizer


def differences(one: Any, other: Any) -> list[str]:
    return equality.differences(one, other)


def check_same(
    one: tuple[torch.nn.Module, torch.optim.Optimizer],
    other: tuple[torch.nn.Module, torch.optim.Optimizer],
) -> None:
    for mine, theirs in zip(one, other, strict=True):
        assert differences(mine.state_dict(), theirs.state_dict()) == []


@pytest.mark.parametrize("converted", [False, True], ids=["foreign", "converted"])
@pytest.mark.parametrize("steps", [0, 1], ids=["new", "used"])
def test_numbers_of_parameters_become_names_by_the_optimizer(
    tmp_path: Path, converted: bool, steps: int
) -> None:
    model, optimizer = saved = make(steps=2)
    path = tmp_path / "training.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    if converted:
        fc.save(tmp_path / "step", fc.interop.open(path))
        path = tmp_path / "step"
    target = make(1, steps)
    fc.restore(path, {"model": target[0], "optimizer": fc.Optimizer(target[1], target[0])})
    check_same(target, saved)
    for each in (saved, target):  # and both continue alike
        each[1].zero_grad()
        torch.manual_seed(3)
        each[0](torch.randn(2, 4)).sum().backward()
        each[1].step()
    check_same(target, saved)


def test_groups_of_other_sizes_are_a_mismatch_and_nothing_is_touched(tmp_path: Path) -> None:
    _, optimizer = make(steps=1)
    torch.save({"optimizer": optimizer.state_dict(), "epoch": 3}, tmp_path / "training.pt")
    model, _ = make(1)
    other = torch.optim.AdamW(model.parameters())
    with pytest.raises(errors.MismatchError, match=r"groups of \[2, 2\].* groups of \[4\]"):
        fc.restore(tmp_path / "training.pt", {"optimizer": fc.Optimizer(other, model)})
    assert not other.state


def test_the_same_checks_and_report_as_of_a_step(tmp_path: Path) -> None:
    model, _ = make()
    fc.interop.huggingface.save(model, tmp_path / "hf", config={}, max_shard_size=60)
    with torch.device("meta"):
        target = make(1)[0]
    fc.restore(tmp_path / "hf", {"model": target})
    assert differences(target.state_dict(), model.state_dict()) == []
    wrong = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 5))
    with pytest.raises(errors.MismatchError, match=r"model\['1.weight'\].*\[5, 3\].*\[2, 3\]"):
        fc.restore(tmp_path / "hf", {"model": wrong})
    report = fc.restore(tmp_path / "hf", {"model": wrong}, strict=False).report
    assert len(report.mismatched) == 2
    assert torch.equal(wrong[0].weight, model[0].weight)
    named = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 3), "b": torch.nn.Linear(3, 2)})
    fc.restore(
        tmp_path / "hf", {"model": named}, key_map={"model.0": "model.a", "model.1": "model.b"}
    )
    assert torch.equal(named["b"].weight, model[1].weight)
    half = make(1)[0].double()
    fc.restore(tmp_path / "hf", {"model": half}, cast=True)
    assert torch.equal(half[0].weight, model[0].weight.double())
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_what_open_returned_is_restored_where_a_format_must_be_named(tmp_path: Path) -> None:
    model, _ = make()
    fc.interop.huggingface.save(model, tmp_path / "hf")
    torch.save(make(1)[0].state_dict(), tmp_path / "hf" / "pytorch_model.bin")
    target = make(2)[0]
    with pytest.raises(errors.UsageError, match="format='safetensors' or 'bin'"):
        fc.restore(tmp_path / "hf", {"model": target})
    fc.restore(fc.interop.open(tmp_path / "hf", "safetensors"), {"model": target})
    assert differences(target.state_dict(), model.state_dict()) == []


def test_a_file_that_is_of_no_format_says_so(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(errors.CheckpointError, match=r"of no format that fc\.interop\.open knows"):
        fc.restore(tmp_path / "notes.txt", {"model": make()[0]})


def test_a_file_of_composer_s_own_trainer_goes_into_a_model_and_the_generators() -> None:
    content = torch.load(COMPOSER, weights_only=False)
    model = torch.nn.ModuleDict({"net": torch.nn.Linear(4, 1)})
    fc.restore(COMPOSER, {"model": model, "rng": fc.Rng()})
    assert differences(dict(model.state_dict()), dict(content["state"]["model"])) == []
    assert random.getstate() == content["rng"][0]["python"]
    assert torch.equal(torch.get_rng_state(), content["rng"][0]["torch"])


def test_a_checkpoint_of_lightning_goes_into_module_optimizer_and_scheduler(tmp_path: Path) -> None:
    model, optimizer = make(steps=2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    content = {
        "epoch": 1,
        "global_step": 2,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": model.state_dict(),
        "loops": {},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [scheduler.state_dict()],
    }
    torch.save(content, tmp_path / "last.ckpt")
    target = make(1)
    fresh = torch.optim.lr_scheduler.StepLR(target[1], 1, 0.1)
    restored = fc.restore(
        tmp_path / "last.ckpt",
        {
            "model": target[0],
            "optimizer": fc.Optimizer(target[1], target[0]),
            "scheduler": fresh,
            "global_step": None,
        },
    )
    assert restored["global_step"] == 2
    assert fresh.state_dict() == scheduler.state_dict()
    check_same(target, (model, optimizer))
    assert fc.interop.open(tmp_path / "last.ckpt").format == "lightning"


def test_an_entry_of_a_lightning_file_does_not_replace_an_item_of_that_name(
    tmp_path: Path,
) -> None:
    content = {"pytorch-lightning_version": "2.6.6", "state_dict": {"w": torch.ones(2)}}
    torch.save(content | {"model": {"name": "unet"}}, tmp_path / "last.ckpt")
    with pytest.raises(errors.UsageError, match="entries model have the names"):
        fc.interop.open(tmp_path / "last.ckpt")
    source = fc.interop.open(tmp_path / "last.ckpt", "torch")
    assert source["model"] == {"name": "unet"}
    assert torch.equal(fc.restore(source)["state_dict"]["w"], torch.ones(2))


def test_what_accelerate_saved_is_restored_with_optimizer_scheduler_and_generators(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = make()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    accelerator.backward(model(torch.randn(2, 4)).sum())
    optimizer.step()
    scheduler.step()
    np.random.rand(3)
    accelerator.save_state(str(tmp_path / "state"))
    drawn = random.random(), np.random.rand(), torch.rand(2)
    target = make(1)
    fresh = torch.optim.lr_scheduler.StepLR(target[1], 1, 0.5)
    fc.restore(
        tmp_path / "state",
        {
            "model": target[0],
            "optimizer": fc.Optimizer(target[1], target[0]),
            "scheduler": fresh,
            "rng": fc.Rng(),
        },
    )
    check_same(target, (model, optimizer.optimizer))
    assert fresh.state_dict() == scheduler.scheduler.state_dict()
    assert (random.random(), np.random.rand()) == drawn[:2]
    assert torch.equal(torch.rand(2), drawn[2])
    assert main(["show", str(tmp_path / "state"), "--depth", "1"]) == 0
    shown = capsys.readouterr().out
    assert "huggingface" in shown
    for name in ("model", "optimizer", "scheduler", "rng"):
        assert f"\n{name}  " in shown


@pytest.mark.parametrize("has_crc", [True, False])
def test_flipped_bytes_in_a_file_of_torch_save_are_found(tmp_path: Path, has_crc: bool) -> None:
    path = tmp_path / "x.pt"
    tensor = torch.arange(1000.0)
    content = {"whole": tensor, "part": tensor[10:20], "other": torch.ones(1000)}
    torch.serialization.set_crc32_options(has_crc)
    try:
        torch.save(content, path)
    finally:
        torch.serialization.set_crc32_options(True)
    fc.save(tmp_path / "sound", fc.interop.open(path))
    assert torch.equal(fc.restore(path)["model"]["part"], tensor[10:20])
    data = bytearray(path.read_bytes())
    data[data.index(tensor[500:600].numpy().tobytes()) + 3] ^= 1
    path.write_bytes(data)
    target = {name: torch.zeros_like(each) for name, each in content.items()}
    acts: list[Callable[[], object]] = [
        lambda: fc.restore(path),
        lambda: fc.restore(path, {"model": target}),
        lambda: fc.restore(path, {"model": target}, only="model.part"),
        lambda: fc.save(tmp_path / "one", fc.interop.open(path)),
    ]
    for act in acts:
        with pytest.raises(errors.CorruptCheckpointError, match="CRC-32") if has_crc else nothing():
            act()
    assert (tmp_path / "one").exists() is not has_crc
    assert main(["convert", str(path), str(tmp_path / "two")]) == (1 if has_crc else 0)
    # Tensors of other records are read, and so are those that the caller has changed.
    assert torch.equal(fc.restore(path, only="model.other")["model"]["other"], content["other"])
    opened = fc.interop.open(path)
    for name in ("whole", "part"):
        opened["model"][name].zero_()
    fc.save(tmp_path / "changed", opened)
