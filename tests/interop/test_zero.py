"""Merging and resharding of ZeRO-1 states: NxD's layout, as documented, and steps."""

from __future__ import annotations

import json
import sys
import types
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch

import functional_ckpt as fc
from functional_ckpt import errors
from functional_ckpt.cli import main
from functional_ckpt.testing.equality import differences

SHAPES = [(7, 3), (5,), (8, 2, 2), (1, 4), ()]


def assert_equal(got: Any, expected: Any) -> None:
    assert differences(got, expected) == []


def full_state(seed: int) -> dict[str, Any]:
    """The full state of a ZeRO-1 optimizer, from its shards."""
    generator = torch.Generator().manual_seed(seed)

    def entry(shape: tuple[int, ...]) -> dict[str, Any]:
        new = [torch.randn(shape, generator=generator) for _ in range(2)]
        return {"step": torch.tensor(3.0), "exp_avg": new[0], "exp_avg_sq": new[1]}

    return {
        "state": {},
        "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": list(range(len(SHAPES)))}],
        "base_state": {number: entry(shape) for number, shape in enumerate(SHAPES)},
        "shape_info": {number: torch.Size(shape) for number, shape in enumerate(SHAPES)},
        "sharded_master_weights": {
            number: torch.randn(shape, generator=generator) for number, shape in enumerate(SHAPES)
        },
    }


def cut(value: Any, size: int, rank: int) -> Any:
    """As torch_xla cuts: padded by torch itself, then chunked."""
    if isinstance(value, dict):
        return {k: v if k == "step" else cut(v, size, rank) for k, v in value.items()}
    if not value.dim():
        return value
    padding = [0, 0] * (value.dim() - 1) + [0, -value.shape[0] % size]
    return torch.nn.functional.pad(value, padding).chunk(size)[rank].clone()


def write_tag(tag: Path, dp_size: int, tp_size: int = 2, pp_size: int = 1) -> None:
    (tag / "optim").mkdir(parents=True)
    for tp in range(tp_size):
        for pp in range(pp_size):
            full = full_state(10 * tp + pp)
            for dp in range(dp_size):
                sections = ("base_state", "sharded_master_weights")
                shard = full | {name: cut(full[name], dp_size, dp) for name in sections}
                name = f"dp_rank_{dp:02d}_tp_rank_{tp:02d}_pp_rank_{pp:02d}.pt"
                torch.save(shard, tag / "optim" / name)


def read_tag(tag: Path) -> dict[str, Any]:
    return {path.name: torch.load(path) for path in sorted((tag / "optim").iterdir())}


def convert(source: Path, destination: Path, *flags: str, code: int = 0) -> None:
    arguments = ["--input_dir", str(source), "--output_dir", str(destination), *flags]
    assert main(["convert_zero", *arguments]) == code


@pytest.mark.parametrize("dp_size", [1, 2, 3, 4, 9])
def test_round_trips_are_exact(tmp_path: Path, dp_size: int) -> None:
    write_tag(tmp_path / "tag", dp_size)
    original = read_tag(tmp_path / "tag")
    convert(tmp_path / "tag", tmp_path / "full", "--convert_to_full", "--num_workers", "2")
    full = read_tag(tmp_path / "full")
    assert list(full) == [f"full_tp_rank_{tp:02d}_pp_rank_00.pt" for tp in range(2)]
    for tp, state in enumerate(full.values()):
        assert_equal(state, full_state(10 * tp))
    sharded = ("--convert_to_sharded", "--dp_size")
    convert(tmp_path / "full", tmp_path / "back", *sharded, str(dp_size))
    assert_equal(read_tag(tmp_path / "back"), original)
    convert(tmp_path / "tag", tmp_path / "five", *sharded, "5")
    assert len(read_tag(tmp_path / "five")) == 10
    convert(tmp_path / "five", tmp_path / "again", *sharded, str(dp_size))
    assert_equal(read_tag(tmp_path / "again"), original)


def test_steps_are_converted_like_tags(tmp_path: Path) -> None:
    write_tag(tmp_path / "tag", 3)
    assert main(["convert", str(tmp_path / "tag"), str(tmp_path / "step")]) == 0
    original = fc.restore(tmp_path / "step")["optimizer"]
    assert len(original) == 6
    convert(tmp_path / "step", tmp_path / "full", "--convert_to_full")
    full = fc.restore(tmp_path / "full")["optimizer"]
    assert_equal(full["full_tp_rank_01_pp_rank_00"], full_state(10))
    convert(tmp_path / "full", tmp_path / "back", "--convert_to_sharded", "--dp_size", "3")
    assert_equal(fc.restore(tmp_path / "back")["optimizer"], original)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--convert_to_sharded"], "needs --dp_size"),
        (["--convert_to_full", "--dp_size", "2"], "not for --convert_to_full"),
        (["--convert_to_sharded", "--dp_size", "0"], "above zero"),
        (["--convert_to_full", "--convert_to_sharded"], "not allowed with"),
        (
            ["--convert_to_full", "--dpsize", "2"],
            "did you mean --dp_size?",
        ),
        ([], "one of the arguments"),
    ],
)
def test_wrong_flags_write_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    write_tag(tmp_path / "tag", 2)
    convert(tmp_path / "tag", tmp_path / "out", *flags, code=2)
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["tag"]


