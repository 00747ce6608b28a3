"""Gives nodes that lack the records and indexes of a step those of another node.

They are the same on all nodes; the data files stay where they are. The received files are written
into a hidden directory, which is no vote, made durable and renamed: to a part without data files,
or one by one over damaged ones.
"""

from __future__ import annotations

import collections
import contextlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from functional_ckpt import errors
from functional_ckpt.core.nodes import part as part_lib
from functional_ckpt.core.nodes.part import PART_FILE, PartRecord
from functional_ckpt.core.nodes.rules import UsableCommit
from functional_ckpt.core.records import records
from functional_ckpt.core.records.file_list import relative
from functional_ckpt.distributed.collective import collective
from functional_ckpt.distributed.coordinator import Bytes, Coordinator
from functional_ckpt.distributed.nodes import Nodes
from functional_ckpt.steps import node_moves, step_files
from functional_ckpt.steps.node_inventory import read_part
from functional_ckpt.steps.tier_steps import TierSteps
from functional_ckpt.storage import commit, durable, queries
from functional_ckpt.storage.base import Storage

_MAX_ATTEMPTS = 3
INCOMING = os.path.join(commit.HIDDEN, "incoming")
_log = logging.getLogger("functional_ckpt")
_Sent: TypeAlias = "list[tuple[str, int, int]]"


def fetch_parts(
    coordinator: Coordinator, nodes: Nodes, steps: TierSteps, wanted: Sequence[int]
) -> list[str]:
    """Fetches records of steps that a node lacks, or has damaged, from another; a collective.

    Args:
        coordinator: The ranks.
        nodes: Their nodes.
        steps: The steps of this node.
        wanted: Steps, equal on all ranks.

    Returns:
        The names of the steps that any node has got, the same on all ranks.

    Raises:
        CoordinationError: Another rank failed.
        StorageError: A directory cannot be read or written.
    """
    storage, root = steps.storage, steps.root
    with collective(coordinator, "which nodes lack a step", _senders) as turn:
        names = [os.path.basename(steps.path(step)) for step in wanted]
        held: dict[str, tuple[tuple[int, int, int, str], dict[str, int]]] = {}
        for name in names if nodes.is_head else ():
            path = os.path.join(root, name)
            record = _part(storage, path)
            if record is not None and _is_sound(storage, path, record):
                held[name] = record.order, _others(storage, path, record)
        head = nodes.is_head
        turn.value = json.dumps({"head": head, "names": list(names), "held": held}).encode()
    sent: _Sent = [(name, sender, getter) for name, sender, getter, _ in json.loads(turn.outcome)]
    sizes: dict[str, dict[str, int]] = {name: of for name, _, _, of in json.loads(turn.outcome)}
    if sent:
        with collective(coordinator, "where records can be written"):
            if steps.read_only and any(getter == coordinator.rank for _, _, getter in sent):
                raise errors.StorageError(
                    f"{root} lacks records of {names}, or they are damaged, and the manager is "
                    "read-only. A writer fetches them from other nodes at a restore.",
                    path=root,
                )
        _send(coordinator, steps, sent, sizes)
        steps.index.forget(wanted)
        steps.reload_local()
    return sorted({name for name, _, _ in sent})


def fetch_for_primary(
    coordinator: Coordinator, nodes: Nodes, steps: TierSteps, commits: Mapping[int, UsableCommit]
) -> None:
    """Fetches the records of every step that the primary's node lacks: uploads need them there.

    A collective, with the arguments of `fetch_parts`.
    """
    lacking = [step for step, each in sorted(commits.items()) if nodes.order[0] not in each.nodes]
    if lacking:
        fetch_parts(coordinator, nodes, steps, lacking)


def _part(storage: Storage, path: str) -> PartRecord | None:
    try:
        return read_part(storage, path)
    except errors.CorruptCheckpointError:
        return None  # logged where the inventory is taken


def _is_sound(storage: Storage, path: str, record: PartRecord) -> bool:
    """Returns whether the records and indexes of a part are as they were saved."""
    try:
        files = step_files.recorded_files(storage, path)
    except errors.CheckpointError as error:
        _log.warning("%s; another node's copy is used", error.message)
        return False
    bad = [
        name
        for name, each in files.items()
        if name not in record.files
        and not step_files.holds_file(storage, os.path.join(path, name), each)
    ]
    if bad:
        _log.warning(
            "%s: missing or damaged: %s; another node's copy is used", path, ", ".join(bad)
        )
    return bool(files) and not bad


def _others(storage: Storage, path: str, record: PartRecord) -> dict[str, int]:
    """Returns the files of a part that every node has, with their sizes."""
    return {
        name: stat.size_bytes
        for name, stat in storage.walk(path).items()
        if stat.kind == "a file" and name not in record.files
    }


