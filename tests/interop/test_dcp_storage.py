"""PyTorch's distributed checkpoint API over steps: its documented behaviours, one process."""

from __future__ import annotations

import dataclasses
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from full import IS_FULL
from torch.distributed.checkpoint import state_dict as helpers
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    _EmptyStateDictLoadPlanner,
)
from torch.distributed.checkpoint.planner import SavePlan, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

import functional_ckpt as fc
from functional_ckpt.interop.dcp import Reader, Writer
from functional_ckpt.storage.local import LocalStorage
from functional_ckpt.verify.checkpoint import verify_checkpoint

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled", "ignore:TypedStorage is deprecated"
)


def save(state: dict[str, Any], path: Path | str, **options: Any) -> None:
    overwrite = options.pop("overwrite", False)
    dcp.save(state, storage_writer=Writer(path, overwrite=overwrite), **options)


def load(state: dict[str, Any], path: Path | str, **options: Any) -> dict[str, Any]:
    cast = options.pop("cast", False)
    dcp.load(state, storage_reader=Reader(path, cast=cast), **options)
    return state


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.rand(()).item())
    model(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def leaves(value: Any) -> list[Any]:
    found = torch.utils._pytree.tree_leaves(value)
    return [
        list_of(each) if isinstance(each, (torch.Tensor, np.ndarray)) else each for each in found
    ]


def list_of(array: Any) -> Any:
    return array.tolist() if len(array.reshape(-1)) < 1000 else array.numpy().tobytes()


class App:
    """The recipe of PyTorch's documentation: one Stateful object for model and optimizer."""

    def __init__(self) -> None:
        self.model, self.optimizer = trained()

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = helpers.get_state_dict(self.model, self.optimizer)
        return {"model": model, "optim": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        helpers.set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optim"],
        )


# ------------------------------------------------------------------------------------------ save


def test_each_key_of_a_nested_state_dict_is_an_item(tmp_path: Path) -> None:
    state = {"model": {"w": torch.rand(3, 2)}, "steps": 7, "betas": (0.9, torch.ones(2))}
    save(state, tmp_path / "1")
    found = fc.restore(tmp_path / "1")
    assert set(found) == set(state)
    assert leaves(dict(found)) == leaves(state)
    assert ocp.PyTreeCheckpointer().restore(tmp_path.resolve() / "1" / "model")["w"].shape == (3, 2)
    with fc.CheckpointManager(tmp_path) as manager:
        assert manager.all_steps() == [1]
    assert verify_checkpoint(LocalStorage(), str(tmp_path / "1"), None) == []


def test_a_flat_state_dict_is_one_item(tmp_path: Path) -> None:
    model, _ = trained()
    save(model.state_dict(), tmp_path / "a")
    other, _ = trained()
    fc.restore(tmp_path / "a", into={"state": other})
    assert leaves(other.state_dict()) == leaves(model.state_dict())
    again = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    assert leaves(load(again, tmp_path / "a")) == leaves(dict(model.state_dict()))


def test_stateful_objects_save_and_load_themselves(tmp_path: Path) -> None:
    app, other = App(), App()
    save({"app": app, "epoch": 3}, tmp_path / "a")
    state = load({"app": other, "epoch": 0}, tmp_path / "a")
    assert state["epoch"] == 3
    assert leaves(other.state_dict()) == leaves(app.state_dict())


def test_the_id_of_a_save_and_a_load_is_the_path(tmp_path: Path) -> None:
    writer, reader = Writer(), Reader()
    for name in ("a", "b"):
        dcp.save({"x": {"w": torch.ones(2)}}, checkpoint_id=tmp_path / name, storage_writer=writer)
        state = {"x": {"w": torch.zeros(2)}}
        dcp.load(state, checkpoint_id=tmp_path / name, storage_reader=reader)
        assert state["x"]["w"].tolist() == [1, 1]
    with pytest.raises(CheckpointException, match="Give Writer"):
        save({"x": torch.ones(1)}, None)  # pyright: ignore[reportArgumentType]


def test_an_existing_checkpoint_is_replaced_only_when_asked(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        if value > 1:
            with pytest.raises(CheckpointException, match="overwrite=True"):
                save({"x": {"w": torch.full((2,), value)}}, tmp_path / "a")
        save({"x": {"w": torch.full((2,), value)}}, tmp_path / "a", overwrite=value > 1)
    assert fc.restore(tmp_path / "a")["x"]["w"].tolist() == [2, 2]
    assert os.listdir(tmp_path) == ["a"]


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    class Failing(DefaultSavePlanner):
        def resolve_data(self, write_item: Any) -> Any:
            raise OSError("no data")

    writer = Writer(tmp_path / "a")
    with pytest.raises(CheckpointException, match="no data"):
        dcp.save({"x": torch.ones(2)}, storage_writer=writer, planner=Failing())
    writer.reset()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "value", [lambda: 0, object(), torch.nn.Linear(1, 1)], ids=["code", "object", "module"]
)
def test_code_and_unknown_objects_are_refused(value: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointException, match="cannot be saved"):
        save({"x": {"y": (value,)}}, tmp_path / "a")
    assert not (tmp_path / "a").exists()


VALUES: dict[str, Any] = {
    "empty": torch.zeros(0, 3),
    "0-dim": torch.tensor(5),
    "bfloat16": torch.rand(3).bfloat16(),
    "float8": torch.rand(3).to(torch.float8_e4m3fn),
    "complex": torch.rand(3, dtype=torch.complex64).conj(),
    "bool": torch.tensor([True, False]),
    "strided": torch.rand(4, 6)[::2, 1::3],
    "channels": torch.rand(1, 2, 3, 4).to(memory_format=torch.channels_last),
    "large": torch.rand(3000, 3001),
    "tuple": (1, (2.5, None), [torch.ones(2)]),
    "list": [1, "a", True],
    "nested": [{"lr": 0.1, "betas": (0.9, 0.99)}, [torch.ones(1), {"x": 1}]],
    "none": None,
    "bytes": b"abc",
    "numpy": torch.arange(3).numpy(),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_come_back(name: str, tmp_path: Path) -> None:
    value = VALUES[name]
    save({"x": {"v": value, "w": torch.ones(1)}}, tmp_path / "a")
    blank = torch.utils._pytree.tree_map(
        lambda leaf: torch.zeros_like(leaf) if isinstance(leaf, torch.Tensor) else leaf, value
    )
    state = load({"x": {"v": blank}}, tmp_path / "a")
    assert leaves(state["x"]["v"]) == leaves(value)
    assert type(state["x"]["v"]) is type(value)


# ------------------------------------------------------------------------------------------ load


def test_tensors_are_filled_in_place(tmp_path: Path) -> None:
    save({"x": {"w": torch.ones(2, 3), "v": torch.ones(4)}}, tmp_path / "a")
    w, v = torch.zeros(3, 2).t(), torch.zeros(8)[::2]
    load({"x": {"w": w, "v": v}}, tmp_path / "a")
    assert bool((w == 1).all()) and bool((v == 1).all())


def test_keys_that_differ(tmp_path: Path) -> None:
    save({"x": {"w": torch.ones(2), "extra": 1}}, tmp_path / "a")
    load({"x": {"w": torch.zeros(2)}}, tmp_path / "a")
    wanted = {"x": {"w": torch.zeros(2), "new": torch.zeros(1)}}
    with pytest.raises(CheckpointException, match="Missing key"):
        load(wanted, tmp_path / "a")
    load(wanted, tmp_path / "a", planner=DefaultLoadPlanner(allow_partial_load=True))
    assert leaves(wanted) == [[1, 1], [0]]


def test_other_shapes_and_dtypes_are_refused(tmp_path: Path) -> None:
    save({"x": {"w": torch.full((2,), 1e6)}}, tmp_path / "a")
    with pytest.raises(CheckpointException, match="ize mismatch"):
        load({"x": {"w": torch.zeros(3)}}, tmp_path / "a")
    half = torch.zeros(2, dtype=torch.float16)
    with pytest.raises(CheckpointException, match="cast=True"):
        load({"x": {"w": half}}, tmp_path / "a")
    assert half.tolist() == [0, 0]
    double = torch.zeros(2, dtype=torch.float64)
    load({"x": {"w": double}}, tmp_path / "a", cast=True)
    assert double.tolist() == [1e6, 1e6]


def test_a_missing_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointException, match="no checkpoint at"):
        load({"x": {"w": torch.zeros(3)}}, tmp_path / "a")


def test_steps_of_managers_are_read(tmp_path: Path) -> None:
    model, optimizer = trained()
    with fc.CheckpointManager(tmp_path) as manager:
        items = {"optim": fc.Optimizer(optimizer, model), "config": fc.Json({"a": [1, {"b": 2}]})}
        manager.save(5, {"model": model, "epoch": 3, **items})
    other, fresh = trained()
    names, state = helpers.get_state_dict(other, fresh)
    found = load(
        {"model": names, "optim": state, "config": {"a": [0, {"b": 0}]}, "epoch": 0}, tmp_path / "5"
    )
    helpers.set_state_dict(other, fresh, model_state_dict=names, optim_state_dict=state)
    assert leaves(other.state_dict()) == leaves(model.state_dict())
    assert leaves(fresh.state_dict()) == leaves(optimizer.state_dict())
    assert (found["config"], found["epoch"]) == ({"a": [1, {"b": 2}]}, 3)


def test_an_empty_state_dict_is_filled_from_the_metadata(tmp_path: Path) -> None:
    state = {"x": {"w": torch.rand(3, 2)}, "groups": [{"lr": 0.5, "names": ["a", "b"]}]}
    save(state, tmp_path / "a")
    found: dict[str, Any] = {}
    planner = _EmptyStateDictLoadPlanner()
    _load_state_dict(found, Reader(tmp_path / "a"), planner=planner, no_dist=True)
    assert leaves(found) == leaves(state)


# ---------------------------------------------------------------------------------------- planners


class Renaming(DefaultSavePlanner):
    def set_up_planner(
        self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        renamed = {f"foo_{key}": value for key, value in state_dict.items()}
        super().set_up_planner(renamed, storage_meta, is_coordinator)


class Halving(DefaultSavePlanner):
    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        for item in plan.items:
            if item.tensor_data is not None:
                item.tensor_data.properties.dtype = torch.float16
        return plan

    def resolve_data(self, write_item: Any) -> Any:
        data = super().resolve_data(write_item)
        is_object = write_item.type == WriteItemType.BYTE_IO
        return data if is_object else data.to(torch.float16)  # pyright: ignore[reportAttributeAccessIssue]


class Adding(DefaultSavePlanner):
    def create_local_plan(self) -> SavePlan:
        return dataclasses.replace(super().create_local_plan(), planner_data="of one rank")

    def create_global_plan(self, all_plans: list[SavePlan]) -> Any:
        plans = [dataclasses.replace(plan, planner_data={}) for plan in all_plans]
        plans, metadata = super().create_global_plan(plans)
        data = [plan.planner_data for plan in all_plans]
        return plans, dataclasses.replace(metadata, planner_data=data)


@pytest.mark.parametrize(
    ("planner", "dtype", "name"),
    [
        (Renaming(), torch.float32, "foo_x"),
        (Halving(), torch.float16, "x"),
        (Adding(), torch.float32, "x"),
        (DefaultSavePlanner(dedup_save_to_lowest_rank=True), torch.float32, "x"),
        (DefaultSavePlanner(flatten_sharded_tensors=False), torch.float32, "x"),
    ],
    ids=["renaming", "halving", "adding", "lowest", "sharded"],
)
def test_planners_of_the_documentation(
    planner: Any, dtype: torch.dtype, name: str, tmp_path: Path
) -> None:
    save({"x": {"w": torch.ones(2), "n": 3}}, tmp_path / "a", planner=planner)
    state = load({name: {"w": torch.zeros(2, dtype=dtype), "n": 0}}, tmp_path / "a")
    assert leaves(state) == [[1, 1], 3]


def test_a_planner_that_does_not_flatten_stores_containers_as_data(tmp_path: Path) -> None:
    state = {"x": {"w": torch.ones(2), "empty": {}}, "w": torch.ones(3), "n": 5}
    closed = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    save(state, tmp_path / "a", planner=closed)
    wanted = {"x": {"w": torch.zeros(2)}, "w": torch.zeros(3), "n": 0}
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    assert leaves(load(wanted, tmp_path / "a", planner=planner)) == leaves(state)
    assert wanted["x"]["empty"] == {}  # pyright: ignore[reportIndexIssue]


def test_a_load_planner_may_make_the_tensors(tmp_path: Path) -> None:
    class Materializing(DefaultLoadPlanner):
        def resolve_tensor(self, read_item: Any) -> torch.Tensor:
            self.made = torch.empty(tuple(read_item.lengths))
            return self.made

        def commit_tensor(self, read_item: Any, tensor: torch.Tensor) -> None:
            self.state_dict[read_item.dest_index.fqn] = self.made

    save({"x": {"w": torch.ones(2, 2)}}, tmp_path / "a")
    planner = Materializing()
    load({"x": {"w": torch.empty(2, 2)}}, tmp_path / "a", planner=planner)
    assert planner.state_dict["x.w"].tolist() == [[1, 1], [1, 1]]


def test_planners_that_cannot_be_served_are_refused(tmp_path: Path) -> None:
    class Bytes(DefaultSavePlanner):
        lookup_object: Any = None

        def resolve_data(self, write_item: Any) -> Any:
            return io.BytesIO(b"a pickle")

    for planner, why in [
        (Bytes(), "never stored"),
        (DefaultSavePlanner(enable_plan_caching=True), "enable_plan_caching"),
    ]:
        with pytest.raises(CheckpointException, match=why):
            save({"x": {"n": 5}}, tmp_path / "a", planner=planner)
    with pytest.raises(fc.errors.UsageError, match="in part"):
        save({"x": {"n": 5}}, tmp_path / "a", use_collectives=False)
    assert not (tmp_path / "a").exists()


# ------------------------------------------------------------------------------------------ async


@pytest.mark.parametrize(
    "kind",
    [
        "thread",
        pytest.param(
            "process",
            marks=pytest.mark.skipif(not IS_FULL, reason="starts a process: a full run has it"),
        ),
    ],
)
def test_async_save_writes_the_values_of_the_call(kind: str, tmp_path: Path) -> None:
    value = torch.ones(1000)
    options: dict[str, Any] = {"async_checkpointer_type": AsyncCheckpointerType(kind)}
    method = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=method, rank=0, world_size=1)  # for the process
    try:
        future = dcp.async_save(
            {"x": {"w": value}}, storage_writer=Writer(tmp_path / "a"), no_dist=True, **options
        )
        value.zero_()
        getattr(future, "upload_completion", future).result()
    finally:
        dist.destroy_process_group()
    assert bool((fc.restore(tmp_path / "a")["x"]["w"] == 1).all())


def test_the_future_of_a_failed_async_save_raises(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a file")
    future: Any = dcp.async_save({"x": {"w": torch.ones(1)}}, storage_writer=Writer(tmp_path / "a"))
    with pytest.raises(CheckpointException, match="exists"):
        future.result()


# ------------------------------------------------------------------------------------------ damage


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    model, optimizer = trained()
    names, state = helpers.get_state_dict(model, optimizer)
    save({"model": names, "optim": state, "note": "abc"}, tmp_path / "a")
    expected = leaves([names, state, "abc"])
    files = sorted(path for path in (tmp_path / "a").rglob("*") if path.is_file())
    draw = torch.Generator().manual_seed(0)
    for file in files:
        data = file.read_bytes()
        count = min(len(data), 40 if IS_FULL else 1)
        for at in torch.randperm(len(data), generator=draw)[:count].tolist():
            changed = bytearray(data)
            changed[at] ^= 1 << (at % 8)
            file.write_bytes(changed)
            found = verify_checkpoint(LocalStorage(), str(tmp_path / "a"), None)
            assert found, f"{file}, byte {at}"
            blank, fresh = helpers.get_state_dict(*trained())
            try:
                got = load({"model": blank, "optim": fresh, "note": ""}, tmp_path / "a")
            except (CheckpointException, fc.CheckpointError):
                pass
            else:
                assert leaves([blank, fresh, got["note"]]) == expected, f"{file}, byte {at}"
        file.write_bytes(data)
