"""Which node sends which files of a step to which other node: computed alike on all nodes. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from functional_ckpt.core.nodes.part import PartRecord


@dataclasses.dataclass(frozen=True, slots=True)
class Copy:
    """Files that one node sends to another.

    Attributes:
        source: The number of the sending node, in the order of this run's nodes.
        target: The number of the receiving node.
        files: The files, in the order in which they are sent.
    """

    source: int
    target: int
    files: tuple[str, ...]


def plan(
    record: PartRecord, holders: Mapping[str, Collection[str]], order: Sequence[str], replicas: int
) -> tuple[Copy, ...]:
    """Returns the copies after which a step survives the loss of any `replicas` nodes.

    A file goes to the node that wrote it, if that has lost it, and then to the nodes that follow in
    the order. Of several nodes that hold it, the one that sends least so far sends it.

    Args:
        record: The step's part record.
        holders: For each data file, the nodes that hold it, verified. A file that none of `order`
            holds is left out.
        order: The nodes of this run.
        replicas: How many nodes besides one are to hold each file; fewer if there are not as many.

    Returns:
        The copies, at most one for each pair of nodes, in an order in which every node sends and
        receives them one after the other: by the distance between the two.
    """
    number = {name: place for place, name in enumerate(order)}
    needed = min(1 + replicas, len(order))
    sent_bytes = [0] * len(order)
    files: dict[tuple[int, int], list[str]] = {}
    for name, file in sorted(record.files.items()):
        held = sorted(number[node] for node in holders.get(name, ()) if node in number)
        if not held:
            continue
        first = number.get(record.owner(name), held[0])
        others = [(first + k) % len(order) for k in range(len(order))]
        targets = [node for node in others if node not in held]
        for target in targets[: max(0, needed - len(held))]:
            source = min(held, key=lambda node: (sent_bytes[node], (target - node) % len(order)))
            sent_bytes[source] += file.size_bytes
            files.setdefault((source, target), []).append(name)
    pairs = sorted(files, key=lambda pair: ((pair[1] - pair[0]) % len(order), pair))
    return tuple(Copy(source, target, tuple(files[source, target])) for source, target in pairs)


def held_after(
    holders: Mapping[str, Collection[str]],
    copies: Sequence[Copy],
    order: Sequence[str],
    missing: Mapping[int, Collection[str]],
) -> dict[str, tuple[str, ...]]:
    """Returns who holds each file after some of the copies.

    Args:
        holders: Who held it before.
        copies: The copies.
        order: The nodes of this run.
        missing: For each target, the files that it has not received.
    """
    held = {name: list(nodes) for name, nodes in holders.items()}
    for copy in copies:
        for name in copy.files:
            if name not in missing.get(copy.target, ()) and order[copy.target] not in held[name]:
                held[name].append(order[copy.target])
    return {name: tuple(nodes) for name, nodes in held.items()}


def senders(
    record: PartRecord, holders: Mapping[str, Collection[str]], ranks: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
    """Returns the ranks that can send each data file of a step; first that of its owner.

    Args:
        record: The step's part record.
        holders: For each data file, the nodes that hold it.
        ranks: For each node of this run, the rank that sends its files.
    """
    return {
        name: tuple(
            ranks[node]
            for node in sorted(holders.get(name, ()), key=lambda node: node != record.owner(name))
            if node in ranks
        )
        for name in record.files
    }
