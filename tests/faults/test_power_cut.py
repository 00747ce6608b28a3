"""The power fails at any operation: reported steps are intact afterwards, bit for bit."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import full
import pytest
import torch
from full import IS_FULL

import functional_ckpt as fc
from functional_ckpt import testing
from functional_ckpt.format import write_files
from functional_ckpt.interop import atomic_output
from functional_ckpt.storage import commit
from functional_ckpt.testing.power_cut import Disk, Image

NUM_SINGLE, NUM_RANDOM = (1000, 20) if IS_FULL else (6, 1)
OLD_STEPS = (1, 2, 3)
NEW_STEP = 4
NEXT_STEP = 90

Versions: TypeAlias = "frozenset[int | None]"
Check: TypeAlias = "Callable[[Path, dict[str, Any]], None]"


def items_of(version: int) -> dict[str, Any]:
    return {"tree": {"version": version, "w": torch.arange(40) + version, "note": f"v{version}"}}


@pytest.fixture
def disk_path() -> Iterator[Path]:
    """In memory if possible: hundreds of images need no real disk."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        (Path(folder) / "disk").mkdir()
        yield Path(folder) / "disk"


class Promises:
    """The required and the allowed state of the disk, from each moment on.

    A version is that of `items_of`; None stands for no step.
    """

    def __init__(self, disk: Disk, versions: Mapping[int, Versions]) -> None:
        self._disk = disk
        self._changes: list[tuple[int, str, Any]] = [
            (0, f"step {step}", held) for step, held in versions.items()
        ]

    def _note(self, key: str, value: Any) -> None:
        self._changes.append((len(self._disk.moments), key, value))
        self._disk.note()  # so that it is looked at before the next promise replaces it

    def step(self, step: int, *versions: int | None) -> None:
        """From now on the step is one of the versions."""
        self._note(f"step {step}", frozenset(versions))

    def metrics(self, step: int, *names: str) -> None:
        """From now on the step has these metrics."""
        self._note(f"metrics {step}", frozenset(names))

    def link(self, *targets: str | None) -> None:
        """From now on the link to the latest step is one of these."""
        self._note("link", frozenset(targets))

    def arrived(self, *steps: int) -> None:
        """From now on these steps are in the second tier."""
        self._note("arrived", frozenset(steps))

    def at(self, number: int) -> dict[str, Any]:
        """All that holds at a moment."""
        return {key: value for when, key, value in self._changes if when <= number}


class Run:
    """A run on a simulated disk, and its guarantees."""

    def __init__(
        self, disk: Disk, root: Path, versions: Mapping[int, Versions] | None = None
    ) -> None:
        self.disk, self.root, self.promises = disk, root, Promises(disk, versions or {})

    def open(self, **options: Any) -> fc.CheckpointManager:
        storage = self.disk.storage
        return fc.CheckpointManager(self.root, storage=storage, overwrite=True, **options)

    def save(self, manager: fc.CheckpointManager, step: int, version: int) -> None:
        before = self.promises.at(len(self.disk.moments)).get(f"step {step}", frozenset({None}))
        self.promises.step(step, version, *before)
        manager.save(step, items_of(version)).result()  # type: ignore[union-attr]
        self.promises.step(step, version)


def prepare(root: Path, **options: Any) -> None:
    with fc.CheckpointManager(root, **options) as manager:
        for step in OLD_STEPS:
            manager.save(step, items_of(step))


@contextlib.contextmanager
def running(disk_path: Path, *, can_exchange: bool = True, **options: Any) -> Iterator[Run]:
    """A run with old steps, all of them durable."""
    prepare(disk_path / "run", **options)
    with Disk(disk_path, can_exchange=can_exchange) as disk:
        run = Run(disk, disk_path / "run", {step: frozenset({step}) for step in OLD_STEPS})
        yield run
        disk.note()


def check_all(run: Run, check: Check | None = None, share: int = 1) -> None:
    """Every image that the disk may hold keeps every promise; by default a sample of them."""
    kept = set(full.drawn(range(len(run.disk.moments)), share))
    seen = set[str]()
    for number, moment in enumerate(run.disk.moments):
        if number not in kept:
            continue
        promised = run.promises.at(number)
        for image in moment.images(num_single=NUM_SINGLE, num_random=NUM_RANDOM, seed=number):
            key = f"{outline(image)} {sorted(promised.items(), key=str)}"
            if key not in seen:
                seen.add(key)
                check_image(image, run, promised, check or check_run)
    assert len(seen) >= 3


def outline(image: Image) -> str:
    """Identity of an image for reading: temporary directories matter only if moved."""
    is_cut = any(path.endswith("replacing.json") for path in image.entries)
    if IS_FULL or is_cut:
        return image.digest
    hidden = (f"{commit.TMP_SUFFIX}/", "/trash/")
    return Image(
        {p: entry for p, entry in image.entries.items() if not any(part in p for part in hidden)}
    ).digest


