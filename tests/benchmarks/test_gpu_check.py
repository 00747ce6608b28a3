"""scripts/gpu_check without a GPU; its figures, of tensors of the CPU in place of a GPU's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import async_peers, cuda

ROOT = Path(__file__).parents[2]


def test_without_a_gpu_it_says_so_and_succeeds() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    found = subprocess.run(
        [ROOT / "scripts" / "gpu_check"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (found.returncode, found.stdout, found.stderr) == (0, "gpu_check: no GPU\n", "")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("name", ["eager", "overlapped", "dcp"])
def test_each_system_saves_restores_and_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(cuda, "_SIDE", 8)
    peer = async_peers.DcpThread() if name == "dcp" else cuda.SYSTEMS[name]()
    figures = cuda.measure_system(
        peer, {"w": torch.rand(100), "v": torch.rand(3, 5)}, str(tmp_path)
    )
    wanted = {f"{what}_{n}_seconds" for what in ("blocked", "durable") for n in (1, 2, 3)}
    wanted |= {f"{what}_seconds" for what in ("restore_warm", "loop_alone", "loop_saving")}
    if peer.is_overlapped:
        wanted |= {f"fence_{n}_seconds" for n in (1, 2, 3)}
    assert figures.keys() == wanted
