"""Back to an earlier step where several tiers hold steps, and on object stores."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest
import rank_jobs
import torch
from gloo_workers import Workers

import functional_ckpt as fc
from functional_ckpt import errors
from functional_ckpt.storage import queries
from functional_ckpt.storage.object_store import MARKER
from functional_ckpt.storage.open import connect


def _state(step: int) -> dict[str, object]:
    return {"state": {"w": torch.full((4,), float(step)), "n": step}}


def _seen(path: object) -> tuple[list[int], int | None]:
    with fc.CheckpointManager(path, read_only=True) as manager:  # pyright: ignore[reportArgumentType]
        return manager.all_steps(), manager.latest_step()


@pytest.fixture(params=["s3", "local"])
def far(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A second tier: an object store, or another directory."""
    if request.param == "local":
        return str(tmp_path / "far")
    return f"{request.getfixturevalue('s3')}/run"


@pytest.fixture(scope="module")
def workers() -> Generator[Workers]:
    started = Workers()
    yield started
    started.close()


def test_every_tier_knows_the_line(far: str, tmp_path: Path) -> None:
    near, keep = tmp_path / "near", fc.policies.LatestN(2)
    tiers = [fc.Tier(path=far, keep=keep)]
    with fc.CheckpointManager(near, keep_policy=keep, tiers=tiers) as manager:
        for step in (10, 20, 30):
            manager.save(step, _state(step))
            manager.wait_until_finished()
        manager.restore(20)
        for step in (21, 22):
            manager.save(step, _state(step))
            manager.wait_until_finished()
        assert manager.all_steps() == [21, 22, 30] and manager.latest_step() == 22
    assert _seen(near) == _seen(far) == ([21, 22, 30], 22)
    assert fc.restore(f"{far}/latest")["state"]["n"] == 22
    with fc.CheckpointManager(tmp_path / "new machine", tiers=tiers) as manager:
        assert manager.restore_or(_state(0)).step == 22
        assert manager.metadata(30).is_abandoned
        manager.save(23, _state(23))
        manager.wait_until_finished()
        assert manager.metadata(23).generation == 1


def test_later_steps_are_discarded_in_every_tier(far: str, tmp_path: Path) -> None:
    near, tiers = tmp_path / "near", [fc.Tier(path=far)]
    with fc.CheckpointManager(near, keep_policy=fc.policies.LatestN(2), tiers=tiers) as manager:
        for step in (10, 20, 30):
            manager.save(step, _state(step))
            manager.wait_until_finished()
        manager.save(40, _state(40))  # on its way there, perhaps
        manager.restore(10, discard_later=True)  # only the far tier holds it
        assert manager.all_steps() == [10] and manager.latest_step() == 10
        manager.save(20, _state(21))
        manager.wait_until_finished()
        assert manager.metadata(20).generation == 0
    assert _seen(near) == ([20], 20) and _seen(far) == ([10, 20], 20)
    assert fc.restore(f"{far}/20")["state"]["n"] == 21


def test_a_step_that_only_another_tier_holds_is_deleted_there(far: str, tmp_path: Path) -> None:
    near, tiers = tmp_path / "near", [fc.Tier(path=far)]
    with fc.CheckpointManager(near, keep_policy=fc.policies.LatestN(1), tiers=tiers) as manager:
        for step in (1, 2, 3):
            manager.save(step, _state(step))
            manager.wait_until_finished()
        assert _seen(near)[0] == [3] and _seen(far)[0] == [1, 2, 3]
        manager.delete(1)
        manager.delete(3)
        assert manager.all_steps() == [2]
        with pytest.raises(errors.StepNotFoundError):
            manager.delete(1)
    assert _seen(near)[0] == [] and _seen(far)[0] == [2]


def test_a_rollback_on_a_store(bucket: str) -> None:
    run, keep = f"{bucket}/run", fc.policies.LatestN(1)
    with fc.CheckpointManager(run, keep_policy=keep, overwrite=True, latest_link="last") as manager:
        for step in (10, 20):
            manager.save(step, _state(step)).result()  # pyright: ignore[reportOptionalMemberAccess]
    with fc.CheckpointManager(run, overwrite=True, latest_link="last") as manager:
        manager.save(30, _state(30))
        manager.restore(20)
        manager.save(30, _state(31))
        manager.wait_until_finished()
        manager.save(25, _state(25))
        manager.wait_until_finished()
        assert manager.all_steps() == [20, 25, 30] and manager.latest_step() == 30
        assert manager.metadata(30).generation in (0, 1)
        manager.restore(20)
        manager.save(21, _state(21))
        manager.wait_until_finished()
    assert _seen(run) == ([20, 21, 25, 30], 21)
    assert fc.restore(f"{run}/last")["state"]["n"] == 21
    with fc.CheckpointManager(run) as manager:
        manager.restore(20, discard_later=True)
        assert manager.all_steps() == [20]
    assert _seen(run) == ([20], 20)


def test_a_marker_without_a_record_is_no_step(s3: str) -> None:
    run = f"{s3}/run"
    with fc.CheckpointManager(run) as manager:
        manager.save(1, _state(1))
    storage = connect(run)[0]
    storage.write(f"{run}/999/{MARKER}", b"{}")
    storage.write(f"{run}/998/notes.txt", b"")
    with fc.CheckpointManager(run, keep_policy=fc.policies.LatestN(1)) as manager:
        assert manager.all_steps() == [1]
        for step in (2, 3):
            manager.save(step, _state(step)).result()  # pyright: ignore[reportOptionalMemberAccess]
        manager.wait_until_finished()
        assert manager.all_steps() == [3]
    assert queries.exists(storage, f"{run}/999/{MARKER}")


@pytest.mark.parametrize("staging", [fc.Eager(), fc.Blocking()], ids=str)
def test_ranks_go_back_together(
    workers: Workers, tmp_path: Path, staging: fc.Eager | fc.Blocking
) -> None:
    near, far = tmp_path / "near", tmp_path / "far"
    outcomes = workers.run(2, rank_jobs.roll_back, str(near), str(far), staging)
    assert outcomes[0] == outcomes[1]
    after_save, latest, after_discard, error = outcomes[0]
    assert (after_save, latest, after_discard) == ([10, 11, 20, 30], 11, [10])
    assert "discard_later" in error
    assert _seen(near) == ([10, 20], 20)
