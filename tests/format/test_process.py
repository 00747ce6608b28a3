"""Saving and restoring native steps loads no TensorStore, and a forked child is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_USE = """
import os, sys, torch
import functional_ckpt as fc
from functional_ckpt import errors

model = torch.nn.Linear(4, 4).to(torch.bfloat16)
items = {"model": model, "x": {"a": torch.ones(3), "n": 3}}
manager = fc.CheckpointManager(sys.argv[1])
manager.save(1, items).result()
manager.restore(1, into={"model": model})
assert manager.restore(1)["x"]["n"] == 3
fc.save(sys.argv[1] + "/one", items)
assert "tensorstore" not in sys.modules
child = os.fork()
if not child:
    try:
        fc.save(sys.argv[1] + "/two", items)
    except errors.ForkedError:
        os._exit(0)
    os._exit(1)
assert os.waitpid(child, 0)[1] == 0
manager.close()
"""


def test_native_steps_need_no_tensorstore_and_a_forked_child_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", _USE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
