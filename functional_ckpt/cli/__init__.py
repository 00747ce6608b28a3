"""The `fckpt` command: inspects, verifies and compares checkpoints, without torch and JAX."""

from __future__ import annotations

from functional_ckpt.cli.app import main

__all__ = ["main"]