def test_bad_input_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tag(tmp_path / "tag", 3)
    before = read_tag(tmp_path / "tag")

    def refused(message: str, *flags: str, code: int, out: str = "out") -> None:
        convert(tmp_path / "tag", tmp_path / out, *(flags or ("--convert_to_full",)), code=code)
        assert message in capsys.readouterr().err
        assert {path.name for path in tmp_path.iterdir()} == {"tag"}

    refused("overlap", code=2, out="tag")
    refused("overlap", code=2, out="tag/optim/new")
    assert_equal(read_tag(tmp_path / "tag"), before)
    optim = tmp_path / "tag" / "optim"
    (optim / "dp_rank_01_tp_rank_01_pp_rank_00.pt").rename(tmp_path / "tag" / "away")
    refused("missing: dp_rank_01_tp_rank_01_pp_rank_00", code=1)
    (tmp_path / "tag" / "away").rename(optim / "dp_rank_01_tp_rank_01_pp_rank_00.pt")
    for tp in range(2):  # leftovers of a run of another size are detected by their shapes
        (optim / f"dp_rank_02_tp_rank_{tp:02d}_pp_rank_00.pt").unlink()
    refused("do not make up the shape", code=1)
    torch.save(torch.nn.Linear(2, 2), optim / "dp_rank_00_tp_rank_00_pp_rank_00.pt")
    refused("pickled object, torch.nn.modules.linear.Linear", code=2)


def test_a_merged_state_is_not_merged_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tag(tmp_path / "tag", 2)
    convert(tmp_path / "tag", tmp_path / "full", "--convert_to_full")
    convert(tmp_path / "full", tmp_path / "twice", "--convert_to_full", code=2)
    assert "merged already" in capsys.readouterr().err
    assert not (tmp_path / "twice").exists()


def test_tensors_that_xser_put_into_files_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch_xla is not here: its class, under the name that its files carry
    name = "torch_xla.utils.serialization"
    for each in ("torch_xla", "torch_xla.utils", name):
        monkeypatch.setitem(sys.modules, each, types.ModuleType(each))
    reference = type("TensorReference", (), {"__module__": name})
    monkeypatch.setattr(sys.modules[name], "TensorReference", reference, raising=False)
    made = reference()
    made.tid = 0
    model = tmp_path / "tag" / "model"
    file = model / "dp_rank_00_tp_rank_00_pp_rank_00.pt"
    (model / f"{file.name}.tensors").mkdir(parents=True)
    torch.save({"w": made, "n": 1}, file)
    torch.save(torch.arange(4.0), model / f"{file.name}.tensors" / "tensor_0.pt")
    for each in ("torch_xla", "torch_xla.utils", name):
        monkeypatch.delitem(sys.modules, each)
    assert_equal(fc.interop.open(tmp_path / "tag")["model"], {"w": torch.arange(4.0), "n": 1})


def test_a_tag_whose_saving_did_not_end_is_refused(tmp_path: Path) -> None:
    write_tag(tmp_path / "tag", 2)
    (tmp_path / "tag" / "checkpoint").write_text("1")
    with pytest.raises(errors.CorruptCheckpointError, match="saving it did not end"):
        fc.interop.open(tmp_path / "tag")
    (tmp_path / "tag" / "done").write_text("1")
    torch.save({"total_steps": 7}, tmp_path / "tag" / "user_content.pt")
    source = fc.interop.open(tmp_path / "tag")
    assert list(source) == ["optimizer", "user_content"]
    assert source["user_content"] == {"total_steps": 7}


def test_the_outcome_of_a_conversion_is_written_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tag(tmp_path / "tag", 2, tp_size=3)
    convert(tmp_path / "tag", tmp_path / "full", "--convert_to_full", "--json")
    assert json.loads(capsys.readouterr().out) == {
        "schema": "fckpt.convert_zero/1",
        "path": str(tmp_path / "full"),
        "num_states": 3,
    }


def test_a_step_in_a_store_is_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bucket = f"memory://bucket-{uuid.uuid4().hex[:8]}"
    write_tag(tmp_path / "tag", 2, tp_size=1)
    fc.save(f"{bucket}/step", fc.interop.open(tmp_path / "tag"))
    full = ["--convert_to_full"]
    arguments = ["convert_zero", "--input_dir", f"{bucket}/step", "--output_dir", f"{bucket}/full"]
    assert main([*arguments, *full]) == 0
    (state,) = fc.restore(f"{bucket}/full")["optimizer"].values()
    assert_equal(state["base_state"], full_state(0)["base_state"])
    arguments = ["convert_zero", "--input_dir", str(tmp_path / "tag"), "--output_dir"]
    assert main([*arguments, f"{bucket}/tag", *full]) == 2
    assert "local paths only" in capsys.readouterr().err
