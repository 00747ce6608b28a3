"""Ray Train with two gloo workers: kills, restarts, reports, retention, and draining."""

from __future__ import annotations

import collections
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from full import IS_FULL

if not IS_FULL:
    pytest.skip("a full run has it", allow_module_level=True)
ray: Any = pytest.importorskip("ray")
pytest.importorskip("ray.train")

from functional_ckpt.errors import UsageError  # noqa: E402
from functional_ckpt.interop.ray import RunConfig  # noqa: E402

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "howto" / "ray.md"
# Two pieces of ten: each takes minutes.
KILLS = ("10,1", "10,2")


ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.2",
    "RAY_raylet_start_wait_time_s": "200",
}


def run(job: str, folder: Path, argument: str = "") -> dict[str, Any]:
    """Runs a job of ray_run.py in a cluster of its own."""
    done = subprocess.run(
        [sys.executable, str(HERE / "ray_run.py"), job, str(folder), argument],
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.timeout(900)
@pytest.mark.parametrize("argument", KILLS)
def test_killed_workers_lose_no_step(argument: str, tmp_path: Path) -> None:
    found = run("kills", tmp_path, argument)
    assert found["num_kills"] == 10
    assert found["num_lost"] == 0
    assert len(found["resumed"]) == 22  # two workers, each start
    assert found["is_equal"]


@pytest.mark.timeout(900)
def test_a_run_continues_under_its_name(tmp_path: Path) -> None:
    found = run("again", tmp_path)
    for part, steps in (("first", [4, 5]), ("second", [7, 8])):
        kept, path, metrics = found[part]
        assert kept == steps
        assert path == str(tmp_path / "a" / "steps" / str(steps[-1]))
        assert metrics["step"] == steps[-1]
    # Each step has the metrics of its report; steps that were deleted are not on the list.
    assert found["reported"] == [[str(step), step] for step in (4, 5, 6, 7, 8)]
    assert found["resumed"] == [None, None, 5, 5]
    assert found["restored"] == ["model", "optimizer", "rng"]


@pytest.mark.timeout(900)
def test_a_drained_node_is_saved_for_once(tmp_path: Path) -> None:
    found = run("drained", tmp_path)
    assert len(found["steps"]) == 1
    assert found["left"] == "UsageError"


@pytest.mark.timeout(900)
def test_a_configuration_of_ray_s_is_refused(tmp_path: Path) -> None:
    found = run("refused", tmp_path)
    assert "Import RunConfig from functional_ckpt.interop.ray" in found["config"]


def test_retention_by_ray_is_refused(tmp_path: Path) -> None:
    keep = ray.train.CheckpointConfig(num_to_keep=2)
    with pytest.raises(UsageError, match=r"num_to_keep=2.*keep_policy"):
        RunConfig(storage_path=str(tmp_path), checkpoint_config=keep)


def test_deleted_steps_are_removed_from_ray_s_list(tmp_path: Path) -> None:
    def reported(step: int) -> dict[str, Any]:
        return {"version": 0, "checkpoint_dir_name": f"steps/{step}", "metrics": {"step": step}}

    state: dict[str, Any] = {
        "ray_version": ray.__version__,
        "checkpoint_results": [reported(3), reported(5)],
        "checkpoint_report_indices": [0, 1],
        "latest_checkpoint_result": reported(3),
        "pending_training_results": [reported(3)],
        "pending_validation_specs": [True],
        "current_report_index": 2,
    }
    (tmp_path / "a" / "steps" / "5").mkdir(parents=True)
    path = tmp_path / "a" / "checkpoint_manager_snapshot.json"
    path.write_text(json.dumps(state))
    RunConfig(name="a", storage_path=str(tmp_path))
    assert json.loads(path.read_text()) == state | {
        "checkpoint_results": [reported(5)],
        "checkpoint_report_indices": [1],
        "latest_checkpoint_result": reported(5),
        "pending_training_results": [],
        "pending_validation_specs": [],
    }


@pytest.mark.parametrize("text", ["", '{"checkpoint_results": [', "{}"])
def test_a_broken_list_is_set_aside(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a" / "checkpoint_manager_snapshot.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.warns(UserWarning, match="is set aside; the steps are not affected"):
        RunConfig(name="a", storage_path=str(tmp_path))
    assert [each.name for each in path.parent.iterdir()] == [f"{path.name}.broken"]


def programs() -> list[str]:
    """Returns the two programs of the page."""
    blocks = re.findall(
        r"^``` \{\.python \.no-run\}\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE
    )
    assert len(blocks) == 2
    return blocks


def test_at_most_five_lines_change() -> None:
    before, after = (
        collections.Counter(line.strip() for line in each.splitlines()) for each in programs()
    )
    # The import of Ray's names has fewer of them.
    new = [line for line in after - before if not line.startswith("from ray.train import ")]
    assert len(new) <= 5, new
    assert (before - after).total() > 15


@pytest.mark.timeout(900)
@pytest.mark.parametrize("index", [0, 1], ids=["before", "after"])
def test_the_page_s_programs_run(index: int, tmp_path: Path) -> None:
    driver = """
import sys
import ray
ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
results = [fit("a", sys.argv[1], num_steps) for num_steps in (4, 6)]
print([result.metrics["loss"] > 0 and result.checkpoint.path for result in results])
"""
    (tmp_path / "program.py").write_text(programs()[index] + driver)
    done = subprocess.run(
        [sys.executable, "program.py", str(tmp_path / "storage")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if index == 1:
        run_folder = tmp_path / "storage" / "a" / "steps"
        assert str(run_folder / "3") in done.stdout
        assert str(run_folder / "5") in done.stdout
