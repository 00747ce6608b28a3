"""Copies of committed steps on other nodes, made in the background by the head of each node.

The heads copy one step at a time, in rounds: they agree on a step that all of them have committed,
exchange its files, and report the files that have arrived. So every head knows the holders of each
file. A head without work exchanges nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence

from functional_ckpt import errors
from functional_ckpt.core.nodes import copies
from functional_ckpt.core.nodes.copies import Copy
from functional_ckpt.core.nodes.rules import UsableCommit
from functional_ckpt.core.records.records import FileRecord
from functional_ckpt.distributed.coordinator import Coordinator, Link
from functional_ckpt.distributed.peer_link import Pace
from functional_ckpt.format.tuning import REFRESH_STEPS, SHARED_FROM_BYTES
from functional_ckpt.steps import node_copy, node_inventory, node_receive
from functional_ckpt.steps.node_copy import CopiedStep, Outcome
from functional_ckpt.steps.node_tier import NodeTier
from functional_ckpt.steps.replication_queue import (
    ReplicationQueue,
    RoundResult,
    choose,
    joined,
    report_of,
)
from functional_ckpt.steps.tier_steps import TierSteps
from functional_ckpt.storage.base import Stat

# How long a head that has its files waits for the others without a sign of it.
_SIGN_SECONDS = 10.0
_FIRST_WAIT_SECONDS, _LAST_WAIT_SECONDS = 1.0, 60.0
_BOARD = "replication"
_NUM_EARLIER = 2
"""In how many earlier steps unchanged files are looked for."""
_log = logging.getLogger("functional_ckpt")


class Replication:
    """Copies steps to other nodes; on the head of each node of a writer.

    Args:
        tier: The nodes, and who holds which file: changed here as copies arrive.
        steps: The directory of this node.
        group: The heads, for the thread of this object.
        owner: The manager: when it is dropped, the thread ends.
        on_replicated: Called with each step that was replicated, in the thread.
    """

    def __init__(
        self,
        tier: NodeTier,
        steps: TierSteps,
        group: Coordinator,
        *,
        owner: object,
        on_replicated: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._on_replicated = on_replicated
        self._tier = tier
        self._steps = steps
        self._order = tier.nodes.order
        self._group = group
        self._pace = Pace(tier.option.max_bytes_per_second)
        self._link: Link | None = None
        self._wait_seconds = _FIRST_WAIT_SECONDS
        self._queue = ReplicationQueue()
        self._thread: threading.Thread | None = None
        self._told: set[str] = set()
        weakref.finalize(owner, self._queue.end, at_once=True).atexit = False

    @property
    def _commits(self) -> dict[int, UsableCommit]:
        return self._tier.commits

    @property
    def _replicas(self) -> int:
        return self._tier.option.replicas

    # ------------------------------------------------------------------------------ the caller's

    def start(self) -> None:
        """Starts the thread; the newest steps that lack copies are copied first."""
        lacking = [
            each
            for each in sorted(self._commits.values(), key=lambda each: each.record.order)
            if not self._tier.survives(each.record.step)
        ]
        kept = {each.record.commit_id for each in lacking}
        node_receive.clear_incoming(self._steps.storage, self._steps.root, kept)
        self._queue.backlog = [each.record.commit_id for each in reversed(lacking)]
        self._note()
        lock = self._steps.lock
        token = None if lock is None else lock.enter()

        def serve(queue: ReplicationQueue, worker: weakref.ref[Replication]) -> None:
            try:
                _serve(queue, worker)
            finally:
                with queue.changed:
                    queue.is_stopped, queue.is_busy = True, False
                    queue.changed.notify_all()
                if lock is not None and token is not None:
                    lock.leave(token)

        args = (self._queue, weakref.ref(self))
        self._thread = threading.Thread(target=serve, args=args, name="replicate", daemon=True)
        self._thread.start()

    def committed(self, step: int) -> None:
        """Copies a step that was committed on all nodes, and is in the commits."""
        record = self._commits[step].record
        with self._queue.changed:
            self._queue.fresh[record.commit_id] = (record.serial, step)
            self._queue.has_failed = False
            self._queue.changed.notify_all()

    def wait(self) -> None:
        """Waits until every step is copied, or an attempt has failed."""
        queue = self._queue
        with queue.changed:
            queue.changed.wait_for(
                lambda: (
                    queue.is_stopped
                    or not (queue.is_busy or (queue.has_work and not queue.has_failed))
                )
            )

    def close(self) -> None:
        """Waits as `wait` does, and ends the thread; the next run copies the missing files."""
        self._queue.end(at_once=False)
        if self._thread is not None:
            self._thread.join()
        self._release()
        self._group.close()

    def stop(self) -> None:
        """Ends the thread after the present attempt."""
        self._queue.end(at_once=True)

    def _release(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close()

    # ------------------------------------------------------------------------------ the thread's

    def work(self) -> float:
        """Copies one step; returns the seconds to wait before the next attempt."""
        started = time.monotonic()
        commit: UsableCommit | None = None
        try:
            commit = self._agree()
            if commit is None:
                return 0.0
            plan = copies.plan(commit.record, commit.holders, self._order, self._replicas)
            result = self._exchange(commit, plan)
        except errors.CheckpointError as error:
            self._release()
            return self._fail(commit, str(error))
        self._settle(commit, plan, result, time.monotonic() - started)
        if result.is_lost:
            self._release()
        if result.failures and not self._tier.survives(commit.record.step):
            return self._fail(commit, "; ".join(result.failures))
        self._queue.has_failed, self._wait_seconds = False, _FIRST_WAIT_SECONDS
        return 0.0

    def _agree(self) -> UsableCommit | None:
        """Returns the step that all heads copy now; None if they have no common one."""
        queue, known = (
            self._queue,
            {each.record.commit_id: each for each in list(self._commits.values())},
        )
        with queue.changed:  # steps that were removed meanwhile are not copied
            queue.fresh = {key: each for key, each in queue.fresh.items() if key in known}
            queue.backlog = [key for key in queue.backlog if key in known]
            own = {
                "fresh": {key: serial for key, (serial, _) in queue.fresh.items()},
                "backlog": queue.backlog,
                "has_link": self._link is not None,
            }
        what, value = "choosing a step to copy", json.dumps(own).encode()
        chosen = json.loads(self._group.gather_broadcast(what, value, choose))
        if not chosen["has_link"]:
            self._release()
            self._link = self._group.link()
        self._take(chosen["commit_id"])
        return known.get(chosen["commit_id"])

    def _take(self, commit_id: str) -> None:
        """Removes a step from the queue; those committed before it wait for an idle time."""
        queue = self._queue
        with queue.changed:
            if not commit_id:  # other heads do not know of these
                queue.backlog = []
            if commit_id in queue.backlog:
                queue.backlog.remove(commit_id)
            if commit_id in queue.fresh:
                serial, number = queue.fresh.pop(commit_id)
                for key, (other, step) in list(queue.fresh.items()):
                    if other < serial:
                        del queue.fresh[key]
                        queue.backlog.append(key)
                        _log.info("step %d is not copied yet: step %d is newer", step, number)

    def _exchange(self, commit: UsableCommit, plan: Sequence[Copy]) -> RoundResult:
        """Sends and receives the files of a step; returns the results of all heads."""
        own, link = self._group.rank, self._link
        copied = self._copied(commit)
        sent: list[Outcome] = []
        received: dict[int, Outcome] = {}
        find = self._finder(commit)

        def send_all() -> None:
            for copy in plan:
                if copy.source == own and link is not None:
                    sent.append(node_copy.send(link, copy.target, copied, self._pace.wait))

        def receive_all() -> None:
            for number, copy in enumerate(plan):
                if copy.target == own and link is not None:
                    received[number] = node_receive.receive(
                        link, copy.source, copied, copy.files, find, self._tier.renaming
                    )

        threads = [
            threading.Thread(target=each, name=f"replicate-{each.__name__}", daemon=True)
            for each in (send_all, receive_all)
        ]
        for each in threads:
            each.start()
        while True:
            deadline = time.monotonic() + _SIGN_SECONDS
            for each in threads:
                each.join(max(0.0, deadline - time.monotonic()))
            is_done = not any(each.is_alive() for each in threads)
            report = report_of(plan, own, sent, received) if is_done else None
            found = self._group.gather_broadcast(
                f"copying step {commit.record.step}", json.dumps(report).encode(), joined
            )
            reports = json.loads(found)
            if None not in reports:
                return RoundResult(self._order, reports)

    def _copied(self, commit: UsableCommit) -> CopiedStep:
        return CopiedStep(
            storage=self._steps.storage,
            root=self._steps.root,
            name=commit.name,
            record=commit.record,
        )

    def _finder(self, commit: UsableCommit) -> node_receive.FindFile:
        """Returns a function that finds files of an unchanged content in earlier steps."""
        storage = self._steps.storage
        table: dict[tuple[int, str], str] = {}
        earlier = sorted(
            (each for each in list(self._commits.values()) if each.name != commit.name),
            key=lambda each: each.record.order,
        )
        own = self._order[self._group.rank]
        for each in earlier[-_NUM_EARLIER:]:
            path = self._copied(each).path
            for name, file in each.record.files.items():
                if file.size_bytes >= SHARED_FROM_BYTES and own in each.holders.get(name, ()):
                    table[file.size_bytes, file.xxh3] = f"{path}/{name}"

        def find(file: FileRecord) -> tuple[str, Stat] | None:
            path = table.get((file.size_bytes, file.xxh3))
            status = None if path is None else storage.stat(path)
            if path is None or status is None or status.size_bytes != file.size_bytes:
                return None
            return None if status.num_links >= REFRESH_STEPS else (path, status)

        return find

    def _settle(
        self, commit: UsableCommit, plan: Sequence[Copy], result: RoundResult, seconds: float
    ) -> None:
        """Notes who holds the step now, the same on all heads."""
        step = commit.record.step
        known = self._commits.get(step)
        if known is None or known.record.commit_id != commit.record.commit_id:
            return  # it was removed or overwritten meanwhile
        holders = copies.held_after(commit.holders, plan, self._order, result.missing)
        nodes = {*commit.nodes, *(self._order[node] for node in result.new_parts)}
        self._commits[step] = dataclasses.replace(
            commit, holders=holders, nodes=tuple(each for each in self._order if each in nodes)
        )
        if not self._tier.survives(step):
            return
        rate = result.num_bytes / 2**20 / max(seconds, 1e-9)
        _log.info("step %d is replicated: %.1f MiB/s", step, rate)
        if self._group.rank == 0:
            self._steps.emit("replicated", step, seconds=seconds, num_bytes=result.num_bytes)
        try:
            # Left by a kill: a node that lacks no file would keep it.
            self._steps.storage.remove(self._copied(commit).incoming)
            self._note()
            self._on_replicated(step)
        except errors.CheckpointError as error:
            _log.warning("%s: after step %d was replicated: %s", self._steps.root, step, error)

    def _note(self) -> None:
        """Notes for `fckpt ls` which steps are replicated; nothing else depends on it."""
        known = [each.record for each in list(self._commits.values())]
        ids = [each.commit_id for each in known if self._tier.survives(each.step)]
        with contextlib.suppress(errors.CheckpointError):
            node_inventory.write_replicated(self._steps.storage, self._steps.root, ids)

    def _fail(self, commit: UsableCommit | None, why: str) -> float:
        """Logs a failed attempt; returns the seconds before the next one."""
        queue = self._queue
        what = "steps" if commit is None else f"step {commit.record.step}"
        with queue.changed:
            if commit is not None and commit.record.commit_id not in queue.backlog:
                queue.backlog.append(commit.record.commit_id)
            queue.has_failed = True
            fate = "" if queue.is_draining else ", trying again"
        if commit is not None or not queue.is_draining:  # else a head has left that lacked a step
            _log.warning("Copying %s to other nodes failed%s: %s", what, fate, why)
        if commit is not None and commit.record.commit_id not in self._told:
            self._told.add(commit.record.commit_id)
            if self._group.rank == 0:
                self._steps.emit("unreplicated", commit.record.step)
        seconds = self._wait_seconds
        self._wait_seconds = min(2 * seconds, _LAST_WAIT_SECONDS)
        return seconds


def _serve(queue: ReplicationQueue, worker: weakref.ref[Replication]) -> None:
    """Runs until the end; holds a reference to the worker during an attempt, not while it waits."""
    while queue.wait_for_work():
        present = worker()
        if present is None:
            return
        seconds = present.work()
        del present
        queue.rest(seconds)


def start_replication(
    tier: NodeTier, steps: TierSteps, coordinator: Coordinator, *, owner: object
) -> tuple[Replication, ...]:
    """Starts to copy steps in the background, on the head of each node of a writer.

    Returns:
        The replications; none on other ranks, or where there is no other node.
    """
    nodes = tier.nodes
    if steps.read_only or len(nodes.order) == 1 or not tier.option.replicas:
        return ()
    board = coordinator.board(_BOARD) if not nodes.is_head or coordinator.rank == 0 else None

    def tell(step: int) -> None:
        if board is not None:
            board.put(tier.commits[step].record.commit_id, b"replicated")
            tier.on_replicated(step)

    def is_told(step: int) -> bool:
        found = tier.commits.get(step)
        if found is None or tier.survives(step) or board is None:
            return found is not None and tier.survives(step)
        return board.get(found.record.commit_id) is not None

    if not nodes.is_head:
        tier.is_replicated = is_told
        return ()
    heads = coordinator.among(nodes.heads, "replication")
    made = Replication(tier, steps, heads, owner=owner, on_replicated=tell)
    tier.on_committed = made.committed
    made.start()
    return (made,)
