"""One directory, both managers: each continues the other's run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from orbax.checkpoint import v1
from orbax_view import as_orbax, differences

import functional_ckpt as fc

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*[Ss]harding.*:UserWarning"),
]


def value(step: int) -> dict[str, Any]:
    return {"w": np.full((3, 2), step, np.float32), "step": step}


def save_with_orbax(root: Path, *steps: int, **options: Any) -> None:
    if "max_to_keep" not in options:  # with both, Orbax would prune by metric and not by age
        options["best_fn"] = lambda metrics: metrics["accuracy"]  # without it, it stores no metrics
    chosen = ocp.CheckpointManagerOptions(**options)
    with ocp.CheckpointManager(root, options=chosen) as manager:
        for step in steps:
            metrics = {"accuracy": 1 / (1 + step)}
            manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(value(step))),
                metrics=metrics,
            )


def save_with_ours(root: Path, *steps: int, **options: Any) -> None:
    with fc.CheckpointManager(root, **options) as manager:
        for step in steps:
            tree = {"w": torch.full((3, 2), float(step)), "step": step}
            manager.save(step, {"state": tree}, metrics={"accuracy": 1 / (1 + step)})


def steps_of_ours(root: Path, *, unranked: tuple[int, ...] = ()) -> list[int]:
    with fc.CheckpointManager(root, read_only=True) as manager:
        for step in manager.all_steps():
            got = as_orbax(manager.restore(step)["state"])
            assert differences(got, value(step)) == []
            if step not in unranked:
                assert manager.metadata(step).metrics == {"accuracy": 1 / (1 + step)}
        return manager.all_steps()


def steps_of_orbax(root: Path, *, unranked: tuple[int, ...] = ()) -> list[int]:
    with ocp.CheckpointManager(root) as manager:
        for step in manager.all_steps():
            assert differences(manager.restore(step)["state"], value(step)) == []
            if step not in unranked:
                assert manager.metadata(step).metrics == {"accuracy": 1 / (1 + step)}
        return sorted(manager.all_steps())


def test_native_manager_continues_an_orbax_run(tmp_path: Path) -> None:
    save_with_orbax(tmp_path, 1, 2)
    save_with_ours(tmp_path, 3)
    assert steps_of_ours(tmp_path) == steps_of_orbax(tmp_path) == [1, 2, 3]


def test_orbax_manager_continues_a_native_run(tmp_path: Path) -> None:
    save_with_ours(tmp_path, 1, 2)
    save_with_orbax(tmp_path, 3)
    assert steps_of_ours(tmp_path) == steps_of_orbax(tmp_path) == [1, 2, 3]


def test_both_managers_alternate_in_one_directory(tmp_path: Path) -> None:
    for step in range(6):
        (save_with_ours if step % 2 else save_with_orbax)(tmp_path, step)
    assert steps_of_ours(tmp_path) == steps_of_orbax(tmp_path) == list(range(6))


def test_native_keep_policy_prunes_orbax_steps(tmp_path: Path) -> None:
    save_with_orbax(tmp_path, 1, 2, 3, 4)
    keep = [fc.policies.LatestN(2), fc.policies.BestN(1, "accuracy")]
    save_with_ours(tmp_path, 5, keep_policy=keep)
    assert steps_of_ours(tmp_path) == steps_of_orbax(tmp_path) == [1, 4, 5]


def test_orbax_prunes_native_steps(tmp_path: Path) -> None:
    save_with_ours(tmp_path, 1, 2, 3, 4)
    save_with_orbax(tmp_path, 5, max_to_keep=2)
    assert steps_of_ours(tmp_path, unranked=(5,)) == [4, 5]
    assert steps_of_orbax(tmp_path, unranked=(5,)) == [4, 5]


def test_orbax_ranks_our_steps_by_their_metrics(tmp_path: Path) -> None:
    save_with_ours(tmp_path, 1, 2, 3)
    options = ocp.CheckpointManagerOptions(best_fn=lambda metrics: metrics["accuracy"])
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        assert manager.best_step() == 1
    with fc.CheckpointManager(tmp_path, read_only=True) as manager:
        assert manager.best_step("accuracy") == 1


def test_orbax_deletes_our_step_and_we_delete_its(tmp_path: Path) -> None:
    save_with_ours(tmp_path, 1, 2)
    save_with_orbax(tmp_path, 3, 4)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.delete(1)
    with fc.CheckpointManager(tmp_path) as manager:
        manager.delete(3)
    assert steps_of_ours(tmp_path) == steps_of_orbax(tmp_path) == [2, 4]


def test_we_overwrite_a_step_of_orbax(tmp_path: Path) -> None:
    save_with_orbax(tmp_path, 1, 2)
    with fc.CheckpointManager(tmp_path, overwrite=True) as manager:
        manager.save(2, {"state": {"w": torch.ones(1)}})
    with ocp.CheckpointManager(tmp_path) as manager:
        assert differences(manager.restore(2)["state"], {"w": np.ones(1, np.float32)}) == []


def test_names_of_steps_are_orbaxs(tmp_path: Path) -> None:
    ours = fc.step_names.StepName(prefix="ckpt", zero_pad=5)
    theirs = ocp.path.step.standard_name_format(step_prefix="ckpt", step_format_fixed_length=5)
    save_with_ours(tmp_path, 7, step_name=ours)
    save_with_orbax(tmp_path, 8, step_name_format=theirs)
    assert sorted(path.name for path in tmp_path.glob("ckpt_*")) == ["ckpt_00007", "ckpt_00008"]
    with fc.CheckpointManager(tmp_path, step_name=ours, read_only=True) as manager:
        assert manager.all_steps() == [7, 8]
    options = ocp.CheckpointManagerOptions(step_name_format=theirs)
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        assert sorted(manager.all_steps()) == [7, 8]


def test_orbax_v1_and_native_alternate_in_one_directory(tmp_path: Path) -> None:
    save_with_ours(tmp_path, 1)
    with v1.training.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(2, value(2), metrics={"accuracy": 1 / 3})
    save_with_ours(tmp_path, 3)
    with v1.training.Checkpointer(tmp_path) as checkpointer:
        assert [checkpoint.step for checkpoint in checkpointer.checkpoints] == [1, 2, 3]
        for step in (1, 2, 3):
            assert differences(checkpointer.load(step), value(step)) == []
    assert steps_of_ours(tmp_path) == [1, 2, 3]


def test_leftovers_of_an_orbax_crash_are_not_steps(tmp_path: Path) -> None:
    save_with_orbax(tmp_path, 1, 2)
    (tmp_path / "2").rename(tmp_path / "2.orbax-checkpoint-tmp")
    with fc.CheckpointManager(tmp_path, read_only=True) as manager:
        assert manager.all_steps() == [1]
    assert (tmp_path / "2.orbax-checkpoint-tmp").exists()  # a reader removes nothing
    save_with_ours(tmp_path, 2)
    assert steps_of_ours(tmp_path) == steps_of_orbax(tmp_path) == [1, 2]


def test_root_metadata_of_orbax_is_left_alone(tmp_path: Path) -> None:
    with ocp.CheckpointManager(tmp_path, metadata={"run": "a"}) as manager:
        manager.save(1, args=ocp.args.Composite(state=ocp.args.StandardSave(value(1))))
    save_with_ours(tmp_path, 2, keep_policy=fc.policies.LatestN(1))
    with ocp.CheckpointManager(tmp_path) as manager:
        assert manager.metadata().custom_metadata == {"run": "a"}
        assert manager.all_steps() == [2]


def test_a_step_of_orbax_is_not_ours_by_a_stray_file(tmp_path: Path) -> None:
    """Our record beside another's arrays must not lend them its name."""
    save_with_ours(tmp_path, 1)
    save_with_orbax(tmp_path, 2)
    record = "_FUNCTIONAL_CKPT"
    shutil.copy(tmp_path / "1" / record, tmp_path / "2" / record)
    shutil.copy(tmp_path / "1" / "state" / record, tmp_path / "2" / "state" / record)
    with (
        fc.CheckpointManager(tmp_path, read_only=True) as manager,
        pytest.raises(fc.errors.CorruptCheckpointError, match="written as step 1, found as step 2"),
    ):
        manager.restore(2)


