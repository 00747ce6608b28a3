"""Calls of ColossalAI's, neuronx-distributed's and Composer's users, by their own documents.

A test is a row of docs/parity.md, of the same number: their call stands in its docstring.
"""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import features_jobs
import pytest
import torch
from features_jobs import make, train
from gloo_workers import Workers

import functional_ckpt as fc
from functional_ckpt import errors, policies
from functional_ckpt.cli import main
from functional_ckpt.testing import equality

HF = fc.interop.huggingface


@pytest.fixture(autouse=True)
def _in_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def bucket() -> str:
    return f"memory://bucket-{uuid.uuid4().hex[:8]}"


class Run:
    """A model, its optimizer and its schedule."""

    def __init__(self, seed: int = 0) -> None:
        self.model = make()
        if seed:
            torch.nn.init.normal_(self.model[0].weight)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2)
        self.items = {
            "model": self.model,
            "optimizer": fc.Optimizer(self.optimizer, self.model),
            "scheduler": self.scheduler,
        }

    def train(self, step: int = 0) -> None:
        train(self.model, self.optimizer, step)
        self.scheduler.step()

    def state(self) -> Any:
        parts = (self.model, self.optimizer, self.scheduler)
        return [dict(part.state_dict()) for part in parts]

    def check_same(self, other: Run) -> None:
        self.optimizer.zero_grad(), other.optimizer.zero_grad()
        assert equality.differences(self.state(), other.state()) == []


@pytest.fixture
def trained() -> Run:
    run = Run()
    run.train()
    return run


# ------------------------------------------------------------------------------------ ColossalAI


def test_row_01_save_model(trained: Run) -> None:
    """`booster.save_model(model, checkpoint, shard=True, size_per_shard=...)`."""
    HF.save(trained.model, "model", max_shard_size=150)
    assert len(list(Path("model").glob("model-*-of-*.safetensors"))) > 1
    HF.save(trained.model, "one.safetensors")  # shard=False: a single file
    assert Path("one.safetensors").is_file()
    for path in ("model", "one.safetensors"):
        with pytest.raises(errors.StepExistsError):
            HF.save(trained.model, path)
        HF.save(trained.model, path, overwrite=True)
        other = Run(1)
        fc.restore(path, {"model": other.model})
        assert torch.equal(other.model[0].weight, trained.model[0].weight)


def test_row_02_from_pretrained_opens_it() -> None:
    """`use huggingface from_pretrained method to load model from our sharded checkpoint`."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    for format in ("safetensors", "bin"):
        HF.save(model, format, max_shard_size="4KB", format=format)
        loaded = transformers.LlamaForCausalLM.from_pretrained(format)
        expected = dict(model.state_dict())
        assert equality.differences(dict(loaded.state_dict()), expected) == []


def test_row_03_prefix_is_of_the_keys(trained: Run) -> None:
    """`booster.save_model(model, checkpoint, prefix="net.")`: the keys, not the files' names."""
    HF.save(trained.model, "model", key_prefix="net.")
    assert set(fc.interop.open("model")["model"]) == {
        f"net.{n}" for n in trained.model.state_dict()
    }
    other = Run(1)
    fc.restore("model", {"model": other.model}, key_map=[(r"model\.net\.", "model.")])
    assert torch.equal(other.model[0].weight, trained.model[0].weight)


def test_row_04_load_model_finds_the_format_and_is_strict(trained: Run) -> None:
    """`booster.load_model(model, checkpoint, strict=True)`."""
    HF.save(trained.model, "dir", max_shard_size=150)
    torch.save(trained.model.state_dict(), "file.pt")
    for path in ("dir", "file.pt"):
        other = Run(1)
        fc.restore(path, {"model": other.model})
        assert torch.equal(other.model[0].weight, trained.model[0].weight)
        wrong = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        with pytest.raises(errors.MismatchError):
            fc.restore(path, {"model": wrong})
        report = fc.restore(path, {"model": wrong}, strict=False).report
        assert len(report.mismatched) == 2 and not report.missing


