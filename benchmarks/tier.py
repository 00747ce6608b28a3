"""A second tier across a slow network: its effect on the training thread."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path

import torch

from benchmarks import meters
from benchmarks.async_peers import SkipMeasure

__all__ = ["measure"]

_SUPPORT = Path(__file__).parents[1] / "tests" / "support"
_BYTES_PER_SECOND = 10e6
_NUM_SAVES, _NUM_WARM = 10, 2
_SLOW = """
import sys
from proxy import Proxy
proxy = Proxy(sys.argv[1])
proxy.up_bytes_per_second = float(sys.argv[2])
print(proxy.url, flush=True)
for line in sys.stdin:
    proxy.up_bytes_per_second = None if line == "fast\\n" else float(line)
"""


def measure(divisor: int, root: str) -> dict[str, float]:
    """Seconds blocked in a save of 32 MiB, alone and during an upload to a slow tier.

    The store is the test suite's, and so is the proxy that lets 10 MB/s pass; each is a process of
    its own. The two ways take turns, twice.
    """
    missing = [name for name in ("moto", "obstore") if importlib.util.find_spec(name) is None]
    if missing:
        raise SkipMeasure(f"{missing[0]} is not installed")
    sys.path.append(str(_SUPPORT))
    import servers

    items = {"model": {"w": torch.rand(8 * 2**20 // divisor)}}
    alone: list[float] = []
    tiered: list[float] = []
    with servers.s3_server() as url, _slowed(url) as (slow_url, control):
        os.environ.update(servers.environment(slow_url))
        servers.make_bucket(url, "bench")
        for turn in range(2):
            alone += _blocked(f"{root}/alone-{turn}", items, None, control)
            tiered += _blocked(f"{root}/near-{turn}", items, f"s3://bench/{turn}", control)
    return {
        "save_of_32_mib_seconds": statistics.median(alone),
        "save_of_32_mib_with_slow_tier_seconds": statistics.median(tiered),
    }


@contextlib.contextmanager
def _slowed(url: str) -> Generator[tuple[str, subprocess.Popen[str]]]:
    """A proxy before the store, and its process."""
    command = [sys.executable, "-c", _SLOW, url, str(_BYTES_PER_SECOND)]
    with subprocess.Popen(
        command, cwd=_SUPPORT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        if process.stdout is None:
            raise RuntimeError("the proxy has no output")
        try:
            yield process.stdout.readline().strip(), process
        finally:
            process.kill()  # its threads may still hold requests back


def _blocked(
    path: str, items: dict[str, object], far: str | None, control: subprocess.Popen[str]
) -> list[float]:
    import functional_ckpt as fc

    def tell(how: str) -> None:
        if control.stdin is not None:
            control.stdin.write(f"{how}\n")
            control.stdin.flush()

    found: list[float] = []
    tell(str(_BYTES_PER_SECOND))
    tiers = [] if far is None else [fc.Tier(path=far)]
    with fc.CheckpointManager(path, keep_policy=fc.policies.LatestN(1), tiers=tiers) as manager:
        for step in range(_NUM_SAVES):
            found.append(meters.seconds(functools.partial(manager.save, step, items)))
            while manager.is_saving_in_progress():
                time.sleep(0.01)  # for the near tier alone: `wait_until_finished` waits for both
        tell("fast")  # the rest may pass: measuring has ended
    return found[_NUM_WARM:]
