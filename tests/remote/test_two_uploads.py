"""Two writers upload different commits of one step; the first is suspended within its upload."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import suspend_itself
import suspended_upload
from full import IS_FULL

import functional_ckpt as fc
from functional_ckpt.storage import open as opening
from functional_ckpt.verify import checkpoint


@pytest.mark.skipif(not IS_FULL, reason="two processes and a server for each case")
@pytest.mark.parametrize("kind", ["s3", "gcs"])
@pytest.mark.parametrize("names", ["plain", "unique"])
@pytest.mark.parametrize("where", ["part", "file"])
def test_no_bytes_of_a_suspended_upload_get_into_the_step_of_the_next_writer(
    kind: str,
    names: str,
    where: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    run = f"{request.getfixturevalue(kind)}/run"
    suspend_itself.shorten_leases(monkeypatch.setattr, "B")
    script = [suspended_upload.__file__, names, where, run, str(tmp_path / "a")]
    process = subprocess.Popen([sys.executable, *script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "suspended\n"
        manager = suspended_upload.saved(str(tmp_path / "b"), run, names, 2.0)
        manager.wait_until_finished()
        process.send_signal(signal.SIGCONT)
        said = process.stdout.read()
        process.wait(60)
        manager.close()
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stdout.close()
    assert "another writer took it over" in said
    storage, root = opening.connect(run)
    assert checkpoint.verify_checkpoint(storage, f"{root}/3", 3) == []
    tensor = fc.restore(f"{run}/3")["t"]["w"]
    assert float(tensor.min()) == float(tensor.max()) == 2.0
