"""How a written step is committed where each node has a directory of its own: in two phases.

    1. every rank has written; the reports of all ranks go to the primary
    2. the primary writes indexes and records; every head receives them, with the part record
    3. every head makes its part durable, the part record last: its vote
    4. the primary sets the decision on the ranks' board, unless a rank that gave up has aborted
    5. every head renames its part and acknowledges that; then the step is reported

A head that has voted removes its part only if the board says `abort`. If the board cannot be
reached, the part stays, and the next start decides.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
import uuid
from collections.abc import Sequence
from typing import Any

from functional_ckpt import errors
from functional_ckpt.core.nodes import part as part_lib
from functional_ckpt.core.nodes.part import PART_FILE, NodeFiles, PartRecord
from functional_ckpt.distributed import large
from functional_ckpt.distributed.collective import collective
from functional_ckpt.distributed.coordinator import Board, Coordinator
from functional_ckpt.saving import finalize, write
from functional_ckpt.saving.publishing import Attempt, Leftovers, Save, outcome_of
from functional_ckpt.saving.retention import noting
from functional_ckpt.steps import node_inventory, node_moves
from functional_ckpt.steps.node_tier import NodeTier
from functional_ckpt.steps.run_steps import Steps
from functional_ckpt.storage import commit, tmp_paths

_COMMIT, _ABORT = b"commit", b"abort"
_NUM_DECISIONS = 2
"""How many decisions the ranks' board keeps."""
_log = logging.getLogger("functional_ckpt")


@dataclasses.dataclass(frozen=True, slots=True)
class _Message:
    """The primary's message to every head before the vote.

    Attributes:
        outcome: The outcome of the commit, if it succeeds.
        part: The part record; None if the step is already there, unchanged.
        files: The records and indexes, relative to the step's directory.
    """

    outcome: dict[str, Any]
    part: PartRecord | None = None
    files: dict[str, bytes] = dataclasses.field(default_factory=dict[str, bytes])

    def to_bytes(self) -> bytes:
        """Returns the message."""
        part = b"" if self.part is None else self.part.to_json()
        header = {
            "outcome": self.outcome,
            "part_bytes": len(part),
            "files": {name: len(data) for name, data in self.files.items()},
        }
        return b"".join([json.dumps(header).encode(), b"\n", part, *self.files.values()])

    @classmethod
    def parse(cls, data: bytes) -> _Message:
        """Returns the message of `to_bytes`."""
        line, _, data = data.partition(b"\n")
        header = json.loads(line)
        start = header["part_bytes"]
        part = part_lib.parse(data[:start], "<the part record>") if start else None
        files: dict[str, bytes] = {}
        for name, size in header["files"].items():
            files[name] = data[start : start + size]
            start += size
        return cls(header["outcome"], part, files)


