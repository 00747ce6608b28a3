"""Verification: reads a checkpoint and reports damaged leaves and files."""

from __future__ import annotations

import os

from functional_ckpt.storage.open import connect
from functional_ckpt.verify.checkpoint import verify_checkpoint
from functional_ckpt.verify.findings import Finding

__all__ = ["Finding", "verify", "verify_checkpoint"]


def verify(path: str | os.PathLike[str]) -> list[Finding]:
    """Compares a step, or a checkpoint of `fc.save`, with its records; reads every byte.

    Args:
        path: Its directory, or the URI of one.

    Returns:
        The findings, sorted by item and file; empty if every byte is intact. Those of Orbax's
        checkpoints that only say that there are no digests have `is_damage` False.

    Raises:
        StepNotFoundError: There is no directory.
        CorruptCheckpointError: It is no checkpoint at all.
    """
    return verify_checkpoint(*connect(path))
