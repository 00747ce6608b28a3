"""A first tier of which each node has its own part: how it is opened and changed.

All nodes follow the primary's decisions. Each head changes its own directory, and holds its lock.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set

from functional_ckpt import errors
from functional_ckpt.core.nodes import copies, rules
from functional_ckpt.core.nodes.part import PART_FILE, PartRecord
from functional_ckpt.core.nodes.rules import Decision, UsableCommit
from functional_ckpt.distributed import large, same_options
from functional_ckpt.distributed.collective import collective, run_on_all
from functional_ckpt.distributed.coordinator import Coordinator
from functional_ckpt.distributed.nodes import Nodes, node_name
from functional_ckpt.policies import lines
from functional_ckpt.policies.base import StepInfo
from functional_ckpt.steps import history, node_inventory, node_moves, step_json
from functional_ckpt.steps.first_tier import OPENING, lock_and_recover
from functional_ckpt.steps.index import Entry, StepIndex
from functional_ckpt.steps.node_index import NodeIndex
from functional_ckpt.steps.node_inventory import Inventory
from functional_ckpt.steps.node_local import NodeLocal
from functional_ckpt.steps.tier_steps import TierSteps
from functional_ckpt.storage import commit, queries

_log = logging.getLogger("functional_ckpt")


class NodeTier:
    """The first tier of a run with `NodeLocal`; see `FirstTier`.

    Args:
        group: The ranks.
        option: The manager's option.

    Attributes:
        option: The manager's option.
        directories: Node -> the id of its directory.
        generation: The highest generation that any node knows.
        commits: Step -> who holds which file of it, as last exchanged; a step that this run has
            committed is held by the nodes that wrote it.
        is_replicated: Whether a step survives the loss of `option.replicas` nodes.
        on_committed: Called with each step that this run has committed.
        on_replicated: See `FirstTier`.
        renaming: Held while a part, or a file in one, gets its name.
    """

    def __init__(self, group: Coordinator, option: NodeLocal) -> None:
        self.option = option
        self.directories: dict[str, str] = {}
        self.generation = 0
        self.commits: dict[int, UsableCommit] = {}
        self.is_replicated: Callable[[int], bool] = self.survives
        self.on_committed: Callable[[int], None] = lambda _: None
        self.on_replicated: Callable[[int], None] = lambda _: None
        self.renaming = threading.Lock()
        self._group = group
        self._nodes: Nodes | None = None
        self._starts_line = False
        self._num_saves = 0

    @property
    def nodes(self) -> Nodes:
        """The nodes of the ranks."""
        if self._nodes is None:
            raise errors.UsageError("The directory is not open yet.")
        return self._nodes

    @property
    def is_head(self) -> bool:
        """See `FirstTier.is_head`."""
        return self.nodes.is_head

    # ------------------------------------------------------------------------------ opening

    def open(self, steps: TierSteps, given: bytes) -> None:
        """See `FirstTier.open`; every rank knows all usable steps afterwards.

        Raises:
            LockedError: Another live writer holds the directory of a node.
            UsageError: There are too few nodes, or two nodes see one directory.
            CoordinationError: The ranks have different options.
        """
        if steps.storage.objects is not None:
            failure = errors.UsageError(
                f"{steps.root} is an object store, which all nodes share. node_local needs a "
                "directory on each node's own disks; give the store as one of the tiers.",
                path=steps.root,
            )
            self._group.gather_broadcast(OPENING, failure, b"".join)
        self._nodes = self._agree(given)
        steps.list_by(StepIndex(steps.storage, steps.root, steps.name_format, takes_parts=True))
        if not steps.read_only:
            self._check_apart(steps)
            with collective(self._group, "locking the nodes' directories"):
                if self.is_head:
                    is_alone = self._group.num_ranks == 1
                    lock_and_recover(steps, is_alone=is_alone, keep=node_moves.votes(steps))
                    node_inventory.make_directory_id(steps.storage, steps.root)
        decision, inventories = self._exchange(steps)
        every = [part for each in inventories.values() for part in each.parts]
        known = [each.generation for each in inventories.values()]
        self._check_replicas(steps.root, is_first_run=not every and not any(known))
        if not steps.read_only:
            own = inventories[self.nodes.own].parts if self.is_head else ()
            with collective(self._group, "completing interrupted commits"):
                wanted, count = self.option.replicas, len(inventories)
                unneeded = rules.removals(own, decision, wanted, num_nodes=count)
                for move in (*rules.moves(own, decision), *unneeded):
                    node_moves.execute(steps, move)
        self.commits = {commit.record.step: commit for commit in decision.usable}
        self._list(steps, inventories, decision)
        steps.before_removal = lambda removed: self._retire(steps, removed)
        # A save of this run counts as later than one of the same step and generation.
        self._num_saves = max((part.record.serial for part in every), default=0)
        self.generation = rules.next_generation(known, every) - 1
        doubtful = (*decision.incomplete, *decision.waiting)
        if (doubtful or not decision.usable) and (every or any(known)) and not steps.read_only:
            # A node that comes back must not win over the steps that are saved from now on.
            self._starts_line = True
            self._raise_generation(steps, self._group)

    def _agree(self, given: bytes) -> Nodes:
        """Returns the nodes of ranks whose options are equal."""
        own = json.dumps([node_name(self.option.node), given.decode()]).encode()

        def combine(values: Sequence[bytes]) -> bytes:
            found = [json.loads(value) for value in values]
            same_options.check([options.encode() for _, options in found])
            return json.dumps([name for name, _ in found]).encode()

        names = json.loads(self._group.gather_broadcast(OPENING, own, combine))
        return Nodes(tuple(names), self._group.rank)

    def _check_replicas(self, root: str, *, is_first_run: bool) -> None:
        """Raises at the first start of a run with too few nodes; warns if it has lost some."""
        num_nodes, replicas = len(self.nodes.order), self.option.replicas
        if not replicas >= num_nodes > 1:
            return
        found = (
            f"node_local has replicas={replicas}, and the run {num_nodes} nodes "
            f"({', '.join(self.nodes.order)}): each copy needs another node."
        )
        if is_first_run:
            raise errors.UsageError(f"{found} At most {num_nodes - 1} are possible.", path=root)
        if self._group.rank == 0:
            _log.warning("%s: %s Until there are more, %d are made.", root, found, num_nodes - 1)

    def _check_apart(self, steps: TierSteps) -> None:
        """Raises unless the ranks of a node share one directory, and nodes do not."""
        group, nodes, storage = self._group, self.nodes, steps.storage
        token = group.gather_broadcast("naming marks", b"", lambda _: uuid.uuid4().hex.encode())

        def mark(rank: int) -> str:
            return os.path.join(steps.hidden, f"node.{token.decode()}.{rank}.tmp")

        with collective(group, "marking the nodes' directories"):
            if nodes.is_head:
                commit.makedirs_durable(storage, steps.hidden)
                storage.write(mark(group.rank), b"")
        try:
            with collective(group, "checking that each node has its own directory"):
                if nodes.is_head:
                    self._check_not_shared(steps, mark)
                else:
                    head = nodes.ranks_of(nodes.own)[0]
                    commit.check_visible(storage, mark(head), group.rank, creator=head)
        finally:
            if nodes.is_head:
                storage.remove(mark(group.rank))

    def _check_not_shared(self, steps: TierSteps, mark: Callable[[int], str]) -> None:
        there = set(steps.storage.list(steps.hidden))
        for head in self.nodes.heads:
            if head != self._group.rank and os.path.basename(mark(head)) in there:
                pair = self.nodes.own, self.nodes.names[head]
                raise errors.UsageError(
                    f"The nodes {pair[0]} and {pair[1]} see the same directory {steps.root}. With "
                    "node_local each node needs a directory on its own disks; without it all ranks "
                    "share one.",
                    path=steps.root,
                )

    def _exchange(self, steps: TierSteps) -> tuple[Decision, dict[str, Inventory]]:
        """Returns the inventories of the nodes, and the decision about them."""
        value: bytes | BaseException = b""
        if self.is_head:
            try:
                taken = node_inventory.take(steps.storage, steps.root, steps.name_format)
                value = taken.to_bytes()
            except Exception as error:  # noqa: BLE001 - raised on every rank
                value = error
        found = large.exchange(self._group, "exchanging the inventories of the nodes", value)
        inventories = {
            self.nodes.names[head]: node_inventory.from_bytes(found[head], self.nodes.names[head])
            for head in self.nodes.heads
        }
        retired = {each for inventory in inventories.values() for each in inventory.retired}
        parts = {name: inventory.parts for name, inventory in inventories.items()}
        self.directories = {name: each.directory for name, each in inventories.items()}
        known = {each for each in self.directories.values() if each}
        decision = rules.decide(parts, directories=known, retired=retired)
        if self._group.rank == 0:
            _tell(steps.root, decision)
        return decision, inventories

    def _list(
        self, steps: TierSteps, inventories: Mapping[str, Inventory], decision: Decision
    ) -> None:
        """Has `steps` list the steps that all nodes hold together."""
        own = self.nodes.own
        used = {each.record.commit_id for each in decision.usable}
        unused = {
            part.name
            for part in inventories[own].parts
            if part.is_renamed and not part.is_aside and part.record.commit_id not in used
        }
        unused -= {each.name for each in decision.usable if own in each.nodes}
        if len(self.nodes.order) > 1:
            unused |= _without_part(steps)
        order = set(self.nodes.order)
        partial = [each for each in decision.usable if set(each.nodes) != order]
        elsewhere = self._infos_of(steps, partial) if partial else {}
        steps.list_by(
            NodeIndex(
                steps.index,
                unused,
                {
                    each.record.step: Entry(each.name, "", elsewhere[each.record.step])
                    for each in partial
                    if own not in each.nodes
                },
            )
        )

    def _infos_of(self, steps: TierSteps, partial: Sequence[UsableCommit]) -> dict[int, StepInfo]:
        """Returns the steps that some nodes lack, as the first node with a part has them."""
        value: bytes | BaseException = b"[]"
        if self.is_head:
            own = [each for each in partial if each.nodes[0] == self.nodes.own]
            try:
                value = json.dumps([step_json.encode(_read(steps, each)) for each in own]).encode()
            except Exception as error:  # noqa: BLE001 - raised on every rank
                value = error
        found = large.exchange(self._group, "exchanging steps that some nodes lack", value)
        infos = [step_json.decode(record) for data in found for record in json.loads(data or b"[]")]
        return {info.step: info for info in infos}

    # ------------------------------------------------------------------------------ later

    def on_other_heads(self, group: Coordinator, what: str, action: Callable[[], object]) -> None:
        """See `FirstTier.on_other_heads`."""
        if len(self.nodes.heads) > 1:
            with collective(group, what):
                if self.is_head and group.rank:
                    action()

    def follow(self, group: Coordinator, what: str, steps: TierSteps) -> None:
        """See `FirstTier.follow`."""
        if len(self.nodes.heads) == 1:
            return

        def listed(_: Sequence[bytes]) -> bytes:
            return json.dumps([info.step for info in steps.infos]).encode()

        kept = json.loads(group.gather_broadcast(what, b"", listed))
        with collective(group, what):
            if group.rank:
                self.remove_all_but(steps, kept)

    def remove_all_but(self, steps: TierSteps, kept: Collection[int]) -> None:
        """Removes from a head's directory the steps that the primary has removed."""
        gone = [info.step for info in steps.infos if info.step not in kept]
        if self.is_head:
            for error in steps.remove(gone).values():
                raise error
        else:
            steps.forget(gone)

    def line(self, origin: StepInfo | None, line: lines.Line) -> lines.Line:
        """See `FirstTier.line`: one of the raised generation, if a step was restored."""
        if origin is not None:
            ancestors = (*origin.ancestors, (origin.generation, origin.step))
            return lines.Line(self.generation, ancestors)
        if self._starts_line and line.generation < self.generation:
            newest = max(self.commits.values(), key=lambda each: each.record.order, default=None)
            if newest is None:
                return lines.Line(self.generation)
            return lines.Line(
                self.generation, (*line.ancestors, (line.generation, newest.record.step))
            )
        return line

    def restored(self, steps: TierSteps, group: Coordinator) -> None:
        """See `FirstTier.restored`: raises the generation, so that no absent node wins later."""
        if not steps.read_only:
            self._raise_generation(steps, group)

    def _raise_generation(self, steps: TierSteps, group: Coordinator) -> None:
        raised = self.generation + 1

        def write() -> None:
            if self.is_head:
                steps.check_lock()
                node_inventory.write_generation(steps.storage, steps.root, raised)

        run_on_all(group, "raising the generation", write)
        self.generation = raised

    def held_back(self, infos: Iterable[StepInfo]) -> Set[int]:
        """See `FirstTier.held_back`: no step is removed before a newer one is replicated."""
        known = tuple(infos)
        newest = lines.newest(info for info in known if self.is_replicated(info.step))
        return {
            info.step for info in known if newest is None or lines.age(info) >= lines.age(newest)
        }

    def next_serial(self) -> int:
        """Returns the number of a save of this run; on the primary."""
        self._num_saves += 1
        return self._num_saves

    def committed(self, record: PartRecord, name: str) -> None:
        """Notes a step that all nodes have committed."""
        holders = {file: (record.owner(file),) for file in record.files}
        self.commits[record.step] = UsableCommit(
            record=record, name=name, nodes=self.nodes.order, holders=holders
        )
        self.on_committed(record.step)

    def survives(self, step: int) -> bool:
        """Returns whether, as far as this rank knows, a step survives the loss of nodes."""
        found = self.commits.get(step)
        return found is not None and rules.is_replicated(
            found.record,
            found.holders,
            self.option.replicas,
            num_nodes=len(self.nodes.order),
        )

    def ranks_with(self, step: int) -> Mapping[str, tuple[int, ...]]:
        """See `FirstTier.ranks_with`."""
        found = self.commits.get(step)
        ranks = dict(zip(self.nodes.order, self.nodes.heads, strict=True))
        return {} if found is None else copies.senders(found.record, found.holders, ranks)

    def forget(self, steps: Collection[int]) -> None:
        """See `FirstTier.forget`."""
        for step in steps:
            self.commits.pop(step, None)

    def _retire(self, steps: TierSteps, removed: Iterable[int]) -> None:
        """Notes durably which commits are removed next, so that every node completes that."""
        known = [self.commits[step].record.commit_id for step in removed if step in self.commits]
        if known:
            node_inventory.retire(steps.storage, steps.root, known)


def _without_part(steps: TierSteps) -> set[str]:
    """Returns the names of steps that were saved without `node_local`: only this node has them."""
    names = {
        entry.name
        for entry in steps.index.look().values()
        if not queries.exists(steps.storage, os.path.join(steps.root, entry.name, PART_FILE))
    }
    if names:
        _log.warning(
            "%s: ignoring steps that were saved without node_local: %s",
            steps.root,
            ", ".join(sorted(names)[:10]),
        )
    return names


def _tell(root: str, decision: Decision) -> None:
    for each in (*decision.incomplete, *decision.waiting):
        _log.warning(
            "%s: step %d is not used (commit %s, on %s): %s. It stays.",
            root,
            each.record.step,
            each.record.commit_id,
            ", ".join(each.nodes),
            each.why,
        )


def _read(steps: TierSteps, found: UsableCommit) -> StepInfo:
    """Returns a step of this node's directory, with its late metrics."""
    path = os.path.join(steps.root, found.name)
    info = history.read_sound_step(steps.storage, path, found.record.step)
    return steps.late.added_to(info)