class NodePublishing:
    """Each node's directory: its head creates, syncs and renames. See `Publishing`.

    Args:
        tier: The nodes.
        steps: The steps.
        group: The ranks.
        overwrite: Whether a step may replace another one.
        has_pruning: Whether steps are pruned after a commit.
    """

    def __init__(
        self,
        tier: NodeTier,
        steps: Steps,
        group: Coordinator,
        *,
        overwrite: bool,
        has_pruning: bool,
    ) -> None:
        self._tier = tier
        self._steps = steps
        self._storage = steps.storage
        self._group = group
        self._overwrite = overwrite
        self._has_pruning = has_pruning
        self._leftovers = Leftovers(steps)
        self._board: Board | None = None
        self._decided: list[str] = []  # on the primary: the last commits whose decision is kept
        self._replaced: str | None = None
        # Step, commit id and path of each commit that another one has replaced.
        self._superseded: list[tuple[int, str, str]] = []

    # ------------------------------------------------------------------------------ writing

    def begin(self, save: Save, what: str) -> write.Begun:
        """See `Publishing.begin`."""
        steps = self._steps

        def name() -> str:
            return tmp_paths.unique_tmp_path(steps.new_path(save.step, save.info.progress))

        if self._board is None:
            self._board = self._group.board("commits")  # now: later the store may not answer
        has_token = steps.has_stores
        begun = write.begin(self._group, what, save.lowered, steps.root, name, has_token=has_token)
        with collective(self._group, f"creating the directories of step {save.step}"):
            if self._tier.is_head:
                self._leftovers.prepare()
                self._drop_superseded()
                may_exist = self._overwrite or save.is_repeat
                steps.check_path_free(save.step, save.info.progress, overwrite=may_exist)
                self._storage.make_directory(begun.tmp, parents=False)
        return begun

    def deliver(self, begun: write.Begun, report: write.RankReport) -> None:
        """Does nothing: reports are gathered once all ranks have written."""

    def publish(self, save: Save, attempt: Attempt) -> dict[str, Any]:
        """Has all ranks continue: `complete` publishes."""
        del save, attempt
        return {}

    # ------------------------------------------------------------------------------ two phases

    def complete(self, save: Save, attempt: Attempt, outcome: dict[str, Any]) -> dict[str, Any]:
        """See `Publishing.complete`; the step is committed when this returns."""
        del outcome
        tmp = attempt.begun.tmp
        try:
            message = self._finalize(save, attempt)
        except BaseException:
            self.abandon(tmp)
            raise
        verdict = message.outcome
        if message.part is not None:
            verdict = self._vote(save, attempt, message, message.part)
        if message.part is None or "retries" in verdict:
            self.abandon(tmp)
            return verdict
        replaced = self._rename(message.part, tmp)
        self._tier.committed(message.part, os.path.basename(commit.final_path(tmp)))
        self._drop_superseded()
        return message.outcome | {"replaced": replaced}

    def _finalize(self, save: Save, attempt: Attempt) -> _Message:
        """Returns the primary's message to the heads."""
        what = f"gathering the reports of step {save.step}"
        own = write.encode_report(attempt.report) if self._group.rank else b""
        reports = large.gather(self._group, what, own)
        value: bytes | BaseException = b""
        if self._group.rank == 0:
            try:
                value = self._records(save, attempt, reports).to_bytes()
            except BaseException as error:  # noqa: BLE001 - raised on every rank
                state = attempt.state_after(error, save)
                value = _Message(attempt.verdict_of({state})).to_bytes() if state else error
        what = f"sending the records of step {save.step}"
        return _Message.parse(large.broadcast(self._group, what, value))

    def _records(self, save: Save, attempt: Attempt, encoded: Sequence[bytes]) -> _Message:
        """On the primary: writes indexes and records into its own part; returns them."""
        commit_time_ns, info, begun = time.time_ns(), save.info, attempt.begun
        tmp, final = begun.tmp, commit.final_path(begun.tmp)
        reports = [attempt.report, *map(write.decode_report, encoded[1:])]
        written = finalize.write_records(
            self._storage, tmp, save.lowered, reports, info, commit_time_ns, begun.token
        )
        if save.is_repeat and finalize.is_same(self._storage, tmp, final):
            return _Message({"is_unchanged": True})
        if save.is_repeat:
            self._steps.check_free(save.step, info.progress, overwrite=self._overwrite)
        part = PartRecord(
            commit_id=uuid.uuid4().hex,
            step=save.step,
            generation=info.line.generation,
            serial=self._tier.next_serial(),
            nodes=tuple(self._files_of(name, reports) for name in self._tier.nodes.order),
        )
        names = [name for name in written.files if name not in part.files]
        has_pruning = self._has_pruning or self._steps.info(save.step) is not None
        outcome = outcome_of(
            self._steps, save, commit_time_ns, written.size_bytes, has_pruning=has_pruning
        )
        files = {name: self._storage.read(os.path.join(tmp, name)) for name in names}
        return _Message(outcome, part, files)

    def _files_of(self, node: str, reports: Sequence[write.RankReport]) -> NodeFiles:
        ranks = self._tier.nodes.ranks_of(node)
        files = {
            f"{item}/{name}": file
            for rank in ranks
            for item, report in reports[rank].items()
            for name, file in report.files.items()
        }
        directory = self._tier.directories[node]
        return NodeFiles(name=node, directory=directory, ranks=ranks, files=files)

    def _vote(
        self, save: Save, attempt: Attempt, message: _Message, part: PartRecord
    ) -> dict[str, Any]:
        """Returns the outcome once the commit is decided; raises if it was aborted.

        An abort removes this node's part. Where the decision is unknown it stays.
        """
        tmp = attempt.begun.tmp

        def decide(states: Sequence[bytes]) -> bytes:
            if found := {*states} - {b""}:
                self._decide(part.commit_id, _ABORT)
                return json.dumps(attempt.verdict_of(found)).encode()
            self._steps.check_lock()
            return self._decide(part.commit_id, _COMMIT)

        failure: BaseException | None = None
        try:
            with collective(self._group, f"voting on step {part.step}", decide) as turn:
                try:
                    if self._tier.is_head:
                        self._make_durable(message, part, tmp)
                except Exception as error:
                    turn.value = attempt.state_after(error, save)
                    if not turn.value:
                        raise
            decision = turn.outcome
            self._drop_decisions(part.commit_id)
        except BaseException as error:  # noqa: BLE001 - raised unless the others have committed
            failure = error
            try:
                decision = self._decide(part.commit_id, _ABORT)
            except errors.CoordinationError:
                error.add_note(
                    f"Whether step {part.step} was committed is not known here: {tmp} stays until "
                    "the next start."
                )
                raise error from None
        if decision == _COMMIT:
            if failure is not None and not isinstance(failure, Exception):
                raise failure  # an interruption; the next start renames this part
            return message.outcome
        if decision != _ABORT:
            return json.loads(decision)
        self.abandon(tmp)
        raise failure or errors.CoordinationError(
            f"The commit of step {part.step} was aborted by a rank that gave up waiting."
        )

    def _make_durable(self, message: _Message, part: PartRecord, tmp: str) -> None:
        """On a head: writes the records, syncs the part, and writes the part record: its vote."""
        self._steps.check_lock()
        storage = self._storage
        if self._group.rank:
            for name, data in message.files.items():
                path = os.path.join(tmp, name)
                storage.make_directory(os.path.dirname(path), parents=False)
                storage.write(path, data)
        own = part.node_of(self._group.rank).files
        commit.sync_tree(storage, tmp, [*message.files, *own])
        storage.sync(self._steps.root)  # the name of the vote must survive a power cut, too
        self._steps.commits.replace(os.path.join(tmp, PART_FILE), part.to_json())

    def _drop_decisions(self, commit_id: str) -> None:
        """Removes the decisions that no rank can ask for: all have voted on this later commit."""
        if self._group.rank == 0 and self._board is not None:
            self._decided.append(commit_id)
            while len(self._decided) > _NUM_DECISIONS:
                self._board.drop(self._decided.pop(0))

    def _decide(self, commit_id: str, value: bytes) -> bytes:
        """Sets the decision, unless there is one; returns the one that holds for all ranks."""
        if self._board is None:
            raise errors.UsageError("No save was started.")
        return self._board.put_if_absent(commit_id, value)

    def _rename(self, part: PartRecord, tmp: str) -> str | None:
        """Renames this node's part, once the commit is decided.

        Returns:
            Where a replaced commit may still be, which the clean-up removes; None without one.
        """
        final = commit.final_path(tmp)
        steps, self._replaced, old = self._steps, None, None
        with collective(self._group, f"renaming step {part.step}"):
            if self._tier.is_head:
                steps.check_lock()
                with self._tier.renaming:
                    old = self._make_way(part.step, os.path.basename(final))
                    # From here on only a step without a part record can be in the way.
                    self._replaced = steps.commits.publish(tmp, final, overwrite=True)
        if old is not None:
            self._superseded.append(old)
            self._replaced = tmp  # nothing is there; the old late metrics go
        return self._replaced

    def _make_way(self, step: int, name: str) -> tuple[int, str, str] | None:
        """Moves another commit of the step aside: the only one that may survive a lost node.

        Returns:
            The step, the id and the new path of a commit to remove once the new one is replicated.
        """
        try:
            record = node_inventory.read_part(self._storage, os.path.join(self._steps.root, name))
        except errors.CorruptCheckpointError:  # of which commit it is, cannot be known: it stays
            node_moves.move_aside(self._steps, name)
            return None
        if record is None:
            return None
        is_used = not self._steps.index.is_unused(name)
        aside = node_moves.move_aside(self._steps, name)
        return (step, record.commit_id, aside) if is_used else None

    # ------------------------------------------------------------------------------ afterwards

    def _drop_superseded(self) -> None:
        """Removes the commits that were replaced by one that is replicated by now."""
        for each in tuple(self._superseded):
            step, commit_id, path = each
            if self._tier.is_replicated(step):
                self._superseded.remove(each)
                try:
                    node_inventory.retire(self._storage, self._steps.root, [commit_id])
                    self._storage.remove(path)
                except errors.CheckpointError as error:
                    _log.warning("%s: the replaced step %d stays: %s", path, step, error)

    def abandon(self, tmp: str) -> None:
        """See `Publishing.abandon`; never called for a part whose commit may be decided."""
        if self._tier.is_head:
            self._leftovers.abandon(tmp)

    def follow(self, step: int, lists: dict[str, list[int]]) -> list[str]:
        """See `Publishing.follow`; other heads remove the steps that the primary has removed."""
        failures: list[str] = []
        with noting(failures):
            if self._replaced is not None:
                self._steps.forget_late_metrics(step)
                self._storage.remove(self._replaced)
        with noting(failures):
            self._tier.remove_all_but(self._steps, lists[""])
        self._steps.follow(lists)
        if self._tier.is_head:
            with noting(failures):
                self._steps.update_latest_link()
        return failures
