"""Jobs of several ranks that go wrong, and the template that forks their processes.

Run as a script it is the template: it imports everything once and forks a rank for each line it is
given. Nothing in it may use TensorStore or a process group before the fork. Ranks and the test
communicate by files: a rank reports lines in `<rank>.jsonl`, and waits for files to appear.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import errno
import faulthandler
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import functional_ckpt as fc
from functional_ckpt import errors, testing
from functional_ckpt.distributed import torch_store
from functional_ckpt.distributed.torch_store import StoreCoordinator
from functional_ckpt.steps import decide

TIMEOUT_SECONDS = 4.0
PATIENCE_SECONDS = 90.0
POINTS = ("before-staging", "writing", "before-barrier", "merging", "renamed")
KINDS = ("raise", "kill", "stall")
SIZE = 500


class Rank:
    """One rank of a job, in its own process."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        self.request = request
        self.rank: int = request["rank"]
        self.num_ranks: int = request["num_ranks"]
        self.folder = Path(request["folder"])
        self.root = request["root"]

    def tell(self, **event: Any) -> None:
        """Reports to the test; complete lines only, whenever the process dies."""
        with (self.folder / f"{self.rank}.jsonl").open("a") as file:
            file.write(json.dumps(event) + "\n")

    def wait_for(self, name: str) -> str:
        """Waits until the test, or another rank, has made a file; returns its text."""
        return wait_for(self.folder / name)

    def join(self) -> None:
        """Makes the process group: its store is the launcher's, or the first rank's."""
        timeout = datetime.timedelta(seconds=60)
        if self.request["host"] == "none":
            return
        if self.request["host"] == "launcher":
            store = dist.TCPStore("127.0.0.1", self.request["port"], timeout=timeout)
        elif self.rank == 0:
            store = dist.TCPStore(
                "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timeout
            )
            put(self.folder / "port", str(store.port))
        else:
            store = dist.TCPStore("127.0.0.1", int(self.wait_for("port")), timeout=timeout)
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore(self.request["id"], store),
            rank=self.rank,
            world_size=self.num_ranks,
            timeout=timeout,
        )

    def manager(self, root: str | None = None, **arguments: Any) -> fc.CheckpointManager:
        seconds = arguments.pop("timeout_seconds", TIMEOUT_SECONDS)
        group = arguments.pop("group", None) or dist.group.WORLD
        coordinator = StoreCoordinator(group, timeout_seconds=seconds)
        return fc.CheckpointManager(root or self.root, coordinator=coordinator, **arguments)


