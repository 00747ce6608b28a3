"""Local first tier, remote second tier: no step is lost, and saves do not wait for the network."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from proxy import Proxy
from remote_environment import set_environment

import functional_ckpt as fc
from functional_ckpt import errors
from functional_ckpt.core.records import records
from functional_ckpt.steps import names, orbax_adapters, upload_worker
from functional_ckpt.steps.index import StepIndex
from functional_ckpt.storage.buckets import base as base_lib
from functional_ckpt.storage.open import connect
from functional_ckpt.testing import differences
from functional_ckpt.verify import checkpoint

# The full count: FUNCTIONAL_CKPT_UPLOAD_KILLS=50 pytest tests/remote/test_tiers.py -k killed
_NUM_KILLS = int(os.environ.get("FUNCTIONAL_CKPT_UPLOAD_KILLS", "3"))
# A new run starts after this many: opening one costs requests for every step that it has, and a
# server of Python's takes milliseconds for each.
_KILLS_OF_A_RUN = 10


def _state(step: int) -> dict[str, object]:
    return {"state": {"w": torch.full((100, 100), float(step)), "n": step}}


def _steps(path: object) -> list[int]:
    with fc.CheckpointManager(path, read_only=True) as manager:
        return manager.all_steps()


def _metrics(path: str, step: int) -> dict[str, object]:
    with fc.CheckpointManager(path, read_only=True) as manager:
        return dict(manager.metadata(step).metrics or {})


@pytest.fixture(params=["s3", "local"])
def far(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A second tier: an object store, or another directory."""
    if request.param == "local":
        return str(tmp_path / "far")
    return f"{request.getfixturevalue('s3')}/run"


def test_a_run_with_two_tiers(far: str, tmp_path: Path) -> None:
    near = tmp_path / "near"
    tier = fc.Tier(path=far, save=fc.policies.every(2), keep=fc.policies.LatestN(3))
    with fc.CheckpointManager(near, keep_policy=[fc.policies.LatestN(1)], tiers=[tier]) as manager:
        for step in range(8):
            manager.save(step, _state(step), metrics={"loss": float(step)})
            manager.wait_until_finished()
        assert manager.all_steps() == [2, 4, 6, 7] and manager.latest_step() == 7
        for step in (4, 7):
            assert not differences(manager.restore(step)["state"], _state(step)["state"])
        assert manager.metadata(4).metrics == {"loss": 4.0}
        assert manager.best_step("loss", mode="min") == 2
    assert _steps(near) == [7]
    assert _steps(far) == [2, 4, 6]
    storage, root = connect(far)
    for step in (2, 4, 6):
        assert checkpoint.verify_checkpoint(storage, f"{root}/{step}", step) == []
    assert fc.restore(f"{far}/latest")["state"]["n"] == 6


def test_new_machine_resumes_from_the_remote_tier(far: str, tmp_path: Path) -> None:
    tiers = [fc.Tier(path=far)]
    with fc.CheckpointManager(tmp_path / "one", tiers=tiers) as manager:
        manager.save(3, _state(3))
    with fc.CheckpointManager(tmp_path / "other", tiers=tiers) as manager:
        assert manager.latest_step() == 3
        assert manager.restore()["state"]["n"] == 3
        manager.save(4, _state(4))
    assert _steps(far) == [3, 4]


def test_late_metrics_go_where_their_steps_are(far: str, tmp_path: Path) -> None:
    near = tmp_path / "near"
    tier = fc.Tier(path=far, keep=[fc.policies.LatestN(2), fc.policies.BestN(1, "eye")])
    kept = [fc.policies.LatestN(1)]
    uploaded: list[int] = []

    def see(event: fc.Event) -> None:
        if event.kind == "uploaded":
            uploaded.append(event.step)

    with fc.CheckpointManager(near, keep_policy=kept, tiers=[tier], on_event=see) as manager:
        manager.save(1, _state(1), metrics={"loss": 1.0})
        manager.wait_until_finished()
        manager.record_metrics(1, {"eye": 0.9, "bad": float("nan")})
        with fc.CheckpointManager(near, read_only=True) as evaluator:  # another process, say
            evaluator.record_metrics(1, {"ear": 0.5})
        manager.wait_until_finished()
        assert _metrics(far, 1).keys() == {"loss", "eye", "bad", "ear"}
        for step in (2, 3, 4):
            manager.save(step, _state(step))
            manager.wait_until_finished()
        assert _steps(far) == [1, 3, 4] and _steps(near) == [4]
        manager.record_metrics(1, {"later": 7})  # the first tier has it no more
        assert _metrics(far, 1)["later"] == 7 and manager.best_step("later") == 1
        assert uploaded == [1, 2, 3, 4]
    with fc.CheckpointManager(near, read_only=True) as evaluator:
        evaluator.record_metrics(4, {"eye": 1.0})  # while there are no uploads
    assert _metrics(far, 4) == {}
    with fc.CheckpointManager(near, keep_policy=kept, tiers=[tier]) as manager:
        manager.wait_until_finished()
        assert _metrics(far, 4) == {"eye": 1.0} and manager.best_step("eye") == 4


