"""Tuning constants of restoring, each with the reason for its value."""

from __future__ import annotations

ROUND_BYTES = 64 * 2**20
"""Bytes of other ranks' data that a rank holds, once to send and once to receive: two chunks of the
largest size. Chosen to bound memory, not measured."""