def test_extra_files_of_ours_are_few_and_hidden_from_orbax(tmp_path: Path) -> None:
    save_with_ours(tmp_path, 1)
    save_with_orbax(tmp_path, 2)
    names = {path.name for path in tmp_path.iterdir()}
    assert {name for name in names if not name.isdigit()} <= {".functional_ckpt"}
    ours = {path.name for path in (tmp_path / "1").iterdir()}
    theirs = {path.name for path in (tmp_path / "2").iterdir()}
    assert ours - theirs == {"_FUNCTIONAL_CKPT"}
    record = json.loads((tmp_path / "1" / "_CHECKPOINT_METADATA").read_bytes())
    orbaxs = json.loads((tmp_path / "2" / "_CHECKPOINT_METADATA").read_bytes())
    assert record["item_handlers"] == orbaxs["item_handlers"]
    assert set(record) == set(orbaxs)


def test_changed_orbax_record_is_detected(tmp_path: Path) -> None:
    """Custom metadata is only in Orbax's file, so the native record has its digest."""
    with fc.CheckpointManager(tmp_path) as manager:
        manager.save(1, {"state": {"w": torch.ones(1)}}, custom_metadata={"seed": 1})
    path = tmp_path / "1" / "_CHECKPOINT_METADATA"
    path.write_bytes(path.read_bytes().replace(b'"seed": 1', b'"seed": 2'))
    with (
        fc.CheckpointManager(tmp_path, read_only=True) as manager,
        pytest.raises(fc.errors.CorruptCheckpointError, match="_CHECKPOINT_METADATA"),
    ):
        manager.metadata(1)
