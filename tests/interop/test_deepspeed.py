"""DeepSpeed's ZeRO folders and universal checkpoints, and Megatron-Core's distributed ones.

The files in data were written by the packages themselves: see deepspeed_run.py, megatron_run.py.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import deepspeed_run
import pytest
import torch
from full import IS_FULL

import functional_ckpt as fc
from functional_ckpt import errors
from functional_ckpt.testing import equality

HERE = Path(__file__).parent
STAGES = (1, 2, 3)


def extracted(name: str, tmp_path: Path) -> Path:
    """Returns the folder with the files of an archive in data."""
    with tarfile.open(HERE / "data" / f"{name}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def check(folder: Path) -> None:
    """Compares a ZeRO folder with the results of DeepSpeed's own tools."""
    zero = fc.interop.open(folder / "zero")
    assert zero.format == "deepspeed"
    assert list(zero) == ["model", "optimizer", "scheduler", "training"]
    fp32 = torch.load(folder / "fp32.pt")
    for name, value in fp32.items():
        assert torch.equal(zero["model"][name].float(), value.float())
    universal = fc.interop.open(folder / "universal")
    assert equality.differences(dict(zero), dict(universal)) == []
    assert zero["training"]["epoch"] == 4
    assert zero["training"]["loss_scaler"]["cur_scale"] == 1.0
    assert zero["scheduler"]["last_epoch"] == 3


def check_restored(path: Path) -> None:
    """Restores a model and its optimizer, which then make one more step."""
    source = fc.interop.open(path)
    torch.manual_seed(5)
    net = deepspeed_run.Net()
    optimizer = torch.optim.AdamW(deepspeed_run.groups(net), lr=1.0)
    items = {"model": net, "optimizer": fc.Optimizer(optimizer, net)}
    fc.restore(path, items, cast=True)
    assert equality.differences(dict(net.state_dict()), _floats(source["model"])) == []
    for parameter, state in optimizer.state.items():
        assert (state["step"], state["exp_avg"].shape) == (3, parameter.shape)
    assert optimizer.param_groups[0]["lr"] == 0.005
    net(torch.randn(2, 7)).sum().backward()
    optimizer.step()
    assert {float(state["step"]) for state in optimizer.state.values()} == {4.0}


def _floats(state: dict[str, Any]) -> dict[str, Any]:
    return {name: each.float() for name, each in state.items()}


def test_zero_and_universal_checkpoints_are_those_of_deepspeed_s_tools(tmp_path: Path) -> None:
    folder = extracted("deepspeed", tmp_path)
    for stage in STAGES:
        check(folder / f"stage{stage}")
        check_restored(folder / f"stage{stage}" / "zero")
    fc.save(tmp_path / "step", fc.interop.open(folder / "stage2" / "universal"))
    check_restored(tmp_path / "step")


def test_incomplete_folders_are_refused(tmp_path: Path) -> None:
    folder = extracted("deepspeed", tmp_path)
    tag = folder / "stage1" / "zero" / "global_step3"
    shard = tag / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    shard.rename(folder / "away")
    with pytest.raises(errors.CorruptCheckpointError, match="1 of"):
        fc.interop.open(tag)["optimizer"]
    (folder / "away").rename(tag / "zero_pp_rank_2_mp_rank_00_optim_states.pt")
    with pytest.raises(errors.CorruptCheckpointError, match="only those of"):
        fc.interop.open(tag)
    (tag / "zero_pp_rank_2_mp_rank_00_optim_states.pt").rename(shard)
    (tag / "mp_rank_01_model_states.pt").write_bytes(
        (tag / "mp_rank_00_model_states.pt").read_bytes()
    )
    with pytest.raises(errors.UsageError, match=r"tensor-parallel.*ds_to_universal"):
        fc.interop.open(tag)
    (tag / "mp_rank_01_model_states.pt").rename(tag / "layer_00-model_states.pt")
    with pytest.raises(errors.UsageError, match="layers of a pipeline"):
        fc.interop.open(tag)
    (tag / "layer_00-model_states.pt").unlink()
    (folder / "stage3" / "universal" / "zero" / "last.weight" / "exp_avg.pt").unlink()
    with pytest.raises(errors.CorruptCheckpointError, match=r"'last\.weight' has no exp_avg"):
        fc.interop.open(folder / "stage3" / "universal")["optimizer"]


