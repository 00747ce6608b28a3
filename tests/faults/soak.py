"""Everything at once, for minutes or hours: `scripts/soak --help`.

One directory at a time has a writer, evaluators and savers. They are killed, stopped and let go,
and between writers, files are damaged, moved and copied. After every writer, all reported steps are
compared, bit for bit, with restored ones. The random choices follow from the seed; the points of
interruption do not.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import faulthandler
import functools
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import servers
import soak_check
import soak_journal
import torch
from soak_journal import Journal
from soak_worker import Arena, Writer, evaluate, key_of, save_paths, staying

import functional_ckpt.manager
from functional_ckpt import errors

_WRITER_SECONDS = 180
_OPERATIONS = {
    "save_next": 50,
    "save_again": 15,
    "save_in_threads": 3,
    "delete": 6,
    "record": 8,
    "restore": 4,
    "restore_latest": 3,
    "go_back": 4,
    "reopen": 4,
    "drop": 3,
    "intrude": 2,
    "fork": 2,
    "jump": 3,
}


@dataclasses.dataclass(slots=True)
class Figures:
    """The actions and findings of a soak."""

    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter[str])
    refusals: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter[str])
    losses: list[str] = dataclasses.field(default_factory=list[str])

    def text(self) -> str:
        """Readable."""
        counts = ", ".join(f"{name} {count}" for name, count in sorted(self.counts.items()))
        lines = [f"operations: {counts}"]
        lines += [f"  refused {count} times: {why}" for why, count in self.refusals.most_common(20)]
        lines += [f"losses: {len(self.losses)}", *(f"  LOSS {loss}" for loss in self.losses)]
        return "\n".join(lines)


class Soak:
    """Runs arenas, one after the other, until the time is up.

    Args:
        folder: The work folder; arenas with losses are left there.
        seed: Of all choices.
        s3_url: The object store's server; None for none.
        skip: Operations to leave out.
    """

    def __init__(
        self, folder: Path, seed: int, s3_url: str | None, skip: frozenset[str] = frozenset()
    ) -> None:
        self.figures = Figures()
        self._folder = folder
        self._choose = random.Random(seed)
        self._s3_url = s3_url
        self._skip = skip
        self._num_arenas = 0
        self._watchers: list[int] = []

    def run(self, until: float, rounds_each: int) -> None:
        """Arenas with a number of writers each, until `time.monotonic()` is `until`."""
        while time.monotonic() < until:
            self._num_arenas += 1
            arena = self._new_arena()
            journal = Journal(arena.folder / "journal")
            losses = self._run_arena(arena, journal, until, rounds_each)
            self._count(soak_journal.read(journal.path))
            if losses:
                self.figures.losses += [f"{arena.folder}: {loss}" for loss in losses]
                (arena.folder / "arena").write_text(f"{arena}\n" + "\n".join(losses))
                sys.stdout.write("\n".join(["LOSS", str(arena), *losses, ""]))
                sys.stdout.flush()
            else:
                shutil.rmtree(arena.folder)

    def _may(self, what: str) -> bool:
        return what not in self._skip

    def _new_arena(self) -> Arena:
        choose = self._choose
        name = f"arena{self._num_arenas}"
        folder = self._folder / name
        folder.mkdir()
        tiers: list[tuple[str, int | None]] = []
        if choose.random() < 0.5:
            tiers.append((str(folder / "far"), choose.choice([None, 4])))
        if self._s3_url is not None and choose.random() < 0.5:
            bucket = f"{name}-{os.getpid()}-{time.time_ns()}"
            servers.make_bucket(self._s3_url, bucket)
            tiers.append((f"s3://{bucket}/run", choose.choice([None, 5])))
        keep = choose.choice([None, 3, 3, 3])
        return Arena(
            folder=folder,
            keep=keep,
            keeps_best=keep is not None and choose.random() < 0.5,
            tiers=tuple(tiers),
            paths=("side", "run/best")
            if choose.random() < 0.5 and self._may("inside")
            else ("side",),
            operations=tuple((n, w) for n, w in _OPERATIONS.items() if n not in self._skip),
        )

    def _run_arena(self, arena: Arena, journal: Journal, until: float, rounds: int) -> list[str]:
        choose = self._choose
        self._watchers = [
            self._fork(evaluate, arena, journal, choose.randrange(2**30)) for _ in range(2)
        ]
        for number in range(2 if self._may("race") else 1):
            self._watchers.append(self._fork(save_paths, arena, journal, number + 1))
        try:
            for number in range(1, rounds + 1):
                seed = choose.randrange(2**30)
                self._run_writer(arena, journal, seed, number * 100_000)
                if losses := self._verdict(arena, journal):
                    return losses
                if time.monotonic() > until:
                    break
                self._disturb(arena, journal)
        finally:
            for pid in self._watchers:
                self._kill(journal, pid)
        return self._verdict(arena, journal)

    # ------------------------------------------------------------------------------ processes

    def _fork(self, work: Callable[..., None], arena: Arena, journal: Journal, *more: Any) -> int:
        """Runs it in a separate process; an error is a loss."""
        pid = os.fork()
        if pid:
            return pid
        faulthandler.dump_traceback_later(3600, exit=True)
        try:
            work(arena, journal, *more)
        except BaseException:
            journal.say("wrong", message=traceback.format_exc()[-1500:])
            os._exit(1)
        os._exit(0)

    def _kill(self, journal: Journal, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        journal.say("dead", of=pid)

    def _run_writer(self, arena: Arena, journal: Journal, seed: int, version: int) -> None:
        """One writer, stopped now and then; it is killed, or ends when it is done."""
        choose = random.Random(seed)

        reading, writing = os.pipe()

        def write(arena: Arena, journal: Journal) -> None:
            faulthandler.cancel_dump_traceback_later()
            faulthandler.dump_traceback_later(_WRITER_SECONDS, exit=True)
            tell = functools.partial(os.write, writing, b".")
            Writer(arena, journal, seed, version, tell).run(choose.choice([3, 30, 100]))

        pid = self._fork(write, arena, journal)
        os.close(writing)
        if choose.random() < 0.8:  # else it is killed while it opens the directory
            select.select([reading], [], [], _WRITER_SECONDS)
        until = time.monotonic() + choose.choice([0.2, 1.0, 3.0, 6.0]) * choose.uniform(0.0, 1.0)
        is_over = self._watch(arena, journal, pid, until, choose)
        os.close(reading)
        if not is_over:
            self._kill(journal, pid)
            self.figures.counts["writer killed"] += 1

    def _watch(
        self, arena: Arena, journal: Journal, pid: int, until: float, choose: random.Random
    ) -> bool:
        """Suspends the writer now and then; whether it has ended."""
        while time.monotonic() < until:
            time.sleep(choose.uniform(0.0, 0.4))
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                journal.say("dead", of=pid)
                self.figures.counts["writer ended"] += 1
                if status:
                    journal.say("wrong", message=f"a writer ended with status {status}")
                return True
            if choose.random() < 0.15:
                self._stop(arena, journal, pid, choose)
        return False

    def _stop(self, arena: Arena, journal: Journal, pid: int, choose: random.Random) -> None:
        """Suspends the writer, tries to take over or moves its directory away, and resumes it."""
        os.kill(pid, signal.SIGSTOP)
        self.figures.counts["writer suspended"] += 1
        try:
            what = choose.choice(["wait", "intrude", "move"])
            if what == "intrude":
                self._wait_for(self._fork(_intrude, arena, journal))
            elif what == "move" and arena.paths == ("side",) and self._may("move"):
                with contextlib.suppress(BlockingIOError), staying(arena, wait=False):
                    self._move_away(arena, journal, pid, choose)
            time.sleep(choose.uniform(0.0, 0.2))
        finally:
            os.kill(pid, signal.SIGCONT)

    def _move_away(self, arena: Arena, journal: Journal, pid: int, choose: random.Random) -> None:
        """The run's directory has another name while its writer continues."""
        if not arena.run.is_dir():
            return
        self.figures.counts["directory moved"] += 1
        away = arena.folder / "away"
        absences = [journal.begin("away", key_of(step)) for step in arena.near_steps()]
        arena.run.rename(away)
        os.kill(pid, signal.SIGCONT)
        time.sleep(choose.uniform(0.0, 0.5))
        os.kill(pid, signal.SIGSTOP)
        if arena.run.exists():  # it was made again: whatever is reported of it will be missed
            self.figures.counts["moved directory made again"] += 1
            shutil.rmtree(arena.run)
        away.rename(arena.run)
        for absence in absences:
            journal.end(absence, is_reported=True)

    def _wait_for(self, pid: int) -> None:
        os.waitpid(pid, 0)

    # -------------------------------------------------------------------- between writers

    def _disturb(self, arena: Arena, journal: Journal) -> None:
        """Damages, moves or copies something."""
        if not arena.run.is_dir():
            return
        chance = self._choose.random()
        if chance < 0.15:
            self._damage(arena, journal)
        elif chance < 0.25:
            self._copy(arena)
        elif chance < 0.3:
            self.figures.counts["lock removed"] += 1
            (arena.run / ".functional_ckpt" / "lock").unlink(missing_ok=True)

    def _copy(self, arena: Arena) -> None:
        """A copy replaces the directory, between writers."""
        self.figures.counts["directory copied"] += 1
        copied, old = arena.folder / "copied", arena.folder / "old"
        for pid in self._watchers:
            os.kill(pid, signal.SIGSTOP)
        shutil.copytree(arena.run, copied, symlinks=True)
        arena.run.rename(old)
        copied.rename(arena.run)
        for pid in self._watchers:
            os.kill(pid, signal.SIGCONT)
        shutil.rmtree(old)

    def _damage(self, arena: Arena, journal: Journal) -> None:
        """One file of one step is cut, emptied, removed, or has a bit flipped."""
        choose = self._choose
        steps = sorted(arena.near_steps())
        if not steps:
            return
        step = choose.choice(steps)
        files = sorted(path for path in (arena.run / str(step)).rglob("*") if path.is_file())
        path = choose.choice(files)
        how = choose.choice(["cut", "empty", "remove", "flip", "flip"])
        hurt = [step] if how == "remove" else _sharing(arena, path)
        self.figures.counts["steps that shared a damaged file"] += len(hurt) - 1
        damages = [journal.begin("damage", key_of(each), file=str(path)) for each in hurt]
        self.figures.counts["file damaged"] += 1
        data = bytearray(path.read_bytes())
        if how == "remove":
            path.unlink()
        elif how == "flip" and data:
            data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
            path.write_bytes(data)
        else:
            path.write_bytes(data[: len(data) // 2 if how == "cut" else 0])
        for damage in damages:
            journal.end(damage, is_reported=True)

    # -------------------------------------------------------------------------------- verdict

    def _verdict(self, arena: Arena, journal: Journal) -> list[str]:
        """The losses, found by a separate process: this one must be able to fork others."""
        names = "most names of a file"
        self.figures.counts[names] = max(self.figures.counts[names], _most_names(arena))
        reading, writing = os.pipe()
        pid = self._fork(
            lambda arena, journal: soak_check.main(arena, journal, writing), arena, journal
        )
        os.close(writing)
        with os.fdopen(reading) as pipe:
            text = pipe.read()
        self._wait_for(pid)
        if not text:
            return ["the check failed", *self._wrong(journal)]
        verdict = json.loads(text)
        self.figures.counts["values verified"] += verdict["num_verified"]
        return [*verdict["losses"], *self._wrong(journal)]

    def _wrong(self, journal: Journal) -> list[str]:
        lines = soak_journal.read(journal.path)
        return [line["message"] for line in lines if line["kind"] == "wrong"]

    def _count(self, lines: list[dict[str, Any]]) -> None:
        what: dict[str, str] = {}
        for line in lines:
            if line["kind"] == "begin":
                what[line["name"]] = line["what"]
            elif line["kind"] == "end":
                outcome = "" if line["is_reported"] else " refused"
                self.figures.counts[what[line["name"]] + outcome] += 1
            elif line["kind"] == "did":
                self.figures.counts[line["operation"]] += 1
            if line.get("error"):
                self.figures.refusals[_in_general(line["error"])] += 1


def _sharing(arena: Arena, path: Path) -> list[int]:
    """The steps that have the file, under any name."""
    inode = path.stat().st_ino
    return [
        step
        for step in sorted(arena.near_steps())
        if any(each.stat().st_ino == inode for each in (arena.run / str(step)).rglob("*"))
    ]


def _most_names(arena: Arena) -> int:
    """How many names a file of the steps has at most."""
    files = (path for step in arena.near_steps() for path in (arena.run / str(step)).rglob("*"))
    return max((path.stat().st_nlink for path in files if path.is_file()), default=0)


def _in_general(error: str) -> str:
    """The message without its numbers and names."""
    words = (word for word in error[:160].split() if "/" not in word)
    return "".join("#" if c.isdigit() else c for c in " ".join(words))[:110]


def _intrude(arena: Arena, journal: Journal) -> None:
    """Tries to write while another writer is suspended."""
    is_open = any(line["kind"] == "opened" for line in soak_journal.read(journal.path))
    try:
        functional_ckpt.CheckpointManager(arena.run).close()
    except errors.LockedError:
        return
    except errors.CheckpointError as error:
        journal.say("refused", operation="intrude", error=soak_journal.describe(error))
        return
    journal.say("intruded", while_open=is_open)


@contextlib.contextmanager
def store(is_wanted: bool) -> Generator[str | None]:
    """An object store's server, which the environment leads to."""
    if not is_wanted:
        yield None
        return
    with servers.s3_server() as url:
        os.environ.update(servers.environment(url))
        yield url


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/soak",
        description="Saves, kills, damages and compares for as long as you like; exits with 1 "
        "where anything that was reported is lost or changed.",
    )
    parser.add_argument("--seconds", type=float, default=600.0, help="for how long (600)")
    parser.add_argument("--seed", type=int, default=0, help="of the random choices (0)")
    parser.add_argument("--folder", type=Path, help="where; a new folder below /tmp by default")
    parser.add_argument("--rounds", type=int, default=25, help="writers for each directory (25)")
    parser.add_argument("--no-store", action="store_true", help="without an object store")
    parser.add_argument(
        "--skip", nargs="*", default=[], help="what to leave out: operations, or inside, race, move"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Soaks; returns the exit status."""
    options = parse(arguments)
    torch.set_num_threads(1)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    with store(not options.no_store) as url:
        soak = Soak(folder, options.seed, url, frozenset(options.skip))
        soak.run(time.monotonic() + options.seconds, options.rounds)
    sys.stdout.write(soak.figures.text() + "\n")
    return 1 if soak.figures.losses else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
