"""`restore_or`: damaged steps, a fallback checkpoint, missing items, and the next save."""

from pathlib import Path
from typing import Any

import pytest
import torch

import functional_ckpt as fc
from functional_ckpt import errors


def program() -> dict[str, Any]:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    extra = {"config": fc.Json({"lr": 1}), "ema": average(0)}
    return fc.training_items(model, optimizer, scheduler=scheduler, extra=extra)


def average(step: int) -> dict[str, torch.Tensor]:
    return {"w": torch.arange(600.0) + step}


def save(run: Path, steps: int, **arguments: Any) -> dict[str, Any]:
    items = program()
    with fc.CheckpointManager(run, **arguments) as manager:
        for step in range(steps):
            items["ema"] = average(step)
            manager.save(step, items)
    return items


def damage(run: Path, step: int) -> None:
    """Flips a bit of the step's `ema`."""
    pattern = average(min(step, 2))["w"].numpy().tobytes()[-64:]
    (path,) = [
        path
        for path in (run / str(step) / "ema").rglob("*")
        if path.is_file() and pattern in path.read_bytes()
    ]
    data = bytearray(path.read_bytes())
    data[data.index(pattern)] ^= 1
    path.write_bytes(data)


def test_an_error_after_a_damaged_step_says_that_the_target_was_written_into(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(600))
    model = torch.nn.ParameterDict({"w": weight})
    with fc.CheckpointManager(tmp_path) as manager:
        manager.save(0, {"first": torch.nn.Linear(3, 2)})
        with torch.no_grad():
            weight.copy_(average(1)["w"])
        manager.save(1, {"first": torch.nn.Linear(3, 2), "ema": model})
    damage(tmp_path, 1)
    with fc.CheckpointManager(tmp_path, read_only=True) as manager:
        first = torch.nn.Linear(3, 2)
        before = first.weight.detach().clone()
        with pytest.raises(errors.StepNotFoundError, match="earlier attempt modified") as found:
            manager.restore_or({"first": first, "ema": model}, on_corrupt="older")
        assert found.value.touched and not torch.equal(before, first.weight)


def test_a_damaged_step_is_passed_over_only_when_asked(tmp_path: Path) -> None:
    save(tmp_path, 3)
    damage(tmp_path, 2)
    damage(tmp_path, 1)
    events: list[fc.Event] = []
    with fc.CheckpointManager(tmp_path, overwrite=True, on_event=events.append) as manager:
        items = program()
        with pytest.raises(errors.CorruptCheckpointError):
            manager.restore_or(items)
        restored = manager.restore_or(items, on_corrupt="older")
        assert (restored.step, restored.next_step) == (0, 1)
        assert torch.equal(restored["ema"]["w"], average(0)["w"])
        assert [(event.kind, event.step) for event in events] == [("skipped", 2), ("skipped", 1)]
        assert manager.all_steps() == [0, 1, 2], "nothing is removed"
        manager.save(1, restored.over(items))
        manager.wait_until_finished()
        assert manager.latest_step() == 1
    with fc.CheckpointManager(tmp_path) as manager:
        assert manager.restore_or(program()).step == 1


@pytest.mark.parametrize("strict", [True, False])
def test_no_step_is_intact(tmp_path: Path, strict: bool) -> None:
    save(tmp_path, 2)
    damage(tmp_path, 0)
    damage(tmp_path, 1)
    with fc.CheckpointManager(tmp_path) as manager:
        with pytest.raises(errors.CorruptCheckpointError) as caught:
            manager.restore_or(program(), on_corrupt="older", strict=strict)
        assert caught.value.step == 0
        assert strict or not caught.value.touched
        with pytest.raises(errors.UsageError, match="on_corrupt must be 'raise' or 'older'"):
            manager.restore_or(program(), on_corrupt="newer")  # type: ignore[arg-type]


def test_an_abandoned_step_is_no_older_step(tmp_path: Path) -> None:
    items = save(tmp_path, 3)
    with fc.CheckpointManager(tmp_path) as manager:
        manager.restore(0, into=items)
        manager.save(7, items)
    damage(tmp_path, 7)
    with fc.CheckpointManager(tmp_path) as manager:
        assert manager.restore_or(program(), on_corrupt="older").step == 0


def test_fallback_is_restored_only_where_there_is_no_step(tmp_path: Path) -> None:
    items = program()
    with torch.no_grad():
        items["model"].weight.fill_(7)
    fc.save(tmp_path / "pretrained", {"model": items["model"]})
    run, pretrained = tmp_path / "run", tmp_path / "pretrained"
    with fc.CheckpointManager(run) as manager:
        own = program()
        with pytest.raises(errors.StepNotFoundError, match="has no item 'optimizer'"):
            manager.restore_or(own, fallback=pretrained)
        restored = manager.restore_or(own, fallback=pretrained, strict=False)
        assert (restored.step, restored.next_step) == (None, 0)
        assert own["model"].weight[0, 0] == 7
        assert "optimizer" in restored.report.missing
        assert restored["optimizer"] is own["optimizer"].value
        with torch.no_grad():
            own["model"].weight.fill_(3)
        manager.save(0, restored.over(own))
    with fc.CheckpointManager(run) as manager:
        again = program()
        assert manager.restore_or(again, fallback=pretrained).step == 0
        assert again["model"].weight[0, 0] == 3


