"""The loss curve that the training scripts write beside their checkpoints."""

from __future__ import annotations

import json
from pathlib import Path


class Curve:
    """The loss curve: a JSON line for each step, flushed at once, cut to the step resumed from."""

    def __init__(self, path: Path, num_steps: int) -> None:
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        if len(lines) < num_steps:
            raise ValueError(
                f"{path} ends after {len(lines)} steps, the checkpoint after {num_steps}."
            )
        path.write_text("".join(lines[:num_steps]))
        self._file = path.open("a")

    def add(self, **values: float) -> None:
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
