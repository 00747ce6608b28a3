"""A JAX program: writes checkpoints with Orbax, v0 and v1, in every layout it knows.

Run as `python orbax_writer.py DIRECTORY [SCENARIO ...]`, with as many CPU devices as XLA_FLAGS
says. Its values are computed with numpy only, so that a test can compute them without JAX.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

SCENARIOS: dict[str, Callable[[str], None]] = {}
# Every dtype of eight bits and fewer that JAX, Orbax and TensorStore can store between them.
NARROW = (
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e4m3b11fnuz", "float8_e3m4"),
    *("float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    *("int4", "int2", "float4_e2m1fn"),
)


def scenario(function: Callable[[str], None]) -> Callable[[str], None]:
    SCENARIOS[function.__name__] = function
    return function


def state(seed: int = 0) -> dict[str, Any]:
    """Arrays, numbers, strings, None, empty and nested containers: all that Orbax takes."""
    generator = np.random.default_rng(seed)
    return {
        "params": {
            "kernel": generator.standard_normal((8, 12), np.float32),
            "bias": generator.standard_normal(8, np.float32).astype(ml_dtypes.bfloat16),
            "a/b": np.arange(6).reshape(2, 3),
            "имя": np.array([True, False]),
        },
        "optimizer": [
            {"mu": np.full((3, 4), 0.5), "count": np.array(7, np.int32)},
            (np.arange(4, dtype=np.uint8), np.ones((2, 2), np.complex64)),
        ],
        "step": 12,
        "rate": 0.1,
        "name": "run é",
        "nothing": None,
        "empty": {"dict": {}, "list": []},
        "0": np.zeros(3, np.float16),
    }


def numbers(seed: int = 0) -> dict[str, Any]:
    """The same without strings, which `StandardSave` refuses."""
    return {key: value for key, value in state(seed).items() if key != "name"}


def config() -> dict[str, Any]:
    return {"lr": 0.1, "layers": [1, 2], "name": None}


def sharded() -> dict[str, np.ndarray[Any, Any]]:
    return {
        "rows": np.arange(32, dtype=np.float32).reshape(8, 4),
        "both": np.arange(64, dtype=np.int32).reshape(8, 8),
        "replicated": np.arange(12, dtype=np.float32).reshape(3, 4),
        "partly": np.arange(16, dtype=np.float32).reshape(4, 4),
        "bfloat16": np.arange(16, dtype=ml_dtypes.bfloat16),
        "scalar": np.array(2.5, np.float32),
    }


def narrow() -> dict[str, np.ndarray[Any, Any]]:
    values = np.array([[1, 1, 1], [0.5, 1, 0.5]])
    return {name: values.astype(getattr(ml_dtypes, name)) for name in NARROW}


# ------------------------------------------------------------------------------------ v0, managers


def _manager(path: str, **options: Any) -> Any:
    import orbax.checkpoint as ocp

    chosen = ocp.CheckpointManagerOptions(**options)
    return ocp.CheckpointManager(path, options=chosen)


@scenario
def v0_standard(path: str) -> None:
    import orbax.checkpoint as ocp

    with _manager(path, best_fn=lambda metrics: metrics["accuracy"]) as manager:
        for step in (1, 2, 10):
            manager.save(
                step,
                args=ocp.args.StandardSave(numbers(step)),
                metrics={"accuracy": 1 / step},
                custom_metadata={"note": "ключ"},
            )


@scenario
def v0_composite(path: str) -> None:
    import orbax.checkpoint as ocp

    with _manager(path) as manager:
        manager.save(
            3,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(numbers()),
                tree=ocp.args.PyTreeSave(state(1)),
                config=ocp.args.JsonSave(config()),
                arrays=ocp.args.ArraySave(np.arange(5)),
            ),
        )


@scenario
def v0_named_steps(path: str) -> None:
    import orbax.checkpoint as ocp

    names = ocp.path.step.standard_name_format(step_prefix="ckpt", step_format_fixed_length=6)
    with _manager(path, step_name_format=names) as manager:
        manager.save(5, args=ocp.args.StandardSave(numbers()))


# ------------------------------------------------------------------------------------ bare items


@scenario
def v0_standard_bare(path: str) -> None:
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, numbers())


@scenario
def v0_pytree_bare(path: str) -> None:
    import orbax.checkpoint as ocp

    ocp.PyTreeCheckpointer().save(path, state())


def _bare(*, use_zarr3: bool, use_ocdbt: bool, use_compression: bool = True) -> None:
    import orbax.checkpoint as ocp

    def write(path: str) -> None:
        handler = ocp.PyTreeCheckpointHandler(
            use_zarr3=use_zarr3, use_ocdbt=use_ocdbt, use_compression=use_compression
        )
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(path, args=ocp.args.PyTreeSave(state()))

    layout = ("zarr3" if use_zarr3 else "zarr2") + ("_ocdbt" if use_ocdbt else "_files")
    SCENARIOS[f"v0_{layout}{'' if use_compression else '_plain'}"] = write


for _zarr3 in (False, True):
    for _ocdbt in (False, True):
        _bare(use_zarr3=_zarr3, use_ocdbt=_ocdbt)
_bare(use_zarr3=True, use_ocdbt=True, use_compression=False)
_bare(use_zarr3=False, use_ocdbt=False, use_compression=False)


@scenario
def v0_rich_types(path: str) -> None:
    """Tuples as such in `_METADATA`: an option of Orbax that has no public name yet."""
    import orbax.checkpoint as ocp
    from orbax.checkpoint._src.metadata.pytree_metadata_options import PyTreeMetadataOptions

    options = PyTreeMetadataOptions(support_rich_types=True)
    handler = ocp.PyTreeCheckpointHandler(pytree_metadata_options=options)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(state()))


@scenario
def v0_chunked(path: str) -> None:
    """Several chunks to an array, and two leaves of another dtype on disk than in memory."""
    import jax
    import orbax.checkpoint as ocp

    tree = {"big": np.arange(4096, dtype=np.float32).reshape(64, 64), "cast": np.arange(6.0)}
    arguments = {
        "big": ocp.SaveArgs(chunk_byte_size=1024),
        "cast": ocp.SaveArgs(dtype=np.dtype(np.float32)),
    }
    assert jax.tree.structure(tree) == jax.tree.structure(arguments)
    handler = ocp.PyTreeCheckpointHandler(use_zarr3=True)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(tree, save_args=arguments))


# ------------------------------------------------------------------------------------ v1


@scenario
def v1_save(path: str) -> None:
    from orbax.checkpoint import v1

    v1.save(path, state(), custom_metadata={"note": 1})


@scenario
def v1_save_named(path: str) -> None:
    from orbax.checkpoint import v1

    v1.save(path, state(), checkpointable_name="weights")


@scenario
def v1_files(path: str) -> None:
    from orbax.checkpoint import v1

    saving = v1.options.ArrayOptions.Saving(use_ocdbt=False, use_zarr3=False)
    with v1.Context(array_options=v1.options.ArrayOptions(saving=saving)):
        v1.save(path, state())


@scenario
def v1_checkpointables(path: str) -> None:
    from orbax.checkpoint import v1

    v1.save_checkpointables(path, {"state": state(), "config": config()})


@scenario
def v1_training(path: str) -> None:
    from orbax.checkpoint import v1

    with v1.training.Checkpointer(path) as checkpointer:
        for step in (0, 4):
            checkpointer.save(step, state(step), metrics={"accuracy": step / 4})


# ------------------------------------------------------------------------------------ JAX arrays


def _sharded_arrays() -> dict[str, Any]:
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    devices = np.array(jax.devices())
    assert devices.size == 4, devices
    mesh = Mesh(devices.reshape(2, 2), ("x", "y"))
    specs = {
        "rows": PartitionSpec(("x", "y")),
        "both": PartitionSpec("x", "y"),
        "replicated": PartitionSpec(),
        "partly": PartitionSpec("y"),
        "bfloat16": PartitionSpec("x"),
        "scalar": PartitionSpec(),
    }
    return {
        name: jax.device_put(value, NamedSharding(mesh, specs[name]))
        for name, value in sharded().items()
    }


@scenario
def sharded_v0(path: str) -> None:
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, _sharded_arrays())


@scenario
def sharded_v1(path: str) -> None:
    from orbax.checkpoint import v1

    v1.save(path, _sharded_arrays())


@scenario
def narrow_v0(path: str) -> None:
    import jax
    import orbax.checkpoint as ocp

    tree = {name: jax.numpy.asarray(value) for name, value in narrow().items()}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


@scenario
def narrow_v1(path: str) -> None:
    import jax
    from orbax.checkpoint import v1

    tree = {name: jax.numpy.asarray(value) for name, value in narrow().items()}
    v1.save(path, tree)


@scenario
def random_keys(path: str) -> None:
    import jax
    import orbax.checkpoint as ocp

    tree = {
        "old": jax.random.PRNGKey(3),
        "new": jax.random.key(5),
        "many": jax.random.split(jax.random.key(1), 3),
    }
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


@scenario
def rewritten(path: str) -> None:
    """A JAX program with a native checkpoint next to `path`: opens it, saves it."""
    import orbax.checkpoint as ocp

    source = os.path.join(os.path.dirname(path), "ours")
    if not os.path.exists(source):
        return
    names = ("model", "optimizer", "scheduler", "tree")
    with ocp.CheckpointManager(source) as manager:
        wanted = {name: ocp.args.PyTreeRestore() for name in names}
        restored = manager.restore(3, args=ocp.args.Composite(**wanted))
    with ocp.CheckpointManager(path) as manager:
        saved = {name: ocp.args.PyTreeSave(restored[name]) for name in names}
        manager.save(3, args=ocp.args.Composite(**saved))


def main(root: str, names: list[str]) -> None:
    for name in names or SCENARIOS:
        SCENARIOS[name](os.path.join(root, name))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