def test_row_05_optimizers_of_its_own_and_of_files(trained: Run) -> None:
    """`booster.save_optimizer(optimizer, path, shard=True)`, `booster.load_optimizer`."""
    fc.save("optimizer", {"optimizer": trained.items["optimizer"]})
    torch.save({"optimizer": trained.optimizer.state_dict()}, "optimizer.bin")
    for path in ("optimizer", "optimizer.bin"):
        other = Run(1)
        fc.restore(path, {"optimizer": other.items["optimizer"]})
        expected, got = (run.optimizer.state_dict() for run in (trained, other))
        assert equality.differences(got, expected) == []


def test_row_06_lr_schedulers(trained: Run) -> None:
    """`booster.save_lr_scheduler(lr_scheduler, path)`, `booster.load_lr_scheduler`."""
    fc.save("lr_scheduler", {"scheduler": trained.scheduler})
    other = Run()
    fc.restore("lr_scheduler", {"scheduler": other.scheduler})
    assert other.scheduler.state_dict() == trained.scheduler.state_dict()


def test_row_07_a_model_built_without_memory_is_loaded(trained: Run) -> None:
    """`with LazyInitContext(): model = Model(config)`; boost; `booster.load(model, model_dir)`."""
    HF.save(trained.model, "model_dir")
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    fc.restore("model_dir", {"model": model})
    train(model, optimizer, 3)
    train(trained.model, torch.optim.AdamW(trained.model.parameters(), lr=0.01), 3)
    assert torch.equal(model[0].weight, trained.model[0].weight)


