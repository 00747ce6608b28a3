"""The option of a first tier that is local to each node."""

from __future__ import annotations

import dataclasses

from functional_ckpt import errors


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NodeLocal:
    """The directory is on each node's own disks (or memory), where other nodes do not see it.

    Each rank writes to its own node. A step is committed once every node has made it durable, and
    replicated once other nodes hold verified copies of each node's files.

    Attributes:
        replicas: How many other nodes receive a copy of a node's files; the loss of as many nodes
            loses no replicated step. 0: a lost node loses the steps that no other tier has.
        node: The name of this rank's node; None for the environment variable
            `FUNCTIONAL_CKPT_NODE`, or else the host's name. Ranks with one name share a directory.
        max_bytes_per_second: At which rate a node sends copies to other nodes at most; None for no
            limit.

    >>> NodeLocal(replicas=2)
    NodeLocal(replicas=2, node=None, max_bytes_per_second=None)
    """

    replicas: int = 1
    node: str | None = None
    max_bytes_per_second: float | None = None

    def __post_init__(self) -> None:
        """Raises UsageError for anything but a count and a name."""
        if type(self.replicas) is not int or self.replicas < 0:
            raise errors.UsageError(f"replicas must be an int >= 0; got {self.replicas!r}.")
        node = self.node
        if node is not None and (not isinstance(node, str) or not node):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise errors.UsageError(f"node must be the name of a node, or None; got {node!r}.")
        rate = self.max_bytes_per_second
        if rate is not None and (type(rate) not in (int, float) or not rate > 0):
            raise errors.UsageError(
                f"max_bytes_per_second must be a number > 0, or None; got {rate!r}."
            )
