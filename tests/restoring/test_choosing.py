"""Partial restores: ignore=, key_map=, other heads, restore_or."""

from __future__ import annotations

import copy
import logging
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from managing import looked_into, saved, state
from torch import nn

import functional_ckpt as fc
from functional_ckpt import errors


def classifier(num_classes: int, body: str = "encoder") -> nn.Module:
    layers = [(body, nn.Linear(3, 4)), ("norm", nn.BatchNorm1d(4)), ("head", nn.Linear(4, 2))]
    model = nn.Sequential(OrderedDict(layers))
    model.head = nn.Linear(4, num_classes)
    return model


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, nn.Module]:
    torch.manual_seed(1)
    model = classifier(2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(8, 3)).square().mean().backward()
    optimizer.step()
    items = {
        "model": model,
        "optimizer": fc.Optimizer(optimizer, model),
        "config": fc.Json({"lr": 1e-3}),
    }
    with fc.CheckpointManager(tmp_path / "run") as manager:
        manager.save(5, items, progress=fc.Progress(batch=5))
    return tmp_path / "run", model


def values(module: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(module.state_dict())


def check_only(module: nn.Module, before: dict[str, torch.Tensor], source: nn.Module) -> set[str]:
    """Every tensor is either as it was or as in the source; returns the names of the latter."""
    theirs = source.state_dict()
    taken: set[str] = set()
    for name, value in module.state_dict().items():
        if name in theirs and torch.equal(value, theirs[name]):
            taken.add(name)
        else:
            assert torch.equal(value, before[name]), name
    return taken


# ------------------------------------------------------------------------------------ ignore


def test_fine_tuning_onto_another_head(trained: tuple[Path, nn.Module]) -> None:
    run, source = trained
    model = classifier(7)
    before = values(model)
    with looked_into(run) as manager:
        with pytest.raises(errors.MismatchError) as caught:
            manager.restore(5, {"model": model})
        assert len(caught.value.mismatched) == 2
        assert check_only(model, before, source) == {"norm.num_batches_tracked"} - {
            name for name in before if not torch.equal(before[name], source.state_dict()[name])
        } or not check_only(model, before, source)

        restored = manager.restore(5, {"model": model}, ignore="model.head.*")
    assert not restored.report
    taken = check_only(model, before, source)
    assert {"encoder.weight", "encoder.bias", "norm.running_mean"} <= taken
    assert not any(name.startswith("head") for name in taken)


def test_not_strict_restore_reports_differences(trained: tuple[Path, nn.Module]) -> None:
    run, source = trained
    model = classifier(7)
    model.extra = nn.Linear(2, 2)
    del model.norm
    before = values(model)
    with looked_into(run) as manager:
        restored = manager.restore(5, {"model": model}, strict=False)
    report = restored.report
    assert sorted(report.missing) == ["model['extra.bias']", "model['extra.weight']"]
    assert len(report.unexpected) == 5
    assert all(leaf.startswith("model['norm.") for leaf in report.unexpected)
    assert [line.split(":")[0] for line in report.mismatched] == [
        "model['head.weight']",
        "model['head.bias']",
    ]
    assert check_only(model, before, source) == {"encoder.weight", "encoder.bias"}


def test_ignored_leaves_may_be_on_either_side(trained: tuple[Path, nn.Module]) -> None:
    run, source = trained
    model = classifier(2)
    model.extra = nn.Linear(2, 2)
    del model.norm
    before = values(model)
    with looked_into(run) as manager:
        manager.restore(5, {"model": model}, ignore=["model.extra.*", "model.norm.*"])
        with pytest.raises(errors.MismatchError, match=r"extra\.weight"):
            manager.restore(5, {"model": model}, ignore="model.norm.*")
    assert {"encoder.weight", "head.bias"} <= check_only(model, before, source)


def test_ignored_items_and_functions(trained: tuple[Path, nn.Module]) -> None:
    run, source = trained
    model = classifier(2)
    with looked_into(run) as manager:
        restored = manager.restore(5, {"model": model, "config": None}, ignore="config")
        assert set(restored) == {"model"}
        restored = manager.restore(5, ignore=lambda name: name == "optimizer" or ".norm." in name)
    assert set(restored) == {"model", "config"}
    assert set(restored["model"]) == {"encoder.weight", "encoder.bias", "head.weight", "head.bias"}
    assert torch.equal(restored["model"]["head.bias"], source.state_dict()["head.bias"])


@pytest.mark.parametrize(
    "ignore", ["model.haed.*", ["model.head.*", "model.haed.*"], [], lambda name: False]
)
def test_ignore_without_a_match_raises(trained: tuple[Path, nn.Module], ignore: Any) -> None:
    run, source = trained
    model = classifier(2)
    before = values(model)
    with (
        looked_into(run) as manager,
        pytest.raises(errors.UsageError, match="matches no item and no leaf"),
    ):
        manager.restore(5, {"model": model}, ignore=ignore)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    del source


# ------------------------------------------------------------------------------------ key_map


@pytest.mark.parametrize(
    "key_map",
    [
        {"model.encoder": "model.backbone"},
        [(r"^model\.encoder\.", "model.backbone.")],
        lambda name: name.replace("model.encoder", "model.backbone"),
    ],
)
def test_a_module_whose_parts_have_other_names(
    trained: tuple[Path, nn.Module], key_map: Any
) -> None:
    run, source = trained
    model = classifier(2, body="backbone")
    with looked_into(run) as manager:
        with pytest.raises(errors.MismatchError, match=r"backbone\.weight"):
            manager.restore(5, {"model": model})
        manager.restore(5, {"model": model}, key_map=key_map)
        as_saved = manager.restore(5, only="model", key_map=key_map)["model"]
    assert torch.equal(model.backbone.weight, source.encoder.weight)
    assert torch.equal(model.head.weight, source.head.weight)
    assert torch.equal(as_saved["backbone.weight"], source.encoder.weight)


def test_new_names_are_what_only_and_ignore_see(trained: tuple[Path, nn.Module]) -> None:
    run, source = trained
    model = classifier(7, body="backbone")
    model.head2 = nn.Linear(4, 2)
    before = values(model)
    key_map = {"model.encoder": "model.backbone", "model.head": "model.head2"}
    with looked_into(run) as manager:
        manager.restore(5, {"model": model}, key_map=key_map, ignore="model.head.*")
        manager.restore(5, {"model": model}, key_map=key_map, only="model.backbone.*")
        with pytest.raises(errors.UsageError, match=r"'model\.haed' renames no leaf"):
            manager.restore(5, {"model": model}, key_map={"model.haed": "model.x"}, strict=False)
    assert torch.equal(model.head2.weight, source.head.weight)
    assert torch.equal(model.backbone.weight, source.encoder.weight)
    assert torch.equal(model.head.weight, before["head.weight"])


def test_one_checkpoint_without_steps(tmp_path: Path) -> None:
    fc.save(tmp_path / "one", {"tree": {"old": torch.ones(2), "rest": torch.zeros(2)}})
    restored = fc.restore(
        tmp_path / "one",
        {"tree": {"new": torch.zeros(2)}},
        key_map={"tree.old": "tree.new"},
        ignore="tree.rest",
    )
    assert torch.equal(restored["tree"]["new"], torch.ones(2))


# ------------------------------------------------------------------------------------ dtypes


def test_another_dtype_or_shape_is_a_mismatch_unless_asked_for(
    trained: tuple[Path, nn.Module],
) -> None:
    run, source = trained
    half = classifier(2).to(torch.float16)
    with looked_into(run) as manager:
        with pytest.raises(errors.MismatchError, match=re.escape("pass cast=True to convert")):
            manager.restore(5, {"model": half})
        manager.restore(5, {"model": half}, cast=True)
        assert torch.equal(half.head.weight, source.head.weight.half())
        with pytest.raises(errors.MismatchError, match=re.escape("float32[7, 4]")):
            manager.restore(5, {"model": classifier(7)}, cast=True)


# ------------------------------------------------------------------------------------ restore_or


def test_restore_or_starts_or_resumes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="functional_ckpt")
    model = classifier(2)
    items = {"model": model, "ema": {"x": torch.zeros(2)}, "config": fc.Json({"lr": 1})}
    with fc.CheckpointManager(tmp_path) as manager:
        begun = manager.restore_or(items)
        assert (begun.step, begun.next_step, begun.progress) == (None, 0, None)
        assert begun["ema"] is items["ema"]
        assert begun["model"] is model
        assert begun["config"] == {"lr": 1}
        assert not begun.report
        assert "no checkpoint found: starting from the initial values" in caplog.text
        items["ema"] = {"x": torch.ones(2)}
        manager.save(7, items, progress=fc.Progress(batch=8))
    caplog.clear()
    weight = model.head.weight.detach().clone()
    model.head.weight.data.zero_()
    with fc.CheckpointManager(tmp_path) as manager:
        gone_on = manager.restore_or({**items, "ema": {"x": torch.zeros(2)}})
        assert (gone_on.step, gone_on.next_step) == (7, 8)
        assert gone_on.progress == fc.Progress(batch=8)
        assert torch.equal(gone_on["ema"]["x"], torch.ones(2))
        assert torch.equal(model.head.weight, weight)
        assert "resuming from step 7 (latest of 1)" in caplog.text


