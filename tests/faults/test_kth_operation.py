"""The k-th storage operation fails, or the process dies there, for every k of all that writes."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from full import drawn_numbers

import functional_ckpt as fc
from functional_ckpt import testing
from functional_ckpt.core.files import file_plan
from functional_ckpt.storage import commit

Action = Callable[[fc.CheckpointManager], Any]

OLD_STEPS = (1, 2, 3)
NEW_STEP = 4
OTHER_STEP = 9


def items_of(version: int) -> dict[str, Any]:
    """Something of everything: tied tensors, scalars, strings, a JSON item, several chunks."""
    shared = torch.arange(40, dtype=torch.float32) + version
    return {
        "tree": {
            "version": version,
            "a": shared,
            "tied": shared,
            "note": f"v{version}",
            "none": None,
            "ids": torch.arange(version + 1),
        },
        "config": fc.Json({"version": version}),
    }


def save(step: int, version: int) -> Action:
    def act(manager: fc.CheckpointManager) -> None:
        commit = manager.save(step, items_of(version), metrics={"version": version})
        assert commit is not None
        manager.wait_until_finished()

    return act


def open_and_close(manager: fc.CheckpointManager) -> None:
    del manager  # opening is tested


# What happens, and which versions each step may hold when it failed: None for none.
CASES: dict[str, tuple[Action, dict[int, set[int | None]]]] = {
    "save": (save(NEW_STEP, 40), {NEW_STEP: {None, 40}, 1: {1, None}}),  # keeps three: prunes 1
    "overwrite": (save(2, 20), {2: {2, 20}}),
    "delete": (lambda manager: manager.delete(2), {2: {2, None}}),
    "record metrics": (lambda manager: manager.record_metrics(2, {"late": 1.0}), {}),
    "open": (open_and_close, {}),
}


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory if possible: a thousand trials need no real disk."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the old steps, copied for each trial."""
    root = tmp_path_factory.mktemp("template") / "run"
    with fc.CheckpointManager(root, keep_policy=fc.policies.LatestN(3)) as manager:
        for step in OLD_STEPS:
            manager.save(step, items_of(step), metrics={"version": step})
    return root


@pytest.fixture
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "several files":
        monkeypatch.setattr(file_plan, "BYTES_PER_FILE", 1)
    return request.param


def new_manager(root: Path, storage: testing.FaultyStorage | None = None) -> fc.CheckpointManager:
    return fc.CheckpointManager(
        root, keep_policy=fc.policies.LatestN(3), overwrite=True, storage=storage
    )


def trials(
    template: Path, tmp_path: Path, act: Action, share: int = 1, **options: Any
) -> Iterator[Trial]:
    """The action with its k-th operation failing, for k from zero until no operation is left.

    By default one of `share` operations fails.
    """
    for where in (is_counted, is_data):
        for at in drawn_numbers(f"{options}", share):
            fault = testing.Fault(at=at, where=where, **options)
            trial = Trial(template, tmp_path / f"{at}", act, fault)
            if not trial.has_failed:
                assert trial.error is None
                trial.close()
                shutil.rmtree(trial.root)
                break
            yield trial
            shutil.rmtree(trial.root)
        assert at >= 1 or share > 1 or where is is_data


def is_data(operation: testing.Operation) -> bool:
    """Data files, which several threads write: their operations have no order."""
    return operation.path.endswith(".safetensors")


def is_counted(operation: testing.Operation) -> bool:
    return not is_data(operation)


class Trial:
    """One action with one fault, and its outcome."""

    def __init__(self, template: Path, root: Path, act: Action, fault: testing.Fault) -> None:
        self.root = root
        shutil.copytree(template, root)
        self.storage = testing.FaultyStorage()
        self.error: BaseException | None = None
        self.manager: fc.CheckpointManager | None = None
        if act is open_and_close:
            _litter(root)
            self.storage.inject(fault)
        try:
            self.manager = new_manager(root, self.storage)
            if act is not open_and_close:
                self.storage.inject(fault)
            act(self.manager)
        except (fc.CheckpointError, testing.Crash) as error:
            self.error = error
        self.has_failed = self.storage.has_failed

    def close(self) -> None:
        if self.manager is not None:
            self.manager.close()