def test_row_08_another_parallel_strategy(workers: Workers, tmp_path: Path) -> None:
    """`when loading, you are not demanded to use the same parallel strategy as saving`."""
    workers.run(2, features_jobs.fsdp, tmp_path / "run")
    one, whole = Run(1), Run()
    for step in range(2):
        train(whole.model, whole.optimizer, step)
    with fc.CheckpointManager("run") as manager:
        manager.restore(1, {name: one.items[name] for name in ("model", "optimizer")})
    for mine, theirs in zip(one.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert len(one.optimizer.state) == 4


def test_row_09_save_checkpoint_with_its_epoch(trained: Run) -> None:
    """`save_checkpoint("vit.pt", epoch, model, optimizer, lr_scheduler)`, `load_checkpoint`."""
    fc.save("vit.pt", {**trained.items, "epoch": fc.Json(7)})
    other = Run(1)
    restored = fc.restore("vit.pt", {**other.items, "epoch": fc.Json()})
    assert restored["epoch"] == 7
    other.check_same(trained)


def test_row_10_a_hook_saves_each_interval(trained: Run) -> None:
    """`hooks.SaveCheckpointHook(1, "vit.pt", model)`."""
    with fc.CheckpointManager("vit", save_policy=policies.every(2)) as manager:
        hook = fc.hooks.SaveHook(manager, trained.items)
        for step in range(1, 6):
            hook(step)
        manager.wait_until_finished()
        assert manager.all_steps() == [2, 4]


# ------------------------------------------------------------------------------------ neuronx


def nxd(directory: str = "checkpoint_dir", **options: Any) -> fc.CheckpointManager:
    named = fc.step_names.StepName(prefix="step")
    return fc.CheckpointManager(directory, step_name=named, **options)


def test_row_11_save_checkpoint_with_any_parts(trained: Run) -> None:
    """`nxd.save_checkpoint(dir, tag=f"step_{n}", model=..., ..., user_content={...})`."""
    user = {"total_steps": 10, "batch_idx": 3, "cli_args": {"lr": 0.1, "dtype": "bf16"}}
    with nxd() as manager:
        manager.save(10, {**trained.items, "user_content": fc.Json(user)})
        manager.save(20, {"model": trained.model})
    assert {path.name for path in Path("checkpoint_dir").glob("step_*")} == {"step_10", "step_20"}
    other = Run(1)
    with nxd() as manager:
        restored = manager.restore(10, {**other.items, "user_content": fc.Json()})
    assert restored["user_content"] == user
    other.check_same(trained)


def test_row_12_no_tag_is_the_latest_complete_one(trained: Run) -> None:
    """`nxd.load_checkpoint(dir, model=...)`, without a tag."""
    with nxd() as manager:
        for step in (10, 20):
            manager.save(step, {"model": trained.model, "n": {"n": step}})
    os.mkdir("copy")
    for name in ("step_20", "step_10"):  # copied backwards: times say nothing
        shutil.copytree(f"checkpoint_dir/{name}", f"copy/{name}")
    os.mkdir("copy/step_30.orbax-checkpoint-tmp")
    with nxd("copy") as manager:
        assert manager.restore()["n"] == {"n": 20}


def test_row_13_user_content_is_none_where_there_is_none(trained: Run) -> None:
    """`if no user contents detected, it will return None`."""
    fc.save("step", {"model": trained.model})
    assert fc.restore("step").get("user_content") is None


def test_row_14_each_byte_is_written_once(workers: Workers, tmp_path: Path) -> None:
    """`states are saved on all ranks` with ZeRO-1, the model by one replica."""
    sizes = workers.run(2, features_jobs.zero, tmp_path / "run")
    with fc.CheckpointManager("run", read_only=True) as manager:
        restored = manager.restore(0)
    assert restored["user"] == {"total_steps": 1}
    assert len(restored["optimizer"]["state"]) == 4
    num_arrays = sum(p.numel() for p in make().parameters()) * 4 * 3
    assert sizes[0] < num_arrays + 40_000


def test_row_15_async_save_is_of_the_moment_of_the_call(trained: Run) -> None:
    """`nxd.save_checkpoint(..., async_save=True)`: complete without another save."""
    with nxd() as manager:
        before = trained.model[0].weight.detach().clone()
        commit = manager.save(1, trained.items)
        trained.train()
        assert commit is not None
        commit.result()
        assert torch.equal(manager.restore(1)["model"]["0.weight"], before)


def test_row_16_num_kept_ckpts(trained: Run) -> None:
    """`num_kept_ckpts=5`; 0 would keep none."""
    with nxd(keep_policy=policies.LatestN(5)) as manager:
        for step in range(8):
            manager.save(step, {"model": trained.model})
        manager.wait_until_finished()
        assert manager.all_steps() == [3, 4, 5, 6, 7]
    with pytest.raises(errors.UsageError):
        nxd("other", keep_policy=policies.LatestN(0))


def test_row_17_zero_1_states_are_converted_offline(capsys: pytest.CaptureFixture[str]) -> None:
    """`nxd_convert_zero_checkpoints --input_dir I --output_dir O --convert_to_sharded ...`."""
    flags = ["convert_zero", "--input_dir", "in", "--output_dir"]
    for wrong in (["out"], ["out", "--convert_to_sharded"], ["out", "--convert_to_full", "--x"]):
        assert main([*flags, *wrong]) == 2
    assert not Path("out").exists()
    capsys.readouterr()
    # tests/interop/test_zero.py converts real layouts in every direction.


# ------------------------------------------------------------------------------------ Composer


def fit(run: Run, folder: str, num_epochs: int, num_batches: int = 4, **options: Any) -> list[int]:
    """`Trainer(..., save_folder=folder, max_duration=f"{num_epochs}ep").fit()`: the steps kept."""
    options = {"save_policy": policies.every("1ep"), **options}
    with fc.CheckpointManager(folder, **options) as manager:
        restored = manager.restore_or(run.items)
        progress = restored.progress or fc.Progress(max_duration=f"{num_epochs}ep")
        manager.check_start(progress.batch + 1)
        while progress.epoch < num_epochs:
            for _ in range(num_batches):
                run.train()
                progress = progress.next_batch(samples=8)
                if progress.batch_in_epoch < num_batches:
                    manager.save(progress.batch, run.items, progress=progress)
            progress = progress.next_epoch()
            is_end = progress.epoch == num_epochs
            manager.save(progress.batch, run.items, progress=progress, force=is_end)
        manager.wait_until_finished()
        return manager.all_steps()


NAMES = fc.step_names.StepTemplate(template="ep{epoch}-ba{batch}")


def test_row_18_names_with_variables() -> None:
    """`save_filename="ep{epoch}-ba{batch}"`; an unknown variable is an error."""
    assert fit(Run(), "checkpoints", 2, step_name=NAMES) == [4, 8]
    names = {path.name for path in Path("checkpoints").glob("ep*")}
    assert names == {"ep1-ba4", "ep2-ba8"}
    with pytest.raises(errors.UsageError, match="epohc"):
        fc.step_names.StepTemplate(template="ep{epohc}-ba{batch}")


def test_row_19_latest_is_a_link_to_the_newest() -> None:
    """`save_latest_filename="latest"`."""
    fit(Run(), "checkpoints", 2, step_name=NAMES, latest_link="latest")
    assert os.readlink("checkpoints/latest") == "ep2-ba8"
    assert "model" in fc.restore("checkpoints/latest")


@pytest.mark.parametrize(
    ("interval", "steps"),
    [
        (policies.every("1ep"), [4, 8, 12]),
        (policies.every("2ep"), [8, 12]),
        (policies.every("5ba"), [5, 10, 12]),
        (policies.When(lambda info: info.progress.epoch > 1), [8, 9, 10, 11, 12]),
    ],
    ids=["1ep", "2ep", "5ba", "function"],
)
def test_row_20_save_interval(interval: Any, steps: list[int]) -> None:
    """`save_interval="1ep"`, `"500ba"`, a function; the end of the training is always saved."""
    assert fit(Run(), "checkpoints", 3, save_policy=interval) == steps


def test_row_21_time_strings() -> None:
    """`"10ep"`, `"500ba"`, `"3e4tok"`, `"0.25dur"`, `"1h20m40s"`; and `"24h"`, `"90m"`."""
    for text in ("10ep", "500ba", "3e4tok", "0.25dur", "90sec", "1h20m40s", "24h", "90m", "2EP"):
        policies.every(text)
    with pytest.raises(errors.UsageError):
        policies.every("2epoch")


def test_row_22_without_overwrite_a_run_does_not_begin_over_later_steps() -> None:
    """`save_overwrite=False`."""
    fit(Run(), "checkpoints", 2)
    with fc.CheckpointManager("checkpoints") as manager, pytest.raises(errors.StepExistsError):
        manager.check_start(1)
    with fc.CheckpointManager("checkpoints", overwrite=True) as manager:
        manager.check_start(1)


def test_row_23_full_and_weights_only_checkpoints(trained: Run) -> None:
    """`callbacks=[CheckpointSaver(folder="full", ...), CheckpointSaver(weights_only=True)]`."""
    with (
        fc.CheckpointManager("full", save_policy=policies.every(5), keep_policy=1) as full,
        fc.CheckpointManager("weights_only", save_policy=policies.every(2)) as weights,
    ):
        for step in range(1, 11):
            full.save(step, trained.items)
            weights.save(step, {"model": trained.model})
        for manager in (full, weights):
            manager.wait_until_finished()
        assert full.all_steps() == [10]
        assert weights.all_steps() == [2, 4, 6, 8, 10]
    other = Run(1)
    report = fc.restore("weights_only/10", other.items, strict=False).report
    assert torch.equal(other.model[0].weight, trained.model[0].weight)
    assert report.missing


def test_row_24_none_is_kept_locally_once_it_is_uploaded(bucket: str) -> None:
    """`save_num_checkpoints_to_keep=0` beside a remote folder, whose steps stay."""
    keep = policies.LatestN(0)
    with fc.CheckpointManager("local", keep_policy=keep, tiers=[bucket]) as manager:
        for step in range(3):
            manager.save(step, {"model": make()})
        manager.wait_until_finished()
        assert manager.all_steps() == [0, 1, 2]
        assert "model" in manager.restore(1)
    assert not [path for path in Path("local").iterdir() if path.name.isdigit()]


def test_row_25_the_anatomy_of_a_checkpoint(trained: Run) -> None:
    """`list(state_dict["state"])`: model, optimizers ... rng."""
    scaler = torch.amp.GradScaler("cpu")
    state = {
        **trained.items,
        "scaler": scaler,
        "rank_zero_seed": {"seed": 17},
        "run_name": fc.Json("run"),
        "metadata_of_run": fc.Json({"version": 1}),
        "rng": fc.Rng(),
    }
    with fc.CheckpointManager("run") as manager:
        progress = fc.Progress(epoch=1, batch=4, sample=32)
        manager.save(4, state, progress=progress, metrics={"accuracy": torch.tensor(0.5)})
        drawn = torch.rand(2)
        restored = manager.restore(4, state)
    assert torch.equal(torch.rand(2), drawn)
    assert restored.progress == progress
    assert restored.metrics == {"accuracy": 0.5}


def test_row_26_incompatible_objects_are_an_error(trained: Run) -> None:
    """`an error will be raised if the weights or state are not compatible with these objects`."""
    fc.save("ep25", trained.items)
    sgd = torch.optim.SGD(trained.model.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(errors.MismatchError, match="AdamW"):
        fc.restore("ep25", {"optimizer": fc.Optimizer(sgd, trained.model)})
    assert sgd.param_groups[0]["lr"] == 0.1
    wrong = torch.nn.Sequential(torch.nn.Linear(4, 9))
    with pytest.raises(errors.MismatchError):
        fc.restore("ep25", {"model": wrong})


def test_row_27_fine_tuning_takes_the_weights_that_fit(trained: Run) -> None:
    """`load_weights_only=True, load_strict_model_weights=False`."""
    fc.save("ep50", trained.items)
    finer = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 7))
    report = fc.restore("ep50", {"model": finer}, strict=False).report
    assert torch.equal(finer[0].weight, trained.model[0].weight)
    assert len(report.mismatched) == 2


