"""Restores a model built on the meta device: `python lazy_run.py CHECKPOINT TINY`.

Prints the bytes of the model and the peak anonymous memory of the restore above the process's
level. Mapped files do not count: the kernel drops them when it needs to.
"""

from __future__ import annotations

import json
import sys
import threading
import time

import torch
from torch import nn

import functional_ckpt as fc


def build(num_layers: int = 8, width: int = 3072) -> nn.Module:
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(num_layers)))


def anonymous_bytes() -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class Peak(threading.Thread):
    """Samples the memory of the process."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = anonymous_bytes()
        self.is_over = threading.Event()

    def run(self) -> None:
        while not self.is_over.is_set():
            self.bytes = max(self.bytes, anonymous_bytes())
            time.sleep(0.0005)


def main(checkpoint: str, tiny: str) -> None:
    fc.restore(tiny)  # excludes TensorStore's one-time setup
    with torch.device("meta"):
        model = build()
    base = anonymous_bytes()
    peak = Peak()
    peak.start()
    fc.restore(checkpoint, {"model": model})
    peak.is_over.set()
    peak.join()
    size_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    is_right = all(
        not value.is_meta and bool((value == index).all())
        for index, value in enumerate(model.state_dict().values())
    )
    print(json.dumps({"size": size_bytes, "peak": peak.bytes - base, "is_right": is_right}))


if __name__ == "__main__":
    main(*sys.argv[1:])
