"""A model that exists once: built on the meta device, its memory comes from the checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import lazy_run
import torch

import functional_ckpt as fc


def test_a_meta_model_is_restored_without_a_second_copy(tmp_path: Path) -> None:
    model = lazy_run.build()
    with torch.no_grad():
        for index, tensor in enumerate(model.state_dict().values()):
            tensor.fill_(index)
    fc.save(tmp_path / "model", {"model": model})
    del model
    fc.save(tmp_path / "tiny", {"model": {"x": torch.ones(3)}})
    script = Path(lazy_run.__file__)
    command = [sys.executable, script, tmp_path / "model", tmp_path / "tiny"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["is_right"]
    assert told["size"] > 280 * 2**20
    print(told)
    assert told["peak"] <= 1.05 * told["size"], told