def test_restore_or_takes_what_restore_takes(trained: tuple[Path, nn.Module]) -> None:
    run, source = trained
    model = classifier(7)
    with looked_into(run) as manager:
        with pytest.raises(errors.MismatchError):
            manager.restore_or({"model": model})
        manager.restore_or({"model": model}, ignore="model.head.*")
        assert torch.equal(model.encoder.weight, source.encoder.weight)
        with pytest.raises(errors.UsageError, match="initial must be a mapping"):
            manager.restore_or([model])  # type: ignore[arg-type]


def test_restore_or_raises_for_a_damaged_step(tmp_path: Path) -> None:
    with fc.CheckpointManager(tmp_path) as manager:
        saved(manager, 3)
    (tmp_path / "3" / "_FUNCTIONAL_CKPT").write_text("{}")
    with looked_into(tmp_path) as manager, pytest.raises(errors.CorruptCheckpointError):
        manager.restore_or(state(0))


def test_steps_with_other_names_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with fc.CheckpointManager(tmp_path, step_name=fc.step_names.StepName(prefix="step")) as manager:
        saved(manager, 3)
    with fc.CheckpointManager(tmp_path) as manager:
        assert manager.restore_or(state(0)).step is None
    assert "1 subdirectories do not match step_name (step_3)" in caplog.text