def _litter(root: Path) -> None:
    """The state after a killed writer."""
    for name in ("7.orbax-checkpoint-tmp/tree", ".functional_ckpt/trash/5.12345678/tree"):
        (root / name).mkdir(parents=True)
        (root / name / "file").write_text("torn")


def check_steps(root: Path, may_hold: dict[int, set[int | None]]) -> dict[int, int]:
    """Every step that another process sees is one of the allowed versions, every bit of it."""
    held: dict[int, int] = {}
    with fc.CheckpointManager(root, read_only=True) as manager:
        for step in manager.all_steps():
            restored = manager.restore(step)
            version = restored["tree"]["version"]
            expected = {**items_of(version), "config": {"version": version}}
            assert testing.differences(dict(restored), expected) == []
            assert manager.metadata(step).metrics is not None
            held[step] = version
    for step in (*OLD_STEPS, NEW_STEP):
        default: set[int | None] = {step if step in OLD_STEPS else None}
        assert held.get(step) in may_hold.get(step, default), (step, held)
    assert set(held) <= {*OLD_STEPS, NEW_STEP}
    return held


def check_next_writer(root: Path, held: dict[int, int], *, saves: bool = True) -> None:
    """The next writer finds the same steps, leaves no leftovers, and can save."""
    with new_manager(root) as manager:
        assert manager.all_steps() == sorted(held)
        names = sorted(path.name for path in root.iterdir() if path.name[0] != ".")
        assert names == sorted(map(str, held))
        trash = root / ".functional_ckpt" / "trash"
        assert not trash.exists() or not list(trash.iterdir())
        if saves:
            save(OTHER_STEP, 90)(manager)
            assert manager.latest_step() == OTHER_STEP


@pytest.mark.parametrize(
    ("case", "layout"),
    [*((case, "one database") for case in CASES), ("save", "several files")],
    indirect=["layout"],
)
@pytest.mark.parametrize("mode", ["once", "lasting"])
def test_failed_save_loses_nothing_and_is_reported_once(
    case: str,
    mode: str,
    layout: str,
    template: Path,
    tmp_path: Path,
    figure: Callable[[str], None],
) -> None:
    act, may_hold = CASES[case]
    num_trials = 0
    share = 3 if (mode, layout) != ("once", "one database") else 1
    for trial in trials(template, tmp_path, act, share, mode=mode, errno=errno.ENOSPC):
        num_trials += 1
        held = check_steps(trial.root, may_hold)
        if mode == "once" and case in ("save", "overwrite"):
            step, old, new = (NEW_STEP, None, 40) if case == "save" else (2, 2, 20)
            is_new = trial.error is None or "was committed, but" in str(trial.error)
            assert held.get(step) == (new if is_new else old), "the error contradicts the state"
        if trial.error is not None:
            assert isinstance(trial.error, fc.CheckpointError)
            assert "No space left on device" in str(trial.error)
            if case in ("save", "overwrite", "delete"):
                assert trial.error.step == (NEW_STEP if case == "save" else 2)
                assert f"{trial.error.step}" in str(trial.error)
        trial.storage.heal()
        if trial.manager is not None:
            trial.manager.check_for_errors()  # it was reported once
            listed = set(trial.manager.all_steps())
            # A step that could neither be made durable nor be taken back is there, but not listed.
            assert listed == set(held) or (mode == "lasting" and listed == set(held) - {NEW_STEP})
            save(OTHER_STEP, 91)(trial.manager)
            again = trial.manager.restore(OTHER_STEP)
            assert testing.differences(again["tree"], items_of(91)["tree"]) == []
            trial.manager.delete(OTHER_STEP)
            kept = sorted(listed)[-2:]  # by the later save
            pruned = {step: {None} for step in listed if step not in kept}
            held = check_steps(trial.root, {**may_hold, **pruned})
        trial.close()
        check_next_writer(trial.root, held, saves=trial.manager is None)
    figure(f"{case}, {mode}, {layout}: {num_trials} operations failed, 0 losses")


