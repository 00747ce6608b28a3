"""What is saved: random data, never zeros, made anew in every child process from one seed."""

from __future__ import annotations

from collections.abc import Mapping

import torch

__all__ = ["WORKLOADS", "make"]

# Name -> (arrays, bytes of each) at full size; `--quick` divides the number of arrays.
WORKLOADS: Mapping[str, tuple[int, int]] = {
    "big": (16, 128 * 2**20),
    "small": (2000, 2**20),
    "tiny": (20000, 4 * 2**10),
}


def make(name: str, divisor: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """The tensors of a workload, fp32.

    Args:
        name: A key of `WORKLOADS`.
        divisor: How many times fewer arrays.
        seed: Of the random numbers.
    """
    count, size_bytes = WORKLOADS[name]
    generator = torch.Generator().manual_seed(seed)
    return {
        f"t{index:05d}": torch.rand(size_bytes // 4, generator=generator)
        for index in range(max(1, count // divisor))
    }
