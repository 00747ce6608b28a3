"""Collectives in which an exception on any rank is raised on every rank."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Sequence

from functional_ckpt.distributed.coordinator import Combine, Coordinator


def _nothing(values: Sequence[bytes]) -> bytes:
    del values
    return b""


@dataclasses.dataclass(slots=True)
class Turn:
    """One rank's side of a collective.

    Attributes:
        value: This rank's contribution; set it in the block.
        outcome: The primary's result; set after the block.
    """

    value: bytes = b""
    outcome: bytes = b""


@contextlib.contextmanager
def collective(coordinator: Coordinator, what: str, combine: Combine = _nothing) -> Generator[Turn]:
    """Runs a block on all ranks; they all continue, or they all raise.

    The block sets `turn.value`. At its end the primary combines the values of all ranks, and every
    rank gets the result as `turn.outcome`. An exception in the block, interruptions included, is
    raised on this rank, and as a `CoordinationError` of its class on the others.

    Args:
        coordinator: The ranks; all of them make the same collectives in the same order.
        what: Name of the operation, for messages.
        combine: Called on the primary with the values in order of rank.

    Raises:
        CoordinationError: Another rank failed in its block, or the primary in `combine`.
        CoordinationTimeoutError: A rank did not arrive in time.
    """
    turn = Turn()
    try:
        yield turn
    except BaseException as error:
        coordinator.gather_broadcast(what, error, combine)
        raise
    turn.outcome = coordinator.gather_broadcast(what, turn.value, combine)


@contextlib.contextmanager
def fails_on_all(coordinator: Coordinator, what: str) -> Generator[None]:
    """Runs a block on each rank by itself; its exception fails the other ranks' next collective.

    For the arguments of a call: a rank with invalid ones does not reach the collectives of the
    others.
    """
    try:
        yield
    except Exception as error:
        coordinator.gather_broadcast(what, error, _nothing)
        raise


def run_on_all(coordinator: Coordinator, what: str, action: Callable[[], object]) -> None:
    """Runs an action on every rank; then all ranks continue, or all raise."""
    with collective(coordinator, what):
        action()


def run_on_primary(
    coordinator: Coordinator,
    what: str,
    action: Callable[[], object],
    *,
    prepare: Callable[[], object] = lambda: None,
    after: Callable[[], object] = lambda: None,
) -> None:
    """Runs an action on the primary once all ranks are prepared.

    Every rank runs `prepare` first; the other ranks run `after` afterwards.
    """

    def act(_: Sequence[bytes]) -> bytes:
        action()
        return b""

    with collective(coordinator, what, act):
        prepare()
    if coordinator.rank:
        after()
