"""Each system call on a run's own paths fails once: `scripts/syscalls --help`.

strace records the system calls of an action (a save, a delete, an upload ...); then the action is
repeated for every call and error, with that one call failing. No reported step may be lost, nothing
may be taken for absent, and the caller must get an error of this package.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import importlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import functional_ckpt as fc
from functional_ckpt import errors, testing
from functional_ckpt.storage.buckets import lease

ERRORS = ("EIO", "ENOSPC", "ESTALE", "EINTR")
_STEPS = (1, 2, 3)
_TIMEOUT_SECONDS = 60.0
_LINE = re.compile(r"^\d+\s+(\w+)\((.*)$")
_PATHS = re.compile(r'"((?:[^"\\]|\\.)*)"|\d+<([^>]*)>')
# Calls about the working directory and waits: their errors have no effect.
_IGNORED = ("getcwd", "chdir", "poll", "ppoll", "select", "pselect6")


def items_of(version: int) -> dict[str, Any]:
    """Something of everything that is stored in a way of its own."""
    return {
        "tree": {"version": version, "x": torch.arange(50.0) + version, "note": f"v{version}"},
        "config": fc.Json({"version": version}),
    }


def open_manager(folder: Path, **options: Any) -> fc.CheckpointManager:
    """A writer as the actions use it."""
    keep = fc.policies.LatestN(3)
    return fc.CheckpointManager(
        folder / "run", keep_policy=keep, overwrite=True, latest_link="latest", **options
    )


def make_template(folder: Path) -> list[str]:
    """The initial run of every trial.

    Returns:
        The package's modules that were needed.
    """
    with open_manager(folder, tiers=[fc.Tier(path=folder / "far")]) as manager:
        for step in _STEPS:
            manager.save(step, items_of(step), metrics={"version": step})
        manager.wait_until_finished()
        manager.record_metrics(2, {"early": 2.0})
        manager.wait_until_finished()
    with fc.CheckpointManager(folder / "run", read_only=True) as manager:
        manager.restore(1)
    return [name for name in sys.modules if name.partition(".")[0] == fc.__name__]


# ------------------------------------------------------------------------------------ actions

Done = dict[str, Any]
Action = tuple[Callable[[Path], Any], Callable[[Path, Any], Done]]
"""The preparation before calls may fail, and the action."""


def _writer(folder: Path) -> fc.CheckpointManager:
    return open_manager(folder)


def _with_tier(folder: Path) -> fc.CheckpointManager:
    return open_manager(folder, tiers=[fc.Tier(path=folder / "far", max_delay_seconds=0.0)])


def _nothing(folder: Path) -> None:
    del folder


def _save(step: int, version: int) -> Callable[[Path, Any], Done]:
    def act(folder: Path, manager: fc.CheckpointManager) -> Done:
        commit = manager.save(step, items_of(version), metrics={"version": version})
        assert commit is not None
        commit.result()
        return {"saved": {str(step): version}}

    return act


def _delete(folder: Path, manager: fc.CheckpointManager) -> Done:
    manager.delete(2)
    return {"deleted": 2}


def _record(folder: Path, manager: fc.CheckpointManager) -> Done:
    manager.record_metrics(2, {"late": 1.0})
    return {"late": True}


def _upload(folder: Path, manager: fc.CheckpointManager) -> Done:
    done = _save(4, 40)(folder, manager)
    try:
        manager.wait_until_finished()
    except errors.CheckpointError as error:
        return {**done, "error": str(error)}
    return {**done, "uploaded": True}


def _look(manager: fc.CheckpointManager) -> Done:
    """A program's view: its steps, the best one, the step to resume from."""
    restored = manager.restore_or({"tree": None, "config": None})
    return {
        "steps": manager.all_steps(),
        "metrics": {
            str(step): dict(manager.metadata(step).metrics or {}) for step in manager.all_steps()
        },
        "best": manager.best_step("early"),
        "restored": [restored.step, restored["tree"]["version"]],
    }


def _open(folder: Path, _: None) -> Done:
    with open_manager(folder) as manager:
        return _look(manager)


