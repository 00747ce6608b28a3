"""Orbax checkpoints, v0 and v1 in every layout, are restored equal to the last bit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import orbax_writer
import pytest
import torch
from orbax_view import as_orbax, differences

import functional_ckpt as fc

BARE = (
    "v0_pytree_bare",
    "v0_zarr2_files",
    "v0_zarr2_files_plain",
    "v0_zarr2_ocdbt",
    "v0_zarr3_files",
    "v0_zarr3_ocdbt",
    "v0_zarr3_ocdbt_plain",
    "v0_rich_types",
)


def new_training() -> tuple[torch.nn.Module, torch.optim.Optimizer, Any]:
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(5, 3, generator=generator)).square().mean().backward()
        optimizer.step()
        scheduler.step()


def tree() -> dict[Any, Any]:
    return {0: torch.arange(3), 1: (torch.ones(2), [True, 2.5]), "texts": ["a", None]}


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that Orbax writes, by a process of its own with four CPU devices."""
    root = tmp_path_factory.mktemp("orbax")
    torch.manual_seed(0)
    model, optimizer, scheduler = new_training()
    train(model, optimizer, scheduler)
    items = {
        "model": model,
        "optimizer": fc.Optimizer(optimizer, model),
        "scheduler": scheduler,
        "tree": tree(),
    }
    with fc.CheckpointManager(root / "ours") as manager:
        manager.save(3, items)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    program = [sys.executable, orbax_writer.__file__, str(root)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return root


def check(got: Any, expected: Any) -> None:
    assert differences(as_orbax(got), as_orbax(expected)) == []


# ------------------------------------------------------------------------------------ without items


@pytest.mark.parametrize("scenario", BARE)
def test_restore_of_an_orbax_item_directory(written: Path, scenario: str) -> None:
    restored = fc.restore(written / scenario)
    assert list(restored) == ["default"]
    check(restored["default"], orbax_writer.state())
    assert isinstance(restored["default"]["params"]["kernel"], torch.Tensor)
    assert restored["default"]["params"]["bias"].dtype == torch.bfloat16
    assert type(restored["default"]["step"]) is int


def test_an_item_directory_of_the_standard_checkpointer(written: Path) -> None:
    check(fc.restore(written / "v0_standard_bare")["default"], orbax_writer.numbers())


def test_orbax_reads_a_native_item_directory(tmp_path: Path) -> None:
    fc.save(tmp_path / "x", {"state": tree()})
    restored = fc.restore(tmp_path / "x" / "state")["default"]
    assert differences(as_orbax(restored), as_orbax(tree())) == []
    assert list(restored) == [0, 1, "texts"] and type(restored[1]) is tuple


def test_a_manager_with_one_item(written: Path) -> None:
    with fc.CheckpointManager(written / "v0_standard", read_only=True) as manager:
        assert manager.all_steps() == [1, 2, 10]
        assert manager.latest_step() == 10
        assert manager.best_step("accuracy") == 1
        assert manager.metadata(2).metrics == {"accuracy": 0.5}
        assert manager.metadata(2).custom_metadata == {"note": "ключ"}
        for step in (1, 2, 10):
            restored = manager.restore(step)
            assert (restored.step, restored.metrics) == (step, {"accuracy": 1 / step})
            check(restored["default"], orbax_writer.numbers(step))


def test_a_manager_with_several_items(written: Path) -> None:
    with fc.CheckpointManager(written / "v0_composite", read_only=True) as manager:
        restored = manager.restore()
        shapes = manager.metadata().items
    assert sorted(restored) == ["arrays", "config", "state", "tree"]
    check(restored["state"], orbax_writer.numbers())
    check(restored["tree"], orbax_writer.state(1))
    assert restored["config"] == orbax_writer.config()
    check(restored["arrays"], {"checkpoint": np.arange(5)})  # Orbax's own name for a lone array
    assert shapes["state"]["params"]["bias"] == fc.handlers.ArraySpec((8,), "bfloat16")


def test_a_manager_with_named_steps(written: Path) -> None:
    name = fc.step_names.StepName(prefix="ckpt", zero_pad=6)
    with fc.CheckpointManager(
        written / "v0_named_steps", step_name=name, read_only=True
    ) as manager:
        assert manager.all_steps() == [5]
        check(manager.restore(5)["default"], orbax_writer.numbers())


@pytest.mark.parametrize(
    ("scenario", "item"),
    [("v1_save", "state"), ("v1_save_named", "weights"), ("v1_files", "state")],
)
def test_restore_of_v1_save(written: Path, scenario: str, item: str) -> None:
    restored = fc.restore(written / scenario)
    assert list(restored) == [item]
    check(restored[item], orbax_writer.state())


def test_metadata_of_v1_custom_metadata(written: Path) -> None:
    assert fc.metadata(written / "v1_save").custom_metadata == {"note": 1}


def test_restore_of_v1_save_checkpointables(written: Path) -> None:
    restored = fc.restore(written / "v1_checkpointables")
    check(restored["state"], orbax_writer.state())
    assert restored["config"] == orbax_writer.config()


def test_restore_of_v1_training_checkpointer(written: Path) -> None:
    with fc.CheckpointManager(written / "v1_training", read_only=True) as manager:
        assert manager.all_steps() == [0, 4]
        assert manager.best_step("accuracy") == 4
        for step in (0, 4):
            check(manager.restore(step)["state"], orbax_writer.state(step))


# ------------------------------------------------------------------------------------ JAX's arrays


@pytest.mark.parametrize(("scenario", "item"), [("sharded_v0", "default"), ("sharded_v1", "state")])
def test_arrays_sharded_over_devices(written: Path, scenario: str, item: str) -> None:
    check(fc.restore(written / scenario)[item], orbax_writer.sharded())


@pytest.mark.parametrize(("scenario", "item"), [("narrow_v0", "default"), ("narrow_v1", "state")])
def test_restore_of_narrow_dtypes_gives_ml_dtypes(written: Path, scenario: str, item: str) -> None:
    restored = fc.restore(written / scenario)[item]
    expected = orbax_writer.narrow()
    assert set(restored) == set(expected)
    for name, array in expected.items():
        is_torch = hasattr(torch, name) and name.startswith("float8")
        got = restored[name]
        assert isinstance(got, torch.Tensor if is_torch else np.ndarray), name
        if is_torch:
            assert got.dtype == getattr(torch, name)
            got = got.view(torch.uint8).numpy().view(array.dtype)
        assert got.dtype == array.dtype == np.dtype(getattr(ml_dtypes, name))
        assert got.tobytes() == array.tobytes(), name


def test_random_keys_come_back_as_their_words(written: Path) -> None:
    keys = fc.restore(written / "random_keys")["default"]
    assert keys["old"].tolist() == [0, 3]
    assert keys["new"].tolist() == [0, 5]
    assert (keys["many"].shape, keys["many"].dtype) == ((3, 2), torch.uint32)


def test_arrays_of_many_chunks_and_another_dtype_on_disk(written: Path) -> None:
    restored = fc.restore(written / "v0_chunked")["default"]
    expected = np.arange(4096, dtype=np.float32).reshape(64, 64)
    check(restored, {"big": expected, "cast": np.arange(6, dtype=np.float32)})


# ------------------------------------------------------------------------------------ with items


def target(like: Callable[..., Any] = torch.zeros) -> dict[Any, Any]:
    """The tree of `orbax_writer.state` as a PyTorch program has it: tuples, an int key."""
    return {
        "params": {
            "kernel": like(8, 12),
            "bias": like(8, dtype=torch.bfloat16),
            "a/b": like(2, 3, dtype=torch.int64),
            "имя": like(2, dtype=torch.bool),
        },
        "optimizer": (
            {"mu": like(3, 4, dtype=torch.float64), "count": like((), dtype=torch.int32)},
            [like(4, dtype=torch.uint8), np.zeros((2, 2), np.complex64)],
        ),
        "step": 0,
        "rate": 0.0,
        "name": "",
        "nothing": None,
        "empty": {"dict": {}, "list": ()},
        0: like(3, dtype=torch.float16),
    }


def test_restore_of_orbax_into_a_pytree_has_its_types(written: Path) -> None:
    wanted = target()
    got = fc.restore(written / "v0_zarr3_ocdbt", {"default": wanted})["default"]
    expected = orbax_writer.state() | {"empty": {"dict": {}, "list": ()}}
    check(got, expected)
    assert type(got["optimizer"]) is tuple
    assert type(got["empty"]["list"]) is tuple
    assert type(got["optimizer"][1][1]) is np.ndarray
    assert 0 in got and "0" not in got
    assert (type(got["step"]), got["step"]) == (int, 12)
    assert not wanted["params"]["kernel"].any()  # the target is not modified


def test_into_memory_of_the_target(written: Path) -> None:
    kernel = torch.zeros(8, 12)
    wanted = {"params": {"kernel": fc.handlers.Fill(kernel)}}
    fc.restore(written / "v1_save", {"state": wanted}, strict=False)
    check(kernel, orbax_writer.state()["params"]["kernel"])


@pytest.mark.parametrize("scenario", ["v0_zarr2_files", "v0_zarr3_ocdbt"])
def test_a_target_that_differs_is_an_error(written: Path, scenario: str) -> None:
    wanted = target()
    wanted["params"]["kernel"] = torch.zeros(8, 13)
    wanted["more"] = torch.zeros(1)
    del wanted["name"]
    with pytest.raises(fc.errors.MismatchError) as caught:
        fc.restore(written / scenario, {"default": wanted})
    assert caught.value.missing == ("default['more']",)
    assert caught.value.unexpected == ("default['name']",)
    assert "float32[8, 13]" in caught.value.mismatched[0]


def test_a_cast_is_asked_for(written: Path) -> None:
    wanted = {"params": {"kernel": torch.zeros(8, 12, dtype=torch.float64)}}
    path = written / "v0_zarr3_ocdbt"
    got = fc.restore(path, {"default": wanted}, only="default.params.kernel", cast=True)
    expected = orbax_writer.state()["params"]["kernel"].astype(np.float64)
    check(got["default"]["params"]["kernel"], expected)


def test_training_saved_again_by_orbax_resumes(written: Path) -> None:
    """A native step, opened and saved by a JAX program: the next steps are equal, bit for bit."""
    torch.manual_seed(0)
    original = new_training()
    train(*original)
    torch.manual_seed(1)
    fresh = new_training()
    with fc.CheckpointManager(written / "rewritten", read_only=True) as manager:
        restored = manager.restore(
            3,
            {
                "model": fresh[0],
                "optimizer": fc.Optimizer(fresh[1], fresh[0]),
                "scheduler": fresh[2],
                "tree": tree(),
            },
        )
    train(*original)
    train(*fresh)
    check(dict(fresh[0].state_dict()), dict(original[0].state_dict()))
    assert fresh[2].state_dict() == original[2].state_dict()
    assert list(restored["tree"]) == [0, 1, "texts"]
    assert restored["tree"][1][1] == [True, 2.5]


# ------------------------------------------------------------------------------------ damage


def test_a_lost_chunk_is_an_error_and_not_zeros(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written / "v0_zarr3_files", tmp_path / "x")
    chunk = tmp_path / "x" / "params.kernel" / "c" / "0" / "0"
    chunk.unlink()
    with pytest.raises(fc.errors.CorruptCheckpointError, match=r"params\.kernel"):
        fc.restore(tmp_path / "x")


def test_a_lost_array_is_an_error(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written / "v0_zarr2_files", tmp_path / "x")
    shutil.rmtree(tmp_path / "x" / "params.kernel")
    with pytest.raises(fc.errors.CorruptCheckpointError, match=r"params\.kernel"):
        fc.restore(tmp_path / "x")
