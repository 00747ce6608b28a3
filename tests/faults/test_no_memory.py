"""A restore without memory fails as that, and not as a damaged checkpoint."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

import functional_ckpt as fc
from functional_ckpt import errors
from functional_ckpt.core.tree import decode


@pytest.fixture
def path(tmp_path: Path) -> Path:
    fc.save(tmp_path / "c", {"tree": {"w": torch.ones(3)}})
    return tmp_path / "c"


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")], ids=repr
)
def test_memory_that_cannot_be_allocated_is_no_damage(
    error: Exception, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(decode, "_allocate", refuse)
        with pytest.raises(
            errors.StorageError, match=r"cannot allocate 12 bytes for 'w'"
        ) as caught:
            fc.restore(path)
    assert (caught.value.errno, caught.value.key_path) == (errno.ENOMEM, "w")
    assert not caught.value.touched
    assert fc.restore(path)["tree"]["w"].tolist() == [1.0] * 3


def test_an_array_that_cannot_exist_is_damage(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("invalid strides")

    monkeypatch.setattr(decode, "_allocate", refuse)
    with pytest.raises(errors.CorruptCheckpointError, match="invalid strides") as caught:
        fc.restore(path)
    assert caught.value.key_path == "w"
