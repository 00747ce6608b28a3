"""One measurement in a process of its own: `python -m benchmarks.child MEASURE WORKLOAD PEER ...`.

Prints one line of JSON last: the figures, or why there are none.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.async_peers import SkipMeasure

__all__ = ["main"]

# Libraries of peers; without them a peer is skipped.
_OPTIONAL = ("jax", "orbax", "safetensors", "torch_checkpointing")


def _measures() -> Mapping[str, Callable[[argparse.Namespace], dict[str, Any]]]:
    from benchmarks import cuda, latency, limits, loop, measures, ranks, tier

    return {
        "limits": lambda to: limits.measure(to.divisor, to.root),
        "latency": lambda to: latency.measure(to.root),
        "sync": lambda to: measures.measure_sync(to.peer, to.workload, to.divisor, to.root),
        "async": lambda to: measures.measure_async(to.peer, to.workload, to.divisor, to.root),
        "ranks": lambda to: ranks.measure(to.peer, to.workload, to.divisor, to.root),
        "loop": lambda to: loop.measure(to.workload, to.divisor, to.root),
        "tier": lambda to: tier.measure(to.divisor, to.root),
        "cuda": lambda to: cuda.measure(to.workload, to.divisor, to.root),
    }


def main(arguments: list[str] | None = None) -> None:
    """Measures and prints `{"figures": ...}`, `{"skipped": why}` or `{"error": what}`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("measure")
    parser.add_argument("workload")
    parser.add_argument("peer")
    parser.add_argument("--divisor", type=int, default=1)
    parser.add_argument("--root", required=True)
    to = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        found: dict[str, Any] = {"figures": _measures()[to.measure](to)}
    except SkipMeasure as reason:
        found = {"skipped": str(reason)}
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _OPTIONAL:
            raise
        found = {"skipped": f"{error.name} is not installed"}
    except Exception as error:  # noqa: BLE001 - one system's failure is a result, not the end of the run
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
    sys.exit(0)
