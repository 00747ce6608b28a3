"""Damaged metrics, progress and metadata: noticed wherever they are used, and the step is kept."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from full import IS_FULL

import functional_ckpt as fc
from functional_ckpt import errors
from functional_ckpt.cli import app
from functional_ckpt.core.records import records
from functional_ckpt.handlers.base import CheckpointItem, Handler
from functional_ckpt.storage.local import LocalStorage

METRICS, PROGRESS, METADATA, RECORD = (
    "metrics/metrics",
    "progress/metadata",
    "_CHECKPOINT_METADATA",
    "_FUNCTIONAL_CKPT",
)

BEST = fc.policies.BestN(1, "acc")


def items(value: float = 1.0) -> dict[str, Any]:
    return {"tree": {"w": torch.full((3,), value)}}


def save(manager: fc.CheckpointManager, step: int, values: Any, **options: Any) -> None:
    commit = manager.save(step, values, **options)
    assert commit is not None
    commit.result()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Step 1 is the best, step 2 the latest."""
    path = tmp_path / "run"
    with fc.CheckpointManager(path) as manager:
        for step, accuracy in ((1, 0.9), (2, 0.5)):
            progress = fc.Progress(batch=step)
            metrics = {"acc": accuracy}
            save(manager, step, items(step), metrics=metrics, progress=progress)
    return path


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flip": flip,
    "digit": lambda path: path.write_bytes(path.read_bytes().replace(b"9", b"1")),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "remove": lambda path: path.unlink(),
    "pipe": lambda path: (path.unlink(), os.mkfifo(path))[1],
    "device": lambda path: (path.unlink(), path.symlink_to("/dev/zero"))[1],
    "holes": lambda path: os.truncate(path, 2**35),
    "folder": lambda path: (path.unlink(), path.mkdir())[1],
}


CASES = [(METRICS, damage) for damage in DAMAGES] + [
    (file, damage)
    for file in (PROGRESS, METADATA, RECORD)
    for damage in (DAMAGES if IS_FULL else ("flip", "pipe"))
    if (file, damage) != (RECORD, "remove")  # as in a foreign checkpoint
]