def test_missing_user_content_is_none(tmp_path: Path) -> None:
    with fc.CheckpointManager(tmp_path) as manager:
        manager.save(1, {**state(1), "user": fc.Json({"note": "kept"})})
        manager.save(2, state(2))
        manager.wait_until_finished()
        assert manager.restore(1).get("user") == {"note": "kept"}
        assert manager.restore(2).get("user") is None


def test_weights_alone_and_several_managers(tmp_path: Path) -> None:
    """Each has its own folder, interval and number of steps kept."""
    model = classifier(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    everything = {"model": model, "optimizer": fc.Optimizer(optimizer, model)}
    full = fc.CheckpointManager(
        tmp_path / "full", save_policy=fc.policies.every(4), keep_policy=fc.policies.LatestN(1)
    )
    weights = fc.CheckpointManager(tmp_path / "weights", save_policy=fc.policies.every(3))
    with full, weights:
        for step in range(1, 10):
            full.save(step, everything)
            weights.save(step, {"model": model})
        full.wait_until_finished()
        weights.wait_until_finished()
        assert full.all_steps() == [8]
        assert weights.all_steps() == [3, 6, 9]
        assert set(weights.restore(9)) == {"model"}
        assert set(fc.restore(tmp_path / "full" / "8", only="model")) == {"model"}