def check_image(image: Image, run: Run, promised: dict[str, Any], check: Check) -> None:
    top = run.disk.path
    back = top.parent / "back"
    image.write(back)
    try:
        check(back / run.root.relative_to(top), promised)
    finally:
        shutil.rmtree(back)


def check_run(root: Path, promised: dict[str, Any]) -> None:
    """A run opened after the power cut keeps its guarantees, and continues."""
    with fc.CheckpointManager(root, overwrite=True) as manager:
        steps = {int(key.split()[1]): value for key, value in promised.items() if key[:4] == "step"}
        assert set(manager.all_steps()) <= set(steps)
        for step, versions in steps.items():
            check_step(manager, step, versions)
            missing = promised.get(f"metrics {step}", frozenset()) - set(
                (manager.metadata(step).metrics or {}) if step in manager.all_steps() else {}
            )
            assert not missing, f"step {step} lost {missing}"
        if "link" in promised:
            link = root / "latest"
            target = os.readlink(link) if link.is_symlink() else None
            assert target in promised["link"]
            assert target is None or int(target) in manager.all_steps()
        names = {path.name for path in root.iterdir() if path.name[0] != "."} - {"latest"}
        assert names == set(map(str, manager.all_steps()))
        if IS_FULL:
            manager.save(NEXT_STEP, items_of(NEXT_STEP)).result()  # type: ignore[union-attr]
            check_step(manager, NEXT_STEP, frozenset({NEXT_STEP}))


def check_step(manager: fc.CheckpointManager, step: int, versions: Versions) -> None:
    if step not in manager.all_steps():
        assert None in versions, f"step {step} is lost"
        return
    restored = manager.restore(step)
    version = restored["tree"]["version"]
    assert version in versions, f"step {step} is version {version}, not of {versions}"
    assert testing.differences(dict(restored), items_of(version)) == []


# ------------------------------------------------------------------------------------ the paths


def test_a_first_save_makes_its_parent_directories_durable(disk_path: Path) -> None:
    with Disk(disk_path) as disk:
        run = Run(disk, disk_path / "some" / "new" / "run")
        with run.open() as manager:
            run.save(manager, 1, 1)
        disk.note()
    check_all(run)


def test_power_cut_during_pruning_keeps_reported_steps(disk_path: Path) -> None:
    with running(disk_path) as run:
        run.promises.step(1, 1, None)
        with run.open(keep_policy=fc.policies.LatestN(3)) as manager:
            run.save(manager, NEW_STEP, 40)
            run.promises.step(2, 2, None)
            run.save(manager, NEW_STEP + 1, 50)
    check_all(run)


@pytest.mark.parametrize("can_exchange", [True, False])
def test_an_overwrite_and_the_deletion_of_what_it_wrote(
    can_exchange: bool, disk_path: Path
) -> None:
    with running(disk_path, can_exchange=can_exchange) as run, run.open() as manager:
        run.save(manager, 2, 20)
        run.save(manager, NEW_STEP, 40)
        run.promises.step(2, 20, None)
        manager.delete(2)
        run.save(manager, NEW_STEP + 1, 50)
    check_all(run)


def test_power_cut_keeps_steps_that_share_a_file(
    disk_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_files, "SHARED_FROM_BYTES", 0)
    base = {"base": {"w": torch.arange(40)}}
    monkeypatch.setitem(globals(), "items_of", lambda version, of=items_of: base | of(version))
    with running(disk_path) as run:
        run.promises.step(1, 1, None)
        with run.open(keep_policy=fc.policies.LatestN(3)) as manager:
            run.save(manager, NEW_STEP, 40)
            run.promises.step(2, 2, None)
            run.save(manager, NEW_STEP + 1, 50)
        (file,) = (run.root / f"{NEW_STEP}/base").glob("*.safetensors")
        assert file.stat().st_nlink == 2
    check_all(run, share=4)


def test_power_cut_during_a_deletion_keeps_the_other_steps(disk_path: Path) -> None:
    with running(disk_path) as run, run.open() as manager:
        run.promises.step(3, 3, None)
        manager.delete(3)
        run.promises.step(2, 2, None)
        manager.delete(2)
    check_all(run)


def test_power_cut_keeps_late_metrics(disk_path: Path) -> None:
    with running(disk_path) as run, run.open() as manager:
        manager.record_metrics(2, {"first": 1.0})
        run.promises.metrics(2, "first")
        manager.record_metrics(2, {"second": 2.0})
        run.promises.metrics(2, "first", "second")
        manager.record_metrics(3, {"third": 3.0})
        run.promises.metrics(3, "third")
    check_all(run)


def test_the_link_to_the_latest_step(disk_path: Path) -> None:
    with running(disk_path, latest_link="latest") as run:
        run.promises.link("3")
        with run.open(latest_link="latest") as manager:
            run.promises.link("3", "4")
            run.save(manager, 4, 40)
            run.promises.link("4")
            run.promises.step(4, 40, None)
            run.promises.link("3", "4")
            manager.delete(4)
            run.promises.link("3")
            for step in (1, 2, 3):
                run.promises.step(step, step, None)
                run.promises.link("3", None)
                manager.delete(step)
            run.promises.link(None)
    check_all(run)


