"""Reading a step whose files are on nodes: a rank that can reads a chunk, and others get parts.

The ranks exchange their wants and the files of their nodes; every rank computes the same plan
(`core/arrays/node_plan`). A copy that cannot be read is replaced by the next holder's, then by that
of the next tier: the ranks exchange its name, and plan again.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np

from functional_ckpt import errors
from functional_ckpt.core.arrays.node_plan import (
    Chunk,
    Copy,
    NodeChunk,
    NodePlan,
    Part,
    plan_node_reads,
)
from functional_ckpt.core.arrays.spec import Array, numpy_dtype
from functional_ckpt.distributed.collective import collective
from functional_ckpt.distributed.coordinator import Bytes
from functional_ckpt.format.checkpoint_dir import OpenCheckpoint, OpenItem
from functional_ckpt.format.read_plan import Destination, ReadRequest
from functional_ckpt.restoring.node_copies import Amounts, Copies, NodeSources
from functional_ckpt.restoring.node_trade import trade
from functional_ckpt.restoring.node_wants import Exchanged, Want, exchange
from functional_ckpt.runtime import threads

ROUND_BYTES = 16 * 2**20
"""Bytes of a round that a rank reads for others, and that it gets, on few ranks. Two rounds are in
memory: one is read while the other is sent. In `python -m benchmarks.nodes_recovery`, on two cores,
a GiB took 1.14 to 1.16 times as long as the bytes alone with 8 MiB, 1.16 to 1.19 times with 16 MiB
and 1.19 to 1.21 times with 32 MiB."""
_ROUND_BYTES_A_RANK = 256 * 2**10
_LARGEST_ROUND_BYTES = 256 * 2**20
"""Of many ranks each round costs more time in their store, so its size grows with their number."""


def read_from_nodes(
    sources: NodeSources,
    checkpoint: OpenCheckpoint,
    items: Sequence[OpenItem],
    requests: Sequence[Sequence[ReadRequest]],
    *,
    verify: Literal["stream", "first", False],
    shown: Callable[[int, int], None] | None = None,
) -> None:
    """Reads the requests of every rank; a collective.

    Args:
        sources: The nodes and the remote tiers.
        checkpoint: The step as this rank's node holds it.
        items: The items that this rank wants something of.
        requests: The requests of each item; those without a grid are left out.
        verify: As of `read.read_all`.
        shown: Called with the bytes that this rank has, and the total.

    Raises:
        CorruptCheckpointError: No source has an intact copy of a chunk.
        CoordinationError: Another rank failed or has exited.
    """
    names = [item.name for item in items]
    with contextlib.ExitStack() as files:
        with collective(sources.coordinator, "opening the step on each node"):
            copies = Copies(checkpoint, sources, verified=verify is not False, files=files)
            for item in items:
                copies.add(item)
            wanted = [
                Want(f"{name}/{request.name}", item, number, request)
                for item, (name, of_item) in enumerate(zip(names, requests, strict=True))
                for number, request in enumerate(of_item)
                if request.grid is not None
            ]
            places = [copies.files_of(name, of) for name, of in zip(names, requests, strict=True)]
        exchanged = exchange(sources, copies, names, wanted, places)
        reading = _Reading(sources, copies, names, wanted, exchanged)
        if verify == "first":
            reading.run(keeps=False)
        reading.run(keeps=True, shown=shown)
    sources.report(reading.amounts)


class _Reading:
    """One restore, of this rank and together with the others."""

    def __init__(
        self,
        sources: NodeSources,
        copies: Copies,
        names: Sequence[str],
        wanted: Sequence[Want],
        exchanged: Exchanged,
    ) -> None:
        self._coordinator = sources.coordinator
        self._sources = sources
        self._copies = copies
        self._names = names
        self._wanted = wanted
        self._exchanged = exchanged
        self._rank = sources.coordinator.rank
        self._damaged: dict[Copy, str] = {}
        self._mutex = threading.Lock()
        self.amounts = Amounts()

    def run(self, *, keeps: bool, shown: Callable[[int, int], None] | None = None) -> None:
        """Reads every part, from the next source after each failure.

        Args:
            keeps: Whether bytes are kept; if not, they are only verified.
            shown: As of `read_from_nodes`.
        """
        done: set[Part] = set()
        is_first = True
        while True:
            plan = plan_node_reads(
                self._exchanged.arrays,
                self._exchanged.wants,
                self._exchanged.holders,
                round_bytes=_round_bytes(self._coordinator.num_ranks),
                done=done,
                damaged=self._damaged,
                shares=self._sources.shares,
            )
            self._raise_lost(plan)
            failed: set[Copy] = set()
            with collective(self._coordinator, "reading from the own node", _merged) as turn:
                own = {part: chunk for part, (chunk, _) in plan.alone.items() if self._is_own(part)}
                failures = self._read_alone(own, keeps=keeps, in_batches=is_first)
                turn.value = _told(
                    {
                        Copy(own[part], self._sources.own_node): text
                        for part, text in failures.items()
                    },
                    list(failures),
                )
            failed |= self._add_failures(turn.outcome)
            # Of a damaged copy, another part may be intact: it has arrived, and must not again.
            unread = _parts(turn.outcome)
            failed |= self._run_rounds(plan.rounds, keeps=keeps)
            for part, (_, num_bytes) in plan.alone.items():
                if part not in unread:
                    done.add(part)
                    self.amounts.own += num_bytes if keeps else 0
            for each in (each for chunks in plan.rounds for each in chunks):
                if each.copy not in failed:
                    self._count(each, done, keeps=keeps)
            if shown is not None:
                total = sum(want.num_bytes for want in self._wanted)
                shown(total, total)
            if not failed:
                return
            is_first = False

    def _is_own(self, part: Part) -> bool:
        return part.rank == self._rank

    def _count(self, each: NodeChunk, done: set[Part], *, keeps: bool) -> None:
        itemsize = self._exchanged.arrays[each.chunk.array].spec.itemsize_bytes
        holders = self._exchanged.holders
        for part in each.parts:
            done.add(Part(part.rank, part.want, each.chunk.at))
            num_bytes = part.box.num_elements * itemsize if keeps else 0
            if each.source >= holders.num_nodes:
                self.amounts.tiers += num_bytes
            elif each.source == holders.node_of[part.rank]:
                self.amounts.own += num_bytes
            else:
                self.amounts.others += num_bytes

    def _raise_lost(self, plan: NodePlan) -> None:
        """Raises if no source has a chunk; on every rank, since all have the same plan."""
        if not plan.lost:
            return
        chunk = plan.lost[0]
        texts = [text for copy, text in self._damaged.items() if copy.chunk == chunk]
        path = self._copies.checkpoint.path
        file = self._exchanged.file_of(chunk)
        why = " ".join(texts) or f"no node has the file {file}."
        raise errors.CorruptCheckpointError(
            f"{path}: {len(plan.lost)} chunks cannot be read from any node or tier, the first of "
            f"array {chunk.array.partition('/')[2]!r}: {why}",
            path=path,
            key_path=chunk.array.partition("/")[2],
        )

    def _add_failures(self, outcome: bytes) -> set[Copy]:
        found = {
            Copy(Chunk(name, tuple(index)), source): text
            for name, index, source, text in json.loads(outcome)[0]
        }
        if self._rank == 0:
            for copy, text in found.items():
                array = copy.chunk.array.partition("/")[2]
                _log.warning("the next copy of array %r is read: %s", array, text)
        self._damaged |= found
        self.amounts.damaged += len(found)
        return set(found)

    # ---------------------------------------------------------------------------- own parts

    def _read_alone(
        self, own: Mapping[Part, Chunk], *, keeps: bool, in_batches: bool
    ) -> dict[Part, str]:
        """Reads parts from the own node; returns those that cannot be read, with the reason."""
        suspects = self._read_batches(own, keeps=keeps) if in_batches else own
        failures: dict[Part, str] = {}
        for part in suspects:
            want = self._wanted[part.want]
            region = want.common(part.at)
            memory = want.memory(part.at) if keeps else None
            request = want.request._replace(
                box=region, destination=None if memory is None else Destination.into(memory)
            )
            try:
                for task in self._copies.own(self._names[want.item]).reader.tasks([request]):
                    task()
            except (errors.CorruptCheckpointError, errors.StorageError) as error:
                failures[part] = error.message
            else:
                if keeps:
                    want.arrive()
        return failures

    def _read_batches(self, own: Mapping[Part, Chunk], *, keeps: bool) -> dict[Part, Chunk]:
        """Reads as many parts at a time as an ordinary restore; returns those that may have failed.

        A batch does not say which of its chunks are damaged: all parts of its requests are read
        again, one by one.
        """
        expected = collections.Counter(part.want for part in own)
        for number, want in enumerate(self._wanted):
            if number in expected:
                want.begin()
        by_item: dict[int, list[Want]] = {}
        for want in self._wanted:
            by_item.setdefault(want.item, []).append(want)
        mine = {(part.want, part.at) for part in own}
        numbers = {id(want): number for number, want in enumerate(self._wanted)}
        tasks: list[Callable[[], None]] = []
        bad: set[int] = set()
        for item, wants in by_item.items():
            requests = [
                want.request._replace(destination=want.counting() if keeps else None)
                for want in wants
            ]
            elsewhere = {
                (place, part.chunk)
                for place, (want, request) in enumerate(zip(wants, requests, strict=True))
                for part in request.parts
                if (numbers[id(want)], part.chunk) not in mine
            }
            of_item = {numbers[id(want)] for want in wants if numbers[id(want)] in expected}
            if not of_item:
                continue
            try:
                found = self._copies.own(self._names[item]).reader.tasks(
                    requests, delivered=elsewhere
                )
            except (errors.CorruptCheckpointError, errors.StorageError):
                bad |= of_item
                continue
            tasks += [functools.partial(self._attempt, task, of_item, bad, keeps) for task in found]
        threads.run_in_threads(tasks)
        if keeps:
            bad = {n for n in expected if self._wanted[n].num_arrived != expected[n]}
            for number in bad:
                self._wanted[number].read_again()
        return {part: chunk for part, chunk in own.items() if part.want in bad}

    def _attempt(
        self, task: Callable[[], None], wants: set[int], bad: set[int], keeps: bool
    ) -> None:
        try:
            task()
        except (errors.CorruptCheckpointError, errors.StorageError):
            if not keeps:  # else the counts say which
                with self._mutex:
                    bad.update(wants)

    # ---------------------------------------------------------------------------- rounds

    def _run_rounds(self, rounds: Sequence[Sequence[NodeChunk]], *, keeps: bool) -> set[Copy]:
        """Reads, sends and receives; returns the copies that could not be read."""
        failed: set[Copy] = set()
        if not rounds:
            return failed
        with contextlib.ExitStack() as open_things:
            sender = threads.BackgroundWriter(1)
            open_things.callback(sender.close)
            link = self._coordinator.link() if keeps else None
            if link is not None:
                open_things.callback(link.close)  # before: a failed transfer is not waited for
            # One is filled while the other is sent. New memory for each round would cost as much as
            # reading into it.
            size_bytes = max(self._read_bytes(chunks) for chunks in rounds) if keeps else 0
            buffers = [np.empty(size_bytes, np.uint8) for _ in rounds[:2]]
            for number, chunks in enumerate(rounds):
                what = f"reads for other nodes, {number + 1} of {len(rounds)}"
                with collective(self._coordinator, what, _merged) as turn:
                    memory, failures = self._read_round(chunks, buffers[number % 2], keeps)
                    turn.value = _told(failures)
                failed |= self._add_failures(turn.outcome)
                good = [each for each in chunks if each.copy not in failed]
                if link is not None:  # waits for the round before, which was sent meanwhile
                    sender.run(
                        functools.partial(
                            trade, link, self._rank, good, memory, self._exchanged, self._wanted
                        )
                    )
                del memory
            sender.wait()
            if link is not None:
                open_things.pop_all()
                sender.close()
                threads.run_apart(link.close)
        return failed

    def _read_bytes(self, chunks: Sequence[NodeChunk]) -> int:
        """Returns the size of the buffer for the chunks of a round that this rank reads."""
        return sum(
            _aligned(self._chunk_bytes(each)) for each in chunks if each.reader == self._rank
        )

    def _chunk_bytes(self, each: NodeChunk) -> int:
        array = self._exchanged.arrays[each.chunk.array]
        return array.grid.box(each.chunk.at).num_elements * array.spec.itemsize_bytes

    def _read_round(
        self, chunks: Sequence[NodeChunk], buffer: Bytes, keeps: bool
    ) -> tuple[dict[int, Array], dict[Copy, str]]:
        """Returns the chunks that this rank read, by `id`, and the copies that it cannot read."""
        start = 0
        memory: dict[int, Array] = {}
        failures: dict[Copy, str] = {}
        tasks: list[Callable[[], None]] = []
        for each in chunks:
            if each.reader != self._rank:
                continue
            array = self._exchanged.arrays[each.chunk.array]
            box = array.grid.box(each.chunk.at)
            if keeps:
                size_bytes = self._chunk_bytes(each)
                flat = buffer[start : start + size_bytes].view(numpy_dtype(array.spec.dtype))
                memory[id(each)] = flat.reshape(box.shape)
                start += _aligned(size_bytes)
            read = functools.partial(self._read_chunk, each, memory.get(id(each)), failures)
            tasks.append(read)
        threads.run_in_threads(tasks)
        return memory, failures

    def _read_chunk(self, each: NodeChunk, memory: Array | None, failures: dict[Copy, str]) -> None:
        try:
            for task in self._copies.chunk_tasks(each.chunk, each.source, memory):
                task()
        except errors.CheckpointError as error:
            if not isinstance(error, _READ_ERRORS):
                raise
            failures[each.copy] = error.message


_log = logging.getLogger("functional_ckpt")
_LINE_BYTES = 64
_READ_ERRORS = (errors.CorruptCheckpointError, errors.StorageError, errors.StepNotFoundError)


def _round_bytes(num_ranks: int) -> int:
    return max(ROUND_BYTES, min(_LARGEST_ROUND_BYTES, num_ranks * _ROUND_BYTES_A_RANK))


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // _LINE_BYTES) * _LINE_BYTES


def _told(failures: Mapping[Copy, str], parts: Sequence[Part] = ()) -> bytes:
    """Returns the copies that this rank cannot read, and the parts of its own that it lacks."""
    if not failures and not parts:
        return b""
    copies = [[*copy.chunk, copy.source, text] for copy, text in failures.items()]
    return json.dumps([copies, parts]).encode()


def _merged(values: Sequence[bytes]) -> bytes:
    told = [json.loads(value) for value in values if value]
    return json.dumps([[each for of in told for each in of[part]] for part in (0, 1)]).encode()


def _parts(outcome: bytes) -> set[Part]:
    return {Part(rank, want, tuple(index)) for rank, want, index in json.loads(outcome)[1]}