@pytest.mark.parametrize(("file", "damage"), CASES)
def test_a_step_with_damaged_small_files_is_kept_and_raises_where_it_is_used(
    file: str, damage: str, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    DAMAGES[damage](root / "1" / file)
    with fc.CheckpointManager(root, keep_policy=BEST) as manager:
        assert "step 1 stays" in caplog.text
        save(manager, 3, items(), metrics={"acc": 0.1})
        assert 1 in manager.all_steps()
        asked: list[Callable[[], Any]] = [
            lambda: manager.metadata(1),
            lambda: manager.metadata(1).metrics,
            lambda: manager.restore(1),
            lambda: fc.metadata(root / "1"),
            lambda: fc.restore(root / "1"),
            manager.best_step,
            lambda: manager.best_step("acc", mode="min"),
        ]
        for ask in asked:
            with pytest.raises(errors.CorruptCheckpointError):
                ask()
        manager.delete(1)
        assert manager.best_step() is not None
        assert manager.metadata(3).metrics == {"acc": 0.1}


def test_ls_says_that_metrics_are_damaged(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(root / "1" / METRICS)
    assert app.main(["ls", "--json", str(root)]) == 0
    first, second = json.loads(capsys.readouterr().out)["steps"]
    assert "changed or swapped" in first["problem"] and first["metrics"] is None
    assert second["problem"] is None and second["metrics"] == {"acc": 0.5}


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE])
def test_the_best_step_is_kept_when_its_metrics_cannot_be_read_once(
    code: int, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, real = str(root / "1" / METRICS), os.open

    def failing(path: Any, *arguments: Any, **options: Any) -> int:
        if path == bad:
            raise OSError(code, os.strerror(code))
        return real(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", failing)
        manager = fc.CheckpointManager(root, keep_policy=BEST)
        with pytest.raises(errors.StorageError):
            manager.metadata(1)
    with manager:
        save(manager, 3, items(), metrics={"acc": 0.1})
        assert 1 in manager.all_steps()
        assert manager.best_step() == 1


# ------------------------------------------------------------------------------------ late metrics


def late_files(root: Path) -> list[Path]:
    return sorted((root / ".functional_ckpt" / "metrics").iterdir())


def test_every_call_that_records_metrics_adds_to_the_others(root: Path) -> None:
    with fc.CheckpointManager(root, read_only=True) as manager:
        manager.record_metrics(1, {"a": 1, "b": float("nan")})
        manager.record_metrics(1, {"a": 2, "c": 3})
        got = dict(manager.metadata(1).metrics or {})
        assert got.pop("b") != got.get("b") and got == {"acc": 0.9, "a": 2, "c": 3}
        assert len(late_files(root)) == 2


@pytest.mark.parametrize("damage", ["flip", "digit", "empty", "cut", "pipe", "holes", "folder"])
def test_damaged_late_metrics_are_noticed_and_their_step_is_kept(damage: str, root: Path) -> None:
    with fc.CheckpointManager(root, read_only=True) as manager:
        manager.record_metrics(1, {"late": 0.9})
        manager.record_metrics(2, {"late": 0.5})
    (bad,) = [path for path in late_files(root) if path.name.startswith("1.")]
    DAMAGES[damage](bad)
    policy = fc.policies.BestN(1, "late")
    with fc.CheckpointManager(root, keep_policy=policy) as manager:
        save(manager, 3, items(), metrics={"late": 0.1})
        assert 1 in manager.all_steps()
        for ask in (lambda: manager.metadata(1).metrics, manager.best_step):
            with pytest.raises(errors.CorruptCheckpointError, match="late"):
                ask()
        shutil.rmtree(bad) if bad.is_dir() else bad.unlink()
        manager.record_metrics(1, {"late": 0.9})
        assert manager.metadata(1).metrics == {"acc": 0.9, "late": 0.9}


def test_late_metrics_of_earlier_versions_are_read_below_newer_ones(root: Path) -> None:
    with fc.CheckpointManager(root, read_only=True) as manager:
        manager.record_metrics(1, {"a": 1})
        (new,) = late_files(root)
        step, commit, _, ending = new.name.split(".")
        old = new.with_name(f"{step}.{commit}.{ending}")
        old.write_text('{"a": 0, "b": 2}')
        assert manager.metadata(1).metrics == {"acc": 0.9, "a": 1, "b": 2}


# ------------------------------------------------------------------------------------ a live target


def live() -> dict[str, Any]:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": fc.Optimizer(optimizer, model)}


def tensors(target: dict[str, Any]) -> list[torch.Tensor]:
    states = target["optimizer"].value.state.values()
    found = [*target["model"].state_dict().values()]
    found += [value for state in states for value in state.values()]
    return [tensor.clone() for tensor in found]


def test_touched_is_true_where_and_only_where_the_target_may_have_changed(tmp_path: Path) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    with fc.CheckpointManager(good) as manager:
        progress = fc.Progress(batch=1)
        save(manager, 1, live(), metrics={"acc": 1}, progress=progress)
    files = [path.relative_to(good) for path in good.glob("1/**/*") if path.is_file()]
    damages = ("flip", "empty", "cut", "remove")
    cases = list(itertools.product(files, damages, ("stream", "first")))
    for file, damage, verify in cases if IS_FULL else cases[::9]:  # every file, damage and time
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(good, bad)
        DAMAGES[damage](bad / file)
        target = live()
        with torch.no_grad():
            target["model"].weight.fill_(7)
        before = tensors(target)
        try:
            fc.restore(bad / "1", target, verify=cast("Any", verify))
        except errors.CheckpointError as error:
            is_changed = any(
                not torch.equal(a, b) for a, b in zip(before, tensors(target), strict=True)
            )
            assert error.touched or not is_changed, (file, damage)
            assert verify == "stream" or not error.touched, (file, damage)
        else:
            # Files that only other programs read, and padding.
            is_data = file.suffix in (".ocdbt", ".safetensors")
            assert file.name in ("_METADATA", "_strings.json") or is_data


class Failing(Handler):
    """Fails while it changes its value."""

    def lower(self, value: Any) -> Any:
        return {"w": value["w"]}

    def lift(self, value: Any, tree: Any) -> Any:
        value["w"].add_(tree["w"])
        raise value["error"]


@pytest.mark.parametrize(
    "error", [errors.CorruptCheckpointError("a"), errors.StorageError("b"), ValueError("c")]
)
def test_a_failure_while_values_are_handed_over_says_that_the_target_was_touched(
    error: Exception, tmp_path: Path
) -> None:
    value = {"w": torch.ones(2), "error": error}
    item = CheckpointItem(value, Failing())
    fc.save(tmp_path / "x", {"item": item})
    with pytest.raises(type(error)) as caught:
        fc.restore(tmp_path / "x", {"item": item})
    if isinstance(caught.value, errors.CheckpointError):
        assert caught.value.touched and "partly modified" in str(caught.value)
    else:
        assert "partly modified" in caught.value.__notes__[0]


# ------------------------------------------------------------------------------------ overwritten


def test_a_step_that_is_overwritten_while_it_is_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = tmp_path / "x"
    state = {"tree": {"w": torch.zeros(100_000)}, "config": fc.Json({"a": 1})}
    fc.save(step, state)
    real, done = LocalStorage.read, []

    def overwriting(self: LocalStorage, path: str, *part: int) -> bytes:
        if part and not done:
            done.append(1)
            fc.save(step, {**state, "tree": {"w": torch.ones(100_000)}}, overwrite=True)
        return real(self, path, *part)

    monkeypatch.setattr(LocalStorage, "read", overwriting)
    with pytest.raises(errors.StorageError, match="overwritten while") as caught:
        fc.restore(step, {"tree": None, "config": None})
    assert caught.value.errno == errno.ESTALE and not caught.value.touched
    assert fc.restore(step)["tree"]["w"][0] == 1


def test_a_step_that_is_overwritten_while_it_is_opened_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    fc.save(path, items(1.0))
    real, done = LocalStorage.read, []

    def overwriting(self: LocalStorage, file: str, *part: Any) -> bytes:
        data = real(self, file, *part)
        if not done and file.endswith(RECORD):
            done.append(1)
            fc.save(path, items(2.0), overwrite=True, custom_metadata={"new": True})
        return data

    monkeypatch.setattr(LocalStorage, "read", overwriting)
    restored = fc.restore(path)
    assert restored["tree"]["w"][0] == 2 and restored.custom_metadata == {"new": True}


def test_a_record_that_lists_an_item_and_not_its_files_is_damage(root: Path) -> None:
    path = root / "2" / RECORD
    record = records.parse_step(path.read_bytes(), str(path))
    listed = {name: file for name, file in record.files.items() if name != f"tree/{RECORD}"}
    path.write_bytes(dataclasses.replace(record, files=listed).to_json())
    with pytest.raises(errors.CorruptCheckpointError, match=f"tree/{RECORD}: the file is missing"):
        fc.restore(root / "2")


def test_a_progress_that_is_none_is_damage_whatever_its_digest_says(root: Path) -> None:
    text = b'{"batch": -1}'
    path = root / "2" / RECORD
    record = records.parse_step(path.read_bytes(), str(path))
    listed = records.FileRecord(len(text), records.digest_hex(text))
    (root / "2" / PROGRESS).write_bytes(text)
    files = {**record.files, PROGRESS: listed}
    path.write_bytes(dataclasses.replace(record, files=files).to_json())
    with pytest.raises(errors.CorruptCheckpointError, match=PROGRESS):
        fc.restore(root / "2")


def test_an_item_called_progress_is_no_progress_of_the_training(root: Path) -> None:
    """Earlier versions could save one."""
    path = root / "2" / RECORD
    record = records.parse_step(path.read_bytes(), str(path))
    items = {**record.items, "progress": "json"}
    path.write_bytes(dataclasses.replace(record, items=items).to_json())
    restored = fc.restore(root / "2")
    assert restored.progress is None
    assert restored["progress"]["batch"] == 2
