"""Where a step of a node-local tier is read: on all nodes, then in the remote tiers."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Sequence

from functional_ckpt.distributed.coordinator import Coordinator
from functional_ckpt.format import checkpoint_dir
from functional_ckpt.restoring.node_copies import Amounts, NodeSources
from functional_ckpt.steps.fetch_parts import fetch_parts
from functional_ckpt.steps.run_steps import Steps
from functional_ckpt.steps.tier_steps import TierSteps

_MIB = 2**20
_log = logging.getLogger("functional_ckpt")


def of_step(
    steps: Steps, coordinator: Coordinator, step: int, tiers: Sequence[TierSteps]
) -> NodeSources | None:
    """Returns where a step is read, once every node has its records; a collective.

    None where all ranks share the first tier.

    Args:
        steps: The steps of this node.
        coordinator: The ranks.
        step: The step.
        tiers: The remote tiers that hold the step, the nearest first.
    """
    nodes = steps.first.nodes
    if nodes is None:
        return None
    fetch_parts(coordinator, nodes, steps, [step])
    started = time.monotonic()

    def report(amounts: Amounts) -> None:
        if coordinator.rank:
            return
        _log.info(
            "%s: step %d restored on %d ranks of %d nodes: %.1f MiB from the own node, %.1f MiB "
            "from other nodes, %.1f MiB from remote tiers; %d chunks had a damaged copy",
            steps.root,
            step,
            coordinator.num_ranks,
            len(nodes.order),
            amounts.own / _MIB,
            amounts.others / _MIB,
            amounts.tiers / _MIB,
            amounts.damaged,
        )
        steps.emit(
            "restored",
            step,
            seconds=time.monotonic() - started,
            num_bytes=amounts.own + amounts.others + amounts.tiers,
            sources={"own": amounts.own, "others": amounts.others, "tiers": amounts.tiers},
        )

    return NodeSources(
        coordinator=coordinator,
        node_of=tuple(nodes.order.index(name) for name in nodes.names),
        tiers=[
            functools.partial(checkpoint_dir.open_checkpoint, each.storage, each.path(step), step)
            for each in tiers
        ],
        report=report,
    )
