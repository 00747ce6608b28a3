"""How costs grow with the amount of work: CPU seconds at several sizes, and their exponents.

    python -m benchmarks.growth [TABLE ...] [--scale 1.0 | --sizes SIZE ...]

A table is a function of one size that returns CPU seconds by call. The exponent of a call is the
slope of its cost over the size, both as logarithms: 1.0 is linear.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
import torch

import functional_ckpt as fc
from benchmarks import growth_ranks
from functional_ckpt import cli
from functional_ckpt.core.records import orbax, records
from functional_ckpt.policies.base import StepInfo
from functional_ckpt.steps.history import commit_time
from functional_ckpt.steps.late_metrics import LateMetrics
from functional_ckpt.storage.local import LocalStorage
from functional_ckpt.storage.open import connect
from functional_ckpt.verify import verify_checkpoint

Figures = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures how costs grow.")
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=", ".join(TABLES))
    sizing = parser.add_mutually_exclusive_group()
    sizing.add_argument("--scale", type=float, default=1.0, help="multiplies all sizes")
    sizing.add_argument("--sizes", type=int, nargs="+", help="in place of those of the table")
    args = parser.parse_args()
    for name in args.tables or TABLES:
        measure, sizes = TABLES[name]
        sizes = args.sizes or [max(4, round(size * args.scale)) for size in sizes]
        found = [measure(size) for size in sizes]
        for call in found[0]:
            seconds = [each[call] for each in found]
            figures = dict(zip(sizes, (round(each, 4) for each in seconds), strict=True))
            row = {"table": name, "call": call, "cpu_s": figures}
            if len(sizes) > 1:
                row["exponent"] = round(exponent(sizes, seconds), 2)
            print(json.dumps(row), flush=True)


def exponent(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """Returns the slope of a straight line through the logarithms."""
    points = [(math.log(n), math.log(max(s, 1e-6))) for n, s in zip(sizes, seconds, strict=True)]
    x_mean = sum(x for x, _ in points) / len(points)
    y_mean = sum(y for _, y in points) / len(points)
    spread = sum((x - x_mean) ** 2 for x, _ in points)
    return sum((x - x_mean) * (y - y_mean) for x, y in points) / spread


def cpu_seconds(call: Callable[[], object]) -> float:
    """Returns the CPU seconds of a call, on all threads of the process."""
    gc.collect()
    start = time.process_time()
    call()
    return time.process_time() - start


def check(is_right: bool) -> None:
    """Raises if a measured call did not do its work."""
    if not is_right:
        raise RuntimeError("The measured call did not do its work.")


# -------------------------------------------------------------------------------------- leaves


def leaves(size: int) -> Figures:
    """Tensors of 16 bytes in one item, on this disk."""
    with tempfile.TemporaryDirectory() as folder:
        return round_trip(f"{folder}/step", size)


def leaves_s3(size: int) -> Figures:
    """Tensors of 16 bytes in one item, on the S3 server of the tests."""
    sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "support"))
    import servers

    with servers.s3_server() as url:
        os.environ.update(servers.environment(url))
        servers.make_bucket(url, "growth")
        return round_trip("s3://growth/step", size)


def leaves_orbax(size: int) -> Figures:
    """Orbax reading an item of this library, and one of its own."""
    with tempfile.TemporaryDirectory() as folder:
        state = make_state(size)
        fc.save(f"{folder}/step", {"state": state})
        arrays = {name: value.numpy() for name, value in state.items()}
        ocp.PyTreeCheckpointer().save(f"{folder}/own", arrays)
        return {
            name: cpu_seconds(functools.partial(ocp.PyTreeCheckpointer().restore, path))
            for name, path in {
                "of this library": f"{folder}/step/state",
                "its own": f"{folder}/own",
            }.items()
        }


def make_state(size: int) -> dict[str, torch.Tensor]:
    values = torch.arange(4 * size, dtype=torch.float32).view(size, 4)
    return {f"w{number:07}": values[number].clone() for number in range(size)}


def round_trip(path: str, size: int) -> Figures:
    """Saves, restores, verifies and shows one checkpoint."""
    state = make_state(size)
    found = {"save": cpu_seconds(lambda: fc.save(path, {"state": state}))}
    found["restore"] = cpu_seconds(lambda: check(len(fc.restore(path)["state"]) == size))
    store = connect(path)
    found["verify"] = cpu_seconds(lambda: check(verify_checkpoint(*store) == []))
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        found["show"] = cpu_seconds(lambda: check(cli.main(["show", path]) == 0))
    return found


# -------------------------------------------------------------------------------------- steps

ITEMS = {"state": {"w": torch.ones(4)}}
KEEP_ALL = [fc.policies.LatestN(10**9), fc.policies.BestN(10**9, "late")]
KEEP_FEW = [fc.policies.LatestN(3), fc.policies.BestN(2, "late")]


def steps(num_steps: int) -> Figures:
    """A directory of steps, each with a late metric."""
    with tempfile.TemporaryDirectory() as folder:
        root = make_steps(Path(folder) / "run", num_steps)
        found: Figures = {}
        manager = fc.CheckpointManager(root, read_only=True)
        found["poll"] = cpu_seconds(lambda: manager.wait_for_new_step(10**9, timeout=0.0))
        found["latest, read-only"] = cpu_seconds(manager.latest_step)
        manager.close()
        found["open"] = cpu_seconds(lambda: fc.CheckpointManager(root).close())
        with fc.CheckpointManager(root, keep_policy=KEEP_ALL) as writer:
            found["save, nothing to prune"] = cpu_seconds(lambda: save(writer, num_steps + 1))
            found["record"] = cpu_seconds(lambda: writer.record_metrics(1, {"late": 0.5}))
            found["metadata"] = cpu_seconds(lambda: writer.metadata(num_steps // 2))
        with fc.CheckpointManager(root, keep_policy=KEEP_FEW) as writer:
            found["save, all but 5 pruned"] = cpu_seconds(lambda: save(writer, num_steps + 2))
            check(len(writer.all_steps()) <= 6)
    return found


def deliveries(num_steps: int) -> Figures:
    """Steps that were promised to another tier, each with a late metric."""
    with tempfile.TemporaryDirectory() as folder:
        root, tier = make_steps(Path(folder) / "near", num_steps), Path(folder) / "far"

        def deliver() -> None:
            with fc.CheckpointManager(root, tiers=[tier]) as manager:
                manager.wait_until_finished()

        found = {"open and deliver all": cpu_seconds(deliver)}
        check(len(LateMetrics(LocalStorage(), str(tier)).look()) == num_steps)
        return found


def save(manager: fc.CheckpointManager, step: int) -> None:
    manager.save(step, ITEMS, metrics={"late": 0.5})
    manager.wait_until_finished()


def make_steps(root: Path, num_steps: int) -> Path:
    """Makes a run by copying its first step; only the copies' small files are their own."""
    with fc.CheckpointManager(root) as manager:
        save(manager, 0)
    late = LateMetrics(LocalStorage(), str(root))
    record_path, metadata_path = records.EXTENSION_FILE, orbax.CHECKPOINT_METADATA_FILE
    first = root / "0"
    record = records.parse_step((first / record_path).read_bytes(), "0")
    metadata: dict[str, Any] = json.loads((first / metadata_path).read_text())
    start_ns = metadata["commit_timestamp_nsecs"]
    for step in range(num_steps):
        time_ns = start_ns - (num_steps - step) * 10**9
        if step:
            copy_step(first, root / str(step), step, record, metadata, time_ns)
        info = StepInfo(step=step, time=commit_time(time_ns if step else start_ns))
        late.record(info, {"late": step * 7919 % 1000})
    return root


