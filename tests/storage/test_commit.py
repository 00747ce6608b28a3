"""A crash at every operation of a commit; the operations themselves are in contract.py."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from functional_ckpt import errors
from functional_ckpt.storage import commit, durable
from functional_ckpt.storage.base import Storage
from functional_ckpt.storage.local import LocalStorage
from functional_ckpt.testing import Crash, Fault, FaultyStorage


def _step(storage: Storage, path: str, data: bytes) -> str:
    storage.make_directory(path)
    storage.write(os.path.join(path, "a"), data)
    return path


@pytest.mark.parametrize("can_exchange", [True, False])
def test_an_overwrite_cut_anywhere_leaves_the_old_step_or_the_new(
    can_exchange: bool, tmp_path: Path
) -> None:
    outcomes: set[bytes] = set()
    for at in range(100):
        root = str(tmp_path / f"{can_exchange}{at}")
        hidden, final = os.path.join(root, commit.HIDDEN), os.path.join(root, "7")
        plain = LocalStorage()
        plain.make_directory(hidden)
        _step(plain, final, b"old")
        tmp = _step(plain, commit.tmp_path(final), b"new")
        storage = FaultyStorage(Fault(at=at, mode="crash"), can_exchange=can_exchange)
        try:
            replaced = commit.protocol(storage, root).publish(tmp, final)
        except Crash:
            replaced = None
        is_whole = replaced is not None
        commit.protocol(plain, root).recover()
        content = plain.read(os.path.join(final, "a"))
        outcomes.add(content)
        assert plain.list(root) == [commit.HIDDEN, "7"]
        assert plain.walk(hidden) == {}
        if is_whole:
            assert content == b"new"
            break
    else:
        pytest.fail("the overwrite never came to its end")
    assert at > 1 and outcomes == {b"old", b"new"}


def test_first_save_cut_anywhere_is_complete_or_absent(tmp_path: Path) -> None:
    for at in range(10):
        root = str(tmp_path / str(at))
        final = os.path.join(root, "7")
        plain = LocalStorage()
        tmp = _step(plain, commit.tmp_path(final), b"new")
        storage = FaultyStorage(Fault(at=at, mode="crash"))
        try:
            commit.protocol(storage, root).publish(tmp, final)
            is_whole = True
        except Crash:
            is_whole = False
        commit.protocol(plain, root).recover()
        assert plain.list(root) in ([], ["7"])
        if is_whole:
            assert list(plain.walk(root)) == ["7/a"]
            return
    pytest.fail("the save never came to its end")


def test_recovery_cut_anywhere_is_finished_by_the_next(tmp_path: Path) -> None:
    """The journal of an overwrite in two renames, with the old step already away."""
    for at in range(20):
        root = str(tmp_path / str(at))
        hidden, final = os.path.join(root, commit.HIDDEN), os.path.join(root, "7")
        plain = LocalStorage()
        _step(plain, commit.tmp_path(final), b"new")
        _step(plain, os.path.join(hidden, "trash", "7.replaced"), b"old")
        record = {"tmp": os.path.basename(commit.tmp_path(final)), "final": "7"}
        plain.write(os.path.join(hidden, "replacing.json"), json.dumps(record).encode())
        storage = FaultyStorage(Fault(at=at, mode="crash"))
        try:
            commit.protocol(storage, root).recover()
            is_whole = True
        except Crash:
            is_whole = False
            commit.protocol(plain, root).recover()
        assert plain.read(os.path.join(final, "a")) == b"new"
        assert plain.walk(hidden) == {}
        if is_whole:
            assert at > 2
            return
    pytest.fail("the recovery never came to its end")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"tmp": "x"}',
        '{"tmp": "../x", "final": "7"}',
        '{"tmp":"x","final":""}',
    ],
)
def test_a_journal_that_makes_no_sense_moves_nothing(text: str, tmp_path: Path) -> None:
    storage, root = LocalStorage(), str(tmp_path / "root")
    hidden = os.path.join(root, commit.HIDDEN)
    storage.make_directory(hidden)
    _step(storage, str(tmp_path / "x"), b"outside")
    storage.write(os.path.join(hidden, "replacing.json"), text.encode())
    with pytest.raises(errors.CorruptCheckpointError, match=r"replacing\.json"):
        commit.protocol(storage, root).recover()
    assert list(storage.walk(str(tmp_path))) == ["root/.functional_ckpt/replacing.json", "x/a"]


def test_a_replacement_without_a_journal_cut_anywhere_leaves_the_old_or_the_new(
    tmp_path: Path,
) -> None:
    plain, outcomes = LocalStorage(), set[bytes]()
    for at in range(30):
        root = tmp_path / str(at)
        final = _step(plain, str(root / "best"), b"old")
        storage = FaultyStorage(can_exchange=False)
        is_cut = True
        with contextlib.suppress(Crash), commit.protocol(storage, str(root)).claimed(final) as tmp:
            storage.write(os.path.join(tmp, "a"), b"new")
            storage.inject(Fault(at=at, mode="crash"))
            commit.protocol(storage, str(root)).publish_claim(tmp, final, overwrite=True)
            is_cut = False
        commit.protocol(plain, str(root)).recover_claim(final)
        content = plain.read(os.path.join(final, "a"))
        outcomes.add(content)
        with commit.protocol(plain, str(root)).claimed(final):
            pass  # the next writer removes leftovers
        assert plain.list(str(root)) == ["best"]
        if not is_cut:
            assert content == b"new"
            break
    else:
        pytest.fail("the replacement never came to its end")
    assert at > 3 and outcomes == {b"old", b"new"}


def test_a_managers_writer_ends_a_replacement_that_was_cut(tmp_path: Path) -> None:
    plain, root = LocalStorage(), str(tmp_path)
    hidden = os.path.join(root, commit.HIDDEN)
    plain.make_directory(hidden)
    _step(plain, os.path.join(root, "best.orbax-checkpoint-tmp-replaced"), b"old")
    commit.protocol(plain, root).recover()
    assert list(plain.walk(root)) == ["best/a"]


def test_nothing_is_visible_before_all_of_it_is_durable(tmp_path: Path) -> None:
    storage = FaultyStorage()
    final = str(tmp_path / "7")
    tmp = _step(storage, os.path.join(commit.tmp_path(final), "item"), b"new")
    commit.sync_tree(storage, commit.tmp_path(final), ["item/a"])
    storage.forget()
    commit.protocol(storage, str(tmp_path)).publish(os.path.dirname(tmp), final)
    assert [operation.kind for operation in storage.operations] == ["rename", "sync"]
    assert storage.operations[-1].path == str(tmp_path)


def test_sync_tree_syncs_files_then_every_directory_from_the_deepest(tmp_path: Path) -> None:
    storage = FaultyStorage()
    for name in ("a", "x/b", "x/y/c"):
        storage.make_directory(os.path.dirname(str(tmp_path / name)))
        storage.write(str(tmp_path / name), b"")
    storage.forget()
    commit.sync_tree(storage, str(tmp_path), ["a", "x/b", "x/y/c"])
    synced = [os.path.relpath(operation.path, tmp_path) for operation in storage.operations]
    assert sorted(synced[:3]) == ["a", "x/b", "x/y/c"]
    assert synced[3:] == ["x/y", "x", "."]


def test_abandon_warns_if_removal_fails(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    storage = FaultyStorage(Fault(at=0, kinds=("remove",)))
    with caplog.at_level(logging.WARNING, "functional_ckpt"):
        commit.protocol(storage, str(tmp_path)).abandon(str(tmp_path / "7.tmp"))
    assert "Could not remove" in caplog.text


def _mid_overwrite(root: str) -> tuple[str, str]:
    """The state after a crash between the two renames of an overwrite of step 7."""
    hidden, final = os.path.join(root, commit.HIDDEN), os.path.join(root, "7")
    plain = LocalStorage()
    _step(plain, commit.tmp_path(final), b"new")
    _step(plain, os.path.join(hidden, "trash", "7.replaced"), b"old")
    record = {"tmp": os.path.basename(commit.tmp_path(final)), "final": "7"}
    plain.write(os.path.join(hidden, "replacing.json"), json.dumps(record).encode())
    return hidden, final


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE])
def test_a_journal_that_cannot_be_looked_at_ends_the_recovery(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(tmp_path)
    hidden, final = _mid_overwrite(root)
    journal, lstat = os.path.join(hidden, "replacing.json"), os.lstat

    def failing(path: Any, **options: Any) -> os.stat_result:
        if path == journal:
            raise OSError(code, os.strerror(code))
        return lstat(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "lstat", failing)
        with pytest.raises(errors.StorageError):
            commit.protocol(LocalStorage(), root).recover()
    commit.protocol(LocalStorage(), root).recover()
    assert LocalStorage().read(os.path.join(final, "a")) == b"new"


def test_the_last_copies_of_a_step_stay_even_without_a_journal(tmp_path: Path) -> None:
    root, plain = str(tmp_path), LocalStorage()
    hidden, final = _mid_overwrite(root)
    plain.remove(os.path.join(hidden, "replacing.json"))
    (kept,) = commit.protocol(plain, root).recover()
    assert "7.replaced" in kept and final in kept
    assert list(plain.walk(root)) == [
        ".functional_ckpt/trash/7.replaced/a",
        "7.orbax-checkpoint-tmp/a",
    ]


def test_a_step_that_is_discarded_does_not_come_back_as_an_old_copy(tmp_path: Path) -> None:
    root, plain = str(tmp_path), LocalStorage()
    hidden, final = os.path.join(root, commit.HIDDEN), os.path.join(root, "7")
    _step(plain, final, b"new")
    _step(plain, os.path.join(hidden, "trash", "7.replaced"), b"old")
    commit.protocol(plain, root).discard(final)
    assert commit.protocol(plain, root).recover() == [] and plain.walk(root) == {}


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_replacement_that_fails_at_any_operation_is_taken_back(
    can_exchange: bool, tmp_path: Path
) -> None:
    """The caller will remove `tmp`: the old content must not be there."""
    for at in range(100):
        root = str(tmp_path / f"{at}")
        hidden, final = os.path.join(root, commit.HIDDEN), os.path.join(root, "7")
        _step(LocalStorage(), final, b"old")
        tmp = _step(LocalStorage(), commit.tmp_path(final), b"new")
        storage = FaultyStorage(Fault(at=at), can_exchange=can_exchange)
        try:
            replaced = commit.protocol(storage, root).publish(tmp, final)
        except errors.StorageError:
            assert storage.read(os.path.join(final, "a")) == b"old"
            assert storage.read(os.path.join(tmp, "a")) == b"new"
            assert storage.list(os.path.join(hidden, "trash")) == []
            continue
        assert not storage.has_failed and replaced is not None
        break
    assert at == (2 if can_exchange else 13)


def test_a_rank_that_sees_another_directory_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "_SETTLE_SECONDS", 0.1)
    (tmp_path / "there").mkdir()
    commit.check_visible(LocalStorage(), str(tmp_path / "there"), 3)
    with pytest.raises(errors.CoordinationError, match="Rank 3") as caught:
        commit.check_visible(LocalStorage(), str(tmp_path / "absent"), 3)
    assert caught.value.ranks == (3,)


def test_new_parent_directories_are_synced_from_the_top(tmp_path: Path) -> None:
    storage = FaultyStorage()
    (tmp_path / "there").mkdir()
    commit.makedirs_durable(storage, str(tmp_path / "there" / "a" / "b"))
    synced = [each.path for each in storage.operations if each.kind == "sync"]
    assert synced == [str(tmp_path / "there"), str(tmp_path / "there" / "a")]


@pytest.mark.parametrize("path", ["s3://bucket/run", "a/relative/path"])
def test_a_path_that_no_directory_is_above_is_refused(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(errors.UsageError, match=f"{path}: not a path in LocalStorage"):
        commit.makedirs_durable(LocalStorage(), path)
    assert list(tmp_path.iterdir()) == []
