"""`fckpt merge` beside the disk: seconds and memory, files cold, against raw reads and one write.

    python -m benchmarks.merge [--steps 8] [--mib 1024] [--dir .]

Prints JSON: the seconds of the merge and of the raw limit (every byte of the inputs read on two
threads, those of one step written and synced), their ratio, and the peak of memory above the start.
The mean is compared with NumPy's, in float64.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence

import numpy as np
import torch

import functional_ckpt as fc
from benchmarks import files, limits, meters

__all__ = ["main", "measure"]

_NUM_TENSORS = 16
_COLUMNS = 1024


def measure(root: str, steps: int, mib: int) -> dict[str, float]:
    """Returns the figures for steps of a size; they are made below `root`."""
    paths = [_make(os.path.join(root, str(number)), number, mib) for number in range(steps)]
    figures = {"raw_seconds": _raw_seconds(root, paths, mib)}
    for path in paths:
        files.drop_cache(path)
    with meters.PeakMemory() as memory:
        out = os.path.join(root, "mean")
        figures["merge_seconds"] = meters.seconds(lambda: fc.transform.merge(paths, out))
    figures["of_raw"] = figures["raw_seconds"] / figures["merge_seconds"]
    figures["peak_mib"] = memory.peak / 2**20
    _compare(paths, out)
    return figures


def _raw_seconds(root: str, paths: Sequence[str], mib: int) -> float:
    target, total = limits.aligned(mib * 2**20), 0.0
    for path in paths:
        files.drop_cache(path)
        item = os.path.join(path, "model")
        total += meters.seconds(lambda item=item: limits.read(item, target, 2))
    raw = os.path.join(root, "raw")
    os.makedirs(raw)
    total += meters.seconds(lambda: limits.write(raw, target, False, 2))
    files.fresh(raw)
    return total


def _make(path: str, number: int, mib: int) -> str:
    generator = torch.Generator().manual_seed(number)
    rows = mib * 2**20 // 4 // _NUM_TENSORS // _COLUMNS
    tensors = {
        f"w{each}": torch.randn(rows, _COLUMNS, generator=generator) for each in range(_NUM_TENSORS)
    }
    fc.save(path, {"model": tensors})
    return path


def _compare(paths: Sequence[str], out: str) -> None:
    """Raises unless every tensor is the mean, to the last bit."""
    for each in range(_NUM_TENSORS):
        only = f"model.w{each}"
        values = [
            fc.restore(path, only=only)["model"][f"w{each}"].numpy() for path in (*paths, out)
        ]
        mean = np.mean(np.stack(values[:-1]), axis=0, dtype=np.float64).astype(np.float32)
        if not np.array_equal(mean, values[-1]):
            raise RuntimeError(f"w{each} is not NumPy's mean")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, and prints the figures."""
    parser = argparse.ArgumentParser(prog="benchmarks.merge", description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--dir", default=".")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.dir) as root:
        print(json.dumps(measure(root, options.steps, options.mib), indent=2))


if __name__ == "__main__":
    main()
