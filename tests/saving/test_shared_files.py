"""Steps cost what changed: a data file that stays the same is a hard link to the last step's."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import functional_ckpt as fc
from functional_ckpt import errors, testing
from functional_ckpt.format import shared_files
from functional_ckpt.storage.local import LocalStorage
from functional_ckpt.verify import verify

SIZE = 520  # a square of float32 is larger than a megabyte


class Adapted(torch.nn.Module):
    """A frozen base with a trained adapter and a buffer."""

    def __init__(self, size: int = SIZE) -> None:
        super().__init__()
        self.base = torch.nn.Linear(size, size).requires_grad_(False)
        self.adapter = torch.nn.Linear(size, 2)
        self.register_buffer("count", torch.zeros(()))


class Run:
    """A run that trains the adapter, and knows the content of every step."""

    def __init__(self, root: Path, **options: Any) -> None:
        torch.manual_seed(0)
        self.root = root
        self.model = Adapted()
        trained = [each for each in self.model.parameters() if each.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
        self.options = options
        self.states: dict[int, dict[str, torch.Tensor]] = {}

    @property
    def items(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": fc.Optimizer(self.optimizer, self.model)}

    def save(self, manager: fc.CheckpointManager, *steps: int) -> None:
        for step in steps:
            self.model.adapter(torch.randn(1, SIZE)).sum().backward()
            self.optimizer.step()
            self.model.get_buffer("count").add_(1)
            manager.save(step, self.items)
            manager.wait_until_finished()
            self.states[step] = {k: v.clone() for k, v in self.model.state_dict().items()}

    def manager(self) -> fc.CheckpointManager:
        return fc.CheckpointManager(self.root, **self.options)

    def check(self, root: Path | None = None, *steps: int) -> None:
        """The steps are complete: every byte, and the values."""
        root = root or self.root
        for step in steps or self.states:
            assert verify(root / str(step)) == []
            model = Adapted()
            fc.restore(root / str(step), into={"model": model, "optimizer": None})
            assert not testing.differences(self.states[step], dict(model.state_dict()))


def large(step: Path) -> Path:
    """The data file of the frozen parameters."""
    (found,) = [
        each
        for each in step.rglob("*.safetensors")
        if b"base.weight" in each.read_bytes()[:8000] and each.stat().st_size > 2**20
    ]
    return found


def num_links(step: Path) -> int:
    return large(step).stat().st_nlink


def test_frozen_parameters_are_written_once(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with run.manager() as manager:
        run.save(manager, 1, 2, 3)
    assert {large(tmp_path / str(step)).stat().st_ino for step in run.states} == {
        large(tmp_path / "1").stat().st_ino
    }
    file = large(tmp_path / "3")
    assert stat.S_IMODE(file.stat().st_mode) == 0o444
    others = [each for each in file.parent.iterdir() if each != file]
    assert all(each.stat().st_nlink == 1 and os.access(each, os.W_OK) for each in others)
    run.check()
    shutil.rmtree(tmp_path / "1")
    (tmp_path / "2").rename(tmp_path / "moved")
    run.check(tmp_path, 3)
    assert verify(tmp_path / "moved") == []


def test_a_run_that_resumes_shares_the_files_of_the_restored_step(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for step in (1, 2, 3):
        with run.manager() as manager:
            manager.restore_or(run.items)
            run.save(manager, step)
    assert num_links(tmp_path / "3") == 3
    run.check()


def test_copies_are_whole(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    with run.manager() as manager:
        run.save(manager, 1, 2)
    subprocess.run(["cp", "-r", tmp_path / "run", tmp_path / "copy"], check=True)
    assert num_links(tmp_path / "copy/2") == 1
    run.check(tmp_path / "copy")
    (tmp_path / "out").mkdir()
    with subprocess.Popen(["tar", "-cC", tmp_path / "run", "."], stdout=subprocess.PIPE) as tar:
        subprocess.run(["tar", "-xC", tmp_path / "out"], stdin=tar.stdout, check=True)
    run.check(tmp_path / "out")


@pytest.mark.parametrize(
    "options",
    [{"share_unchanged": False}, {"staging": fc.Blocking()}, {"staging": fc.Eager(budget_bytes=0)}],
    ids=["independent", "blocking", "no-budget"],
)
def test_options(tmp_path: Path, options: dict[str, Any]) -> None:
    run = Run(tmp_path, **options)
    with run.manager() as manager:
        run.save(manager, 1, 2)
    assert num_links(tmp_path / "2") == (1 if "share_unchanged" in options else 2)
    run.check()


def _remove(step: Path) -> None:
    shutil.rmtree(step)


def _change(step: Path) -> None:
    file = large(step)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.chmod(0o644)
    file.write_bytes(data)


def _replace(step: Path) -> None:
    shutil.copytree(step, step.with_name("copy"))
    shutil.rmtree(step)
    step.with_name("copy").rename(step)


@pytest.mark.parametrize("change", [_remove, _change, _replace])
def test_files_that_are_no_longer_those_of_the_last_step_are_written(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    run = Run(tmp_path)
    with run.manager() as manager:
        run.save(manager, 1)
        change(tmp_path / "1")
        run.save(manager, 2)
        assert num_links(tmp_path / "2") == 1
        run.save(manager, 3)
    assert num_links(tmp_path / "3") == 2
    run.check(tmp_path, 2, 3)


@pytest.mark.parametrize("code", [errno.EMLINK, errno.EXDEV])
def test_a_system_without_links_writes(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*paths: object, **options: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    run = Run(tmp_path)
    with run.manager() as manager:
        run.save(manager, 1, 2)
    assert num_links(tmp_path / "2") == 1
    run.check()


def test_a_link_that_fails_otherwise_leaves_the_steps_alone(tmp_path: Path) -> None:
    storage = testing.FaultyStorage()
    run = Run(tmp_path, storage=storage)
    with run.manager() as manager:
        run.save(manager, 1)
        storage.inject(testing.Fault(errno=errno.ENOSPC, kinds=("link",)))
        with pytest.raises(errors.SaveError, match="No space"):
            run.save(manager, 2)
        storage.inject(testing.Fault(errno=errno.EIO, kinds=("link",)))
        run.save(manager, 3)  # written again after an error that may pass
    assert storage.has_failed and num_links(tmp_path / "3") == 2
    run.check()


def test_a_file_of_another_user_is_not_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x")
    status = LocalStorage().stat(str(source))
    assert status is not None

    def refuse(*paths: object) -> None:
        raise PermissionError(errno.EPERM, "not the owner")

    monkeypatch.setattr(os, "chmod", refuse)
    assert not LocalStorage().share(str(tmp_path / "new"), str(source), status)
    assert [each.name for each in tmp_path.iterdir()] == ["source"]


def test_files_are_written_again_after_some_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_files, "REFRESH_STEPS", 2)
    run = Run(tmp_path)
    with run.manager() as manager:
        run.save(manager, *range(5))
    assert [num_links(tmp_path / str(step)) for step in range(5)] == [2, 2, 2, 2, 1]
    run.check()


def rot(file: Path) -> None:
    """Flips a bit as a disk does: no time changes."""
    times = file.stat()
    data = bytearray(file.read_bytes())
    data[-1000] ^= 1
    with file.open("r+b") as opened:
        opened.write(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("finder", ["restore", "restore_or", "verify"])
def test_damage_takes_the_steps_that_share_it_and_no_later_one(tmp_path: Path, finder: str) -> None:
    run = Run(tmp_path)
    with run.manager() as manager:
        run.save(manager, 1)
        manager._saver.last_files.forget()
        run.save(manager, 2, 3)
        rot(large(tmp_path / "3"))
        run.save(manager, 4)
        (finding,) = verify(tmp_path / "4") if finder == "verify" else [None]
        if finding is not None:
            assert finding.shared_with == ("2", "3") and "also in 2, 3" in str(finding)
        elif finder == "restore":
            with pytest.raises(errors.CorruptCheckpointError):
                manager.restore()
        else:
            assert manager.restore_or(run.items, on_corrupt="older").step == 1
        run.save(manager, 5, 6)
    assert num_links(tmp_path / "6") == (3 if finder == "restore_or" else 2)
    run.check(tmp_path, 1, 5, 6)


def test_steps_without_a_manager_share_nothing(tmp_path: Path) -> None:
    model = Adapted()
    for name in ("a", "b"):
        fc.save(tmp_path / name, {"model": model})
        assert num_links(tmp_path / name) == 1


def test_what_changes_late_in_a_file_is_found(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tree = {
        "matrix": torch.randn(SIZE, SIZE),
        "strided": torch.randn(300, 200).t(),
        "exotic": torch.ones(2**20 + 5, dtype=torch.complex128),  # not in a file of tensors
        "empty": torch.zeros(0, 3),
        "last": torch.randn(300),
    }
    with fc.CheckpointManager(tmp_path) as manager:
        for step, name in enumerate(["", "", "strided", "matrix", "exotic", "last", ""]):
            if name:
                tree[name][-1] += 1
            manager.save(step, {"tree": tree})
            manager.wait_until_finished()
            assert verify(tmp_path / str(step)) == []
            found = fc.restore(tmp_path / str(step))["tree"]
            assert not testing.differences(tree, found)
    links = [
        tuple((tmp_path / f"{step}/tree" / name).stat().st_nlink for step in range(7))
        for name in ("data.safetensors", "chunks.bin")
    ]
    assert links == [(2, 2, 1, 2, 2, 2, 2), (4, 4, 4, 4, 3, 3, 3)]


def test_parameters_of_the_optimizer_are_not_frozen(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.model.base.requires_grad_(True)
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1, momentum=0.9)
    run.model.base(torch.randn(1, SIZE)).sum().backward()
    run.optimizer.step()
    run.model.base.requires_grad_(False)  # for a while
    with run.manager() as manager:
        manager.save(1, run.items)
    assert [each.name for each in (tmp_path / "1/model").glob("*.safetensors")] == [
        "model.safetensors"
    ]


def test_damage_is_noted_for_a_writer_that_keeps_one_step(tmp_path: Path) -> None:
    run = Run(tmp_path, keep_policy=fc.policies.LatestN(1))
    with run.manager() as manager:
        run.save(manager, 1, 2)
        assert num_links(tmp_path / "2") == 1
        inode = large(tmp_path / "2").stat().st_ino
        rot(large(tmp_path / "2"))
        assert len(verify(tmp_path / "2")) == 1
        run.save(manager, 3)
        assert large(tmp_path / "3").stat().st_ino != inode
    run.check(tmp_path, 3)


def test_items_that_were_not_restored_are_written(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with run.manager() as manager:
        run.save(manager, 1)
    rot(large(tmp_path / "1"))
    with run.manager() as manager:
        manager.restore(into={"optimizer": None})
        run.save(manager, 2)
    assert num_links(tmp_path / "2") == 1
    run.check(tmp_path, 2)