def test_row_28_keys_to_ignore(trained: Run) -> None:
    """`load_ignore_keys=["state/model/2*"]`; a key without a match is an error."""
    fc.save("ep1", trained.items)
    other = Run(1)
    own = other.model[2].weight.detach().clone()
    other.model[2].weight.data.add_(1)
    fc.restore("ep1", {"model": other.model}, ignore="model.2.*")
    assert torch.equal(other.model[2].weight, own + 1)
    assert torch.equal(other.model[0].weight, trained.model[0].weight)
    with pytest.raises(errors.UsageError):
        fc.restore("ep1", {"model": other.model}, ignore="model.layers.*")


def test_row_29_weights_outside_a_trainer(trained: Run) -> None:
    """`model.load_state_dict(torch.load(path)["state"]["model"])`."""
    fc.save("ep1", trained.items)
    other = make()
    other.load_state_dict(fc.restore("ep1", only="model")["model"])
    assert torch.equal(other[0].weight, trained.model[0].weight)
    assert main(["export", "ep1", "weights.pt", "--to", "torch", "--item", "model"]) == 0
    other.load_state_dict(torch.load("weights.pt", weights_only=True))


def test_row_30_steps_are_uploaded(bucket: str) -> None:
    """`save_folder="s3://my_bucket/checkpoints"`: written locally, then uploaded."""
    assert fit(Run(), "local", 2, tiers=[f"{bucket}/checkpoints"]) == [4, 8]
    shutil.rmtree("local")
    assert "model" in fc.restore(f"{bucket}/checkpoints/8")


