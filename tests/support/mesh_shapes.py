"""Meshes up to 1,024 ranks and sizes of dims, uneven ones above all."""

from __future__ import annotations

MESHES = (
    *((n,) for n in (1, 2, 3, 4, 6, 8, 64, 1024)),
    *((2, 2), (2, 3), (3, 2), (4, 8), (32, 32), (2, 512), (128, 8)),
    *((2, 2, 2), (2, 3, 4), (4, 8, 32), (16, 8, 8)),
)
SIZES = (0, 1, 2, 3, 5, 7, 10, 12, 33, 100)
