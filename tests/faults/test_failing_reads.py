"""A file system that fails while it is read: that is neither absence nor damage."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile
import pytest
import torch
from full import IS_FULL

import functional_ckpt as fc
from functional_ckpt import errors
from functional_ckpt.storage.local import LocalStorage
from functional_ckpt.verify import verify_checkpoint

CODES = (errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE) if IS_FULL else (errno.EIO,)


def state(value: float = 1.0) -> dict[str, Any]:
    return {"tree": {"w": torch.full((5000,), value), "n": 1}, "config": fc.Json({"a": 1})}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "run"
    with fc.CheckpointManager(path) as manager:
        for step in (1, 2):
            progress = fc.Progress(batch=step)
            manager.save(step, state(step), metrics={"acc": 1 / step}, progress=progress)
        manager.wait_until_finished()
        manager.record_metrics(1, {"late": 1})
    return path


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


class Failing:
    """Lets the calls that look at a directory fail, one of them at a time."""

    NAMES = ("stat", "lstat", "open", "listdir", "scandir", "fstat", "pread", "preadv", "read")

    def __init__(self, patch: pytest.MonkeyPatch, root: Path, at: int, code: int) -> None:
        self.num_calls = 0
        for name in self.NAMES:
            patch.setattr(os, name, self._wrap(name, getattr(os, name), str(root), at, code))

    def _wrap(self, name: str, real: Any, root: str, at: int, code: int) -> Any:
        def call(target: Any, *arguments: Any, **options: Any) -> Any:
            if isinstance(target, int):
                path = os.readlink(f"/proc/self/fd/{target}")
            else:
                path = os.fsdecode(target)
            if path.startswith(root) and arguments[:1] != (os.O_RDWR | os.O_CREAT,):
                number, self.num_calls = self.num_calls, self.num_calls + 1
                if number == at:
                    raise OSError(code, os.strerror(code))
            return real(target, *arguments, **options)

        return call


def continue_run(root: Path) -> Any:
    with fc.CheckpointManager(root, read_only=True) as manager:
        return manager.restore_or({"tree": None, "config": None}).step


def look(root: Path) -> Any:
    with fc.CheckpointManager(root, read_only=True) as manager:
        return manager.all_steps(), manager.latest_step()


def best(root: Path) -> Any:
    with fc.CheckpointManager(root, read_only=True) as manager:
        return manager.best_step("acc"), manager.metadata(1).metrics


def prune(root: Path) -> Any:
    with fc.CheckpointManager(root, keep_policy=fc.policies.BestN(1, "acc")) as manager:
        manager.save(3, state(3), metrics={"acc": 0.1})
        manager.wait_until_finished()
    return 1 in look(root)[0]


ACTIONS: dict[Callable[[Path], Any], Any] = {
    continue_run: 2,
    look: ([1, 2], 2),
    best: (1, {"acc": 1.0, "late": 1}),
    prune: True,
    lambda root: fc.restore(root / "1")["tree"]["n"]: 1,
    lambda root: fc.metadata(root / "1").metrics: {"acc": 1.0},
    lambda root: verify_checkpoint(LocalStorage(), str(root / "1"), 1): [],
}


@pytest.mark.timeout(600 if IS_FULL else 300)
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("number", range(len(ACTIONS)))
def test_every_call_that_fails_once_is_an_error_or_changes_nothing(
    number: int, code: int, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    action, expected = list(ACTIONS.items())[number]
    is_verify = number == len(ACTIONS) - 1
    at = 0
    while True:
        copy = root if action is not prune else tmp_path / f"copy{at}"
        if copy is not root:
            shutil.copytree(root, copy)
        with monkeypatch.context() as patch:
            failing = Failing(patch, copy, at, code)
            try:
                got = action(copy)
            except errors.CheckpointError as error:
                causes = [error]
                while causes[-1].__cause__ is not None:
                    causes.append(causes[-1].__cause__)
                is_said = any(getattr(each, "errno", None) == code for each in causes)
                assert is_said or f"[errno {code}]" in str(error), error
            else:
                is_finding = is_verify and got and got[0].problem == "unreadable"
                assert got == expected or is_finding, (at, got)
        if failing.num_calls <= at:
            break
        with fc.CheckpointManager(copy, read_only=True) as manager:
            assert 1 in manager.all_steps() and manager.metadata(1).metrics == {
                "acc": 1.0,
                "late": 1,
            }
        at += 1 if IS_FULL else 3
    assert at > 3


# ------------------------------------------------------------------------------------ descriptors


@pytest.mark.parametrize("is_part", [False, True])
def test_a_process_without_descriptors_does_not_call_a_step_damaged(
    is_part: bool, root: Path
) -> None:
    storage = LocalStorage()
    fc.restore(root / "2")  # for its imports
    if is_part:  # read through TensorStore
        from functional_ckpt.format.checkpoint_dir import open_checkpoint

        node = next(open_checkpoint(storage, str(root / "1"), 1).tree("tree").array_nodes())
        item = open_checkpoint(storage, str(root / "1"), 1).tree("tree")
        task = lambda: item.open_reader().tasks([item.request(node)])[0]()  # noqa: E731
    else:
        task = lambda: fc.restore(root / "1")  # noqa: E731
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open("/dev/null", os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        with pytest.raises(errors.StorageError) as caught:
            task()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert caught.value.errno == errno.EMFILE
    task()


# ------------------------------------------------------------------------------------ special files


def put(kind: str, path: Path, outside: Path) -> None:
    """Puts something else instead of a file or a folder, or beside it."""
    moved = outside / path.name
    if path.exists():
        shutil.move(path, moved)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(path.parent)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name[:50])
        os.chdir(here)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "link":
        path.symlink_to(moved)
    else:
        shutil.copy(moved, path) if moved.is_file() else shutil.copytree(moved, path)
        os.truncate(path, 2**36)


# A third of the paths of each kind, unless all are requested.
PLACES = (
    *("_FUNCTIONAL_CKPT", "_CHECKPOINT_METADATA", "config/metadata", "config", "metrics"),
    *("metrics/metrics", "progress/metadata", "progress", "tree", "tree/_FUNCTIONAL_CKPT"),
    *("tree/_METADATA", "tree/_strings.json", "tree/manifest.ocdbt"),
    *("tree/index.ocdbt", "tree/*.safetensors"),
)


@pytest.mark.parametrize("writer", ["ours", "foreign"])
@pytest.mark.parametrize("kind", ["fifo", "socket", "device", "loop", "link", "holes"])
def test_special_files_and_links_are_refused_wherever_they_are(
    kind: str, writer: str, root: Path, tmp_path: Path
) -> None:
    good = root / "1"
    if writer == "foreign":
        (good / "_FUNCTIONAL_CKPT").unlink()
        (good / "tree" / "_FUNCTIONAL_CKPT").unlink()
    kinds = ("fifo", "socket", "device", "loop", "link", "holes")
    for number, place in enumerate(PLACES):
        if not IS_FULL and (number + kinds.index(kind)) % 3:
            continue
        run, outside = tmp_path / str(number), tmp_path / f"outside{number}"
        outside.mkdir()
        shutil.copytree(root, run)
        found = sorted((run / "1").glob(place))
        if not found or (
            kind == "holes" and (found[0].is_dir() or found[0].suffix in (".ocdbt", ".safetensors"))
        ):
            continue
        put(kind, found[0], outside)
        refused = 0
        for read in (
            lambda run=run: fc.CheckpointManager(run, read_only=True).all_steps(),
            lambda run=run: fc.metadata(run / "1"),
            lambda run=run: fc.restore(run / "1"),
            lambda run=run: verify_checkpoint(LocalStorage(), str(run / "1"), 1),
        ):
            try:
                refused += read is not None and _is_finding(read())
            except errors.CheckpointError:
                refused += 1
        is_only_orbax_s = writer == "ours" and place in ("tree/_METADATA", "tree/_strings.json")
        is_ignored = writer == "foreign" and place.startswith(("progress", "metrics"))
        assert refused or is_ignored or is_only_orbax_s, (place, kind)


def _is_finding(result: Any) -> bool:
    return isinstance(result, list) and any(getattr(each, "is_damage", False) for each in result)


def test_a_chunk_that_is_a_link_gives_nothing_away(tmp_path: Path) -> None:
    path = tmp_path / "x"
    hostile.make_zarr2(path)
    secret = tmp_path / "secret"
    secret.write_bytes(b"TOPSECRET" * 100)
    chunk = path / "tree" / "half" / "0"
    chunk.unlink()
    chunk.symlink_to(secret)
    for read in (fc.restore, fc.metadata):
        with pytest.raises(errors.CorruptCheckpointError, match="a link"):
            read(path)
