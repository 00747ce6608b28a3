"""Paths, item names and keys that TensorStore cannot read: refused, or saved and read back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import functional_ckpt as fc
from functional_ckpt import errors

BAD = ["\\back", "end\\", "a\\\\b", "a\\..\\b", "\udcff", "x\udcffy"]
GOOD = ["a\\b", "with space", "%41%2f", "?q", "#f", "*", "é" * 100, "\x7f", "a:b", "file:x", "..x"]


def items() -> dict[str, Any]:
    return {"tree": {"w": torch.arange(3000.0), "n": 1}}


@pytest.mark.parametrize("name", BAD)
def test_a_directory_whose_arrays_could_not_be_read_is_refused_before_it_is_made(
    name: str, tmp_path: Path
) -> None:
    path = os.path.join(tmp_path, name)
    for call in (
        lambda: fc.save(path, items()),
        lambda: fc.save(os.path.join(path, "below"), items()),
        lambda: fc.CheckpointManager(path),
        lambda: fc.CheckpointManager(path, read_only=True),
        lambda: fc.restore(path),
        lambda: fc.metadata(path),
    ):
        with pytest.raises(errors.UsageError, match="TensorStore"):
            call()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", GOOD)
def test_any_other_directory_can_be_read(name: str, tmp_path: Path) -> None:
    path = os.path.join(tmp_path, name)
    fc.save(path, items())
    assert fc.restore(path)["tree"]["n"] == 1
    part = fc.restore(path, {"tree": {"w": torch.zeros(3000), "n": 0}})["tree"]["w"]
    assert torch.equal(part, torch.arange(3000.0))


@pytest.mark.parametrize("name", ["\\x", "x\\", "x\\..\\y", "a\0b", "\udcff", "", "..", "a" * 201])
def test_an_item_that_could_not_be_read_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(errors.UsageError, match=r"[Ii]tem") as caught:
        fc.save(tmp_path / "x", {name: {"w": torch.ones(1)}})
    assert "Rename the directory" not in str(caught.value)
    assert not (tmp_path / "x").exists()


def test_step_names_that_could_not_be_read_are_refused() -> None:
    with pytest.raises(errors.UsageError):
        fc.step_names.StepName(prefix="\\run")


def test_a_double_slash_in_front_is_one(tmp_path: Path) -> None:
    fc.save(f"/{tmp_path}/x", items())
    assert fc.restore(tmp_path / "x")["tree"]["n"] == 1


@pytest.mark.parametrize("key", ["k" * 64_001, "k" * 70_000, "é" * 33_000])
def test_a_key_that_is_too_long_for_the_database_is_refused(key: str, tmp_path: Path) -> None:
    for tree in ({key: torch.ones(2)}, {"a": {"b": {key: 1}}}):
        with pytest.raises(errors.UnsupportedLeafError, match="bytes"):
            fc.save(tmp_path / "x", {"tree": tree})
    assert not (tmp_path / "x").exists()


def test_the_longest_key_is_read_back(tmp_path: Path) -> None:
    key = "\U0001f600" * 16_000
    fc.save(tmp_path / "x", {"tree": {key: torch.arange(5.0)}})
    assert torch.equal(fc.restore(tmp_path / "x")["tree"][key], torch.arange(5.0))
    assert fc.metadata(tmp_path / "x").items["tree"][key].shape == (5,)