def test_other_objects_than_records_are_refused(tmp_path: Path) -> None:
    folder = extracted("deepspeed", tmp_path)
    tag = folder / "stage1" / "zero" / "global_step3"
    for rank in range(2):
        torch.save({"optimizer_state_dict": os.system}, tag / _shard(rank))
    with pytest.raises(errors.UsageError, match=r"pickled object, posix\.system"):
        fc.interop.open(tag)["optimizer"]


def _shard(rank: int) -> str:
    return f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def check_megatron(folder: Path) -> None:
    """Compares a checkpoint with the tensors that its ranks had."""
    source = fc.interop.open(folder / "run")
    assert source.format == "megatron"
    assert list(source) == ["model", "optimizer", "objects", "common"]
    expected: dict[str, torch.Tensor] = torch.load(folder / "expected.pt")
    optimizer = source["optimizer"]
    for name, value in expected.items():
        if name.startswith("optimizer.state."):
            key, parameter = name.removeprefix("optimizer.state.").split(".", 1)
            assert torch.equal(optimizer["state"][parameter][key], value)
        else:
            assert torch.equal(source["model"][name], value)
    assert len(expected) == 3 * len(source["model"])
    assert {float(each["step"]) for each in optimizer["state"].values()} == {1.0}
    assert optimizer["param_groups"][0]["params"] == list(optimizer["state"])
    assert source["objects"]["rng_state"] == {"0_2": {"rank": 0}, "1_2": {"rank": 1}}
    assert source["common"]["iteration"] == 7
    assert source["common"]["args"] == {"lr": 0.01, "attention_backend": 5}
    fc.save(folder / "step", source)
    assert equality.differences(fc.restore(folder / "step")["model"], source["model"]) == []


@pytest.mark.parametrize("registered", [[], [argparse.Namespace]], ids=["alone", "imported"])
def test_a_distributed_checkpoint_of_megatron(registered: list[Any], tmp_path: Path) -> None:
    folder = extracted("megatron", tmp_path)
    with torch.serialization.safe_globals(registered):  # as an import of Megatron registers it
        check_megatron(folder)
    (folder / "run" / "iter_0000007" / "__1_0.distcp").unlink()
    with pytest.raises(errors.CorruptCheckpointError, match="__1_0"):
        fc.interop.open(folder / "run")


def test_other_formats_of_megatron_are_refused(tmp_path: Path) -> None:
    folder = extracted("megatron", tmp_path) / "run" / "iter_0000007"
    config = folder / "metadata.json"
    config.write_text(config.read_text().replace("torch_dist", "zarr"))
    with pytest.raises(errors.UsageError, match="'zarr'; expected 'torch_dist'"):
        fc.interop.open(folder)


full_only = pytest.mark.skipif(not IS_FULL, reason="starts processes: a full run has it")


def launch(script: str, *arguments: str) -> None:
    """Runs a script on two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(HERE / script), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@full_only
@pytest.mark.parametrize("stage", STAGES)
def test_checkpoints_that_deepspeed_writes(stage: int, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.utils.zero_to_fp32 import (  # pyright: ignore[reportMissingImports]
        get_fp32_state_dict_from_zero_checkpoint,
    )

    launch("deepspeed_run.py", str(tmp_path), str(stage))
    fp32 = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "zero"))
    torch.save({name: each.clone() for name, each in fp32.items()}, tmp_path / "fp32.pt")
    check(tmp_path)
    check_restored(tmp_path / "zero")


@full_only
def test_checkpoints_that_megatron_writes(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    launch("megatron_run.py", str(tmp_path))
    check_megatron(tmp_path)
