"""Leaves that share memory are stored once, and share memory again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import functional_ckpt as fc

MEBI = 2**20


def _size_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _pointer(value: Any) -> int:
    if isinstance(value, np.ndarray):
        return value.__array_interface__["data"][0]
    return value.data_ptr()


def _tensor() -> torch.Tensor:
    return torch.arange(MEBI, dtype=torch.float32)


def _parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(_tensor())


def _array() -> Any:
    return np.arange(MEBI, dtype=np.float32)


@pytest.mark.parametrize("make", [_tensor, _parameter, _array])
@pytest.mark.parametrize("with_target", [False, True])
def test_stored_once_and_tied_again(make: Any, with_target: bool, tmp_path: Path) -> None:
    shared = make()
    value = {"a": shared, "list": [shared, shared], "other": make()}
    fc.save(tmp_path / "c", {"v": value})
    assert _size_bytes(tmp_path / "c") < 2.1 * 4 * MEBI
    restored = fc.restore(tmp_path / "c", {"v": value} if with_target else None)["v"]
    assert _pointer(restored["a"]) == _pointer(restored["list"][0]) == _pointer(restored["list"][1])
    assert _pointer(restored["a"]) != _pointer(restored["other"])
    assert _pointer(restored["a"]) != _pointer(shared)
    assert type(restored["list"][1]) is type(shared)
    expected = shared.detach() if isinstance(shared, torch.Tensor) else shared
    np.testing.assert_array_equal(torch.as_tensor(restored["list"][1]).detach(), expected)


def test_a_parameter_and_its_plain_view(tmp_path: Path) -> None:
    parameter = _parameter()
    fc.save(tmp_path / "c", {"v": {"p": parameter, "t": parameter.detach()}})
    assert _size_bytes(tmp_path / "c") < 1.1 * 4 * MEBI
    restored = fc.restore(tmp_path / "c")["v"]
    assert type(restored["p"]) is torch.nn.Parameter and type(restored["t"]) is torch.Tensor
    assert restored["p"].data_ptr() == restored["t"].data_ptr()
    assert not restored["t"].requires_grad


def test_a_view_stores_what_is_viewed(tmp_path: Path) -> None:
    base = _tensor()
    fc.save(tmp_path / "c", {"v": {"view": base[100:110]}})
    assert _size_bytes(tmp_path / "c") < 20_000
    assert torch.equal(fc.restore(tmp_path / "c")["v"]["view"], base[100:110])


def test_the_same_memory_read_otherwise_is_not_tied(tmp_path: Path) -> None:
    base = torch.arange(6.0)
    value = {
        "flat": base,
        "matrix": base.view(2, 3),
        "bits": base.view(torch.int32),
        "stride": base[::2],
        "conj": torch.view_as_complex(base.view(3, 2)).conj(),
    }
    fc.save(tmp_path / "c", {"v": value})
    restored = fc.restore(tmp_path / "c")["v"]
    for name, expected in value.items():
        assert torch.equal(restored[name], expected), name


def test_zero_size_tensors_share_no_memory_to_tie(tmp_path: Path) -> None:
    fc.save(tmp_path / "c", {"v": [torch.empty(0), torch.empty(0, 3), np.empty(0)]})
    shapes = [tuple(value.shape) for value in fc.restore(tmp_path / "c")["v"]]
    assert shapes == [(0,), (0, 3), (0,)]


def test_ties_across_a_target_that_has_none(tmp_path: Path) -> None:
    """Two tensors of the target stay two, with the bytes that were stored once."""
    shared = torch.arange(3.0)
    fc.save(tmp_path / "c", {"v": [shared, shared]})
    one, other = fc.restore(tmp_path / "c", {"v": [torch.zeros(3), torch.zeros(3)]})["v"]
    assert torch.equal(one, shared) and torch.equal(other, shared)
    assert one.data_ptr() != other.data_ptr()


def test_tied_values_inside_sparse_tensors(tmp_path: Path) -> None:
    sparse = torch.sparse_coo_tensor(
        torch.tensor([[0, 1]]), _tensor()[:2], (2,), check_invariants=True
    )
    fc.save(tmp_path / "c", {"v": [sparse, sparse]})
    one, other = fc.restore(tmp_path / "c")["v"]
    assert one._values().data_ptr() == other._values().data_ptr()
