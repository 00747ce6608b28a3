"""Uploads of one step by several nodes: the primary deals out the files, and checks the result.

The first rank of each node uploads the node's share (`upload_helper`). The ranks share a board:

    <tier>/beat            changes while the primary uploads, and holds the tier's lock
    <tier>/task/<rank>     the share of a rank, or that there is none
    <tier>/state/<rank>    its progress, which changes while the rank is alive

The primary takes a rank that is silent for dead, and uploads the rest of its share, or deals it out
to the nodes that hold a copy where each has files of its own (`NodeLocal`). A rank that was
only suspended, and one whose primary is silent, send nothing more. A request that is under way then
does no harm: the content of a file is the same, whichever node sends it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any

from functional_ckpt import errors
from functional_ckpt.core.files.dealing import deal_to_holders
from functional_ckpt.core.records.records import FileRecord
from functional_ckpt.distributed.coordinator import Board

BEAT_SECONDS = 1.0
SILENT_SECONDS = 10.0
NUM_FILES = 4
"""How many files a node uploads at the same time."""
_LOOK_SECONDS = 0.1
_MIN_BYTES = 2**20
_log = logging.getLogger("functional_ckpt")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """The files of one upload that one node sends.

    Attributes:
        number: The ordinal number of the upload.
        source: The name of the step's directory in the first tier, whose path may differ between
            nodes.
        target: The name of the directory in the tier to which the files are copied.
        files: The files, relative to both; none if the upload has ended.
        is_last: Whether there are no more uploads.
    """

    number: int
    source: str = ""
    target: str = ""
    files: Mapping[str, FileRecord] = dataclasses.field(default_factory=dict[str, FileRecord])
    is_last: bool = False

    def to_bytes(self) -> bytes:
        """Returns it as JSON."""
        return json.dumps(dataclasses.asdict(self)).encode()

    @classmethod
    def parse(cls, data: bytes) -> Share:
        """Returns the share of `to_bytes`."""
        record: dict[str, Any] = json.loads(data)
        files = {name: FileRecord(**file) for name, file in record.pop("files").items()}
        return cls(files=files, **record)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """The progress of a node's share.

    Attributes:
        number: The ordinal number of the upload.
        sent_bytes: The size of the files that were sent.
        is_over: Whether it sends nothing more.
        error: Why files of the share are missing; empty if they are not.
    """

    number: int
    sent_bytes: int = 0
    is_over: bool = False
    error: str = ""

    def to_bytes(self, beat: int) -> bytes:
        """Returns it as JSON, with a number that makes it another text than before."""
        return json.dumps({**dataclasses.asdict(self), "beat": beat}).encode()

    @classmethod
    def parse(cls, data: bytes) -> State:
        """Returns the state of `to_bytes`."""
        record: dict[str, Any] = json.loads(data)
        del record["beat"]
        return cls(**record)


def beat_key(tier: int) -> str:
    """Returns the key that changes while the primary uploads to a tier."""
    return f"{tier}/beat"


def task_key(tier: int, rank: int) -> str:
    """Returns the key of a rank's share."""
    return f"{tier}/task/{rank}"


def state_key(tier: int, rank: int) -> str:
    """Returns the key of a rank's progress."""
    return f"{tier}/state/{rank}"