def _open_to_read(folder: Path, _: None) -> Done:
    with fc.CheckpointManager(folder / "run", read_only=True) as manager:
        return _look(manager)


def _save_alone(folder: Path, _: None) -> Done:
    fc.save(folder / "alone", items_of(5), overwrite=True)
    return {"alone": 5}


ACTIONS: dict[str, Action] = {
    "save": (_writer, _save(4, 40)),
    "overwrite": (_writer, _save(2, 20)),
    "delete": (_writer, _delete),
    "record": (_writer, _record),
    "upload": (_with_tier, _upload),
    "open": (_nothing, _open),
    "look": (_nothing, _open_to_read),
    "fc.save": (_nothing, _save_alone),
}


# ------------------------------------------------------------------------------------- trials


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """A system call that can be found again: the k-th of its name on a path."""

    name: str
    path: str
    number: int

    def __str__(self) -> str:
        return f"{self.name} #{self.number} on {self.path}"


class Bench:
    """Does an action, over and over, in children that strace holds.

    Args:
        folder: On the file system in question; empty.
    """

    def __init__(self, folder: Path) -> None:
        self._template = folder / "template"
        self._place = folder / "place"
        self._log = folder / "trace"
        self._template.mkdir()
        # Imported once, here: a child that imports them itself takes ten times as long.
        for name in _in_child(lambda: make_template(self._template)):
            importlib.import_module(name)

    def calls(self, action: str) -> list[Call]:
        """The action's system calls on the run's paths."""
        done = self.run(action, ["-y", "-e", "trace=%file,%desc"])
        if done.get("error"):
            raise RuntimeError(f"{action} fails undisturbed: {done}")
        found: collections.Counter[tuple[str, str]] = collections.Counter()
        for line in self._log.read_text().splitlines():
            match = _LINE.match(line)
            if match is None or match[1] in _IGNORED:
                continue
            named = [a or b for a, b in _PATHS.findall(match[2].rpartition(" = ")[0])]
            for path in named:
                if path.startswith(str(self._place)):
                    found[match[1], path] += 1
                    break
        return [Call(n, p, k + 1) for (n, p), count in found.items() for k in range(count)]

    def trial(self, action: str, call: Call, error: str) -> list[str]:
        """The problems after the action with that call failing; None if it was not made."""
        inject = f"inject={call.name}:error={error}:when={call.number}"
        options = ["-P", call.path, "-e", f"trace={call.name}", "-e", inject]
        done = self.run(action, options)
        if "(INJECTED)" not in self._log.read_text():
            return ["not reached"]
        return [*_judge(done), *_in_child(lambda: _check(self._place, action, done))]

    def run(self, action: str, options: Sequence[str]) -> Done:
        """Does the action under strace with these options."""
        shutil.rmtree(self._place, ignore_errors=True)
        shutil.copytree(self._template, self._place, symlinks=True)
        go_reading, go_writing = os.pipe()
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(go_writing)
            os.close(reading)
            _perform(self._place, action, go_reading, writing)
        os.close(go_reading)
        os.close(writing)
        with open(reading, "rb") as outcome:
            outcome.read(1)  # it has prepared
            self._log.write_text("")
            tracer = subprocess.Popen(
                [
                    "strace",
                    "-f",
                    "-qq",
                    "-s",
                    "4096",
                    "-o",
                    str(self._log),
                    *options,
                    "-p",
                    f"{pid}",
                ],
                stderr=subprocess.PIPE,
                text=True,
            )
            _await_tracer(pid, tracer)
            os.write(go_writing, b".")
            os.close(go_writing)
            signal.alarm(int(_TIMEOUT_SECONDS))
            try:
                text = outcome.read()
            except TimeoutError:
                os.kill(pid, signal.SIGKILL)
                text = b'{"hang": true}'
            finally:
                signal.alarm(0)
        os.waitpid(pid, 0)
        _, messages = tracer.communicate()
        return json.loads(text or json.dumps({"raw": f"it died; {messages}"}))


def _time_out(*_: Any) -> None:
    raise TimeoutError