def test_overwritten_step_loses_old_metrics(far: str, tmp_path: Path) -> None:
    tiers = [fc.Tier(path=far)]
    with fc.CheckpointManager(tmp_path / "near", overwrite=True, tiers=tiers) as manager:
        manager.save(1, _state(1)).result()
        manager.record_metrics(1, {"eye": 0.9})
        manager.wait_until_finished()
        manager.save(1, _state(2)).result()
        manager.wait_until_finished()
        assert _metrics(far, 1) == {}
    storage, root = connect(far)
    assert storage.list(f"{root}/.functional_ckpt/metrics") == []


def test_damaged_upload_record_is_logged(
    far: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    near = tmp_path / "near"
    with fc.CheckpointManager(near) as manager:
        manager.save(1, _state(1))
    file = near / ".functional_ckpt" / "uploads.json"
    for text in ("{", "[]", '{"promised": {}, "considered": 3}'):
        file.write_text(text)
        caplog.clear()
        with fc.CheckpointManager(near, tiers=[fc.Tier(path=far)]):
            pass
        assert f"{file} cannot be read" in caplog.text and "recomputing which steps" in caplog.text
    assert _steps(far) == [1]
    caplog.clear()
    with fc.CheckpointManager(near, tiers=[fc.Tier(path=far)]):
        pass
    assert "cannot be read" not in caplog.text


def test_restore_falls_back_when_the_near_step_is_damaged(far: str, tmp_path: Path) -> None:
    near = tmp_path / "near"
    with fc.CheckpointManager(near, tiers=[fc.Tier(path=far)]) as manager:
        manager.save(1, _state(1))
        manager.wait_until_finished()
        for file in (near / "1" / "state").glob("*.safetensors"):
            data = bytearray(file.read_bytes())
            data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
            file.write_bytes(data)
        with pytest.raises(errors.CheckpointError):
            fc.restore(near / "1")
        target = {"w": torch.zeros(100, 100), "n": 0}
        restored = manager.restore(1, {"state": target})
        assert not differences(restored["state"], _state(1)["state"])


@pytest.mark.parametrize("damage", ["data", "metadata", "record"])
def test_a_tier_with_an_earlier_save_of_a_damaged_step_does_not_replace_it(
    damage: str, far: str, tmp_path: Path
) -> None:
    near, tiers = tmp_path / "near", [fc.Tier(path=far)]
    with fc.CheckpointManager(near, tiers=tiers) as manager:
        manager.save(1, _state(1))
        manager.save(2, _state(2))
    with fc.CheckpointManager(near, overwrite=True) as manager:
        manager.save(1, _state(3))
    files = {"data": near / "1" / "state" / "data.safetensors"}
    names = {"metadata": "_CHECKPOINT_METADATA", "record": "_FUNCTIONAL_CKPT"}
    for step in (1, 2):
        file = files["data"] if damage == "data" else near / str(step) / names[damage]
        file.write_bytes(file.read_bytes()[:-200] + bytes(200))
    target = {"w": torch.zeros(100, 100), "n": 0}
    with fc.CheckpointManager(near, tiers=tiers, read_only=True) as reader:
        with pytest.raises(errors.CorruptCheckpointError, match="holds another save of step 1"):
            reader.restore(1, {"state": target})
        assert not target["w"].any()
        restored = reader.restore(2, {"state": target})  # the same save: from either
        assert not differences(restored["state"], _state(2)["state"])
        assert not differences(fc.restore(os.path.join(far, "1"))["state"], _state(1)["state"])


def test_what_has_changed_near_is_not_copied(far: str, tmp_path: Path) -> None:
    near = tmp_path / "near"
    with fc.CheckpointManager(near) as manager:
        manager.save(1, _state(1))
        manager.save(2, _state(2))
    (near / "1" / "state" / "_METADATA").write_bytes(b"{}")
    manager = fc.CheckpointManager(near, tiers=[fc.Tier(path=far)])
    with pytest.raises(errors.SaveError, match="changed after it was committed"):
        manager.wait_until_finished()
    manager.close()
    assert _steps(far) == [2]


def test_overwritten_step_replaces_the_copy(far: str, tmp_path: Path) -> None:
    with fc.CheckpointManager(
        tmp_path / "near", overwrite=True, tiers=[fc.Tier(path=far)]
    ) as manager:
        manager.save(1, _state(1))
        manager.wait_until_finished()
        manager.save(1, _state(11))
    assert fc.restore(f"{far}/1")["state"]["n"] == 11


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests are given up after half a second, and made again soon."""
    monkeypatch.setattr(base_lib, "_MAX_SECONDS", 0.5)
    monkeypatch.setattr(upload_worker, "_FIRST_WAIT_SECONDS", 0.05)
    monkeypatch.setattr(upload_worker, "_LAST_WAIT_SECONDS", 0.1)


@pytest.mark.usefixtures("quick")
def test_an_outage_delays_uploads_and_nothing_else(
    s3: str, s3_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    proxy = Proxy(s3_url)
    set_environment(monkeypatch, proxy.url)
    near = tmp_path / "near"
    with fc.CheckpointManager(
        near, keep_policy=[fc.policies.LatestN(1)], tiers=[fc.Tier(path=f"{s3}/run")]
    ) as manager:
        proxy.is_down = True
        for step in range(4):
            manager.save(step, _state(step)).result()
        assert _steps(near) == [0, 1, 2, 3]  # none is pruned before the tier has it
        time.sleep(1.5)
        manager.check_for_errors()
        proxy.is_down = False
        manager.wait_until_finished()
        manager.save(4, _state(4)).result()
        assert _steps(near) in ([4], [3, 4])
    assert _steps(f"{s3}/run") == [0, 1, 2, 3, 4]
    proxy.close()


@pytest.mark.usefixtures("quick")
def test_metrics_recorded_in_an_outage_arrive_after_it(
    s3: str, s3_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    proxy = Proxy(s3_url)
    set_environment(monkeypatch, proxy.url)
    near, options = tmp_path / "near", {"keep_policy": [fc.policies.LatestN(1)]}
    tiers = [fc.Tier(path=f"{s3}/run")]
    with fc.CheckpointManager(near, tiers=tiers, **options) as manager:
        manager.save(0, _state(0))
        manager.wait_until_finished()
        proxy.is_down = True
        manager.record_metrics(0, {"late": 1})  # no tier is waited for: it is down
        manager.save(1, _state(1)).result()
        assert _steps(near) == [0, 1]  # nor is the step pruned before its metrics have arrived
    proxy.is_down = False
    with fc.CheckpointManager(near, tiers=tiers, **options) as manager:
        manager.wait_until_finished()
    assert _metrics(f"{s3}/run", 0) == {"late": 1} and _steps(f"{s3}/run") == [0, 1]
    proxy.close()


@pytest.mark.usefixtures("quick")
def test_a_bound_on_the_delay_raises(
    s3: str, s3_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    proxy = Proxy(s3_url)
    set_environment(monkeypatch, proxy.url)
    tier = fc.Tier(path=f"{s3}/run", max_delay_seconds=0.2)
    manager = fc.CheckpointManager(tmp_path / "near", tiers=[tier])
    proxy.is_down = True
    manager.save(1, _state(1)).result()
    with pytest.raises(errors.SaveError, match="cannot be copied"):
        manager.wait_until_finished()
    manager.close()  # the step stays promised
    proxy.is_down = False
    with fc.CheckpointManager(tmp_path / "near", tiers=[tier]) as manager:
        manager.wait_until_finished()
    assert _steps(f"{s3}/run") == [1]
    proxy.close()


def test_files_that_arrived_are_not_sent_again(
    s3: str, s3_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    near, run = tmp_path / "near", f"{s3}/run"
    state = {f"item{i}": {"w": torch.randn(250_000)} for i in range(6)}
    with fc.CheckpointManager(near) as manager:
        manager.save(1, state)
    with fc.CheckpointManager(near, tiers=[fc.Tier(path=run)]) as manager:
        manager.wait_until_finished()
    store = connect(run)[0]
    note = f"{run}/1.orbax-checkpoint-tmp/.unfinished"  # as if it had been cut before its end
    identity = records.digest_hex((near / "1" / "_FUNCTIONAL_CKPT").read_bytes())
    store.write(note, f'{{"token": "{identity}"}}'.encode())
    store.remove(f"{run}/1/commit_success.txt")
    store.remove(f"{run}/1/item3")
    (near / ".functional_ckpt" / "uploads.json").unlink()
    proxy = Proxy(s3_url)
    set_environment(monkeypatch, proxy.url)
    with fc.CheckpointManager(near, tiers=[fc.Tier(path=run)]) as manager:
        manager.wait_until_finished()
    assert 1e6 < proxy.traffic.up_bytes < 1.1e6
    assert torch.equal(fc.restore(f"{run}/1")["item3"]["w"], state["item3"]["w"])
    proxy.close()


def test_training_does_not_wait_for_a_slow_store(
    s3: str, s3_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    proxy = Proxy(s3_url)
    set_environment(monkeypatch, proxy.url)
    proxy.up_bytes_per_second = 1e6
    with fc.CheckpointManager(tmp_path / "near", tiers=[fc.Tier(path=f"{s3}/run")]) as manager:
        started = time.monotonic()
        manager.save(1, {"w": {"w": torch.randn(1_000_000)}}).result()
        saved = time.monotonic() - started
        manager.wait_until_finished()
        uploaded = time.monotonic() - started
    assert uploaded > 3.5 and saved < uploaded / 2
    proxy.close()


@pytest.mark.parametrize("first", range(0, _NUM_KILLS, _KILLS_OF_A_RUN))
def test_killed_in_the_middle_of_uploads(first: int, s3: str, tmp_path: Path) -> None:
    """Every reported step is complete in one tier or the other; in the end, in both."""
    near, run, rng = tmp_path / "near", f"{s3}/run", random.Random(first)
    store, root = connect(run)
    names_of_steps = names.as_name_format(None, adapt=orbax_adapters.adapt_name_format)
    checked: set[int] = set()
    script = str(Path(__file__).parent / "upload_forever.py")
    reported = -1
    for _ in range(min(_KILLS_OF_A_RUN, _NUM_KILLS - first)):
        process = subprocess.Popen(
            [sys.executable, script, str(near), run],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        for _ in range(rng.randint(1, 4)):
            reported = int(process.stdout.readline())
        time.sleep(rng.random() * 0.3)
        process.kill()
        reported = max([reported, *map(int, process.stdout.read().split())])
        process.stdout.close()
        process.wait()
        found = set(StepIndex(store, root, names_of_steps).look())
        assert checked <= found  # earlier steps are still there
        for step in found - checked:
            values = fc.restore(f"{run}/{step}")["state"]
            assert float(values["w"].min()) == float(values["w"].max()) == step
        checked |= found
    with fc.CheckpointManager(near, tiers=[fc.Tier(path=run)]) as manager:
        manager.wait_until_finished()
        steps = manager.all_steps()
    assert set(range(reported + 1)) <= set(steps) and set(steps) == set(_steps(run))
    assert not [name for name in store.list(run) if "tmp" in name]
    for step in _steps(run):
        assert checkpoint.verify_checkpoint(store, f"{run}/{step}", step) == []


def test_a_listener_of_an_upload_must_not_wait_for_it(tmp_path: Path) -> None:
    seen: list[BaseException] = []
    managers: list[fc.CheckpointManager] = []

    def listener(event: fc.Event) -> None:
        if event.kind == "uploaded":
            try:
                managers[0].wait_until_finished()
            except errors.UsageError as error:
                seen.append(error)

    tiers = [fc.Tier(path=tmp_path / "far")]
    managers.append(fc.CheckpointManager(tmp_path / "near", tiers=tiers, on_event=listener))
    managers[0].save(1, _state(1))
    managers[0].wait_until_finished()
    managers[0].close()
    assert len(seen) == 1 and "Set a flag there" in str(seen[0])