class State:
    """Replicated tensors, all determined by one number."""

    def __init__(self, version: int = -1) -> None:
        self.version = version
        self.on_lower: Callable[[], None] = lambda: None

    def state_dict(self) -> dict[str, Any]:
        self.on_lower()
        generator = torch.Generator().manual_seed(self.version + 1)
        return {
            "version": self.version,
            "tensors": [torch.randn(SIZE, generator=generator) for _ in range(7)],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        expected = State(state["version"]).state_dict()["tensors"]
        assert all(map(torch.equal, state["tensors"], expected)), "restored tensors differ"
        self.version = state["version"]


def items_of(step: int, rank: int) -> dict[str, Any]:
    return {"state": State(step), "rng": fc.Rng(), "own": {"rank": rank, "step": step}}


def attempt(call: Callable[[], object]) -> dict[str, Any]:
    """The outcome of a call: seconds, and the error with the ranks that it names."""
    start = time.monotonic()
    try:
        call()
    except Exception as error:
        ranks = getattr(error, "ranks", ()) or getattr(error.__cause__, "ranks", ())
        names = [kind.__name__ for kind in type(error).__mro__]
        found = {"error": names[0], "kinds": names, "text": str(error), "ranks": list(ranks)}
    else:
        found = {"error": None, "kinds": [], "text": "", "ranks": []}
    return found | {"seconds": time.monotonic() - start}


def save(manager: fc.CheckpointManager, step: int, items: Mapping[str, Any]) -> None:
    """Saves and waits."""
    commit = manager.save(step, items)
    assert commit is not None
    commit.result(PATIENCE_SECONDS)


# ---------------------------------------------------------------------------- the matrix


class Trap(testing.FaultyStorage):
    """Announces the points of a save; armed, the first time that one is reached."""

    def __init__(
        self, root: str, point: str, is_primary: bool, strike: Callable[[str], None]
    ) -> None:
        super().__init__()
        self.is_armed = False
        self._root = root
        self._point = point
        self._is_primary = is_primary
        self._strike = strike

    def operation(self, kind: str, path: str) -> None:
        if self.is_armed and self._is_here(kind, path):
            self.is_armed = False
            self._strike(path)

    def _is_here(self, kind: str, path: str) -> bool:
        match self._point:
            case "writing":
                return kind == "write_data"
            case "before-barrier":
                # The last of a rank's operations before it meets the others.
                if self._is_primary:
                    is_data = path.endswith(".safetensors") and "/rng/" in path
                    return kind == "write_data" and is_data
                return kind == "write" and "/.ranks/" in path
            case "merging":
                return kind == "write_data" and path.endswith("index.ocdbt")
            case "renamed":
                return kind == "sync" and path == self._root
            case _:
                return False


class Fault:
    """Strikes one rank once: at a point of its own, or while the primary is at one."""

    def __init__(self, this: Rank) -> None:
        self._this = this
        self.point: str = this.request["point"]
        self.kind: str = this.request["kind"]
        self.victim: int = this.request["victim"]
        is_primary = this.rank == 0
        self._is_remote = self.victim != 0 and self.point in ("merging", "renamed")
        self.storage = Trap(this.root, self.point, is_primary, self._reached)
        if self._is_remote and this.rank == self.victim:
            threading.Thread(target=self._watch, daemon=True).start()

    def arm(self, state: State) -> None:
        this = self._this
        if self._is_remote:
            self.storage.is_armed = this.rank == 0
        elif this.rank == self.victim and self.point == "before-staging":
            state.on_lower = lambda: self._reached("state")
        else:
            self.storage.is_armed = this.rank == self.victim

    def _reached(self, path: str) -> None:
        if self._is_remote:
            put(self._this.folder / "reached", "")
            self._this.wait_for("struck")
            time.sleep(0.1)
            return
        put(self._this.folder / "struck", "")
        if self.kind == "raise":
            cause = OSError(errno.EACCES, os.strerror(errno.EACCES), path)
            raise errors.StorageError(
                f"injected at {path}", errno=errno.EACCES, path=path
            ) from cause
        _end_or_stop(self.kind)

    def _watch(self) -> None:
        self._this.wait_for("reached")
        put(self._this.folder / "struck", "")
        if self.kind == "raise":
            [thread] = [t for t in threading.enumerate() if t.name.startswith("commit-")]
            identity = ctypes.c_ulong(thread.ident or 0)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(identity, ctypes.py_object(MemoryError))
        else:
            _end_or_stop(self.kind)


def _end_or_stop(kind: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
    time.sleep(1)  # another thread may have received the signal: this one stops here


def matrix(this: Rank) -> None:
    """One cell: saves until something fails, waits for a command, and continues if the job can."""
    fault = Fault(this)
    manager = this.manager(storage=fault.storage)
    save(manager, 0, items_of(0, this.rank))
    # No rank may be struck while another still reads that step 0 was saved.
    put(this.folder / f"begun-{this.rank}", "")
    for rank in range(this.num_ranks):
        this.wait_for(f"begun-{rank}")
    step = 0
    while True:
        step += 1
        items = items_of(step, this.rank)
        if step == 1:
            fault.arm(items["state"])
        found = attempt(lambda: save(manager, step, items))  # noqa: B023 - called at once
        if found["error"] or step == 4:
            break
    this.tell(event="failed", step=step, **found)
    if this.wait_for("go") == "on":
        this.tell(event="went-on", **attempt(lambda: save(manager, 10, items_of(10, this.rank))))
    manager.close()


def aftermath(this: Rank) -> None:
    """The next run, on other ranks than the last: no losses, no leftovers, saves work."""
    for root in this.request["roots"]:
        with this.manager(root) as manager:
            left = [name for name in os.listdir(root) if "tmp" in name]
            left += [name for name in os.listdir(Path(root, ".functional_ckpt")) if "tmp" in name]
            steps = manager.all_steps()
            restored: list[int] = []
            for step in steps:
                state = State()
                manager.restore(step, {"state": state, "own": None})
                restored.append(state.version)
            save(manager, 50, items_of(50, this.rank))
        this.tell(event="looked", root=root, left=left, steps=steps, restored=restored)


# ---------------------------------------------------------------------------- other jobs


def elsewhere(this: Rank) -> None:
    """One rank is given another directory."""
    root = this.root if this.rank != 1 else this.root + "-of-another-machine"
    this.tell(event="opened", **attempt(lambda: this.manager(root)))
    with this.manager() as manager:  # the next one, given the right directory
        save(manager, 1, items_of(1, this.rank))


def unmounted(this: Rank) -> None:
    """One rank's directory is replaced by another while the job runs."""
    os.makedirs(this.root, exist_ok=True)
    link = f"{this.root}-as-seen-by-{this.rank}"
    os.symlink(this.root, link)
    with this.manager(link) as manager:
        save(manager, 0, items_of(0, this.rank))
        if this.rank == 1:
            os.unlink(link)
            os.mkdir(link)
        this.tell(event="saved", **attempt(lambda: save(manager, 1, items_of(1, this.rank))))
        if this.rank == 1:
            assert os.listdir(link) == [], "wrote into a directory that no other rank sees"
            os.rmdir(link)
            os.symlink(this.root, link)
        save(manager, 2, items_of(2, this.rank))
        assert manager.all_steps() == [0, 2]


def disagree(this: Rank) -> None:
    """Ranks that make different calls get an error, and can continue."""
    with this.manager(timeout_seconds=PATIENCE_SECONDS) as manager:
        save(manager, 0, items_of(0, this.rank))
        step = 2 if this.rank == 1 else 1
        this.tell(event="steps", **attempt(lambda: save(manager, step, items_of(3, this.rank))))
        items = items_of(3, this.rank) | ({"more": {"x": 1}} if this.rank == 1 else {})
        this.tell(event="items", **attempt(lambda: save(manager, 3, items)))
        call: Callable[[], object] = lambda: save(manager, 4, items_of(4, this.rank))  # noqa: E731
        if this.rank == 1:
            call = manager.restore
        this.tell(event="calls", **attempt(call))
        wanted = 0 if this.rank == 1 else 5
        this.tell(event="restores", **attempt(lambda: manager.restore(wanted)))
        save(manager, 6, items_of(6, this.rank))
        assert manager.all_steps() == [0, 6]


def background(this: Rank) -> None:
    """A failure of one rank's commit is reported once on every rank, by its next call."""
    for number, policy in enumerate([None, [fc.policies.When(lambda step: True)]]):
        root = f"{this.root}/{number}"
        storage = Trap(root, "writing", this.rank == 0, _fail)
        with this.manager(root, storage=storage, save_policy=policy) as manager:
            save(manager, 0, items_of(0, this.rank))
            storage.is_armed = this.rank == 1
            assert manager.save(1, items_of(1, this.rank))
            if this.rank == 2:
                time.sleep(0.5)  # the others learn of it at once
            first = attempt(lambda: manager.save(2, items_of(2, this.rank)))
            again = attempt(lambda: save(manager, 3, items_of(3, this.rank)))
            this.tell(event="failed", first=first, again=again, steps=manager.all_steps())


def _fail(path: str) -> None:
    raise errors.StorageError(f"injected at {path}", errno=errno.EACCES, path=path)


def unsaveable(this: Rank) -> None:
    """Staging fails on one rank: the others, which have started already, get the error."""
    from functional_ckpt.saving import stage as stager

    original = stager.Stager.stage

    def stage(*arguments: Any) -> Any:
        raise MemoryError("injected")

    with this.manager(timeout_seconds=PATIENCE_SECONDS) as manager:
        if this.rank == this.request["victim"]:
            stager.Stager.stage = stage
        found = attempt(lambda: save(manager, 0, items_of(0, this.rank)))
        stager.Stager.stage = original
        this.tell(event="saved", **found)
        save(manager, 1, items_of(1, this.rank))
        assert manager.all_steps() == [1]


def restore_fails(this: Rank) -> None:
    """One rank cannot restore: all raise."""
    with this.manager(timeout_seconds=PATIENCE_SECONDS) as manager:
        save(manager, 0, items_of(0, this.rank))
        for event, victim in (("mismatch", 1), ("mismatch", 0), ("mismatch", 2)):
            target: Any = {"own": {"rank": 0, "step": 0}}
            if this.rank == victim:
                target["own"]["surplus"] = torch.zeros(3)
            found = attempt(lambda: manager.restore(0, target))  # noqa: B023
            this.tell(event=event, victim=victim, **found)

        def refuse(state: dict[str, Any]) -> None:
            raise ValueError("injected")

        for victim in (1, 0):
            state = State()
            if this.rank == victim:
                state.load_state_dict = refuse  # type: ignore[method-assign]
            found = attempt(lambda: manager.restore(0, {"state": state}))  # noqa: B023
            this.tell(event="lift", victim=victim, **found)
        manager.restore(0, {"state": State()})
    for victim, damage in ((1, "data"), (0, "data"), (1, "record"), (1, "absent")):
        # Copies that are no longer alike, on machines that each have their own.
        copy = f"{this.root}-copy-{victim}-{damage}-{this.rank}"
        import shutil

        shutil.copytree(this.root, copy)
        if this.rank == victim:
            _damage(Path(copy, "0"), damage)
        with this.manager(copy, read_only=True, timeout_seconds=PATIENCE_SECONDS) as manager:
            found = attempt(lambda: manager.restore(0, {"state": State()}))
            this.tell(event=damage, victim=victim, **found)
            found = attempt(lambda: manager.restore(0, {"own": None}))
            assert (found["error"] is None) == (damage == "data"), found


def _damage(step: Path, what: str) -> None:
    if what == "absent":
        step.rename(step.with_name("1000"))
    elif what == "record":
        (step / "_FUNCTIONAL_CKPT").write_text("{")
    else:
        file = max((step / "state").glob("*.safetensors"), key=lambda path: path.stat().st_size)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


def preempted(this: Rank) -> None:
    """SIGTERM on one rank: all save the same step, know it, and wait no longer than they should."""
    policies = [fc.policies.every(this.request["interval"]), fc.policies.Preemption()]
    manager = this.manager(save_policy=policies, timeout_seconds=600.0)
    step = -1
    while step < 100_000:
        step += 1
        if this.request["calls"] == "save-all" or step % 10 == 0:
            manager.save(step, items_of(step, this.rank))
        if step == 3:
            this.tell(event="running")
        if manager.reached_preemption(step):
            if this.request["calls"] != "save-all":
                manager.save(step, items_of(step, this.rank), force=True)
            break
        time.sleep(0.01)
    manager.wait_until_finished()
    this.tell(event="stopped", step=step, latest=manager.latest_step())
    # Now one of them dies: the others must not wait ten minutes for it.
    if this.rank == 1:
        manager._closed = True
        os.kill(os.getpid(), signal.SIGKILL)
    found = attempt(lambda: manager.save(step + 1, items_of(step, this.rank), force=True))
    this.tell(event="bounded", **found)
    manager.close()


def many_managers(this: Rank) -> None:
    """Managers beside and after each other, on groups of any kind; the store does not fill up."""
    assert this.num_ranks == 3
    if this.request["connection"] == "shared":  # as with stores that cannot be cloned
        torch_store._clone = lambda store: store
    # Not all ranks have been in the same groups before.
    pair = dist.new_group([2, 0], backend="gloo")
    if this.rank != 1:
        assert isinstance(pair, dist.ProcessGroup)
        coordinator = StoreCoordinator(pair, timeout_seconds=TIMEOUT_SECONDS)
        told = coordinator.gather_broadcast("who is who", b"%d" % this.rank, b",".join)
        assert told == ",".join(map(str, coordinator.global_ranks)).encode(), told
        with this.manager(f"{this.root}/pair", group=pair) as manager:
            save(manager, 0, items_of(0, this.rank))
            state = State()
            manager.restore(0, {"state": state})
            assert state.version == 0
    with this.manager(f"{this.root}/a") as a, this.manager(f"{this.root}/b") as b:
        for step in range(3):
            # Rounds of both, in both threads of each, all at once.
            commits = [a.save(step, items_of(step, this.rank)), b.save(step, items_of(step, 0))]
            if step:
                a.restore(step - 1, {"state": State()})
            for commit in commits:
                assert commit is not None
                commit.result(PATIENCE_SECONDS)
    store = dist.group.WORLD.get_group_store()  # type: ignore[union-attr]
    policy = fc.policies.LatestN(2)
    with this.manager(f"{this.root}/a", keep_policy=policy) as manager:
        assert manager.all_steps() == [0, 1, 2]
        for step in range(3):  # each restore above has started a new line
            if manager.metadata(step).is_abandoned:
                manager.delete(step)
        counts: list[int] = []
        for step in range(3, 23):
            save(manager, step, {"own": {"rank": this.rank}})
            dist.barrier()  # every rank knows that the step is saved
            counts.append(store.num_keys())
            dist.barrier()  # and none continues before all have counted
            assert manager.all_steps()[-2:] == [step - 1, step]
            assert len(manager.all_steps()) == 2
    this.tell(event="keys", counts=counts)


def last_words(this: Rank) -> None:
    """The first rank hosts the store and leaves as soon as it may: the others miss nothing."""
    manager = this.manager()
    save(manager, 0, items_of(0, this.rank))
    commit = manager.save(1, items_of(1, this.rank))
    assert commit is not None
    if this.rank:
        time.sleep(0.05)
    manager.close()
    assert commit.result(0) == 1
    this.tell(event="closed")


def host(this: Rank) -> None:
    """No rank: hosts the store of other jobs, as a launcher does, until it is killed."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    put(this.folder / "port", str(store.port))
    faulthandler.cancel_dump_traceback_later()
    signal.pause()


JOBS: dict[str, Callable[[Rank], None]] = {
    job.__name__: job
    for job in (
        *(matrix, aftermath, elsewhere, unmounted, disagree, background, unsaveable),
        *(restore_fails, preempted, many_managers, last_words, host),
    )
}


# ---------------------------------------------------------------------------- processes


def put(path: Path, text: str) -> None:
    """Makes a file at once, with all of its text."""
    hidden = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    hidden.write_text(text)
    hidden.rename(path)


def wait_for(path: Path, seconds: float = PATIENCE_SECONDS) -> str:
    """Waits for a file that `put` makes."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} has not appeared")
        time.sleep(0.01)
    return path.read_text()


def run_rank(request: Mapping[str, Any]) -> None:
    """The life of a forked process."""
    faulthandler.dump_traceback_later(PATIENCE_SECONDS + 20, exit=True)
    this = Rank(request)
    decide._PREEMPTED_TIMEOUT_SECONDS = request.get("preempted_seconds", 20.0)
    try:
        this.join()
        JOBS[request["job"]](this)
        this.tell(event="done")
    except BaseException as error:
        this.tell(event="broken", text="".join(traceback.format_exception(error)))


def main() -> None:
    torch.set_num_threads(1)
    import functional_ckpt.handlers.rng
    import functional_ckpt.manager  # noqa: F401 - the template pays for every import

    children: dict[int, Path] = {}

    def bury(*_: object) -> None:
        with contextlib.suppress(ChildProcessError):
            while found := os.waitpid(-1, os.WNOHANG):
                pid, status = found
                if pid == 0 or pid not in children:
                    return
                put(children[pid], str(os.waitstatus_to_exitcode(status)))

    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        pid = os.fork()
        if pid == 0:
            run_rank(request)
            return  # and leaves the interpreter as every program does
        children[pid] = Path(request["folder"], f"exit-{request['rank']}")
        signal.signal(signal.SIGCHLD, bury)
        bury()
        print(pid, flush=True)


if __name__ == "__main__":
    main()
