"""Native checkpoints open in every reader of Orbax, equal to the last bit."""

from __future__ import annotations

import collections
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from orbax.checkpoint import v1
from orbax_view import as_orbax, differences

import functional_ckpt as fc
from functional_ckpt import testing
from functional_ckpt.core.files import file_plan
from functional_ckpt.format import ocdbt_tree

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning"),
    # Orbax warns that a checkpoint is read without a sharding, which is intended here.
    pytest.mark.filterwarnings("ignore:.*[Ss]harding.*:UserWarning"),
]

FLOAT8 = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")


class Pair(NamedTuple):
    left: Any
    right: Any


def pytree() -> dict[Any, Any]:
    shared = torch.arange(6.0)
    return {
        "none": None,
        "ints": [0, -7, 2**53 + 1, 2**63 - 1, -(2**63), 2**63, -(2**80)],
        "floats": [0.1, math.nan, math.inf, -0.0, 5e-324],
        "bools": (True, False),
        "long": [list(range(200)), (0.5, math.nan) * 100, {"of bools": [True, False] * 100}],
        "long and mixed": [1, 2.5] * 70,
        "long queue": collections.deque(range(150), 200),
        "log": [{"step": 1, "loss": math.nan, "text": "\u0434"}] * 130,
        "complex": complex(1.5, -2),
        "texts": ["", "привет", "a\nb", "💾"],
        "bytes": [b"", b"\x00\xff"],
        "empties": [{}, [], (), collections.OrderedDict(), collections.deque()],
        "nested": Pair(left=(torch.ones(2), [1, (2,)]), right=collections.deque([1, 2], 5)),
        "zero size": [torch.empty(0), torch.empty(3, 0, 2, dtype=torch.bfloat16), np.zeros((0, 4))],
        "zero dims": [
            torch.tensor(3.5),
            np.array(2, np.int16),
            np.float32(1.25),
            torch.tensor(True),
        ],
        "bfloat16": torch.randn(5, 3).bfloat16(),
        "float8": [torch.arange(1, 9).float().to(getattr(torch, name)) for name in FLOAT8],
        "complexes": [
            torch.randn(3, dtype=torch.complex64),
            torch.randn(2, dtype=torch.complex128),
        ],
        "half complex": torch.ones(3, dtype=torch.complex64).to(torch.complex32),
        "float4": torch.arange(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        "integers": [
            torch.tensor([0, 3], dtype=dtype)
            for dtype in (
                torch.uint8,
                torch.int8,
                torch.uint16,
                torch.int16,
                torch.uint32,
                torch.uint64,
            )
        ],
        "tied": [shared, {"again": shared}, torch.nn.Parameter(shared)],
        "views": [shared[::2], torch.randn(3, 4).t(), torch.ones(1).expand(3), shared.flip(0)],
        "conj": torch.randn(3, dtype=torch.complex64).conj(),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "sparse": torch.eye(3).to_sparse(),
        "quantized": torch.quantize_per_tensor(torch.randn(4), 0.1, 3, torch.qint8),
        "numpy": [np.arange(4, dtype=">i4"), np.asfortranarray(np.arange(6.0).reshape(2, 3))],
        "dtype": torch.bfloat16,
        "a/b": torch.ones(1),
        "a//b/": torch.ones(2),
        "//": torch.ones(3),
        "": torch.ones(4),
        "..": torch.ones(5),
        "x.y": {"z": torch.ones(6)},
        "ключ": torch.ones(7),
        "c": {"0": torch.ones(8)},
        "zarr.json": torch.ones(9),
        7: torch.ones(10),
        (1, "t"): torch.ones(11),
        "new\nline 'quoted' \"twice\" [0] {1} %2F *?#": torch.ones(12),
    }


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer, Any]:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3),
        torch.nn.BatchNorm2d(4),
        torch.nn.Flatten(),
        torch.nn.Linear(144, 3),
    )
    optimizer = torch.optim.AdamW(
        [{"params": model[0].parameters(), "lr": 0.01}, {"params": model[3].parameters()}]
    )
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 1, 8, 8)).square().mean().backward()
        optimizer.step()
        scheduler.step()
    return model, optimizer, scheduler


METRICS = {"accuracy": 0.75, "loss": 1.5}
CUSTOM = {"commit": "abc", "größe": [1, None]}
CONFIG = {"lr": 0.1, "layers": [1, 2], "name": "ü"}
TREES = ("model", "optimizer", "scheduler", "rng", "tree")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of a training run, as our manager leaves them."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("ours")
    model, optimizer, scheduler = trained()
    items = {
        "model": model,
        "optimizer": fc.Optimizer(optimizer, model),
        "scheduler": scheduler,
        "rng": fc.Rng(),
        "tree": pytree(),
        "config": fc.Json(CONFIG),
    }
    with fc.CheckpointManager(path) as manager:
        manager.save(3, items, metrics={"accuracy": 0.9})
        manager.save(10, items, metrics=METRICS, custom_metadata=CUSTOM)
        manager.record_metrics(3, {"late": 1})  # leaves a sidecar in our hidden directory
    return path