@pytest.mark.parametrize(
    ("case", "layout"),
    [*((case, "one database") for case in CASES), ("overwrite", "several files")],
    indirect=["layout"],
)
def test_a_crash_at_any_operation_loses_nothing(
    case: str, layout: str, template: Path, tmp_path: Path
) -> None:
    act, may_hold = CASES[case]
    share = 1 if layout == "one database" else 3
    for trial in trials(template, tmp_path, act, share, mode="crash"):
        held = check_steps(trial.root, may_hold)
        trial.close()  # lets go of the lock, as the kernel does for the dead
        check_next_writer(trial.root, held)


def is_publishing(operation: testing.Operation) -> bool:
    """From the exchange on; earlier operations are tested above."""
    return f"2{commit.TMP_SUFFIX}/" not in operation.path


@pytest.mark.parametrize("mode", ["once", "lasting", "crash"])
def test_an_overwrite_without_atomic_exchange(mode: str, template: Path, tmp_path: Path) -> None:
    """Two renames and a journal: between the two, readers see the old step."""
    for at in itertools.count():
        root = tmp_path / f"{at}"
        shutil.copytree(template, root)
        storage = testing.FaultyStorage(can_exchange=False)
        manager = new_manager(root, storage)
        storage.inject(testing.Fault(at=at, mode=mode, errno=errno.EIO, where=is_publishing))
        failure: BaseException | None = None
        try:
            save(2, 20)(manager)
        except fc.errors.SaveError as error:
            failure = error
            assert error.step == 2
        if not storage.has_failed:
            assert failure is None
            break
        held = check_steps(root, {2: {2, 20}})
        assert fc.restore(root / "2")["tree"]["version"] == held[2]
        storage.heal()
        manager.close()
        with new_manager(root) as successor:
            assert successor.all_steps() == [1, 2, 3]
        held = check_steps(root, {2: {2, 20}})
        check_next_writer(root, held)
        shutil.rmtree(root)
    assert at >= 14


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_error_has_the_message_of_the_system(code: int, template: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(template, root)
    storage = testing.FaultyStorage()
    with new_manager(root, storage) as manager:
        storage.inject(
            testing.Fault(errno=code, where=lambda op: op.path.endswith("manifest.ocdbt"))
        )
        commit = manager.save(NEW_STEP, items_of(40))
        assert commit is not None
        with pytest.raises(fc.errors.SaveError, match=os.strerror(code)) as caught:
            commit.result()
        assert isinstance(caught.value.__cause__, fc.errors.StorageError)
        assert caught.value.__cause__.errno == code
        assert caught.value.step == NEW_STEP
        assert caught.value.path is not None and str(root) in caught.value.path


def test_fc_save_is_complete_or_absent(tmp_path: Path) -> None:
    """`fc.save` and its overwrite, at every operation."""
    for name, mode in (("once", "once"), ("crash", "crash")):
        for at in range(1000):
            path = tmp_path / f"{name}{at}"
            fc.save(path, items_of(1))
            storage = testing.FaultyStorage(testing.Fault(at=at, mode=mode))
            with contextlib.suppress(fc.CheckpointError, testing.Crash):
                fc.save(path, items_of(2), overwrite=True, storage=storage)
            if not storage.has_failed:
                break
            version = fc.restore(path)["tree"]["version"]
            assert version in (1, 2)
            expected = {**items_of(version), "config": {"version": version}}
            assert testing.differences(dict(fc.restore(path)), expected) == []
            fc.save(path, items_of(3), overwrite=True)
            assert fc.restore(path)["tree"]["version"] == 3
            assert [each.name for each in tmp_path.iterdir()] == [path.name]
            shutil.rmtree(path)
        shutil.rmtree(path)