def cut_between_the_renames(root: Path) -> None:
    """The state after an overwrite of step 2 that is cut between its two renames."""
    storage = testing.FaultyStorage(can_exchange=False)
    with fc.CheckpointManager(root, overwrite=True, storage=storage) as manager:
        storage.inject(
            testing.Fault(
                at=1, mode="crash", kinds=("rename",), where=lambda op: "replacing" not in op.path
            )
        )
        with contextlib.suppress(testing.Crash, fc.CheckpointError):
            manager.save(2, items_of(20)).result()  # type: ignore[union-attr]
    assert not (root / "2").exists()


def test_the_end_of_an_overwrite_that_was_cut(disk_path: Path) -> None:
    prepare(disk_path / "run")
    cut_between_the_renames(disk_path / "run")
    with Disk(disk_path) as disk:
        held: dict[int, Versions] = {step: frozenset({step}) for step in OLD_STEPS}
        run = Run(disk, disk_path / "run", {**held, 2: frozenset({2, 20})})
        with run.open():
            run.promises.step(2, 20)
        disk.note()
    check_all(run)


@pytest.mark.parametrize("kind", ["local", "store"])
def test_uploads_to_a_tier(kind: str, disk_path: Path) -> None:
    """A step is always in one tier or the other, and uploaded steps stay in the second."""
    far = f"memory://{uuid.uuid4().hex}/far" if kind == "store" else disk_path / "new" / "far"
    expected = {**{step: step for step in OLD_STEPS}, 4: 40, 5: 50}
    arrived: list[int] = []

    def see(event: fc.Event) -> None:
        if event.kind == "uploaded":
            arrived.append(event.step)
            run.promises.arrived(*arrived)

    with running(disk_path) as run:
        tier = fc.Tier(path=far, storage=run.disk.storage if kind == "local" else None)
        options = {"keep_policy": fc.policies.LatestN(1), "tiers": [tier], "on_event": see}
        with run.open(**options) as manager:
            for step in (4, 5):
                run.save(manager, step, expected[step])
                manager.wait_until_finished()
            manager.record_metrics(5, {"late": 1.0})
            run.promises.metrics(5, "late")
            manager.wait_until_finished()
    assert sorted(arrived) == sorted(expected)

    def check(root: Path, promised: dict[str, Any]) -> None:
        held = check_tier(root, expected)
        there = set(promised.get("arrived", ()))
        if kind == "local":
            found = check_tier(root.parent / "new" / "far", expected)
            assert there <= found, f"{there - found} is lost in the second tier"
            there = found
        for step in (int(key.split()[1]) for key in promised if key.startswith("step")):
            is_promised = None not in promised[f"step {step}"]
            assert not is_promised or step in held | there, f"step {step} is in no tier"

    check_all(run, check, share=3)
    with fc.CheckpointManager(far, read_only=True) as copy:
        assert copy.all_steps() == sorted(expected)
        assert copy.metadata(5).metrics == {"late": 1.0}


def check_tier(root: Path, expected: dict[int, int]) -> set[int]:
    """Checks every step of a tier; returns their numbers."""
    if not root.exists():
        return set()
    with fc.CheckpointManager(root) as manager:
        for step in manager.all_steps():
            check_step(manager, step, frozenset({expected[step]}))
        return set(manager.all_steps())


@pytest.mark.parametrize("overwrite", [False, True])
def test_power_cut_during_fc_save_leaves_it_complete_or_absent(
    overwrite: bool, disk_path: Path
) -> None:
    path = disk_path / "new" / "checkpoint"
    if overwrite:
        path.parent.mkdir()
        fc.save(path, items_of(1))
    with Disk(disk_path) as disk:
        run = Run(disk, path)
        run.promises.step(0, *((1, 2) if overwrite else (None, 2)))
        fc.save(path, items_of(2), overwrite=True, storage=disk.storage)
        run.promises.step(0, 2)
        disk.note()

    def check(back: Path, promised: dict[str, Any]) -> None:
        versions = promised["step 0"]
        if not back.exists():
            assert None in versions
            return
        restored = fc.restore(back)
        assert restored["tree"]["version"] in versions
        version = restored["tree"]["version"]
        assert testing.differences(dict(restored), items_of(version)) == []

    check_all(run, check)


@pytest.mark.parametrize("is_directory", [False, True])
def test_an_exported_file_or_directory(is_directory: bool, disk_path: Path) -> None:
    path = disk_path / "new" / "export"
    with Disk(disk_path) as disk:
        run = Run(disk, path)
        run.promises.step(0, None, 1)
        with atomic_output.atomic_output(path, disk.storage) as tmp:
            file = Path(tmp) / "file" if is_directory else Path(tmp)
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(b"content")
        run.promises.step(0, 1)
        disk.note()

    def check(back: Path, promised: dict[str, Any]) -> None:
        file = back / "file" if is_directory else back
        if not back.exists():
            assert None in promised["step 0"]
        else:
            assert file.read_bytes() == b"content"

    check_all(run, check)