@pytest.fixture(scope="module")
def expected(root: Path) -> dict[str, Any]:
    with fc.CheckpointManager(root, read_only=True) as manager:
        return {name: as_orbax(value) for name, value in manager.restore(10).items()}


def test_expectation_is_what_was_live(expected: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, _, _ = trained()
    assert differences(expected["model"], as_orbax(dict(model.state_dict()))) == []
    assert differences(expected["tree"], as_orbax(pytree())) == []
    assert len(json.dumps(sorted(expected["optimizer"]))) > 2


# ------------------------------------------------------------------------------------ the manager


def test_manager_restores_without_args(root: Path, expected: dict[str, Any]) -> None:
    with ocp.CheckpointManager(root) as manager:
        restored = manager.restore(10)
    got = {name: restored[name] for name in (*TREES, "config")}
    assert differences(got, expected) == []
    assert restored["metrics"] == METRICS


@pytest.mark.parametrize("args", [ocp.args.StandardRestore, ocp.args.PyTreeRestore])
def test_manager_restores_with_args(
    root: Path, expected: dict[str, Any], args: Callable[[], Any]
) -> None:
    wanted = {name: args() for name in TREES}
    with ocp.CheckpointManager(root) as manager:
        restored = manager.restore(
            10, args=ocp.args.Composite(config=ocp.args.JsonRestore(), **wanted)
        )
    assert differences(dict(restored.items()), expected) == []


def test_manager_restores_into_an_abstract_tree(root: Path, expected: dict[str, Any]) -> None:
    import jax

    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = {
        key: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=device)
        for key, value in expected["model"].items()
    }
    with ocp.CheckpointManager(root) as manager:
        restored = manager.restore(
            10, args=ocp.args.Composite(model=ocp.args.StandardRestore(target))
        )
    assert all(isinstance(value, jax.Array) for value in restored["model"].values())
    # JAX without x64 narrows int64; everything else is the same bits.
    narrowed = {
        key: value.astype(np.int32) if value.dtype == np.int64 else value
        for key, value in expected["model"].items()
    }
    assert differences(restored["model"], narrowed) == []


def test_manager_lists_our_steps(root: Path) -> None:
    options = ocp.CheckpointManagerOptions(
        best_fn=lambda metrics: metrics["accuracy"], read_only=True
    )
    with ocp.CheckpointManager(root, options=options) as manager:
        assert list(manager.all_steps()) == [3, 10]
        assert manager.latest_step() == 10
        assert manager.best_step() == 3
        assert manager.metadata(10).metrics == METRICS
        step = manager.metadata(10)
        assert step.custom_metadata == CUSTOM
        assert step.init_timestamp_nsecs < step.commit_timestamp_nsecs
        assert set(step.item_handlers) == {*TREES, "config", "metrics"}


def test_item_metadata_has_our_shapes(root: Path, expected: dict[str, Any]) -> None:
    names = {name: ocp.StandardCheckpointHandler() for name in TREES}
    with ocp.CheckpointManager(root, item_names=tuple(names), item_handlers=names) as manager:
        metadata = manager.item_metadata(10)
    for name, value in expected["model"].items():
        found = metadata["model"][name]
        assert (tuple(found.shape), np.dtype(found.dtype)) == (value.shape, value.dtype)


# ------------------------------------------------------------------------------------ checkpointers


@pytest.mark.parametrize("item", TREES)
@pytest.mark.parametrize("checkpointer", [ocp.StandardCheckpointer, ocp.PyTreeCheckpointer])
def test_checkpointers_restore_an_item(
    root: Path, expected: dict[str, Any], item: str, checkpointer: Callable[[], Any]
) -> None:
    assert differences(checkpointer().restore(root / "10" / item), expected[item]) == []


# ------------------------------------------------------------------------------------ version 1


@pytest.mark.parametrize("item", TREES)
def test_v1_loads_an_item_by_name(root: Path, expected: dict[str, Any], item: str) -> None:
    assert differences(v1.load(root / "10", checkpointable_name=item), expected[item]) == []


def test_v1_loads_the_item_called_state(tmp_path: Path) -> None:
    torch.manual_seed(1)
    tree = pytree()
    fc.save(tmp_path / "x", {"state": tree, "other": torch.ones(1)})
    assert differences(v1.load(tmp_path / "x"), as_orbax(tree)) == []