def _await_tracer(pid: int, tracer: subprocess.Popen[str]) -> None:
    until = time.monotonic() + _TIMEOUT_SECONDS
    while "TracerPid:\t0\n" in Path(f"/proc/{pid}/status").read_text():
        if tracer.poll() is not None or time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
            raise RuntimeError(f"strace cannot attach: {tracer.communicate()[1]}")
        time.sleep(0.005)


def _perform(folder: Path, action: str, go: int, writing: int) -> None:
    """The child: prepares, waits for strace, acts, and reports the outcome."""
    count = itertools.count(1)
    uuid.uuid4 = lambda: uuid.UUID(int=next(count) << 96, version=4)  # the same names every time
    os.getpid = lambda: 4242
    lease._started = lambda _: "then"  # so that its lease is that of a process which has ended
    prepare, act = ACTIONS[action]
    done: Done = {}
    try:
        prepared = prepare(folder)
        os.write(writing, b".")
        os.read(go, 1)
        try:
            done = act(folder, prepared)
        except errors.CheckpointError as error:
            done = {"error": str(error), "class": type(error).__name__}
    except BaseException:
        done = {"raw": traceback.format_exc()[-1500:]}
    os.write(writing, json.dumps(done).encode())
    os._exit(0)


def _in_child(work: Callable[[], Any]) -> Any:
    """Runs it in a process of its own, for it uses threads, and this one forks."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            result = work()
        except BaseException:
            result = [f"the check failed: {traceback.format_exc()[-1500:]}"]
        with open(writing, "w") as pipe:
            json.dump(result, pipe)
            pipe.flush()
            os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        result = json.load(pipe)
    os.waitpid(pid, 0)
    if result and isinstance(result, list) and str(result[0]).startswith("the check failed"):
        raise RuntimeError(result[0])
    return result


# -------------------------------------------------------------------------------------- judging


def _judge(done: Done) -> list[str]:
    """The problems of the reported outcome."""
    if "hang" in done:
        return ["it hangs"]
    if "raw" in done:
        return [f"a raw exception: {done['raw'][-300:]}"]
    found: list[str] = []
    if "Corrupt" in done.get("class", ""):
        found.append(f"damage is claimed: {done['error'][:200]}")
    if "steps" in done:
        expected = {"1": {"version": 1}, "2": {"version": 2, "early": 2.0}, "3": {"version": 3}}
        if done["steps"] != list(_STEPS):
            found.append(f"steps were taken for absent: {done['steps']}")
        elif done["metrics"] != expected or done["best"] != 2:
            found.append(f"metrics were taken for absent: {done}")
        if done["restored"] != [3, 3]:
            found.append(f"restore_or resumed from {done['restored']}")
    return found


def _check(folder: Path, action: str, done: Done) -> list[str]:
    """The problems of the state after the action."""
    may_hold: dict[int, set[int | None]] = {1: {1}, 2: {2}, 3: {3}, 4: {None}}
    if action in ("save", "upload"):
        may_hold |= {1: {1, None}, 4: {40} if "saved" in done else {None, 40}}
        if action == "upload":  # the other tier holds them: a full disk lets go of them here
            may_hold |= {2: {2, None}, 3: {3, None}}
    elif action == "overwrite":
        may_hold[2] = {20} if "saved" in done else {2, 20}
    elif action == "delete":
        may_hold[2] = {None} if "deleted" in done else {2, None}
    found = _check_run(folder / "run", may_hold, late="late" in done)
    far: dict[int, set[int | None]] = {1: {1}, 2: {2}, 3: {3}, 4: {None}}
    if action == "upload":
        far[4] = {40} if "uploaded" in done else {None, 40}
    found += [f"far: {each}" for each in _check_run(folder / "far", far)]
    if "alone" in done and fc.restore(folder / "alone")["tree"]["version"] != 5:
        found.append("fc.save returned, and its checkpoint is not there")
    return [*found, *_check_next(folder)]


def _check_run(root: Path, may_hold: dict[int, set[int | None]], late: bool = False) -> list[str]:
    found: list[str] = []
    held: dict[int, int] = {}
    with fc.CheckpointManager(root, read_only=True) as manager:
        for step in manager.all_steps():
            try:
                restored = manager.restore(step)
            except errors.CheckpointError as error:
                found.append(f"step {step} is listed: {error}")
                continue
            version = held[step] = restored["tree"]["version"]
            expected = {**items_of(version), "config": {"version": version}}
            if testing.differences(dict(restored), expected):
                found.append(f"step {step} is a mix")
            metrics = dict(manager.metadata(step).metrics or {})
            needed = {"version": version} | ({"early": 2.0} if (step, version) == (2, 2) else {})
            needed |= {"late": 1.0} if late and step == 2 else {}
            if any(metrics.get(name) != value for name, value in needed.items()):
                found.append(f"metrics of step {step} are {metrics}")
    for step, versions in may_hold.items():
        if held.get(step) not in versions:
            found.append(f"step {step} holds {held.get(step)}, may hold {versions}")
    return found


def _check_next(folder: Path) -> list[str]:
    """Whether the next writer sees the same, and can continue."""
    with fc.CheckpointManager(folder / "run", read_only=True) as manager:
        steps = manager.all_steps()
    with open_manager(folder) as manager:
        if manager.all_steps() != steps:
            return [f"the next writer sees {manager.all_steps()}, not {steps}"]
        manager.save(9, items_of(90)).result()
    names = {path.name for path in (folder / "run").iterdir() if path.name[0] != "."}
    left = [name for name in names if not name.isdigit() and name != "latest"]
    return [f"the next writer leaves {left}"] if left else []


# ----------------------------------------------------------------------------------------- main


def is_possible() -> str | None:
    """Why system calls cannot be made to fail here; None where they can."""
    if shutil.which("strace") is None:
        return "there is no strace"
    result = subprocess.run(["strace", "-qq", "true"], capture_output=True, text=True)
    return f"strace may not trace here: {result.stderr.strip()}" if result.returncode else None


def trials(
    bench: Bench, actions: Sequence[str], codes: Sequence[str], every: int
) -> Iterator[tuple[str, list[str]]]:
    """Runs all trials; yields each trial and its problems."""
    signal.signal(signal.SIGALRM, _time_out)
    number = 0
    for action in actions:
        for call in bench.calls(action):
            for code in codes:
                number += 1
                if number % every == 0:
                    wrong = bench.trial(action, call, code)
                    yield f"{action}: {code} from {call}", wrong


@contextlib.contextmanager
def folder_on(place: Path | None) -> Iterator[Path]:
    """An empty folder there."""
    with tempfile.TemporaryDirectory(dir=place, prefix="syscalls-") as folder:
        yield Path(folder).resolve()


def main(arguments: list[str]) -> int:
    """Prints the problems; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="scripts/syscalls", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--actions", nargs="*", default=list(ACTIONS), choices=list(ACTIONS))
    parser.add_argument("--errors", nargs="*", default=list(ERRORS))
    parser.add_argument("--every", type=int, default=1, help="run every N-th trial")
    parser.add_argument("--seconds", type=float, default=1e9, help="for how long at most")
    parser.add_argument("--folder", type=Path, help="on which file system; /tmp by default")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if (reason := is_possible()) is not None:
        print(f"scripts/syscalls: skipped, {reason}")
        return 0
    counts: collections.Counter[str] = collections.Counter()
    num_wrong = 0
    until = time.monotonic() + options.seconds
    with folder_on(options.folder) as folder:
        bench = Bench(folder)
        for what, wrong in trials(bench, options.actions, options.errors, options.every):
            counts[what.partition(":")[0]] += 1
            if time.monotonic() > until:
                break
            if wrong == ["not reached"]:
                counts["not reached"] += 1
            elif wrong:
                num_wrong += 1
                print(f"{what.replace(str(folder), '')}: {'; '.join(wrong)}", flush=True)
    print(f"trials: {dict(counts)}; wrong: {num_wrong}")
    return 1 if num_wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