def _senders(values: Sequence[bytes]) -> bytes:
    """Returns name, sender, receiver and sizes for every part that a node gets."""
    told = [json.loads(value) for value in values]
    found: list[tuple[str, int, int, Mapping[str, int]]] = []
    num_sent: collections.Counter[int] = collections.Counter()
    for name in told[0]["names"]:
        holders = {
            rank: each["held"][name] for rank, each in enumerate(told) if name in each["held"]
        }
        if not holders:
            continue
        newest = max(order for order, _ in holders.values())
        able = [rank for rank, (order, _) in holders.items() if order == newest]
        for rank, each in enumerate(told):
            if each["head"] and rank not in able:
                sender = min(able, key=lambda rank: (num_sent[rank], rank))
                num_sent[sender] += 1
                found.append((name, sender, rank, holders[sender][1]))
    return json.dumps(found).encode()


def _send(
    coordinator: Coordinator,
    steps: TierSteps,
    sent: _Sent,
    sizes: Mapping[str, Mapping[str, int]],
) -> None:
    """Sends the parts, one after the other: a node holds one in memory."""
    link = coordinator.link()
    try:
        for name, sender, getter in sent:
            with collective(coordinator, f"the records of {name} for a node that lacks them"):
                data = None
                if sender == coordinator.rank:
                    data = _read(steps.storage, os.path.join(steps.root, name), sizes[name])
            with collective(coordinator, f"writing the records of {name}"):
                if data is not None:
                    link.send(getter, data).wait()
                elif getter == coordinator.rank:
                    data = np.empty(sum(sizes[name].values()), np.uint8)
                    link.receive(sender, data).wait()
                    _write(steps, name, sizes[name], data)
    finally:
        link.close()


def _read(storage: Storage, path: str, sizes: Mapping[str, int]) -> Bytes:
    parts: list[Any] = []
    for name, size_bytes in sizes.items():
        data = storage.read(os.path.join(path, name))
        if len(data) != size_bytes:
            raise errors.StorageError(
                f"{os.path.join(path, name)} changed while it was read.",
                path=os.path.join(path, name),
            )
        parts.append(np.frombuffer(data, np.uint8))
    return np.concatenate(parts)


def _write(steps: TierSteps, name: str, sizes: Mapping[str, int], data: Bytes) -> None:
    """Writes a part without data files, or the records of one; verified at each opening."""
    contents: dict[str, bytes] = {}
    start = 0
    for file, size_bytes in sizes.items():
        contents[relative(file)] = data[start : start + size_bytes].tobytes()
        start += size_bytes
    record = part_lib.parse(contents.get(PART_FILE, b""), os.path.join(name, PART_FILE))
    storage, root = steps.storage, steps.root
    incoming = os.path.join(root, INCOMING)
    tmp = os.path.join(incoming, f"{record.commit_id}.records")
    durable.makedirs_durable(storage, incoming)
    storage.remove(tmp)
    for folder in {os.path.dirname(os.path.join(tmp, file)) for file in contents}:
        storage.make_directory(folder)
    for file, content in contents.items():
        storage.write(os.path.join(tmp, file), content)
    durable.sync_tree(storage, tmp, contents)
    final = os.path.join(root, name)
    for _ in range(_MAX_ATTEMPTS):
        if _is_of(storage, final, record, contents):
            _replace_records(storage, tmp, final, contents)
            storage.remove(tmp)
            return
        if queries.exists(storage, final):  # of another commit, which is not used
            node_moves.move_aside(steps, name)
        with contextlib.suppress(errors.StorageError):  # it may be there by now
            storage.rename(tmp, final)
            break
    else:
        storage.rename(tmp, final)
    storage.sync(root)


def _is_of(storage: Storage, path: str, record: PartRecord, contents: Mapping[str, bytes]) -> bool:
    """Returns whether a directory is a part of a commit; one of its two records may be damaged."""
    found = _part(storage, path)
    if found is not None:
        return found.commit_id == record.commit_id
    identity = step_files.record_digest(storage, path)
    return identity == records.digest_hex(contents[records.EXTENSION_FILE])


def _replace_records(storage: Storage, tmp: str, final: str, contents: Mapping[str, bytes]) -> None:
    """Replaces the files that differ; replication may have brought them all meanwhile."""
    for file, content in contents.items():
        path = os.path.join(final, file)
        if queries.read_optional(storage, path) != content:
            storage.make_directory(os.path.dirname(path))
            storage.rename(os.path.join(tmp, file), path)
            storage.sync(os.path.dirname(path))
            _log.warning("%s: replaced by another node's copy", path)