def test_v1_loads_all_checkpointables(root: Path, expected: dict[str, Any]) -> None:
    loaded = v1.load_checkpointables(root / "10")
    assert differences({name: loaded[name] for name in expected}, expected) == []


def test_v1_training_checkpointer_sees_our_steps(root: Path, expected: dict[str, Any]) -> None:
    with v1.training.Checkpointer(root) as checkpointer:
        assert [checkpoint.step for checkpoint in checkpointer.checkpoints] == [3, 10]
        assert checkpointer.latest is not None and checkpointer.latest.step == 10
        assert checkpointer.latest.metrics == METRICS
        loaded = checkpointer.load(10, checkpointable_name="model")
    assert differences(loaded, expected["model"]) == []


# ------------------------------------------------------------------------------------ names, sizes


@pytest.mark.parametrize("names", [("", "/"), ("a", "a/"), ("a.b", "a")])
def test_names_that_orbax_cannot_tell_apart_are_refused(
    tmp_path: Path, names: tuple[str, str]
) -> None:
    tree: dict[str, Any] = {names[0]: torch.ones(1), names[1]: torch.ones(2)}
    if names[0] == "a.b":
        tree = {"a.b": torch.ones(1), "a": {"b": torch.ones(2)}}
    with pytest.raises(fc.errors.NameCollisionError, match=r"would be stored as .*, as .* would"):
        fc.save(tmp_path / "x", {"state": tree})
    assert list(tmp_path.iterdir()) == []


def test_an_array_called_slash(tmp_path: Path) -> None:
    fc.save(tmp_path / "x", {"state": {"/": torch.arange(3)}})
    for got in _read_by_all(tmp_path / "x"):
        assert differences(got, {"/": np.arange(3)}) == []
    assert torch.equal(fc.restore(tmp_path / "x")["state"]["/"], torch.arange(3))


BARE: dict[str, Any] = {
    "tensor": torch.arange(3.0),
    "number": 4,
    "text": "t",
    "nothing": None,
    "empty": {},
    "list": [1, torch.ones(2)],
}


@pytest.mark.parametrize("name", BARE)
def test_items_that_are_one_leaf(tmp_path: Path, name: str) -> None:
    value = BARE[name]
    fc.save(tmp_path / "x", {"state": value})
    expected = as_orbax(value if name == "list" else {"value": value})
    for got in (
        ocp.PyTreeCheckpointer().restore(tmp_path / "x" / "state"),
        ocp.StandardCheckpointer().restore(tmp_path / "x" / "state"),
        v1.load(tmp_path / "x"),
    ):
        assert differences(got, expected) == []


def _read_by_all(path: Path) -> list[Any]:
    return [
        ocp.PyTreeCheckpointer().restore(path / "state"),
        ocp.StandardCheckpointer().restore(path / "state"),
        v1.load(path),
    ]


def test_an_item_spread_over_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_plan, "BYTES_PER_FILE", 1)
    torch.manual_seed(2)
    tree = pytree()
    fc.save(tmp_path / "x", {"state": tree})
    assert len(list((tmp_path / "x" / "state").glob("*.safetensors"))) > 2
    for got in _read_by_all(tmp_path / "x"):
        assert differences(got, as_orbax(tree)) == []


def test_orbax_reads_a_large_item(tmp_path: Path) -> None:
    """Arrays of several chunks, ragged ones among them, in more than one database."""
    generator = torch.Generator().manual_seed(0)
    big = torch.randn(5_000, 4_099, generator=generator)
    assert big.nbytes > 2 * file_plan.BYTES_PER_FILE
    tree = {
        "big": big,
        "tied": big,
        "ragged": torch.randn(1_000_003, 9, generator=generator).bfloat16(),
        "small": [torch.randn(3), 1],
    }
    fc.save(tmp_path / "x", {"state": tree})
    expected = as_orbax(tree)
    for got in _read_by_all(tmp_path / "x"):
        assert differences(got, expected) == []
    item = tmp_path / "x" / "state"
    stored = sum(file.stat().st_size for file in item.rglob("*") if file.is_file())
    assert stored < 1.05 * (big.nbytes + tree["ragged"].nbytes)  # the tied leaf is stored once


def test_orbax_reads_an_index_of_several_levels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ocdbt_tree, "MAX_NODE_BYTES", 1500)
    tree = {f"block{index % 5}": {} for index in range(5)}
    for index in range(300):
        tree[f"block{index % 5}"][f"w{index}"] = torch.full((3,), float(index))
    fc.save(tmp_path / "x", {"state": tree})
    for got in _read_by_all(tmp_path / "x"):
        assert differences(got, as_orbax(tree)) == []
    assert testing.differences(fc.restore(tmp_path / "x")["state"], tree) == []
