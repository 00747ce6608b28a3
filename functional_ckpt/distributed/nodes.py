"""Nodes: the ranks that share a host, and its local disks."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from collections.abc import Sequence

from functional_ckpt.distributed.coordinator import Coordinator

NODE_VARIABLE = "FUNCTIONAL_CKPT_NODE"
"""The environment variable that names the node of a rank, in place of the host's name."""


@dataclasses.dataclass(frozen=True, slots=True)
class Nodes:
    """The nodes of a group of ranks, as one of the ranks knows them.

    Attributes:
        names: The name of each rank's node, in order of rank.
        rank: The rank that this process has.
    """

    names: tuple[str, ...]
    rank: int

    @property
    def own(self) -> str:
        """The name of this rank's node."""
        return self.names[self.rank]

    @property
    def order(self) -> tuple[str, ...]:
        """The names of the nodes, in order of their heads; the first is the primary's."""
        return tuple(dict.fromkeys(self.names))

    @property
    def heads(self) -> tuple[int, ...]:
        """The first rank of each node, ascending."""
        return tuple(self.names.index(name) for name in self.order)

    @property
    def is_head(self) -> bool:
        """Whether this rank is the first one of its node."""
        return self.names.index(self.own) == self.rank

    def ranks_of(self, name: str) -> tuple[int, ...]:
        """Returns the ranks of a node, ascending."""
        return tuple(rank for rank, each in enumerate(self.names) if each == name)


def nodes_of(coordinator: Coordinator, node: str | None = None) -> Nodes:
    """Returns the nodes of all ranks, which make this call together: one round.

    Args:
        coordinator: The ranks.
        node: The name of this rank's node; None for that of `FUNCTIONAL_CKPT_NODE`, or else of the
            host.
    """
    name = node_name(node)
    if coordinator.num_ranks == 1:
        return Nodes((name,), 0)

    def combine(names: Sequence[bytes]) -> bytes:
        return json.dumps([each.decode() for each in names]).encode()

    found = coordinator.gather_broadcast("the nodes of the ranks", name.encode(), combine)
    return Nodes(tuple(json.loads(found)), coordinator.rank)


def node_name(node: str | None = None) -> str:
    """Returns the name of this process's node; see `nodes_of`."""
    return node or os.environ.get(NODE_VARIABLE) or socket.gethostname()
