"""Run with four JAX devices: restores a step with Orbax alone, each array in another sharding.

    XLA_FLAGS=--xla_force_host_platform_device_count=4 sharded_reader.py CHECKPOINTS STEP KNOWN

Writes one line of JSON: differences from KNOWN (see sharded_writer.py), and the restored names.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

ITEMS = ("model", "optimizer", "arrays")


def another_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """The last dim that four devices divide, over all; else that two divide, over two of them."""
    for size, axes in ((4, ("x", "y")), (2, ("y",))):
        for dim in reversed(range(len(shape))):
            if shape[dim] % size == 0:
                return NamedSharding(mesh, PartitionSpec(*(None,) * dim, axes))
    return NamedSharding(mesh, PartitionSpec())


def restore_args(target: Any) -> Any:
    """How to ask for a tree; a standard restore takes no strings, which an optimizer has."""
    if all(hasattr(leaf, "sharding") for leaf in jax.tree.leaves(target)):
        return ocp.args.StandardRestore(target)
    each = jax.tree.map(
        lambda leaf: (
            ocp.ArrayRestoreArgs(sharding=leaf.sharding)
            if hasattr(leaf, "sharding")
            else ocp.RestoreArgs()
        ),
        target,
    )
    return ocp.args.PyTreeRestore(restore_args=each)


def named(tree: Any) -> dict[str, Any]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def problems(leaf: Any, expected: Any, sharding: NamedSharding) -> list[str]:
    """The differences of an array from its known value, device by device."""
    if leaf.sharding != sharding or len(leaf.addressable_shards) != 4:
        return [f"is sharded as {leaf.sharding}, wanted {sharding}"]
    if leaf.dtype != expected.dtype or leaf.shape != expected.shape:
        return [f"is {leaf.dtype}{leaf.shape}, known is {expected.dtype}{expected.shape}"]
    wrong = [
        shard.device.id
        for shard in leaf.addressable_shards
        if np.asarray(shard.data).tobytes() != expected[shard.index].tobytes()
    ]
    return [f"has other bytes on devices {wrong}"] if wrong else []


def main() -> None:
    # Not at import: pytest imports this file when it looks for doctests.
    jax.config.update("jax_enable_x64", True)
    checkpoints, step, known = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("x", "y"))
    arrays = dict(np.load(known / "arrays.npz"))
    values = json.loads((known / "values.json").read_text())

    def target(leaf: Any) -> Any:
        if not hasattr(leaf, "shape"):
            return leaf
        sharding = another_sharding(mesh, leaf.shape)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    with ocp.CheckpointManager(checkpoints) as manager:
        as_saved = manager.restore(step)
    targets = {name: jax.tree.map(target, as_saved[name]) for name in ITEMS}
    args = {name: restore_args(tree) for name, tree in targets.items()}
    # A manager that has restored once without arguments takes no others for an item.
    with ocp.CheckpointManager(checkpoints) as manager:
        restored = manager.restore(step, args=ocp.args.Composite(**args))
    found, wanted = named({name: restored[name] for name in ITEMS}), named(targets)

    differences = sorted(
        f"{name}: only here or there" for name in found.keys() ^ {*arrays, *values}
    )
    for name, expected in arrays.items():
        if name in found:
            texts = problems(found[name], expected, wanted[name].sharding)
            differences += [f"{name} {text}" for text in texts]
    for name, expected in values.items():
        if name in found and found[name] != expected:
            differences.append(f"{name} is {found[name]!r}, known is {expected!r}")
    shapes = {
        name: found[name].addressable_shards[0].data.shape for name in arrays if name in found
    }
    sys.stdout.write(json.dumps({"differences": differences, "shard_shapes": shapes}) + "\n")


if __name__ == "__main__":
    main()
