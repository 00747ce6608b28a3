"""A manager on an object store: the same calls, the same promises."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import servers
import torch
from proxy import Proxy
from remote_environment import set_environment, set_gcs_environment

import functional_ckpt as fc
from functional_ckpt import cli, errors
from functional_ckpt.storage import queries
from functional_ckpt.storage.buckets import lease
from functional_ckpt.storage.local import LocalStorage
from functional_ckpt.storage.object_store import MARKER, ObjectStorage
from functional_ckpt.storage.open import connect
from functional_ckpt.testing import differences


def _state(seed: int) -> dict[str, object]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(64, 96, generator=generator)
    return {
        "tree": {"w": weight, "tied": weight, "n": [1, 2.5, "text"], "empty": torch.empty(0)},
        "config": fc.Json({"seed": seed}),
    }


def _store(uri: str) -> ObjectStorage:
    store = connect(uri)[0]
    assert isinstance(store, ObjectStorage)
    return store


def test_a_run_in_a_bucket_saves_overwrites_and_restores(bucket: str) -> None:
    run = f"{bucket}/some/run"
    with fc.CheckpointManager(
        run, keep_policy=[fc.policies.LatestN(2)], overwrite=True, latest_link="latest"
    ) as manager:
        assert manager.latest_step() is None and manager.directory == run
        for step in (1, 2, 3):
            manager.save(step, _state(step), metrics={"loss": 1 / step})
        manager.wait_until_finished()
        assert manager.all_steps() == [2, 3]
        manager.record_metrics(2, {"late": 7.0})
        manager.save(3, _state(33)).result()  # over the step that is there
        assert manager.restore(3)["config"] == {"seed": 33}
        with fc.CheckpointManager(run, read_only=True) as reader:
            assert reader.all_steps() == [2, 3]
            assert reader.metadata(2).metrics == {"loss": 0.5, "late": 7.0}
            assert not differences(reader.restore(2)["tree"], _state(2)["tree"])
            assert reader.wait_for_new_step(3, timeout=0.05, poll=0.05) is None
            thread = threading.Timer(0.1, lambda: manager.save(4, _state(4)))
            thread.start()
            assert reader.wait_for_new_step(3, timeout=60, poll=0.1) == 4
            thread.join()
        manager.wait_until_finished()
        manager.delete(3)
        assert manager.all_steps() == [4]
    restored = fc.restore(f"{run}/4")
    assert not differences(restored["tree"], _state(4)["tree"])
    assert _store(run).list(run) == [".functional_ckpt", "4", "latest"]
    assert fc.restore(f"{run}/latest")["config"] == {"seed": 4}


def test_targets_are_filled_in_place(bucket: str) -> None:
    module = torch.nn.Linear(8, 8)
    saved = module.weight.detach().clone()
    fc.save(f"{bucket}/one", {"model": module})
    with torch.no_grad():
        module.weight.zero_()
    fc.restore(f"{bucket}/one", {"model": module})
    assert torch.equal(module.weight, saved)
    with pytest.raises(errors.StepExistsError):
        fc.save(f"{bucket}/one", {"model": module})


def test_step_names_in_a_store_are_parsed(s3: str) -> None:
    name = fc.step_names.StepName(prefix="step", zero_pad=4)
    with fc.CheckpointManager(f"{s3}/run", step_name=name) as manager:
        manager.save(12, _state(1)).result()
    assert "step_0012" in _store(s3).list(f"{s3}/run")
    with fc.CheckpointManager(f"{s3}/run", step_name=name, read_only=True) as manager:
        assert manager.latest_step() == 12


def test_every_command_accepts_a_uri(bucket: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = f"{bucket}/run"
    with fc.CheckpointManager(run) as manager:
        for step in (1, 2):
            manager.save(step, _state(step)).result()
    assert cli.main(["ls", "--json", run]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [each["step"] for each in listed["steps"]] == [1, 2] and listed["latest"] == 2
    assert all(each["problem"] is None for each in listed["steps"])
    assert cli.main(["show", f"{run}/2"]) == 0
    assert cli.main(["diff", run, "1", "2"]) == 1
    assert cli.main(["verify", run]) == 0
    store = _store(run)
    (file,) = [name for name in store.walk(f"{run}/2/tree") if name.endswith(".safetensors")]
    data = bytearray(store.read(f"{run}/2/tree/{file}"))
    data[len(data) // 2] ^= 1
    store.write(f"{run}/2/tree/{file}", bytes(data))
    assert cli.main(["verify", f"{run}/1"]) == 0
    assert cli.main(["verify", f"{run}/2"]) == 1


def test_no_step_without_its_marker(bucket: str) -> None:
    run = f"{bucket}/run"
    with fc.CheckpointManager(run) as manager:
        manager.save(1, _state(1)).result()
        manager.save(2, _state(2)).result()
    _store(run).remove(f"{run}/2/{MARKER}")
    with fc.CheckpointManager(run, read_only=True) as manager:
        assert manager.all_steps() == [1]
    with pytest.raises(errors.StepNotFoundError, match=MARKER):
        fc.restore(f"{run}/2")
    manager = fc.CheckpointManager(run)  # it does not remove foreign objects
    with manager, pytest.raises(errors.SaveError, match=f"no {MARKER}"):
        manager.save(2, _state(2)).result()
    assert queries.exists(_store(run), f"{run}/2/tree/manifest.ocdbt")


def test_next_writer_removes_leftovers_of_a_crash(bucket: str) -> None:
    run = f"{bucket}/run"
    with fc.CheckpointManager(run) as manager:
        manager.save(1, _state(1)).result()
    store = _store(run)
    store.write(f"{run}/2.orbax-checkpoint-tmp/.unfinished", b"{}")
    store.write(f"{run}/2/tree/data.safetensors", b"half")
    store.write(f"{run}/1.orbax-checkpoint-tmp/.unfinished", b"{}")  # killed after the marker
    with fc.CheckpointManager(run, read_only=True) as manager:
        assert manager.all_steps() == [1]
    assert queries.exists(store, f"{run}/2/tree/data.safetensors")
    with fc.CheckpointManager(run) as manager:
        assert manager.all_steps() == [1]
        assert store.list(run) == [".functional_ckpt", "1"]


def test_a_cut_overwrite_is_ended(bucket: str) -> None:
    run = f"{bucket}/run"
    with fc.CheckpointManager(run) as manager:
        manager.save(1, _state(1)).result()
    store = _store(run)
    hidden = f"{run}/.functional_ckpt"
    store.rename(f"{run}/1", f"{run}/1.orbax-checkpoint-tmp")  # complete, and being published
    store.write(f"{hidden}/trash/1.replaced/{MARKER}", b"")
    store.write(f"{run}/1/tree/_METADATA", b"a copy that was cut")
    store.write(f"{hidden}/replacing.json", b'{"tmp": "1.orbax-checkpoint-tmp", "final": "1"}')
    with fc.CheckpointManager(run) as manager:
        assert manager.all_steps() == [1]
        assert manager.restore(1)["config"] == {"seed": 1}


def test_one_writer_at_a_time(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = f"{bucket}/run"
    with fc.CheckpointManager(run) as manager:
        with pytest.raises(errors.LockedError, match=f'"pid": {os.getpid()}'):
            fc.CheckpointManager(run)
        # Another machine takes it over, as it may when the lease has run out.
        store = _store(run)
        store.write(f"{run}/.functional_ckpt/lock", b'{"pid": 1, "lease": "other"}')
        for each in manager._steps.storage._requests._leases:
            each._try_to_renew()
        with pytest.raises(errors.LockedError, match="another writer took it over"):
            manager.save(1, _state(1)).result()
    assert store.list(run) == [".functional_ckpt"]
    assert queries.exists(store, f"{run}/.functional_ckpt/lock")  # held by another writer
    monkeypatch.setattr(lease, "LEASE_SECONDS", 2.5)
    monkeypatch.setattr(lease, "_LOOK_SECONDS", 0.2)
    started = time.monotonic()
    with fc.CheckpointManager(run) as manager:  # it is not renewed, and runs out
        assert time.monotonic() - started < 30
        manager.save(1, _state(1)).result()


def test_permanent_errors_are_not_retried(
    s3: str, s3_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(errors.StorageError, match="no such bucket"):
        fc.CheckpointManager("s3://no-such-bucket/run")
    with pytest.raises(errors.UsageError, match="nothing://"):
        fc.CheckpointManager("nothing://bucket/run")
    monkeypatch.setenv("S3_ENDPOINT_URL", "127.0.0.1:1")
    with pytest.raises(errors.UsageError, match="http://"):
        fc.CheckpointManager(f"{s3}/run")
    monkeypatch.setenv("S3_ENDPOINT_URL", s3_url)
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(errors.UsageError, match="needs its secret"):
        fc.CheckpointManager(f"{s3}/run")


@pytest.mark.parametrize(
    ("status", "code", "meaning"),
    [
        (403, "AccessDenied", "permission denied"),
        (403, "InvalidAccessKeyId", "access key or its secret is wrong"),
        (403, "SignatureDoesNotMatch", "access key or its secret is wrong"),
        (400, "ExpiredToken", "token has expired"),
        (400, "AuthorizationHeaderMalformed", "another region"),
        (301, "PermanentRedirect", "another region"),
        (400, "InvalidArgument", "the request is refused"),
        (404, "NoSuchBucket", "no such bucket"),
    ],
)
def test_s3_refusals_are_distinguished_and_hide_the_key(
    status: int, code: str, meaning: str, s3: str, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = Proxy(s3_url)
    proxy.refusal = (
        status,
        f"<Error><Code>{code}</Code><AWSAccessKeyId>{servers.KEY_ID}</AWSAccessKeyId>"
        f"<StringToSign>{servers.SECRET}</StringToSign></Error>".encode(),
    )
    set_environment(monkeypatch, proxy.url)
    started = time.monotonic()
    with pytest.raises(errors.StorageError, match=meaning) as caught:
        fc.CheckpointManager(f"{s3}/run")
    assert time.monotonic() - started < 30
    for secret in (servers.KEY_ID, servers.SECRET):
        assert secret not in str(caught.value) and secret not in repr(caught.value)
    proxy.close()


def test_transient_errors_are_retried(
    s3: str, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of status 400 too, if the network damaged the request."""
    proxy = Proxy(s3_url)
    proxy.refusal = (400, b"<Error><Code>RequestTimeout</Code></Error>")
    set_environment(monkeypatch, proxy.url)
    timer = threading.Timer(0.5, lambda: setattr(proxy, "refusal", None))
    timer.start()
    with fc.CheckpointManager(f"{s3}/run") as manager:
        assert manager.all_steps() == [] and proxy.refusal is None
    timer.join()
    proxy.close()


