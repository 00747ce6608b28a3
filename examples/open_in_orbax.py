#!/usr/bin/env python3
"""Opens a step of train_digits.py with Orbax under JAX, and compares it with PyTorch's values.

    python examples/open_in_orbax.py runs/digits/checkpoints 399

Every leaf must be the same; then the network is written down once more, in JAX, and must classify
the test images as well as it did in PyTorch. Prints one line of JSON; exits 1 if anything differs.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from sklearn.datasets import load_digits

import functional_ckpt as fc


def is_empty(node: Any) -> bool:
    """Values that JAX does not count as leaves."""
    return node is None or (isinstance(node, (dict, list, tuple)) and not node)


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by path, including None and empty containers."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_empty)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def is_same(theirs: Any, ours: Any) -> bool:
    """Whether both leaves are equal: dtype, shape and bytes of an array, or type and value."""
    if not hasattr(ours, "shape"):
        return type(theirs) is type(ours) and theirs == ours
    one, other = np.asarray(theirs), np.asarray(ours)
    return (
        one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    )


def convolve(images: jax.Array, weights: dict[str, jax.Array], layer: str) -> jax.Array:
    """A convolution, its batch norm and a rectifier."""
    out = jax.lax.conv_general_dilated(
        images,
        weights[f"conv{layer}.weight"],
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NCHW", "OIHW", "NCHW"),
    )
    mean, variance, scale, shift = (
        weights[f"norm{layer}.{name}"][:, None, None]
        for name in ("running_mean", "running_var", "weight", "bias")
    )
    out += weights[f"conv{layer}.bias"][:, None, None]
    return jax.nn.relu((out - mean) / jnp.sqrt(variance + 1e-5) * scale + shift)


@jax.jit
def classify(weights: dict[str, jax.Array], images: jax.Array) -> jax.Array:
    """The classifier of train_digits.py, in JAX."""
    x = convolve(convolve(images, weights, "1"), weights, "2")
    x = x.reshape(-1, 32, 4, 2, 4, 2).max((3, 5)).reshape(-1, 512)
    x = jax.nn.relu(x @ weights["hidden.weight"].T + weights["hidden.bias"])
    return jnp.argmax(x @ weights["output.weight"].T + weights["output.bias"], axis=1)


def main() -> None:
    directory, step = os.path.abspath(sys.argv[1]), int(sys.argv[2])
    with ocp.CheckpointManager(directory) as manager:
        theirs = manager.restore(step)
    ours = fc.restore(os.path.join(directory, str(step)))

    differences: list[str] = []
    num_leaves = 0
    for item in ours:
        wanted, found = named_leaves(ours[item]), named_leaves(theirs[item])
        num_leaves += len(wanted)
        for name in {**wanted, **found}:
            both = name in wanted and name in found
            if not both or not is_same(found[name], wanted[name]):
                differences.append(item + name)

    data: Any = load_digits()
    images = jnp.asarray(data.images[::5, None] / 16, jnp.float32)
    weights = {name: jnp.asarray(value) for name, value in theirs["ema"]["average"].items()}
    accuracy = float(np.mean(np.asarray(classify(weights, images)) == data.target[::5]))
    if abs(accuracy - theirs["metrics"]["accuracy"]) > 1e-9:
        differences.append(f"accuracy: {accuracy} in JAX, saved was {theirs['metrics']}")

    print(json.dumps({"leaves": num_leaves, "accuracy": accuracy, "differences": differences}))
    sys.exit(1 if differences else 0)


if __name__ == "__main__":
    main()
