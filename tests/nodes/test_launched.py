"""`node_local` under torchrun, as docs/tiers.md launches it: an agent for each node."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from full import IS_FULL
from train_on_nodes import KILLED_AT, NUM_STEPS

import functional_ckpt as fc

_PROGRAM = Path(__file__).with_name("train_on_nodes.py")


def _launch(root: Path) -> None:
    """Runs the program by an agent on each of two nodes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    agents: list[subprocess.Popen[str]] = []
    for number, node in enumerate(("node-a", "node-b")):
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2"),
            *("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=1"),
            *(f"--node-rank={number}", "--local-addr=127.0.0.1", "--max-restarts=2"),
            *(str(_PROGRAM), str(root)),
        ]
        environ = {
            **os.environ,
            "FUNCTIONAL_CKPT_NODE": node,
            "OMP_NUM_THREADS": "1",
            # Of torch 2.13, all attempts share one store, where gloo finds the addresses of the
            # attempt before.
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        agents.append(
            subprocess.Popen(
                command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    try:
        texts = [agent.communicate(timeout=240)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(texts)


@pytest.mark.skipif(not IS_FULL, reason="two agents of torchrun, which wait for each other")
def test_torchrun_restarts_ranks_that_resume_and_recover_a_wiped_node(tmp_path: Path) -> None:
    _launch(tmp_path)
    attempts = tmp_path / "attempts.txt"
    first, second = attempts.read_text().splitlines()
    assert first == "None True"
    assert second in [f"{step} True" for step in (KILLED_AT - 1, KILLED_AT)]
    shutil.rmtree(tmp_path / "node-b")
    _launch(tmp_path)
    assert attempts.read_text().splitlines()[2] == f"{NUM_STEPS} True"
    for node in ("node-a", "node-b"):  # partners of each other: each has all
        found = fc.restore(tmp_path / node / str(NUM_STEPS))["state"]["w"]
        expected = torch.arange(4.0).repeat_interleave(3) + NUM_STEPS
        assert torch.equal(found, expected)
