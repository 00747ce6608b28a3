"""Checkpoints made of checkpoints: means, edited ones and copies, piece by piece.

Memory does not grow with an array. All bytes that are read are compared with their digests, and a
failure leaves nothing at the destination.
"""

from functional_ckpt.transform.copying import copy
from functional_ckpt.transform.editing import edit
from functional_ckpt.transform.merging import merge

__all__ = ["copy", "edit", "merge"]