def test_strict_false_keeps_an_item_that_the_step_lacks(tmp_path: Path) -> None:
    save(tmp_path / "run", 1)
    items = {**program(), "added": {"x": 1}}
    with fc.CheckpointManager(tmp_path / "run") as manager:
        with pytest.raises(errors.StepNotFoundError, match="strict=False"):
            manager.restore(into=items)
        restored = manager.restore(into=items, strict=False)
        assert restored.report.missing == ("added",)
        assert restored["added"] == {"x": 1}
        with pytest.raises(errors.StepNotFoundError, match="has no item 'others'"):
            manager.restore(into={"others": 1}, strict=False)


def test_restored_with_defaults_is_accepted_by_save(tmp_path: Path) -> None:
    items = save(tmp_path, 2)
    with fc.CheckpointManager(tmp_path) as manager:
        fresh = program()
        following = manager.restore_or(fresh).over(fresh)
        assert following.keys() == items.keys()
        assert torch.equal(following["ema"]["w"], average(1)["w"])
        assert following["optimizer"] == fresh["optimizer"]
        assert following["config"] == fc.Json({"lr": 1})
        manager.save(2, following)
    assert fc.metadata(tmp_path / "2").items["config"] == {"lr": 1}


def test_over_keeps_the_options_of_items_below_others() -> None:
    model = torch.nn.Linear(1, 1)
    given = {"nets": {"g": fc.Module(model, only="w*"), "scale": 1.0, "all": [fc.Json(1)]}}
    restored = fc.Restored({"nets": {"g": model, "scale": 2.0, "all": [3]}})
    following = {"g": fc.Module(model, only="w*"), "scale": 2.0, "all": [fc.Json(3)]}
    assert restored.over(given) == {"nets": following}


def test_path_of_a_step_is_where_it_is_restored_from(tmp_path: Path) -> None:
    names = fc.step_names.StepName(prefix="step", zero_pad=4)
    save(tmp_path, 2, step_name=names)
    with fc.CheckpointManager(tmp_path, step_name=names, read_only=True) as manager:
        assert manager.path(1) == str(tmp_path / "step_0001")
        restored = fc.restore(manager.path(1))
        assert (restored.step, restored.next_step) == (1, 2)
        with pytest.raises(errors.StepNotFoundError):
            manager.path(5)


def test_a_directory_of_steps_names_them(tmp_path: Path) -> None:
    save(tmp_path, 2)
    with pytest.raises(errors.CheckpointError, match=r"directory of steps \(0, 1\).*/1, or use"):
        fc.restore(tmp_path)


@pytest.mark.parametrize("name", ["{run_name}/steps", "runs/{rank}"])
def test_variables_in_a_directory_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(errors.UsageError, match="which is not replaced"):
        fc.CheckpointManager(tmp_path / name)
    with pytest.raises(errors.UsageError, match=r"latest_link='latest-rank\{rank\}'"):
        fc.CheckpointManager(tmp_path / "run", latest_link="latest-rank{rank}")
    with pytest.raises(errors.UsageError, match=r"tiers='s3://bucket/\{run_name\}'"):
        fc.CheckpointManager(tmp_path / "run", tiers=["s3://bucket/{run_name}"])
    with pytest.raises(errors.UsageError, match=r"path='.*\{run_name\}.*' contains"):
        fc.save(tmp_path / name.replace("rank", "run_name"), {"x": 1})
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_was_just_saved_is_saved_again_by_force(tmp_path: Path) -> None:
    items = program()
    with fc.CheckpointManager(tmp_path, save_policy=fc.policies.every(2)) as manager:
        assert manager.save(4, items)
        commit = manager.save(4, items, force=True)
        assert commit is not None and commit.result() == 4
        assert manager.all_steps() == [4]


def test_training_items_refuse_objects_without_state() -> None:
    model = torch.nn.Linear(1, 1)
    loader = torch.utils.data.DataLoader([1, 2])
    with pytest.raises(errors.UsageError, match=r"loader: .*StatefulDataLoader"):
        fc.training_items(model, loader=loader)
    with pytest.raises(errors.UsageError, match="extra repeats the names rng"):
        fc.training_items(model, extra={"rng": fc.Rng()})
    assert list(fc.training_items(model, scaler=torch.amp.GradScaler("cpu"))) == [
        "model",
        "scaler",
        "rng",
    ]
