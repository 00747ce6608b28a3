#!/usr/bin/env python3
"""Compares two runs of train_digits.py, bit for bit; exits 1 if they differ.

python examples/compare.py runs/one runs/other
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import functional_ckpt as fc


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The result of comparing two runs.

    Attributes:
        step: The last step of the first.
        num_leaves: Leaves compared, by item.
        num_bytes: Bytes of tensors compared.
        num_losses: Points of the loss curve compared.
        differences: Everything that differs, in words.
    """

    step: int
    num_leaves: dict[str, int]
    num_bytes: int
    num_losses: int
    differences: list[str]


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of nested containers, with its path; empty containers count as leaves."""
    if not isinstance(tree, (dict, list, tuple)) or not tree:
        yield path, tree
        return
    for key, child in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield from leaves(child, f"{path}.{key}" if path else str(key))


def is_same(one: Any, other: Any) -> bool:
    """Whether two leaves are equal in type, dtype, shape and every bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return (
            one.dtype == other.dtype
            and one.shape == other.shape
            and torch.equal(bits(one), bits(other))
        )
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        same_kind = one.dtype == other.dtype and one.shape == other.shape
        return same_kind and one.tobytes() == other.tobytes()
    return type(one) is type(other) and repr(one) == repr(
        other
    )  # repr: nan is nan, -0.0 is not 0.0


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes, which distinguish -0.0 from 0.0, and in which a nan equals itself."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def compare(one: Path, other: Path) -> Comparison:
    """Compares the last steps and the loss curves of two runs."""
    steps: list[fc.Restored] = []
    for workdir in (one, other):
        with fc.CheckpointManager(workdir / "checkpoints", read_only=True) as manager:
            steps.append(manager.restore())
    differences: list[str] = []
    if steps[0].step != steps[1].step:
        differences.append(f"last step: {steps[0].step} and {steps[1].step}")
    ours, theirs = (dict(leaves(dict(step))) for step in steps)
    for name in {**ours, **theirs}:
        if name not in ours or name not in theirs:
            differences.append(f"{name}: only in {one if name in ours else other}")
        elif not is_same(ours[name], theirs[name]):
            differences.append(f"{name}: not the same")
    if steps[0].metrics != steps[1].metrics:
        differences.append(f"metrics: {steps[0].metrics} and {steps[1].metrics}")
    curves = [(workdir / "curve.jsonl").read_text() for workdir in (one, other)]
    if curves[0] != curves[1]:
        differences.append("curve.jsonl: not the same")
    tensors = [leaf for leaf in ours.values() if isinstance(leaf, torch.Tensor)]
    return Comparison(
        step=-1 if steps[0].step is None else steps[0].step,
        num_leaves={item: sum(1 for _ in leaves(tree)) for item, tree in steps[0].items()},
        num_bytes=sum(tensor.nbytes for tensor in tensors),
        num_losses=curves[0].count("\n"),
        differences=differences,
    )


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    result = compare(Path(sys.argv[1]), Path(sys.argv[2]))
    if result.differences:
        sys.exit("\n".join(result.differences))
    total = sum(result.num_leaves.values())
    print(f"step {result.step}: {total} leaves and {result.num_losses} losses are the same")


if __name__ == "__main__":
    main()
