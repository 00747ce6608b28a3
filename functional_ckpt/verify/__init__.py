"""Verification: reads a checkpoint and reports damaged leaves and files."""

from __future__ import annotations

from functional_ckpt.verify.checkpoint import verify_checkpoint
from functional_ckpt.verify.findings import Finding

__all__ = ["Finding", "verify_checkpoint"]
