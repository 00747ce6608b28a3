"""Changes of the parts in a node's directory, as the nodes have decided."""

from __future__ import annotations

import logging
import os
import uuid

from functional_ckpt import errors
from functional_ckpt.core.nodes.part import PART_FILE
from functional_ckpt.core.nodes.rules import Move
from functional_ckpt.steps import node_inventory
from functional_ckpt.steps.tier_steps import TierSteps
from functional_ckpt.storage import commit, queries

_log = logging.getLogger("functional_ckpt")


def move_aside(steps: TierSteps, name: str) -> str:
    """Moves a part out of the way of another commit of its step; returns its new path."""
    try:
        record = node_inventory.read_part(steps.storage, os.path.join(steps.root, name))
    except errors.CorruptCheckpointError:
        record = None
    commit_id = f"unknown-{uuid.uuid4().hex}" if record is None else record.commit_id
    return _put_aside(steps, name, node_inventory.aside_path(name, commit_id))


def execute(steps: TierSteps, move: Move) -> None:
    """Changes one part of this node's directory; a crash in between changes no later decision."""
    storage, part = steps.storage, move.part
    path = os.path.join(steps.root, part.path)
    if move.action == "remove":
        node_inventory.retire(storage, steps.root, [part.record.commit_id])
        if part.is_renamed and not part.is_aside:
            steps.commits.discard(path)
        else:
            storage.remove(path)
        _log.warning("%s: removed %s (commit %s)", steps.root, part.path, part.record.commit_id)
        return
    if move.action == "rename":
        final = os.path.join(steps.root, part.name)
        steps.commits.drop(steps.commits.publish(path, final))
        storage.sync(steps.root)
    else:
        aside = node_inventory.aside_path(part.name, part.record.commit_id)
        _put_aside(steps, part.path, aside)
    done = "completed the commit of" if move.action == "rename" else "moved aside"
    _log.warning("%s: %s %s (commit %s)", steps.root, done, part.name, part.record.commit_id)


def _put_aside(steps: TierSteps, path: str, aside: str) -> str:
    storage, target = steps.storage, os.path.join(steps.root, aside)
    storage.make_directory(os.path.dirname(target))
    storage.remove(target)
    storage.rename(os.path.join(steps.root, path), target)
    storage.sync(os.path.dirname(target))
    storage.sync(steps.root)
    return target


def votes(steps: TierSteps) -> frozenset[str]:
    """Returns the names of the unfinished directories that hold a vote."""
    storage = steps.storage
    return frozenset(
        name
        for name in storage.list(steps.root)
        if commit.TMP_SUFFIX in name
        and queries.exists(storage, os.path.join(steps.root, name, PART_FILE))
    )
