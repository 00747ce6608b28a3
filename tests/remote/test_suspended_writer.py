"""A real process is suspended, another takes its directory over, and then the first wakes up."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import suspend_itself
from full import IS_FULL

import functional_ckpt as fc

_CASES = [("gcs", "prune"), ("s3", "upload")]
if IS_FULL:
    _CASES = [
        (kind, where)
        for kind in ("s3", "gcs")
        for where in ("marker", "late marker", "prune", "late prune", "upload")
    ]


@pytest.mark.parametrize(("kind", "where"), _CASES)
@pytest.mark.parametrize("is_same_step", [True, False] if IS_FULL else [True])
def test_a_suspended_process_harms_no_step_of_the_next_writer(
    kind: str,
    where: str,
    is_same_step: bool,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    run = f"{request.getfixturevalue(kind)}/run"
    suspend_itself.shorten_leases(monkeypatch.setattr, "B")
    nears = [str(tmp_path / name) for name in ("a", "b")] if where == "upload" else []
    process = subprocess.Popen(
        [sys.executable, suspend_itself.__file__, where, run, *nears[:1]],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "suspended\n"
        tiers = [fc.Tier(path=run)] if nears else []
        with fc.CheckpointManager(nears[1] if nears else run, tiers=tiers) as manager:
            before = manager.all_steps()
            steps = [step for step in (1, 3) if is_same_step and step not in before]
            if where == "late prune":
                steps = []  # a delete that is on its way cannot be called back
            for step in (*steps, 4):
                manager.save(step, suspend_itself.items(200.0 + step)).result()
            manager.wait_until_finished()
            reported = manager.all_steps()
            process.send_signal(signal.SIGCONT)
            said = process.stdout.read()
            process.wait(60)
            with fc.CheckpointManager(run, read_only=True) as reader:
                assert set(reported) <= set(reader.all_steps()), said
                for step in reader.all_steps():
                    tensor = reader.restore(step)["t"]["w"]
                    first = 200.0 if step in (*steps, 4) else 100.0
                    assert float(tensor.min()) == float(tensor.max()) == first + step
                is_there = 3 in reader.all_steps()
        assert ("saved" in said) == (is_there and 3 not in steps) or "Error" in said, said
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stdout.close()
