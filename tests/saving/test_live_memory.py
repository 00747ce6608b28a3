"""Memory that changes at any time, as with Hogwild: digests match the written bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash

import functional_ckpt as fc
from functional_ckpt.core.arrays import digests
from functional_ckpt.format import data_file

Save = Callable[[Path, dict[str, Any]], Path]


def tree() -> dict[str, Any]:
    """A leaf of every kind that is copied in a way of its own."""
    torch.manual_seed(0)
    return {
        "small": torch.randn(40, 3),
        "scalar": torch.tensor(1.5),
        "several blocks": torch.randn(100_000),
        "several steps": torch.randn(900_000),
        "strided": torch.randn(300, 70).t(),
        "numpy": np.zeros((33, 5), np.float32),
        "model": torch.nn.Linear(30, 20).weight,
    }


@pytest.fixture
def changing(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A tree of which every leaf changes whenever some bytes were digested."""
    live = tree()

    def change() -> None:
        with torch.no_grad():
            for value in live.values():
                value += 1

    digest, update = xxhash.xxh3_64_hexdigest, digests.BlockDigests.update

    def digest_then_change(data: Any, *more: Any) -> str:
        found = digest(data, *more)
        change()
        return found

    def update_then_change(self: digests.BlockDigests, data: memoryview) -> None:
        update(self, data)
        change()

    monkeypatch.setattr(xxhash, "xxh3_64_hexdigest", digest_then_change)
    monkeypatch.setattr(digests.BlockDigests, "update", update_then_change)
    return live


def save_alone(path: Path, items: dict[str, Any]) -> Path:
    fc.save(path, items)
    return path


def save_step(**options: Any) -> Save:
    def save(path: Path, items: dict[str, Any]) -> Path:
        with fc.CheckpointManager(path, **options) as manager:
            commit = manager.save(1, items)
            assert commit is not None and commit.result() == 1
        return path / "1"

    return save


SAVES: dict[str, Save] = {
    "fc.save": save_alone,
    "synchronous": save_step(staging=fc.Blocking()),
    "budget": save_step(staging=fc.Eager(budget_bytes=1000)),
    "eager": save_step(),
}


@pytest.mark.parametrize("large", [False, True], ids=["through the cache", "around the cache"])
@pytest.mark.parametrize("save", SAVES)
def test_a_step_of_changing_memory_can_be_restored(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changing: dict[str, Any],
    save: str,
    large: bool,
) -> None:
    if large:
        monkeypatch.setattr(data_file, "DIRECT_FROM_BYTES", 1)
    place = SAVES[save](tmp_path / "a", {"tree": changing})
    restored = fc.restore(place)["tree"]
    assert {name: value.shape for name, value in restored.items()} == {
        name: value.shape for name, value in changing.items()
    }


@pytest.mark.parametrize("sizes", [[1], [65536], [65536 * 3], [1, 65535, 7, 200_000, 65536, 5]])
def test_blocks_are_digested_whatever_the_pieces(sizes: list[int]) -> None:
    data = np.random.default_rng(0).integers(0, 255, sum(sizes), np.uint8)
    blocks = digests.BlockDigests()
    start = 0
    for size in sizes:
        blocks.update(data[start : start + size].data)
        start += size
    assert blocks.hexdigests() == digests.digest_blocks(data.data)
