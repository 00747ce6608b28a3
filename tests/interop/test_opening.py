"""Every known format is found out, opened as items and turned into a step; and written again."""

from __future__ import annotations

import datetime
import json
import pickle
import random
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch.distributed import checkpoint as dcp

import functional_ckpt as fc
from functional_ckpt import errors
from functional_ckpt.cli import main
from functional_ckpt.interop import atomic_output, neuronx, torch_save
from functional_ckpt.interop import dcp as interop_dcp
from functional_ckpt.interop import safetensors as interop_safetensors
from functional_ckpt.storage.open import connect
from functional_ckpt.testing import equality

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

WEIGHTS = {
    "w": torch.arange(12.0).reshape(3, 4),
    "h": torch.ones(5, dtype=torch.bfloat16),
    "n": torch.tensor(7),
}


def differences(got: Any, expected: Any) -> list[str]:
    """As bits; in any order of the names, which safetensors sorts."""
    if isinstance(got, dict) and isinstance(expected, dict) and got.keys() == expected.keys():
        got = {key: got[key] for key in expected}
    return equality.differences(got, expected)


def adam() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


def make_safetensors(path: Path) -> dict[str, Any]:
    safetensors.torch.save_file(WEIGHTS, path)
    return {"model": WEIGHTS}


def make_state_dict(path: Path) -> dict[str, Any]:
    model, _ = adam()
    torch.save(model.state_dict(), path)
    return {"model": dict(model.state_dict())}


def make_old_torch(path: Path) -> dict[str, Any]:
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=False)
    return {"model": WEIGHTS}


def make_training_file(path: Path) -> dict[str, Any]:
    model, optimizer = adam()
    parts = {"epoch": 3, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(parts, path)
    return parts | {"model": dict(model.state_dict())}


def make_dcp(path: Path) -> dict[str, Any]:
    model, optimizer = adam()
    state = {
        "model": dict(model.state_dict()),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "names": ["a", "b"],
        "pair": (1, 2.5),
    }
    dcp.save(state, checkpoint_id=path, no_dist=True)
    return state


def make_composer(path: Path) -> dict[str, Any]:
    model, optimizer = adam()
    state = {
        "model": model.state_dict(),
        "optimizers": {"AdamW": optimizer.state_dict()},
        "schedulers": {},
        "timestamp": {"Timestamp": {"epoch": 1, "batch": 500}},
        "rank_zero_seed": 17,
        "run_name": "run",
        "metadata": {"composer_env_info": {"composer_version": "0.28"}},
    }
    rng = [
        {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state(),
        }
    ]
    torch.save({"state": state, "rng": rng}, path)
    metadata = state.pop("metadata")
    expected = {**state, "model": dict(model.state_dict()), "composer_metadata": metadata}
    return {**expected, "rng": fc.Rng().handler.lower({})}


def make_colossalai(path: Path) -> dict[str, Any]:
    model, optimizer = adam()
    tensors = dict(model.state_dict())
    packed = optimizer.state_dict()
    for folder in ("modeling", "optimizer"):
        (path / folder).mkdir(parents=True)
    halves = [dict(list(tensors.items())[:2]), dict(list(tensors.items())[2:])]
    weight_map: dict[str, str] = {}
    optim_map: dict[str, str] = {}
    for number, half in enumerate(halves, 1):
        name = f"pytorch_model-{number:05d}.bin"
        torch.save(half, path / "modeling" / name)
        weight_map |= dict.fromkeys(half, name)
        name = f"pytorch_optim-{number:05d}.bin"
        part = {key: packed["state"][key] for key in ((0, 1), (2, 3))[number - 1]}
        torch.save(part, path / "optimizer" / name)
        optim_map |= dict.fromkeys(map(str, part), name)
    write_index(path / "modeling" / "pytorch_model.bin.index.json", weight_map, {})
    groups = {"param_groups": "pytorch_optim_group.bin"}
    write_index(path / "optimizer" / "pytorch_optim.bin.index.json", optim_map, groups)
    torch.save(packed["param_groups"], path / "optimizer" / "pytorch_optim_group.bin")
    torch.save({"last_epoch": 2}, path / "lr_scheduler")
    return {"model": tensors, "optimizer": packed, "lr_scheduler": {"last_epoch": 2}}


def write_index(path: Path, weight_map: dict[str, str], metadata: dict[str, Any]) -> None:
    record = {"metadata": {"total_size": 1, **metadata}, "weight_map": weight_map}
    path.write_text(json.dumps(record))


def make_neuronx(path: Path) -> dict[str, Any]:
    tensors = dict(adam()[0].state_dict())
    (path / "model").mkdir(parents=True)
    for pp, names in enumerate((("0.weight", "0.bias"), ("1.weight", "1.bias"))):
        stage = {name: tensors[name] for name in names}
        torch.save(stage, path / "model" / f"dp_rank_00_tp_rank_00_pp_rank_{pp:02d}.pt")
    torch.save({"last_epoch": 2}, path / "scheduler.pt")
    (path / "done").write_text("1")
    return {"model": tensors, "scheduler": {"last_epoch": 2}}


def make_orbax(path: Path) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    tree = {"w": np.arange(6.0, dtype=np.float32).reshape(2, 3)}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.resolve(), tree)
    return {"default": {"w": torch.from_numpy(tree["w"])}}


