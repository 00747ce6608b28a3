"""Azure Blob Storage, by its emulator: a store like the others, with conditional writes."""

from __future__ import annotations

import uuid
from collections.abc import Generator, Mapping

import azurite
import pytest
import torch
from contract import StorageContract

import functional_ckpt as fc
from functional_ckpt import errors
from functional_ckpt.storage.base import Storage
from functional_ckpt.storage.buckets.base import PreconditionFailed
from functional_ckpt.storage.open import connect
from functional_ckpt.testing import differences
from functional_ckpt.verify import verify

pytestmark = pytest.mark.skipif(azurite.command() is None, reason="needs azurite-blob (npm)")


@pytest.fixture(scope="module")
def variables() -> Generator[Mapping[str, str]]:
    with azurite.server() as found:
        yield found


@pytest.fixture
def container(variables: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    name = f"container-{uuid.uuid4().hex[:8]}"
    azurite.create_container(variables["AZURE_STORAGE_ENDPOINT"], name)
    return f"az://{name}"


class TestAzure(StorageContract):
    @pytest.fixture
    def storage(self, container: str) -> Storage:
        return connect(container)[0]

    @pytest.fixture
    def root(self, container: str) -> str:
        return f"{container}/run"


def test_a_run(container: str) -> None:
    run = f"{container}/run"
    state = {"w": torch.randn(2000, 3000), "tied": torch.arange(10), "n": 3}  # of several parts
    with fc.CheckpointManager(run, keep_policy=[fc.policies.LatestN(2)], overwrite=True) as manager:
        for step in range(3):
            manager.save(step, {"state": {**state, "n": step}}, metrics={"a": step})
        manager.save(2, {"state": state})
        manager.wait_until_finished()
        assert manager.all_steps() == [1, 2]
        with pytest.raises(errors.LockedError):
            fc.CheckpointManager(run)
    assert verify(f"{run}/2") == []
    assert not differences(fc.restore(f"{run}/2")["state"], state)
    fc.transform.copy(f"{run}/2", f"{container}/copy/2")
    assert verify(f"{container}/copy/2") == []


def test_writes_are_conditional(container: str) -> None:
    storage, _ = connect(container)
    bucket = storage._bucket  # type: ignore[attr-defined]
    first = bucket.write("a", b"1", replacing="")
    with pytest.raises(PreconditionFailed):
        bucket.write("a", b"2", replacing="")
    second = bucket.write("a", b"3", replacing=first.version)
    with pytest.raises(PreconditionFailed):
        bucket.write("a", b"4", replacing=first.version)
    assert bucket.read("a") == b"3" and bucket.head("a").version == second.version


def test_a_container_that_is_absent_and_a_wrong_key_are_named(
    container: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(errors.StorageError, match="there is no such bucket"):
        fc.CheckpointManager("az://nothing-here/run")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "d3Jvbmcga2V5")
    with pytest.raises(errors.StorageError, match=r"denied|refused|wrong") as caught:
        fc.CheckpointManager(f"{container}/run")
    assert "d3Jvbmcga2V5" not in str(caught.value)