def copy_step(
    first: Path,
    path: Path,
    step: int,
    record: records.StepRecord,
    metadata: dict[str, Any],
    time_ns: int,
) -> None:
    shutil.copytree(first, path, copy_function=os.link)
    data = json.dumps({**metadata, "commit_timestamp_nsecs": time_ns}).encode()
    file = records.FileRecord(len(data), records.digest_hex(data))
    files = {**record.files, orbax.CHECKPOINT_METADATA_FILE: file}
    new = records.StepRecord(step=step, items=record.items, files=files)
    for name, content in (
        (orbax.CHECKPOINT_METADATA_FILE, data),
        (records.EXTENSION_FILE, new.to_json()),
    ):
        (path / name).unlink()
        (path / name).write_bytes(content)


TABLES: dict[str, tuple[Callable[[int], Figures], tuple[int, ...]]] = {
    "leaves": (leaves, (10_000, 30_000, 100_000, 300_000)),
    "leaves_s3": (leaves_s3, (1_000, 10_000, 60_000)),
    "leaves_orbax": (leaves_orbax, (1_000, 10_000, 30_000)),
    "steps": (steps, (300, 1_000, 3_000, 10_000)),
    "deliveries": (deliveries, (30, 100, 300, 1_000)),
    "ranks": (growth_ranks.declined, (4, 8, 12)),
}


if __name__ == "__main__":
    main()
