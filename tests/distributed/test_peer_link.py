"""Data between two ranks, as threads and as processes: in order, complete, or a clear error."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from gloo_workers import Workers
from thread_ranks import run_ranks

from functional_ckpt import errors
from functional_ckpt.distributed import peer_link
from functional_ckpt.distributed.coordinator import Coordinator, Link, SingleProcess
from functional_ckpt.distributed.peer_link import (
    MemoryLinks,
    Pace,
    receive_message,
    receive_stream,
    send_message,
    send_stream,
)
from functional_ckpt.distributed.torch_store import StoreCoordinator

SIZES = (0, 1, 999, 1000, 1001, 12_345, 3)


def _data(size: int, seed: int) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def _send_all(link: Link, rank: int, tag: int) -> None:
    for seed, size in enumerate(SIZES):
        data = _data(size, seed + tag)

        def fill(piece: memoryview, offset: int, data: bytes = data) -> None:
            piece[:] = data[offset : offset + len(piece)]

        send_stream(link, rank, size, fill, tag=tag)
        send_message(link, rank, data, tag=tag)


def _receive_all(link: Link, rank: int, tag: int) -> bool:
    is_equal = True
    for seed, size in enumerate(SIZES):
        got = bytearray(size)

        def take(piece: memoryview, offset: int, got: bytearray = got) -> None:
            got[offset : offset + len(piece)] = piece

        receive_stream(link, rank, size, take, tag=tag)
        is_equal &= bytes(got) == receive_message(link, rank, tag=tag) == _data(size, seed + tag)
    return is_equal


def exchange(coordinator: Coordinator) -> bool:
    """Each rank sends to the next and receives from the last at the same time, on two tags."""
    rank, count = coordinator.rank, coordinator.num_ranks
    link = coordinator.link()
    senders = [
        threading.Thread(target=_send_all, args=(link, (rank + 1) % count, tag)) for tag in (1, 2)
    ]
    for each in senders:
        each.start()
    found = [_receive_all(link, (rank - 1) % count, tag) for tag in (1, 2)]
    for each in senders:
        each.join()
    coordinator.gather_broadcast("leaving", b"", b"".join)
    link.close()
    return all(found)


def test_streams_of_threads_arrive_whole_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_link, "PIECE_BYTES", 1000)
    assert run_ranks(3, exchange) == [True] * 3


def exchange_in_processes() -> bool:
    peer_link.PIECE_BYTES = 1000
    whole = StoreCoordinator(dist.group.WORLD)
    if whole.rank == 1:
        return True
    part = whole.among([3, 0, 2], "odd ones")
    assert part.global_ranks == (3, 0, 2)
    ranks = json.loads(
        part.gather_broadcast(
            "ranks",
            b"%d" % dist.get_rank(),
            lambda v: json.dumps([int(each) for each in v]).encode(),
        )
    )
    assert ranks == [3, 0, 2] and ranks[part.rank] == dist.get_rank()
    return exchange(part) and exchange(whole.among([3, 0, 2], "odd ones"))


def test_streams_of_processes_arrive_among_some_of_the_ranks(workers: Workers) -> None:
    assert workers.run(4, exchange_in_processes) == [True] * 4


def test_memory_does_not_grow_with_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_link, "PIECE_BYTES", 1000)
    links = MemoryLinks()
    buffers: set[int] = set()

    def fill(piece: memoryview, _: int) -> None:
        buffers.add(np.frombuffer(piece, np.uint8).__array_interface__["data"][0])

    thread = threading.Thread(target=send_stream, args=(links.link(0), 1, 50_500, fill))
    thread.start()
    receive_stream(links.link(1), 0, 50_500, lambda piece, _: None)
    thread.join()
    assert len(buffers) == 2


def test_the_pace_holds_streams_back_together() -> None:
    pace, started = Pace(1000.0), time.monotonic()
    threads = [threading.Thread(target=lambda: [pace.wait(50), pace.wait(50)]) for _ in range(2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert time.monotonic() - started >= 0.15  # three of the four waits


def test_a_peer_that_is_gone_or_silent_is_an_error_that_names_it() -> None:
    links = MemoryLinks(timeout_seconds=0.05)
    with pytest.raises(errors.CoordinationError, match="rank 1: it did not take part in time") as e:
        links.link(0).receive(1, np.empty(1, np.uint8)).wait()
    assert e.value.ranks == (1,)
    slow = MemoryLinks()
    threading.Timer(0.05, slow.lose, [1]).start()
    with pytest.raises(errors.CoordinationError, match="rank 1: it is gone"):
        slow.link(0).send(1, np.empty(1, np.uint8)).wait()
    with pytest.raises(errors.UsageError, match="alone"):
        SingleProcess().link().send(1, np.empty(1, np.uint8))


def wait_for_a_dead_rank(text: Path) -> None:
    link = StoreCoordinator(dist.group.WORLD, timeout_seconds=30.0).link()
    if dist.get_rank():
        send_message(link, 0, b"the first")
        os.kill(os.getpid(), signal.SIGKILL)
    assert receive_message(link, 1) == b"the first"
    try:
        receive_message(link, 1)
    except errors.CoordinationError as error:
        text.write_text(f"{error.ranks} {error}")


def test_a_rank_that_was_killed_is_an_error_at_once(tmp_path: Path) -> None:
    workers, begun = Workers(), time.monotonic()
    try:
        with pytest.raises(EOFError):  # of the rank that died
            workers.run(2, wait_for_a_dead_rank, tmp_path / "text")
        while not (tmp_path / "text").exists() and time.monotonic() - begun < 60:
            time.sleep(0.05)
    finally:
        workers.close()
    assert "(1,) Connection to a rank lost while exchanging data with rank 1" in (
        (tmp_path / "text").read_text()
    )
