"""Memory: a step is exported a shard at a time, and a source is saved without a second copy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

import functional_ckpt as fc
from functional_ckpt.interop import huggingface

NUM_TENSORS, TENSOR_BYTES = 16, 8 * 2**20

# The peak of anonymous memory: mapped files are the page cache's, and cost nothing.
MEASURE = """
import shutil, sys, tempfile, threading
import psutil, torch
import functional_ckpt as fc
from functional_ckpt.interop import huggingface
process, peak, done = psutil.Process(), 0, threading.Event()
def anonymous():
    info = process.memory_info()
    return info.rss - info.shared
warm = tempfile.mkdtemp()
fc.save(warm + "/step", {"model": {"w": torch.ones(9)}})
huggingface.export(warm + "/step", warm + "/hf")
shutil.rmtree(warm)
start = anonymous()
def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous() - start)
thread = threading.Thread(target=watch)
thread.start()
CALL
done.set()
thread.join()
print(peak)
"""


def peak_bytes(call: str, root: Path) -> int:
    code = MEASURE.replace("CALL", call)
    done = subprocess.run(
        [sys.executable, "-c", code, str(root)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout)


def test_memory_is_bounded_by_a_shard(tmp_path: Path) -> None:
    model = {f"w{n}": torch.full((TENSOR_BYTES // 4,), float(n)) for n in range(NUM_TENSORS)}
    fc.save(tmp_path / "step", {"model": model})
    call = 'huggingface.export(sys.argv[1] + "/step", sys.argv[1] + "/hf", max_shard_size="10MB")'
    # a tensor being read, its bytes being written, and the libraries' own memory
    assert peak_bytes(call, tmp_path) < NUM_TENSORS * TENSOR_BYTES / 2
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) == NUM_TENSORS
    assert torch.equal(huggingface.load(tmp_path / "hf")["w3"], model["w3"])
    call = 'fc.save(sys.argv[1] + "/again", fc.interop.open(sys.argv[1] + "/hf"))'
    assert peak_bytes(call, tmp_path) < NUM_TENSORS * TENSOR_BYTES / 2
    assert torch.equal(fc.restore(tmp_path / "again")["model"]["w5"], model["w5"])
