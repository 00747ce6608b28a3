"""Runs programs in forks of one process that has imported torch: a request a line on stdin.

A request is JSON: `program`, `root`, `num_ranks`, `environment`, and the `modules` to import before
the fork. The answer is the exit code of the first rank that failed, or 0. The ranks that are left
are killed then, as torchrun does.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import traceback
from typing import Any

import torch._dynamo  # noqa: F401 - an optimizer imports it: 2 s in each fork

import functional_ckpt as fc


def serve() -> None:
    """Answers requests until stdin ends."""
    fc.CheckpointManager, fc.restore  # noqa: B018 - imported before the forks
    for line in sys.stdin:
        request = json.loads(line)
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the answers
            for module in request["modules"]:
                importlib.import_module(module)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        pids = [_fork(request, rank, port) for rank in range(request["num_ranks"])]
        print(_wait(pids), flush=True)


def _fork(request: dict[str, Any], rank: int, port: int) -> int:
    if (pid := os.fork()) != 0:
        return pid
    code = 1
    try:
        log = os.open(f"{request['root']}/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        os.environ.update(request["environment"])
        if request["num_ranks"] > 1:
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "MASTER_PORT": port}
            sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), request["num_ranks"])
            names = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "resume"}
            os.environ.update({key: str(value) for key, value in (ranks | sizes | names).items()})
        sys.argv = [request["program"], request["root"]]
        runpy.run_path(request["program"], run_name="__main__")
        code = 0
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(pids: list[int]) -> int:
    left, outcome = set(pids), 0
    while left:
        pid, status = os.wait()
        left.discard(pid)
        code = os.waitstatus_to_exitcode(status)
        if code and not outcome:
            outcome = code
            for each in left:
                os.kill(each, signal.SIGKILL)
    return outcome


if __name__ == "__main__":
    serve()
