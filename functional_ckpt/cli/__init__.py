"""The `fckpt` command: look at checkpoints, verify and compare them. Without torch and JAX."""

from __future__ import annotations

from functional_ckpt.cli.app import main

__all__ = ["main"]
