"""`fc.save` to one path by several processes and threads, and leftovers of dead ones."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import functional_ckpt as fc
import scripts
from functional_ckpt import errors, testing
from functional_ckpt.storage import tmp_paths


def items(number: int) -> dict[str, Any]:
    tree = {"w": torch.full((20_000,), float(number)), "n": number}
    return {"tree": tree, **{f"json{i}": fc.Json(number) for i in range(5)}}


def number_of(path: Path) -> int:
    found = fc.restore(path)
    numbers = {found["tree"]["n"], *found["tree"]["w"].unique().tolist()}
    numbers |= {found[f"json{i}"] for i in range(5)}
    assert len(numbers) == 1, numbers
    return int(numbers.pop())


RACE = """
number = int(sys.argv[2])
def items(n):
    tree = {"w": torch.full((20_000,), float(n)), "n": n}
    return {"tree": tree, **{f"json{i}": fc.Json(n) for i in range(5)}}
fc.save(f"{root}/warm{number}", items(0))
for i in range(8):
    open(f"{root}/at{i}.{number}", "w").close()
    while not all(os.path.exists(f"{root}/at{i}.{other}") for other in range(3)):
        time.sleep(0.0005)
    try:
        fc.save(f"{root}/c{i}", items(10 * i + number), overwrite=i % 2 == 0)
        open(f"{root}/ok{i}.{number}", "w").close()
    except fc.errors.StepExistsError:
        assert i % 2
"""


def test_processes_that_save_to_one_path_never_mix(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(scripts.command(RACE, tmp_path, str(k)), env=scripts.environment())
        for k in range(3)
    ]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    for i in range(8):
        reported = [k for k in range(3) if (tmp_path / f"ok{i}.{k}").exists()]
        assert number_of(tmp_path / f"c{i}") - 10 * i in reported
        assert len(reported) == (1 if i % 2 else 3)
    assert [name for name in os.listdir(tmp_path) if "tmp" in name] == []


@pytest.mark.parametrize("can_exchange", [True, False])
def test_threads_that_save_to_one_path_never_mix(can_exchange: bool, tmp_path: Path) -> None:
    storage = testing.FaultyStorage(can_exchange=can_exchange)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for i in range(5):
                fc.save(tmp_path / "best", items(10 * i + number), overwrite=True, storage=storage)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for each in workers:
        each.start()
    for each in workers:
        each.join()
    assert failures == []
    assert number_of(tmp_path / "best") in range(40, 44)
    assert os.listdir(tmp_path) == ["best"]


def test_a_manager_beside_it_leaves_a_live_save_alone(tmp_path: Path) -> None:
    class Opening(testing.FaultyStorage):
        """Opens a manager of the directory before every operation."""

        def operation(self, kind: str, path: str) -> None:
            fc.CheckpointManager(tmp_path).close()
            super().operation(kind, path)

    fc.save(tmp_path / "best", items(1), storage=Opening())
    assert number_of(tmp_path / "best") == 1
    fc.save(tmp_path / "best", items(2), storage=Opening(), overwrite=True)
    assert number_of(tmp_path / "best") == 2


KILLED = """
class Stuck(testing.FaultyStorage):
    def operation(self, kind, path):
        if kind == "sync" and path.endswith("_METADATA"):  # written, and not published yet
            print("writing", flush=True)
            time.sleep(60)
        super().operation(kind, path)
fc.save(root + "/best", items(1), storage=Stuck())
"""


@pytest.mark.parametrize("cleaner", ["fc.save", "manager"])
def test_leftovers_of_dead_saves_are_removed_and_live_ones_kept(
    cleaner: str, tmp_path: Path
) -> None:
    def clean() -> None:
        if cleaner == "manager":
            fc.CheckpointManager(tmp_path).close()
        else:
            fc.save(tmp_path / "best", items(2), overwrite=True)

    def leftovers() -> list[str]:
        return [name for name in os.listdir(tmp_path) if tmp_paths.TMP_SUFFIX in name]

    with subprocess.Popen(
        scripts.command(KILLED, tmp_path), env=scripts.environment(), stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"writing\n"
        clean()
        assert len(leftovers()) == 1, "its writer is alive"
        process.send_signal(signal.SIGKILL)
        process.wait()
    clean()
    assert leftovers() == []


def test_a_leftover_of_another_machine_stays_for_a_day(tmp_path: Path) -> None:
    left = tmp_path / "best.orbax-checkpoint-tmp-0123456789ab.00000000"
    left.mkdir()
    (left / "file").write_text("x")
    fc.save(tmp_path / "best", items(1))
    fc.CheckpointManager(tmp_path).close()
    assert left.exists()
    long_ago = time.time() - 25 * 3600
    for path in (left / "file", left):
        os.utime(path, (long_ago, long_ago))
    fc.save(tmp_path / "best", items(2), overwrite=True)
    assert not left.exists()


def test_a_save_that_fails_leaves_nothing(tmp_path: Path) -> None:
    for kind in ("write", "sync", "rename"):
        storage = testing.FaultyStorage(testing.Fault(errno=errno.EACCES, kinds=(kind,)))
        with pytest.raises(errors.StorageError):
            fc.save(tmp_path / "best", items(1), storage=storage)
        assert os.listdir(tmp_path) == []


def test_the_longest_name_can_be_saved(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    fc.save(path, items(1))
    fc.save(path, items(2), overwrite=True)
    assert number_of(path) == 2 and os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("kind", ["a run", "files"])
def test_a_directory_that_is_no_checkpoint_is_never_replaced(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "place"
    if kind == "files":
        (path / "src").mkdir(parents=True)
        (path / "src" / "main.py").write_text("x")
    else:
        with fc.CheckpointManager(path) as manager:
            manager.save(1, items(1))
    before = sorted(path.rglob("*"))
    with pytest.raises(errors.UsageError, match="without a record of a checkpoint"):
        fc.save(path, items(2), overwrite=True)
    assert sorted(path.rglob("*")) == before and os.listdir(tmp_path) == ["place"]


def test_an_empty_directory_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "best").mkdir()
    fc.save(tmp_path / "best", items(2), overwrite=True)
    assert number_of(tmp_path / "best") == 2


@pytest.mark.parametrize("empty", ["", "file://"])
def test_an_empty_path_is_not_the_current_directory(empty: str) -> None:
    for call in (lambda: fc.save(empty, items(1), overwrite=True), lambda: fc.restore(empty)):
        with pytest.raises(errors.UsageError, match="path is empty"):
            call()
    with pytest.raises(errors.UsageError, match="path is empty"):
        fc.CheckpointManager(empty)