class Shares:
    """The primary's side: deals out the uploads to one tier. Used by the thread that uploads.

    Args:
        board: The board of the ranks.
        tier: The ordinal number of the tier.
        ranks: The first rank of each other node.
        check: Raises if the lock of the tier was lost.
        held: See `FirstTier.ranks_with`.
    """

    def __init__(
        self,
        board: Board,
        tier: int,
        ranks: Sequence[int],
        check: Callable[[], None],
        held: Callable[[int], Mapping[str, Sequence[int]] | None],
    ) -> None:
        self._board = board
        self._tier = tier
        self._check = check
        self._held = held
        self._ranks = tuple(ranks)
        self._number = 0
        self._num_beats = 0
        self._dealt: dict[int, Share] = {}
        self._silent: dict[int, bytes | None] = {}

    def is_apart(self, step: int) -> bool:
        """Returns whether each node has files of its own, and no node need have all of a step."""
        return self._held(step) is not None

    def senders(self, step: int, files: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Returns the ranks that can send each file of a step.

        Where each node has files of its own, its indexes and records are sent by the primary.
        """
        held = self._held(step)
        if held is None:
            return dict.fromkeys(files, (0, *self._ranks))
        return {name: tuple(held.get(name, (0,))) for name in files}

    @contextlib.contextmanager
    def dealt(
        self,
        source: str,
        target: str,
        files: Mapping[str, FileRecord],
        senders: Mapping[str, Sequence[int]],
    ) -> Generator[Mapping[int, Sequence[str]]]:
        """Deals out files; yields the share of each rank. That of rank 0 is the primary's own.

        A file that only silent ranks can send is in no share.

        Args:
            source: The step's directory in the first tier.
            target: The directory to which the files are copied.
            files: The files, relative to both.
            senders: The ranks that can send each file.
        """
        try:
            dealt = self._deal(os.path.basename(source), os.path.basename(target), files, senders)
            with self.beating() if self._dealt else contextlib.nullcontext():
                yield dealt
        finally:
            for rank in self._dealt:
                self._give(rank, Share(number=self._number))
            self._dealt = {}

    def wait(self, on_sent: Callable[[int], None]) -> list[str]:
        """Returns once no other node sends files of the upload.

        Args:
            on_sent: Called with numbers of bytes that other nodes have sent.

        Returns:
            The errors of other nodes, which may succeed if they try again.
        """
        failures: list[str] = []
        sent = dict.fromkeys(self._dealt, 0)
        seen: dict[int, tuple[bytes | None, float]] = {}
        while sent:
            for rank in list(sent):
                data = self._get(state_key(self._tier, rank))
                last, since = seen.setdefault(rank, (data, time.monotonic()))
                if data != last:
                    seen[rank] = (data, time.monotonic())
                elif time.monotonic() - since >= SILENT_SECONDS:
                    self._silent[rank] = data
                    del sent[rank]
                    _log.warning("rank %d does not answer: another node uploads its files", rank)
                state = None if data is None else State.parse(data)
                if rank not in sent or state is None or state.number != self._number:
                    continue
                on_sent(state.sent_bytes - sent[rank])
                sent[rank] = state.sent_bytes
                if state.is_over:
                    del sent[rank]
                    if state.error:
                        failures.append(f"rank {rank}: {state.error}")
                        _log.warning(
                            "rank %d failed, another node uploads its files: %s", rank, state.error
                        )
            if sent:
                time.sleep(_LOOK_SECONDS)
        return failures

    @contextlib.contextmanager
    def beating(self) -> Generator[None]:
        """Shows the other nodes that the primary is alive, and holds the lock of the tier."""
        stop = threading.Event()
        self._beat()
        threading.Thread(target=self._beat_until, args=(stop,), daemon=True).start()
        try:
            yield
        finally:
            stop.set()

    def close(self) -> None:
        """Ends the threads of the other nodes."""
        for rank in self._ranks:
            self._give(rank, Share(number=self._number, is_last=True))

    def _deal(
        self,
        source: str,
        target: str,
        files: Mapping[str, FileRecord],
        senders: Mapping[str, Sequence[int]],
    ) -> dict[int, list[str]]:
        """Gives the other nodes their shares; returns the share of each rank."""
        sizes = {name: file.size_bytes for name, file in files.items()}
        silent = {rank for rank in self._ranks if self._is_silent(rank)}
        chosen = {name: [r for r in senders[name] if r not in silent] for name in files}
        if sum(sizes.values()) < _MIN_BYTES:
            chosen = {name: [0] if 0 in ranks else ranks for name, ranks in chosen.items()}
        shares = deal_to_holders(sizes, chosen)
        if not shares.keys() - {0}:
            return shares
        self._number += 1
        self._beat()
        for rank in [rank for rank in shares if rank]:
            share = Share(
                number=self._number,
                source=source,
                target=target,
                files={name: files[name] for name in shares[rank]},
            )
            if self._give(rank, share):
                self._dealt[rank] = share
            else:
                names = shares.pop(rank)
                shares.setdefault(0, []).extend(name for name in names if 0 in senders[name])
        return shares

    def _is_silent(self, rank: int) -> bool:
        """Returns whether a rank that was silent still is."""
        if rank in self._silent and self._get(state_key(self._tier, rank)) != self._silent[rank]:
            del self._silent[rank]
        return rank in self._silent

    def _beat_until(self, stop: threading.Event) -> None:
        with contextlib.suppress(errors.CheckpointError):  # then the other nodes stop
            while not stop.wait(BEAT_SECONDS):
                self._check()
                self._beat()

    def _beat(self) -> None:
        self._num_beats += 1
        self._put(beat_key(self._tier), b"%d" % self._num_beats)

    def _give(self, rank: int, share: Share) -> bool:
        return self._put(task_key(self._tier, rank), share.to_bytes())

    def _put(self, key: str, value: bytes) -> bool:
        """Writes a value; returns whether the board could be reached."""
        try:
            self._board.put(key, value)
        except errors.CoordinationError as error:
            _log.warning("The primary uploads alone: %s", error)
            return False
        return True

    def _get(self, key: str) -> bytes | None:
        try:
            return self._board.get(key)
        except errors.CoordinationError:
            return None
