"""The mean of checkpoints is NumPy's to the last bit, for little memory, and all or nothing."""

from __future__ import annotations

import os
import tracemalloc
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch

import functional_ckpt as fc
from functional_ckpt import errors
from functional_ckpt.core.arrays.rounding import rounded
from functional_ckpt.core.arrays.spec import numpy_dtype
from functional_ckpt.transform import rewriting
from functional_ckpt.verify import verify

NARROW = ("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
DTYPES = ("float64", "float32", "float16", *NARROW, "complex64", "complex128")
WEIGHTS = [1.0, 0.25, 2.0]


def save_all(folder: Path, states: Sequence[dict[str, Any]]) -> list[Path]:
    paths = [folder / f"input-{number}" for number in range(len(states))]
    for path, state in zip(paths, states, strict=True):
        fc.save(path, state)
    return paths


def nearest(values: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    """The nearest finite values of a dtype, those with an even last bit at ties, by comparison."""
    kind = numpy_dtype(dtype)
    bits = np.arange(2 ** (8 * kind.itemsize), dtype=f"u{kind.itemsize}")
    with np.errstate(invalid="ignore"):
        numbers = bits.view(kind).astype(np.float64)
    table, first = np.unique(numbers[np.isfinite(numbers)], return_index=True)
    even = bits[np.isfinite(numbers)][first] % 2 == 0
    after = np.clip(np.searchsorted(table, values), 1, len(table) - 1)
    below, above = values - table[after - 1], table[after] - values
    is_up = (above < below) | ((above == below) & even[after])
    return table[np.where(is_up, after, after - 1)]


@pytest.mark.parametrize("dtype", [*NARROW, "float16"])
def test_a_number_is_rounded_once(dtype: str) -> None:
    kind = numpy_dtype(dtype)
    with np.errstate(invalid="ignore"):
        every = np.arange(2 ** (8 * kind.itemsize), dtype=f"u{kind.itemsize}").view(kind)
        numbers = np.unique(every.astype(np.float64))
    numbers = numbers[np.isfinite(numbers)]
    middle = numbers[:-1] / 2 + numbers[1:] / 2
    values = np.concatenate(
        [numbers, middle, np.nextafter(middle, np.inf), np.nextafter(middle, -np.inf)]
    )
    values = values[(values != 0) & ((values > numbers[0] * 1.001) | (values > 0))]
    assert np.array_equal(rounded(values, dtype).astype(np.float64), nearest(values, dtype))


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_the_mean_is_that_of_numpy(weights: list[float] | None, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)

    def values(name: str) -> torch.Tensor:
        shape = (3, 5, 7) if name != "float64" else (700_001,)  # of several pieces
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64) * 3
        if name.startswith("complex"):
            return torch.complex(drawn, drawn.flip(0)).to(getattr(torch, name))
        return drawn.to(getattr(torch, name))

    states = [{"x": {name: values(name) for name in DTYPES}} for _ in range(3)]
    for state in states:
        state["x"] |= {"scalar": torch.randn((), generator=generator), "none": torch.empty(0, 2)}
    fc.transform.merge(save_all(tmp_path, states), tmp_path / "out", weights=weights)
    found = fc.restore(tmp_path / "out")["x"]
    for name, value in found.items():
        wide = torch.complex128 if value.is_complex() else torch.float64
        stacked = np.stack([state["x"][name].to(wide).numpy() for state in states])
        mean = np.average(stacked, axis=0, weights=weights) if weights else np.mean(stacked, axis=0)
        got = value.to(wide).numpy()
        if name in NARROW:
            assert np.array_equal(got, nearest(mean, name)), name
        else:
            expected = mean.astype(value.numpy().dtype).astype(stacked.dtype)
            assert np.array_equal(got, expected), name
    assert verify(tmp_path / "out") == []


def step(number: int) -> dict[str, Any]:
    torch.manual_seed(number)
    model: Any = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    model[1].num_batches_tracked += number
    shared = torch.randn(5)
    return {
        "model": model,
        "optimizer": fc.Optimizer(torch.optim.AdamW(model.parameters(), lr=0.1 * number), model),
        "tree": {
            "tied": [shared, shared],
            "mask": torch.tensor([True, number > 1]),
            "text": f"step {number}",
            "when": np.float32(number),
            "queue": list(range(number)),
            "bytes": bytes([number]),
        },
        "config": fc.Json({"number": number}),
    }


def test_the_rest_is_that_of_the_last_checkpoint(tmp_path: Path) -> None:
    states = [step(1), step(2)]
    paths = [tmp_path / "1", tmp_path / "2"]
    for path, state, number in zip(paths, states, (1, 2), strict=True):
        fc.save(
            path,
            state,
            metrics={"loss": 1.0},
            progress=fc.Progress(epoch=number),
            custom_metadata={"run": number},
        )
    fc.transform.merge(paths, tmp_path / "out", weights=[3, 1])
    found = fc.restore(tmp_path / "out")
    assert found["model"]["1.num_batches_tracked"] == 2
    assert found["config"] == {"number": 2}
    tree = found["tree"]
    assert tree["tied"][0] is tree["tied"][1]
    assert torch.equal(tree["mask"], torch.tensor([True, True]))
    rest = (tree["text"], tree["when"], tree["queue"], tree["bytes"])
    assert rest == ("step 2", np.float32(2), [0, 1], b"\2")
    metadata = fc.metadata(tmp_path / "out")
    assert not metadata.metrics and metadata.progress == fc.Progress(epoch=2)
    assert metadata.custom_metadata == {
        "run": 2,
        "merged": {"checkpoints": [*map(str, paths)], "weights": [3, 1]},
    }
    target = step(2)
    fc.restore(tmp_path / "out", into=target)  # by the same call as its inputs
    weights = [state["model"][0].weight.detach().double() for state in states]
    assert torch.equal(target["model"][0].weight, ((weights[0] * 3 + weights[1]) / 4).float())
    fc.transform.merge(paths, tmp_path / "model", items=["model"])
    assert list(fc.restore(tmp_path / "model")) == ["model"]


@pytest.mark.filterwarnings("ignore")
def test_orbax_reads_a_mean(tmp_path: Path) -> None:
    states = [{"x": {"a": torch.full((3,), float(n)), "n": n}} for n in (1, 2)]
    fc.transform.merge(save_all(tmp_path, states), tmp_path / "out")
    with ocp.StandardCheckpointer() as checkpointer:
        found: Any = checkpointer.restore(tmp_path / "out" / "x")
    assert np.array_equal(found["a"], np.full(3, 1.5, np.float32)) and found["n"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": torch.ones(1)}, "x.extra: tensor float32\\[1\\], and nothing"),
        ({"a": torch.ones(3)}, "x.a: tensor float32\\[3\\], and tensor float32\\[2\\]"),
        ({"a": torch.ones(2).half()}, "x.a: tensor float16\\[2\\], and tensor float32\\[2\\]"),
        ({"a": 1.5}, "x.a: nothing, and tensor float32\\[2\\]"),
        ({"sparse": torch.eye(2).to_sparse()}, "x.sparse.* differs, and is a part of a tensor"),
    ],
)
def test_other_arrays_are_refused_by_name(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    last = {"a": torch.ones(2), "sparse": torch.eye(2).roll(1, 0).to_sparse()}
    first = {**last, **change}
    paths = save_all(tmp_path, [{"x": first}, {"x": last}])
    with pytest.raises(errors.MismatchError, match=message):
        fc.transform.merge(paths, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["input-0", "input-1"]


def test_other_items_are_refused_by_name(tmp_path: Path) -> None:
    x = {"a": torch.ones(1)}
    paths = save_all(tmp_path, [{"x": x, "y": x}, {"x": x}])
    with pytest.raises(errors.MismatchError, match=r"Item 'y' is tree in .*0 and absent in .*1"):
        fc.transform.merge(paths, tmp_path / "out")
    fc.transform.merge(paths, tmp_path / "out", items=["x"])
    with pytest.raises(errors.StepNotFoundError, match="no item 'z'"):
        fc.transform.merge(paths, tmp_path / "other", items=["z"])


@pytest.mark.parametrize(
    ("weights", "message"),
    [([1], "Expected 2 weights"), ([1, -1], "sum not 0"), ([1, float("nan")], "finite")],
)
def test_wrong_weights_are_refused(weights: list[float], message: str, tmp_path: Path) -> None:
    paths = save_all(tmp_path, [{"x": torch.ones(1)}] * 2)
    with pytest.raises(errors.UsageError, match=message):
        fc.transform.merge(paths, tmp_path / "out", weights=weights)
    with pytest.raises(errors.UsageError, match="at least two"):
        fc.transform.merge(paths[:1], tmp_path / "out")


def test_a_damaged_input_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    paths = save_all(tmp_path, [{"x": {"a": torch.randn(1000), "b": torch.ones(3)}}] * 3)
    file = paths[1] / "x" / "data.safetensors"
    data = bytearray(file.read_bytes())
    data[-2000] ^= 1
    file.write_bytes(data)
    with pytest.raises(errors.CorruptCheckpointError, match=r"input-1.*array 'a'"):
        fc.transform.merge(paths, tmp_path / "out")
    assert len(os.listdir(tmp_path)) == 3


def test_a_mean_out_of_range_is_refused(tmp_path: Path) -> None:
    half = torch.tensor([60000.0]).half()
    paths = save_all(tmp_path, [{"x": {"a": half}}, {"x": {"a": -half}}])
    with pytest.raises(errors.UsageError, match=r"x\.a: 120000 is out of the range of float16"):
        fc.transform.merge(paths, tmp_path / "out", weights=[1.5, -0.5])
    infinite = [{"x": {"a": torch.tensor([float("inf")])}}, {"x": {"a": torch.ones(1)}}]
    fc.transform.merge(save_all(tmp_path / "more", infinite), tmp_path / "out")
    assert fc.restore(tmp_path / "out")["x"]["a"].item() == float("inf")


def test_memory_does_not_grow_with_an_array(tmp_path: Path) -> None:
    size_bytes = 40 * 2**20
    states = [{"x": {"a": torch.full((size_bytes // 4,), float(n))}} for n in range(2)]
    paths = save_all(tmp_path, states)
    del states
    read: list[tuple[int, int]] = []
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        fc.transform.merge(paths, tmp_path / "out", report=lambda a, b: read.append((a, b)))
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert peak < 24 * 2**20
    assert read[-1] == (2 * size_bytes, 2 * size_bytes)
    assert len(read) == 1 + -(-size_bytes // 4 // rewriting._PIECE_ELEMENTS)
    assert (fc.restore(tmp_path / "out")["x"]["a"] == 0.5).all()


def test_uris_and_files_of_other_programs_are_merged(tmp_path: Path) -> None:
    bucket = f"memory://bucket-{uuid.uuid4().hex[:8]}"
    fc.save(f"{bucket}/run", {"model": {"a": torch.ones(3)}})
    torch.save({"a": torch.full((3,), 2.0)}, tmp_path / "model.pt")
    fc.transform.merge([f"{bucket}/run", tmp_path / "model.pt"], f"{bucket}/soup")
    assert torch.equal(fc.restore(f"{bucket}/soup")["model"]["a"], torch.full((3,), 1.5))


def test_numpy_rounds_twice_and_we_do_not() -> None:
    value = np.array([1 + 2**-8 + 2**-40])
    assert value.astype(ml_dtypes.bfloat16) == 1.0
    assert rounded(value, "bfloat16").astype(float) == 1.0078125