@pytest.mark.parametrize(
    ("status", "meaning"),
    [
        (400, "the request is refused"),
        (401, "the endpoint or the credentials cannot be used"),
        (403, "permission denied"),
        (404, "no such bucket"),
    ],
)
def test_gcs_refusals_are_distinguished(
    status: int, meaning: str, gcs: str, gcs_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = Proxy(gcs_url)
    proxy.refusal = (status, b'{"error": {"message": "its own words"}}')
    set_gcs_environment(monkeypatch, proxy.url)
    started = time.monotonic()
    with pytest.raises(errors.StorageError, match=meaning):
        fc.CheckpointManager(f"{gcs}/run")
    assert time.monotonic() - started < 30
    proxy.close()


def test_gcs_needs_credentials_and_a_url(
    gcs: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(errors.StorageError, match="no such bucket"):
        fc.CheckpointManager("gs://no-such-bucket/run")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "127.0.0.1:1")
    with pytest.raises(errors.UsageError, match="STORAGE_EMULATOR_HOST must start with http://"):
        fc.CheckpointManager(f"{gcs}/run")
    with monkeypatch.context() as patch, pytest.raises(errors.UsageError, match=r"ckpt\[gcs\]"):
        patch.setitem(sys.modules, "google.cloud.storage", None)
        fc.CheckpointManager(f"{gcs}/run")
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "absent.json"))
    with pytest.raises(errors.StorageError, match=r"absent.json was not found.*GCS_KEY"):
        fc.CheckpointManager(f"{gcs}/run")