MAKERS: dict[str, tuple[str, Any]] = {
    "weights.safetensors": ("safetensors", make_safetensors),
    "model.pt": ("torch", make_state_dict),
    "old.pt": ("torch", make_old_torch),
    "training.pt": ("torch", make_training_file),
    "dcp": ("dcp", make_dcp),
    "ep1-ba500-rank0.pt": ("composer", make_composer),
    "epoch-0": ("colossalai", make_colossalai),
    "step_10": ("neuronx", make_neuronx),
    "orbax": ("step", make_orbax),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_format_is_found_and_becomes_a_step(tmp_path: Path, name: str) -> None:
    format, make = MAKERS[name]
    expected = make(tmp_path / name)
    source = fc.interop.open(tmp_path / name)
    assert source.format == format
    assert set(source) == set(expected)
    for item, value in expected.items():
        assert differences(source[item], value) == [], item
    assert main(["convert", str(tmp_path / name), str(tmp_path / "converted")]) == 0
    restored = fc.restore(tmp_path / "converted")
    for item, value in expected.items():
        assert differences(restored[item], value) == [], item
    named = fc.interop.open(tmp_path / name, format)
    assert named.format == format


def test_a_converted_model_restores_into_a_module(tmp_path: Path) -> None:
    make_dcp(tmp_path / "dcp")
    fc.save(tmp_path / "step", fc.interop.open(tmp_path / "dcp"))
    model, _ = adam()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    fc.restore(tmp_path / "step", {"model": model})
    assert differences(dict(model.state_dict()), expected) == []


def test_convert_adds_a_step_to_a_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_safetensors(tmp_path / "w.safetensors")
    source, run = str(tmp_path / "w.safetensors"), str(tmp_path / "run")
    assert main(["convert", source, run, "--step", "7"]) == 0
    with fc.CheckpointManager(run) as manager:
        assert differences(manager.restore(7)["model"], WEIGHTS) == []
    assert main(["convert", source, run, "--step", "7"]) == 2
    assert main(["convert", source, run]) == 2
    assert "never overwritten" in capsys.readouterr().err
    assert main(["convert", source, str(tmp_path / "x"), "--item", "optimizer"]) == 2
    assert "has no item 'optimizer'; it has model" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("to", ["safetensors", "torch", "hf", "dcp"])
def test_exported_items_open_again(tmp_path: Path, to: str) -> None:
    tied = {**WEIGHTS, "same": WEIGHTS["w"]}
    fc.save(tmp_path / "step", {"model": tied, "epoch": 3})
    arguments = ["export", str(tmp_path / "step"), str(tmp_path / "out"), "--to", to]
    assert main(arguments) == 0
    source = fc.interop.open(tmp_path / "out")
    assert differences(source["model"], tied) == []
    assert main(arguments) == 2
    if to == "torch":
        loaded = torch.load(tmp_path / "out", weights_only=True)
        assert loaded["epoch"] == 3
    elif to == "dcp":
        target = {"model": {name: torch.zeros_like(tensor) for name, tensor in tied.items()}}
        dcp.load(target, checkpoint_id=tmp_path / "out", no_dist=True)
        assert differences(target["model"], tied) == []
    elif to == "safetensors":
        assert safetensors.torch.load_file(tmp_path / "out").keys() == WEIGHTS.keys()


def test_an_exported_torch_file_has_tensors_for_numpy_s_arrays(tmp_path: Path) -> None:
    content = {"model": WEIGHTS, "rng": fc.Rng(), "n": {"a": np.arange(3), "b": np.float32(0.5)}}
    fc.save(tmp_path / "step", content)
    assert main(["export", str(tmp_path / "step"), str(tmp_path / "out"), "--to", "torch"]) == 0
    loaded = torch.load(tmp_path / "out", weights_only=True)
    assert differences(loaded["model"], WEIGHTS) == []
    assert torch.equal(loaded["n"]["a"], torch.arange(3))
    assert loaded["n"]["b"] == 0.5


def test_an_export_names_the_leaf_that_torch_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fc.save(tmp_path / "step", {"model": WEIGHTS, "config": {"args": {"home": Path("/x")}}})
    assert main(["export", str(tmp_path / "step"), str(tmp_path / "out"), "--to", "torch"]) == 2
    text = capsys.readouterr().err
    assert "refuses config.args.home, pathlib" in text
    assert "\x1b" not in text and "x1b" not in text and "--item" in text
    assert not (tmp_path / "out").exists()


def test_export_refuses_unsuitable_items(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fc.save(
        tmp_path / "step", {"a": WEIGHTS, "b": {"epoch": 3}, "z": {"z": torch.ones(1).cfloat()}}
    )
    step, out = str(tmp_path / "step"), str(tmp_path / "out")
    for arguments, message in (
        (["--to", "hf"], "choose one with --item of a, b, z"),
        (["--to", "hf", "--item", "b"], "expected tensors"),
        (["--to", "hf", "--item", "q"], "no item 'q'"),
        (["--to", "dcp", "--variant", "x"], "--variant is for --to hf"),
        (["--to", "hf", "--item", "a", "--max-shard-size", "big"], "max_shard_size"),
    ):
        assert main(["export", step, out, *arguments]) == 2
        assert message in capsys.readouterr().err
    assert main(["export", step, str(tmp_path / "step" / "in"), "--to", "torch"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["step"]


def test_a_pickled_object_is_refused_by_name(tmp_path: Path) -> None:
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "bad.pt")
    with pytest.raises(errors.UsageError, match=r"bad\.pt: .*torch\.nn\.modules\.linear\.Linear"):
        fc.interop.open(tmp_path / "bad.pt")
    assert main(["convert", str(tmp_path / "bad.pt"), str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


def test_an_index_that_is_a_hostile_pickle_runs_nothing(tmp_path: Path) -> None:
    make_dcp(tmp_path / "dcp")
    mark = tmp_path / "ran"
    # GLOBAL os.system, its argument, REDUCE
    attack = b"cos\nsystem\n(Vtouch " + str(mark).encode() + b"\ntR."
    (tmp_path / "dcp" / ".metadata").write_bytes(attack)
    with pytest.raises(errors.CorruptCheckpointError, match="not the index"):
        fc.interop.open(tmp_path / "dcp")
    assert not mark.exists()


def test_a_damaged_dcp_is_refused(tmp_path: Path) -> None:
    make_dcp(tmp_path / "dcp")
    file = tmp_path / "dcp" / "__0_0.distcp"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(errors.CorruptCheckpointError, match="is incomplete"):
        fc.save(tmp_path / "x", fc.interop.open(tmp_path / "dcp"))
    file.unlink()
    with pytest.raises(errors.CorruptCheckpointError, match="distcp', which is not there"):
        fc.interop.open(tmp_path / "dcp")
    assert not (tmp_path / "x").exists()


def test_a_missing_shard_of_colossalai_is_named(tmp_path: Path) -> None:
    make_colossalai(tmp_path / "x")
    (tmp_path / "x" / "optimizer" / "pytorch_optim-00002.bin").unlink()
    with pytest.raises(errors.CorruptCheckpointError, match=r"optim-00002\.bin, which is not"):
        fc.interop.open(tmp_path / "x")


def test_ambiguity_lists_the_candidates(tmp_path: Path) -> None:
    make_dcp(tmp_path / "x")
    safetensors.torch.save_file(WEIGHTS, tmp_path / "x" / "model.safetensors")
    with pytest.raises(errors.UsageError, match=r"'huggingface' .*'dcp' .*format="):
        fc.interop.open(tmp_path / "x")
    assert list(fc.interop.open(tmp_path / "x", "huggingface")) == ["model"]
    assert "epoch" in fc.interop.open(tmp_path / "x", "dcp")


def test_open_of_an_unknown_format_raises(tmp_path: Path) -> None:
    with pytest.raises(errors.StepNotFoundError, match="no such file"):
        fc.interop.open(tmp_path / "nothing")
    with pytest.raises(errors.UsageError, match="nothing here looks like"):
        fc.interop.open(tmp_path)
    (tmp_path / "x.pt").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(errors.CorruptCheckpointError, match=r"x\.pt: .*cannot (be )?read"):
        fc.interop.open(tmp_path / "x.pt")
    with pytest.raises(errors.UsageError, match="no format 'onnx'"):
        fc.interop.open(tmp_path, "onnx")
    with pytest.raises(errors.UsageError, match="does not look like"):
        fc.interop.open(tmp_path / "x.pt", "safetensors")


@pytest.fixture
def bucket() -> str:
    """A new bucket in this process's memory; its URI."""
    return f"memory://bucket-{uuid.uuid4().hex[:8]}"


def uri_errors(bucket: str, path: Path) -> Iterator[str]:
    """The error of each exporting function for a URI."""
    model, _ = adam()
    fc.save(path / "step", {"model": model})
    for call in (
        lambda: fc.interop.huggingface.save(model, f"{bucket}/x"),
        lambda: fc.interop.huggingface.save(model, f"{bucket}/x", format="bin"),
        lambda: fc.interop.huggingface.export(path / "step", f"{bucket}/x"),
        lambda: torch_save.save(model.state_dict(), f"{bucket}/x"),
        lambda: interop_dcp.save({"model": model.state_dict()}, f"{bucket}/x"),
        lambda: interop_dcp.save({"model": model.state_dict()}, "s3://no-such-bucket/x/y"),
    ):
        with pytest.raises(errors.UsageError) as caught:
            call()
        yield str(caught.value)


def test_writing_another_programs_files_to_a_uri_is_refused_at_once(
    bucket: str, tmp_path: Path
) -> None:
    for message in uri_errors(bucket, tmp_path):
        assert "local paths only. Write to a local path, then copy" in message
    assert connect(bucket)[0].list(bucket) == []


@pytest.mark.parametrize("to", ["safetensors", "torch", "hf", "dcp"])
def test_a_step_in_a_store_is_exported(
    bucket: str, tmp_path: Path, to: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with fc.CheckpointManager(f"{bucket}/run") as manager:
        manager.save(3, {"model": WEIGHTS}, force=True)
    out = str(tmp_path / "out")
    assert main(["export", f"{bucket}/run", out, "--to", to]) == 0
    assert differences(fc.interop.open(out)["model"], WEIGHTS) == []
    assert main(["export", f"{bucket}/run", f"{bucket}/out", "--to", to]) == 2
    assert "local paths only" in capsys.readouterr().err


def test_convert_writes_steps_to_a_store(
    bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_safetensors(tmp_path / "w.safetensors")
    source = str(tmp_path / "w.safetensors")
    assert main(["convert", source, f"{bucket}/one"]) == 0
    assert main(["convert", source, f"{bucket}/run", "--step", "7"]) == 0
    assert differences(fc.restore(f"{bucket}/one")["model"], WEIGHTS) == []
    assert differences(fc.restore(f"{bucket}/run/7")["model"], WEIGHTS) == []
    assert main(["convert", source, f"{bucket}/one"]) == 2
    assert "never overwritten" in capsys.readouterr().err
    assert main(["convert", f"{bucket}/one", f"{bucket}/one/in"]) == 2
    assert "overlap" in capsys.readouterr().err
    assert main(["convert", f"{bucket}/one", str(tmp_path / "back")]) == 0
    assert differences(fc.restore(tmp_path / "back")["model"], WEIGHTS) == []


def test_a_uri_opens_as_a_step_only(bucket: str) -> None:
    fc.save(f"{bucket}/one", {"model": WEIGHTS})
    assert differences(fc.interop.open(f"{bucket}/one")["model"], WEIGHTS) == []
    with pytest.raises(errors.StepNotFoundError, match=r"a directory of steps \(one\)"):
        fc.interop.open(bucket)
    with pytest.raises(errors.UsageError, match="Copy it to a local path"):
        fc.interop.open(f"{bucket}/one", "dcp")
    with pytest.raises(errors.StepNotFoundError, match="there is nothing"):
        fc.interop.open(f"{bucket}/two")
    with pytest.raises(errors.UsageError, match="copy it here"):
        fc.interop.huggingface.load(f"{bucket}/one")


@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_of_weights_in_two_formats_the_one_asked_for_opens(
    tmp_path: Path, format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    both, other = tmp_path / "both", {"w": torch.zeros(2)}
    both.mkdir()
    safetensors.torch.save_file(WEIGHTS, both / "model.safetensors")
    torch.save(other, both / "pytorch_model.bin")
    expected = WEIGHTS if format == "safetensors" else other
    for auto in (None, "huggingface"):
        with pytest.raises(errors.UsageError, match="format='safetensors' or 'bin'"):
            fc.interop.open(both, auto)
    source = fc.interop.open(both, format)
    assert source.format == "huggingface"
    assert differences(source["model"], expected) == []
    assert main(["convert", str(both), str(tmp_path / "step"), "--format", format]) == 0
    assert differences(fc.restore(tmp_path / "step")["model"], expected) == []


def test_a_format_that_a_directory_does_not_hold_is_an_error(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "pytorch_model.bin")
    with pytest.raises(errors.UsageError, match="does not look like a file of safetensors"):
        fc.interop.open(tmp_path, "safetensors")


def test_a_state_of_composer_that_is_no_mapping_is_damage(tmp_path: Path) -> None:
    torch.save({"state": [1], "rng": []}, tmp_path / "ep1.pt")
    with pytest.raises(errors.CorruptCheckpointError, match="'state' is not a mapping"):
        fc.interop.open(tmp_path / "ep1.pt")


def test_times_and_versions_in_a_file_of_composer_are_plain_values(tmp_path: Path) -> None:
    """`Timestamp.state_dict()` of Composer has four spans of time; test_opened has a real file."""
    make_composer(tmp_path / "plain.pt")
    content = torch.load(tmp_path / "plain.pt", weights_only=False)
    counts = ("iteration", "epoch", "batch", "sample", "token", "epoch_in_iteration")
    counts += ("token_in_iteration", "batch_in_epoch", "sample_in_epoch", "token_in_epoch")
    times = ("total_wct", "iteration_wct", "epoch_wct", "batch_wct")
    timestamp = dict.fromkeys(counts, 3) | dict.fromkeys(times, datetime.timedelta(seconds=3.5))
    saved = [("ep1-ba4-rank0.pt", timestamp)]
    content["state"] |= {
        "timestamp": timestamp,
        "callbacks": {"CheckpointSaver": {"all_saved_checkpoints_to_timestamp": saved}},
        "metadata": {"PyTorch_version": torch.__version__},
    }
    torch.save(content, tmp_path / "real.pt")
    source = fc.interop.open(tmp_path / "real.pt")
    assert source.format == "composer"
    assert type(source["model"]) is dict  # not one whose attributes a tree would store
    fc.save(tmp_path / "step", source)
    restored = fc.restore(tmp_path / "step")
    expected = dict.fromkeys(counts, 3) | dict.fromkeys(times, 3.5)
    assert restored["timestamp"] == expected
    kept = restored["callbacks"]["CheckpointSaver"]["all_saved_checkpoints_to_timestamp"]
    assert kept == [("ep1-ba4-rank0.pt", expected)]
    assert restored["composer_metadata"] == {"PyTorch_version": str(torch.__version__)}


def test_two_folders_of_one_item_of_colossalai_are_refused(tmp_path: Path) -> None:
    make_colossalai(tmp_path)
    for first, second in (("modeling", "model"), ("lr_scheduler", "scheduler")):
        (tmp_path / second).symlink_to(first)
        with pytest.raises(errors.UsageError, match="hold the same item; move one away"):
            fc.interop.open(tmp_path)
        (tmp_path / second).unlink()
    assert set(fc.interop.open(tmp_path)) == {"model", "optimizer", "lr_scheduler"}


@pytest.mark.parametrize("layout", ["one folder", "two folders"])
@pytest.mark.parametrize("separator", ["-", "."])
def test_an_asynchronous_save_of_colossalai_opens_with_its_optimizer(
    tmp_path: Path, layout: str, separator: str
) -> None:
    is_one = layout == "one folder"
    folders = {name: tmp_path if is_one else tmp_path / name for name in ("model", "optimizer")}
    for folder in folders.values():
        folder.mkdir(exist_ok=True)
    name = "model-00001.safetensors"
    safetensors.torch.save_file(WEIGHTS, folders["model"] / name)
    write_index(folders["model"] / "model.safetensors.index.json", dict.fromkeys(WEIGHTS, name), {})
    moment, step = f"state{separator}0{separator}exp_avg", f"state{separator}0{separator}step"
    pickled = torch.frombuffer(bytearray(pickle.dumps(4)), dtype=torch.uint8)
    name = "optimizer-00001.safetensors"
    safetensors.torch.save_file(
        {moment: torch.ones(2), step: pickled},
        folders["optimizer"] / name,
        metadata={"format": "pt", "non_tensor_keys": json.dumps([step])},
    )
    groups = [{"lr": 0.1, "params": [0]}]
    torch.save(groups, folders["optimizer"] / "pytorch_optim_group.bin")
    write_index(
        folders["optimizer"] / "optimizer.safetensors.index.json",
        dict.fromkeys((moment, step), name),
        {"param_groups": "pytorch_optim_group.bin"},
    )
    source = fc.interop.open(tmp_path)
    assert source.format == "colossalai"
    assert differences(source["model"], WEIGHTS) == []
    optimizer = source["optimizer"]
    assert optimizer["param_groups"] == groups
    assert optimizer["state"][0].keys() == {"exp_avg", "step"}
    assert optimizer["state"][0]["step"] == 4
    assert torch.equal(optimizer["state"][0]["exp_avg"], torch.ones(2))
    safetensors.torch.save_file({"state-exp_avg": torch.ones(2)}, folders["optimizer"] / name)
    with pytest.raises(errors.CorruptCheckpointError, match="not the state of a numbered param"):
        _ = fc.interop.open(tmp_path)["optimizer"]
    (folders["optimizer"] / name).unlink()
    with pytest.raises(errors.CheckpointError, match=name):
        fc.interop.open(tmp_path)


def test_what_a_folder_holds_beside_its_weights_is_an_item_or_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    safetensors.torch.save_file(WEIGHTS, folder / "model.safetensors")
    torch.save(adam()[1].state_dict(), folder / "optimizer.pt")
    torch.save({"last_epoch": 2}, folder / "scheduler.pt")
    for name in ("training_args.bin", "custom_checkpoint_0.pkl"):
        torch.save({}, folder / name)
    (folder / "trainer_state.json").write_text('{"global_step": 5}')
    with pytest.warns(UserWarning, match=r"left out: custom_checkpoint_0\.pkl, training_args\.bin"):
        source = fc.interop.open(folder)
    assert set(source) == {"model", "optimizer", "scheduler", "trainer"}
    assert main(["convert", str(folder), str(tmp_path / "step")]) == 0
    assert "left out: custom_checkpoint_0.pkl, training_args.bin" in capsys.readouterr().out
    assert fc.restore(tmp_path / "step")["trainer"] == {"global_step": 5}
    assert main(["show", str(folder)]) == 0
    assert "left out  custom_checkpoint_0.pkl, training_args.bin" in capsys.readouterr().out


@pytest.mark.parametrize(
    "names",
    [("optimizer.bin", "optimizer.pt"), ("random_states_0.pkl", "rng_state_0.pth")],
    ids=["optimizer", "rng"],
)
def test_two_files_of_one_item_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    safetensors.torch.save_file(WEIGHTS, tmp_path / "model.safetensors")
    for name in names:
        torch.save({"of": name}, tmp_path / name)
    with pytest.raises(errors.UsageError, match=f"{names[0]} and {names[1]} are the same item"):
        fc.interop.open(tmp_path)


@pytest.mark.parametrize(
    ("numbers", "items"),
    [("0", {"rng"}), ("3", {"rng"}), ("01", {"rng_0", "rng_1"}), ("12", {"rng_1", "rng_2"})],
)
def test_the_random_states_of_several_ranks_have_their_numbers(
    tmp_path: Path, numbers: str, items: set[str]
) -> None:
    safetensors.torch.save_file(WEIGHTS, tmp_path / "model.safetensors")
    for number in numbers:
        torch.save({"python": random.Random(1).getstate()}, tmp_path / f"rng_state_{number}.pth")
    assert set(fc.interop.open(tmp_path)) == {"model"} | items


def test_a_folder_of_peft_opens_without_its_weights_a_second_time(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "adapter_model.bin")
    torch.save({"state": 1}, tmp_path / "optimizer.pt")
    source = fc.interop.open(tmp_path)
    assert sorted(source) == ["model", "optimizer"] and source.format == "peft"
    torch.save(WEIGHTS, tmp_path / "adapter_model.safetensors")
    with pytest.raises(errors.UsageError, match="in two formats"):
        fc.interop.open(tmp_path)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_folder_of_peft_opens_as_the_weights_of_its_adapter(tmp_path: Path, kind: str) -> None:
    if kind == "bin":
        torch.save(WEIGHTS, tmp_path / "adapter_model.bin")
    else:
        tied = {"format": "pt", "tied": "w"}
        safetensors.torch.save_file(WEIGHTS, tmp_path / "adapter_model.safetensors", tied)
    (tmp_path / "adapter_config.json").write_text("{}")
    source = fc.interop.open(tmp_path)
    assert source.format == "peft"
    found = dict(source["model"])
    assert kind == "bin" or found.pop("tied") is found["w"]
    assert differences(found, WEIGHTS) == []


def test_files_behind_links_open_as_those_of_a_cache_do(tmp_path: Path) -> None:
    """Hugging Face's cache holds links to files that are named by their digests."""
    folder, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    folder.mkdir()
    blobs.mkdir()
    safetensors.torch.save_file(WEIGHTS, blobs / "1")
    index = {"weight_map": dict.fromkeys(WEIGHTS, "model-00001-of-00001.safetensors")}
    (blobs / "2").write_text(json.dumps(index))
    (folder / "model-00001-of-00001.safetensors").symlink_to("../blobs/1")
    (folder / "model.safetensors.index.json").symlink_to("../blobs/2")
    opened = fc.interop.open(folder)
    assert opened.format == "huggingface"
    assert differences(dict(opened["model"]), WEIGHTS) == []


@pytest.mark.parametrize(("header_bytes", "fits"), [(2, True), (3, False), (17, False)])
def test_a_file_that_is_shorter_than_its_header_is_not_of_safetensors(
    tmp_path: Path, header_bytes: int, fits: bool
) -> None:
    path = tmp_path / "file"
    path.write_bytes(header_bytes.to_bytes(8, "little") + b"{}")
    assert interop_safetensors.fits(str(path)) is fits


def test_an_item_that_a_step_no_longer_has_is_named(tmp_path: Path) -> None:
    fc.save(tmp_path / "step", {"model": WEIGHTS, "more": {"n": 1}})
    source = fc.interop.open(tmp_path / "step")
    fc.save(tmp_path / "step", {"model": WEIGHTS}, overwrite=True)
    assert differences(dict(source["model"]), WEIGHTS) == []
    with pytest.raises(errors.StepNotFoundError, match="has no item 'more' any more"):
        source["more"]


def test_a_file_without_tensors_opens_and_one_that_is_absent_is_named(tmp_path: Path) -> None:
    safetensors.torch.save_file({}, tmp_path / "empty.safetensors")
    assert dict(fc.interop.open(tmp_path / "empty.safetensors")["model"]) == {}
    with pytest.raises(errors.StepNotFoundError, match="absent"):
        interop_safetensors.load(str(tmp_path / "absent.safetensors"))


def test_a_destination_that_is_taken_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "taken").write_bytes(b"1")
    with (
        pytest.raises(errors.StepExistsError, match="taken"),
        atomic_output.atomic_output(tmp_path / "taken"),
    ):
        pytest.fail("nothing is to be written")
    assert [each.name for each in tmp_path.iterdir()] == ["taken"]


def test_an_item_without_weights_is_not_written_as_weights(tmp_path: Path) -> None:
    fc.save(tmp_path / "c", {"state": {"lr": 0.1, "w": torch.ones(2)}, "empty": {"a": {}}})
    for item, text in (("state", "lr hold none"), ("empty", "tensors under names")):
        with pytest.raises(errors.UnsupportedLeafError, match=text):
            fc.interop.huggingface.export(tmp_path / "c", tmp_path / "out", item=item)
    assert not (tmp_path / "out").exists()


def test_files_of_ranks_form_a_grid_without_gaps(tmp_path: Path) -> None:
    def stem(tp: int, pp: int, dp: int = 0, width: int = 2) -> str:
        return f"dp_rank_{dp:0{width}}_tp_rank_{tp:0{width}}_pp_rank_{pp:0{width}}"

    whole = [stem(tp, pp, dp) for tp in range(2) for pp in range(3) for dp in range(2)]
    assert list(neuronx.parse_ranks(whole, "x").values()) == sorted(whole)
    for gone in whole[:-1]:
        with pytest.raises(errors.CorruptCheckpointError, match=f"are missing: {gone}"):
            neuronx.parse_ranks([name for name in whole if name != gone], "x")
    with pytest.raises(errors.CorruptCheckpointError, match="both of one rank"):
        neuronx.parse_ranks([stem(0, 0), stem(0, 0, width=3)], "x")
    make_neuronx(tmp_path / "step_10")
    files = sorted((tmp_path / "step_10" / "model").glob("*tp_rank_*"))
    files[0].rename(files[0].with_name(files[0].name.replace("tp_rank_00", "tp_rank_07")))
    with pytest.raises(errors.CorruptCheckpointError, match="are missing"):
        fc.interop.open(tmp_path / "step_10")


class Odd:
    """An object that `torch.save` pickles."""


def test_a_file_that_could_not_be_loaded_safely_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(errors.UnsupportedLeafError, match=r"refuses odd, .*\.Odd"):
        torch_save.save({"w": torch.ones(2), "odd": Odd()}, tmp_path / "x.pt")
    assert list(tmp_path.iterdir()) == []