def test_row_31_names_in_the_bucket_are_the_uri_s(bucket: str) -> None:
    """`save_remote_file_name`: the path in the URI, and the step's name."""
    fit(Run(), "local", 1, step_name=NAMES, tiers=[f"{bucket}/run/checkpoints"])
    assert "model" in fc.restore(f"{bucket}/run/checkpoints/ep1-ba4")


def test_row_32_loading_by_uri(bucket: str, trained: Run) -> None:
    """`load_path="s3://checkpoint-debugging/checkpoints/ep1.pt"`."""
    fc.save(f"{bucket}/checkpoints/ep1", trained.items)
    other = Run(1)
    fc.restore(f"{bucket}/checkpoints/ep1", other.items)
    other.check_same(trained)


def test_row_33_sharded_checkpoints_are_elastic(workers: Workers, tmp_path: Path) -> None:
    """Sharded FSDP checkpoints: saved by two ranks, gone on with by one."""
    workers.run(2, features_jobs.fsdp, tmp_path / "run")
    workers.run(
        1, features_jobs.fsdp, tmp_path / "run"
    )  # nothing is left to do: it resumes at the end
    with fc.CheckpointManager("run", read_only=True) as manager:
        assert manager.all_steps() == [0, 1]


def test_row_34_autoresume(caplog: pytest.LogCaptureFixture) -> None:
    """`autoresume=True`: the decision is logged, and a lost link does not restart the run."""
    with caplog.at_level(logging.INFO, logger="functional_ckpt"):
        assert fit(Run(), "run", 1, latest_link="latest") == [4]
        os.unlink("run/latest")
        resumed = Run(1)
        assert fit(resumed, "run", 2, latest_link="latest") == [4, 8]
    assert resumed.scheduler.last_epoch == 8
    assert "step 4" in caplog.text
    assert os.readlink("run/latest") == "8"
