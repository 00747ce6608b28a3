"""Gloo groups that `torch.distributed` does not know of: the training's stay untouched.

torch names groups by their ranks, so a second group of the same ranks would find keys of the first
in the store.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from functional_ckpt import errors
from functional_ckpt.distributed.coordinator import Bytes, Transfer


def connect(store: Any, rank: int, num_ranks: int, timeout_seconds: float) -> Any:
    """Returns a group of ranks that meet in a store; all of them call this.

    Raises:
        CoordinationError: Not all ranks have come in time.
    """
    make: Any = dist.ProcessGroupGloo  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    with _clear_errors("connecting the ranks"):
        return make(store, rank, num_ranks, datetime.timedelta(seconds=timeout_seconds))


class GlooChannel:
    """A `Channel` of a group."""

    def __init__(self, group: Any) -> None:
        self._group: Any = group

    def all_to_all(self, outgoing: Sequence[Bytes], incoming_bytes: Sequence[int]) -> list[Bytes]:
        """See `Channel.all_to_all`."""
        given = torch.from_numpy(np.concatenate(outgoing))
        got = torch.empty(sum(incoming_bytes), dtype=torch.uint8, device="cpu")
        sizes = [len(each) for each in outgoing]
        with _clear_errors("handing data between the ranks"):
            self._group.alltoall_base(got, given, list(incoming_bytes), sizes).wait()
        return [each.numpy() for each in got.split(list(incoming_bytes))]

    def close(self) -> None:
        """See `Channel.close`."""
        self._group = None


class GlooLink:
    """A `Link` of a group.

    Args:
        group: The group.
        names: The name of each of its ranks in messages.
    """

    def __init__(self, group: Any, names: Sequence[int]) -> None:
        self._group: Any = group
        self._names = tuple(names)

    def send(self, rank: int, data: Bytes, tag: int = 0) -> Transfer:
        """See `Link.send`."""
        return self._start("send", rank, data, tag)

    def receive(self, rank: int, into: Bytes, tag: int = 0) -> Transfer:
        """See `Link.receive`."""
        return self._start("recv", rank, into, tag)

    def _start(self, action: str, rank: int, data: Bytes, tag: int) -> Transfer:
        number = self._names[rank]
        if self._group is None:
            raise errors.CoordinationError("The link between the ranks is closed.", ranks=(number,))
        tensor = torch.from_numpy(data)
        with _clear_errors(f"exchanging data with rank {number}", (number,)):
            return _GlooTransfer(getattr(self._group, action)([tensor], rank, tag), tensor, number)

    def close(self) -> None:
        """See `Link.close`."""
        group, self._group = self._group, None
        if group is not None:
            with contextlib.suppress(RuntimeError):
                group.abort()


class _GlooTransfer:
    """Data on its way; holds its memory, which gloo does not."""

    def __init__(self, work: Any, tensor: torch.Tensor, rank: int) -> None:
        self._work = work
        self._tensor = tensor
        self._rank = rank

    def wait(self) -> None:
        """See `Transfer.wait`."""
        with _clear_errors(f"exchanging data with rank {self._rank}", (self._rank,)):
            self._work.wait()


@contextlib.contextmanager
def _clear_errors(what: str, ranks: Sequence[int] = ()) -> Generator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo's own, and DistError
        summary = str(error).partition("\n")[0]
        raise errors.CoordinationError(
            f"Connection to a rank lost while {what}: {summary}", ranks=ranks
        ) from error