def test_large_file_is_uploaded_completely(bucket: str, tmp_path: Path) -> None:
    """In parts, of which the last is a smaller one."""
    file, target, back = tmp_path / "file", f"{bucket}/run/file", tmp_path / "back"
    file.write_bytes(torch.randn(5_000_000).numpy().tobytes())
    store = _store(bucket)
    store.put_file(str(file), target)
    assert store.checksum(target) == LocalStorage().checksum(str(file))
    store.rename(f"{bucket}/run", f"{bucket}/moved")
    store._bucket.download("moved/file", str(back))
    assert back.read_bytes() == file.read_bytes()


def test_no_credentials_are_stored(s3: str) -> None:
    run = f"{s3}/run"
    with fc.CheckpointManager(run) as manager:
        manager.save(1, _state(1), metrics={"a": 1}).result()
        store = _store(run)
        for name in store.walk(s3):
            data = store.read(f"{s3}/{name}")
            assert servers.KEY_ID.encode() not in data and servers.SECRET.encode() not in data


@pytest.mark.parametrize("where", ["profile", "gcs", "oci"])
def test_credentials_come_from_the_environment(
    where: str, s3: str, s3_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of AWS's files, of Google's HMAC keys, of OCI: none of them is in AWS's variables."""
    name = s3.removeprefix("s3://")
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.delenv(variable)
    uri = {"profile": f"s3://{name}/a", "gcs": f"gs://{name}/a", "oci": f"oci://{name}@space/a"}
    if where == "profile":
        file = tmp_path / "credentials"
        file.write_text(
            f"[mine]\naws_access_key_id = {servers.KEY_ID}\n"
            f"aws_secret_access_key = {servers.SECRET}\n"
        )
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
        monkeypatch.setenv("AWS_PROFILE", "mine")
    elif where == "gcs":
        monkeypatch.setenv("GCS_KEY", servers.KEY_ID)
        monkeypatch.setenv("GCS_SECRET", servers.SECRET)
        monkeypatch.setenv("GCS_ENDPOINT_URL", s3_url)
    else:
        file = tmp_path / "config"
        file.write_text("[DEFAULT]\nregion = eu-frankfurt-1\n")
        monkeypatch.setenv("OCI_CONFIG_FILE", str(file))
        monkeypatch.setenv("OCI_ACCESS_KEY_ID", servers.KEY_ID)
        monkeypatch.setenv("OCI_SECRET_ACCESS_KEY", servers.SECRET)
    fc.save(uri[where], _state(1))
    assert not differences(fc.restore(uri[where])["tree"], _state(1)["tree"])


@pytest.mark.parametrize(("kind", "lead"), [("s3", set_environment), ("gcs", set_gcs_environment)])
def test_a_small_part_reads_little(
    kind: str,
    lead: Callable[[pytest.MonkeyPatch, str], None],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = f"{request.getfixturevalue(kind)}/one"
    state = {
        "large": {f"layer{i}": torch.randn(1024, 2048) for i in range(6)},
        "small": {"bias": torch.randn(64)},
    }
    fc.save(one, state)
    total = queries.total_bytes(_store(one), one)
    assert total > 48e6
    proxy = Proxy(request.getfixturevalue(f"{kind}_url"))
    lead(monkeypatch, proxy.url)
    restored = fc.restore(one, only="small")
    assert torch.equal(restored["small"]["bias"], state["small"]["bias"])
    assert 0 < proxy.traffic.down_bytes < 0.02 * total
    proxy.traffic.down_bytes = 0
    restored = fc.restore(one, only="large.layer3")
    assert torch.equal(restored["large"]["layer3"], state["large"]["layer3"])
    assert 8e6 < proxy.traffic.down_bytes < 0.2 * total
    proxy.close()
