"""Writes the golden checkpoints of this version into a new folder beside this file.

    python tests/golden/write.py v2

A folder that was released is never written again. Needs Orbax and JAX, for those that Orbax writes.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import golden_values as values
import numpy as np
import torch

import functional_ckpt as fc
from functional_ckpt.core.files import file_plan

HERE = Path(__file__).parent
METRICS = {"accuracy": 0.75, "steps": 3}
CUSTOM = {"note": "é", "list": [1, None, {"a": True}]}
CONFIG = {"lr": 0.1, "layers": [1, 2], "name": "ü", "none": None}


def write_ours(folder: Path) -> None:
    model = values.module(filled=True)
    optimizer = values.optimizer(model, filled=True)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    items: dict[str, Any] = {
        "model": model,
        "optimizer": fc.Optimizer(optimizer, model),
        "scheduler": scheduler,
        "rng": fc.Rng({"own": np.random.default_rng(14)}),
        "tree": values.tree(),
        "config": fc.Json(CONFIG),
    }
    values.seed()  # after the module was made, which draws
    with fc.CheckpointManager(folder / "run") as manager:
        manager.save(7, items, metrics=METRICS, custom_metadata=CUSTOM)
    shutil.rmtree(folder / "run" / ".functional_ckpt")  # holds the lock, with this machine's name
    with_targets = {
        "named": values.Pair(torch.arange(4), [1, 2.5]),
        "wrapped": values.Wrapped(torch.arange(6.0), torch.tensor(0.5)),
    }
    fc.save(folder / "save", {"targets": with_targets, "leaf": torch.arange(3)})
    file_plan.BYTES_PER_FILE = 1  # over several files, as from 64 MiB on
    fc.save(folder / "spread", {"tree": values.tree()})


def write_orbax(folder: Path) -> None:
    import orbax.checkpoint as ocp
    from orbax.checkpoint import v1

    options = ocp.CheckpointManagerOptions(best_fn=lambda metrics: metrics["accuracy"])
    with ocp.CheckpointManager(folder / "orbax_v0_zarr2", options=options) as manager:
        arguments = ocp.args.StandardSave(values.orbax_tree())
        manager.save(3, args=arguments, metrics={"accuracy": 0.5})
    handler = ocp.PyTreeCheckpointHandler(use_zarr3=True)
    with ocp.Checkpointer(handler) as checkpointer:
        tree = values.orbax_tree() | {"text": "é"}
        checkpointer.save(folder / "orbax_v0_zarr3", args=ocp.args.PyTreeSave(tree))
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
    with ocp.Checkpointer(handler) as checkpointer:
        tree = values.orbax_tree() | {"text": "é"}
        checkpointer.save(folder / "orbax_v0_files", args=ocp.args.PyTreeSave(tree))
    v1.save(folder / "orbax_v1", values.orbax_tree() | {"text": "é"}, custom_metadata={"a": 1})


def main(version: str) -> None:
    folder = HERE / version
    if folder.exists():
        raise FileExistsError(f"{folder}: golden checkpoints are never written again")
    with tempfile.TemporaryDirectory() as scratch:  # Orbax writes its path into commit_success.txt
        write_ours(Path(scratch))
        write_orbax(Path(scratch))
        shutil.copytree(scratch, folder)


if __name__ == "__main__":
    main(sys.argv[1])
