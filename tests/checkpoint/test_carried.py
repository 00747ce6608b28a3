"""Everything a pytree may hold comes back equal to the bit, through the disk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, TARGET_ONLY
from equal_values import assert_same
from hypothesis import HealthCheck, given, settings

import functional_ckpt as fc
from functional_ckpt.testing import strategies

# Torch's warnings for the first tensor of a kind; the library adds none.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC|BSR|BSC) tensor support:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning"),
]

# Arrays are stored independent of their position in a tree, so a few are tested alone.
ALONE = [name for name in CASES if not name.startswith(("numpy_", "tensor_"))]
ALONE += ["numpy_float32_2d", "numpy_U2_scalar", "tensor_float32_0d", "tensor_coo_hybrid"]


@pytest.mark.matrix(4)
@pytest.mark.parametrize("name", CASES)
def test_restore_without_target_returns_saved_values(name: str, tmp_path: Path) -> None:
    value = {"inside": CASES[name]()}
    fc.save(tmp_path / "c", {"v": value})
    assert_same(fc.restore(tmp_path / "c")["v"], value, is_own_class=False)


@pytest.mark.matrix(4)
@pytest.mark.parametrize("name", [*CASES, *TARGET_ONLY])
def test_restore_with_target_returns_saved_values(name: str, tmp_path: Path) -> None:
    make = {**CASES, **TARGET_ONLY}[name]
    torch.manual_seed(0)
    saved: Any = make()
    torch.manual_seed(1)
    target = {"inside": make()}
    fc.save(tmp_path / "c", {"v": {"inside": saved}})
    assert_same(fc.restore(tmp_path / "c", {"v": target})["v"], {"inside": saved})


@pytest.mark.matrix(2)
@pytest.mark.parametrize("name", [*ALONE, *TARGET_ONLY])
def test_single_leaf_items_restore_equal(name: str, tmp_path: Path) -> None:
    """An item may be one leaf, or any container."""
    value = {**CASES, **TARGET_ONLY}[name]()
    fc.save(tmp_path / "c", {"v": fc.PyTree(value)})
    assert_same(fc.restore(tmp_path / "c", {"v": fc.PyTree(value)})["v"], value)


@pytest.mark.parametrize("name", TARGET_ONLY)
def test_without_its_class_the_parts_come_back(name: str, tmp_path: Path) -> None:
    value = TARGET_ONLY[name]()
    fc.save(tmp_path / "c", {"v": {"inside": value}})
    parts = fc.restore(tmp_path / "c")["v"]["inside"]
    assert type(parts) is dict
    if hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()
        assert_same(parts, {name: getattr(value, name) for name in names})
    else:
        assert_same(parts, {0: value.child})


def test_the_target_is_imitated_and_left_alone(tmp_path: Path) -> None:
    saved = {"w": torch.arange(3.0), "p": torch.nn.Parameter(torch.ones(2)), "n": 1}
    target = {"w": torch.zeros(3), "p": torch.nn.Parameter(torch.zeros(2)), "n": 5}
    fc.save(tmp_path / "c", {"v": saved})
    restored = fc.restore(tmp_path / "c", {"v": target})["v"]
    assert_same(restored, saved)
    assert_same(target["w"], torch.zeros(3))
    assert target["n"] == 5 and restored["p"] is not target["p"]
    restored["w"] += 1
    assert_same(target["w"], torch.zeros(3))


def test_what_is_restored_can_be_written(tmp_path: Path) -> None:
    """Read-only and expanded memory comes back as ordinary memory."""
    value = {"a": CASES["numpy_read_only"](), "b": torch.ones(1).expand(3)}
    fc.save(tmp_path / "c", {"v": value})
    restored = fc.restore(tmp_path / "c")["v"]
    restored["a"][0] = 9
    restored["b"][0] = 9
    assert restored["a"].tolist() == [9, 1, 2, 3, 4, 5]
    assert restored["b"].tolist() == [9, 1, 1]


def test_layout_in_memory_is_kept_where_it_is_dense(tmp_path: Path) -> None:
    value = {name: CASES[name]() for name in ("tensor_channels_last", "numpy_float64_fortran")}
    value["numpy_rows"] = np.zeros((3, 4))
    fc.save(tmp_path / "c", {"v": value})
    restored = fc.restore(tmp_path / "c")["v"]
    assert restored["tensor_channels_last"].is_contiguous(memory_format=torch.channels_last)
    assert restored["numpy_float64_fortran"].flags.f_contiguous
    assert restored["numpy_rows"].flags.c_contiguous


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=strategies.pytrees(max_leaves=8))
def test_random_pytrees_restore_equal(value: Any, tmp_path: Path) -> None:
    fc.save(tmp_path / "c", {"v": fc.PyTree(value)}, overwrite=True)
    assert_same(fc.restore(tmp_path / "c")["v"], value)
    assert_same(fc.restore(tmp_path / "c", {"v": fc.PyTree(value)})["v"], value)


def test_a_restore_says_nothing_of_its_own(tmp_path: Path) -> None:
    """Only the user's own code warns; a restore in a new process adds no warning."""
    names = [name for name in CASES if name.startswith(("tensor_", "numpy_"))]
    fc.save(tmp_path / "c", {"v": {name: CASES[name]() for name in names}})
    program = f"import functional_ckpt as fc; print(len(fc.restore({str(tmp_path / 'c')!r})['v']))"
    command = [sys.executable, "-W", "error", "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.stdout, result.stderr) == (f"{len(names)}\n", "")
