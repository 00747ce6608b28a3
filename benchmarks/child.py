"""One measurement in a process of its own: `python -m benchmarks.child MEASURE WORKLOAD PEER ...`.

Prints one line of JSON last: the figures, or why there are none.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks import schedule
from benchmarks.async_peers import SkipMeasure

__all__ = ["main"]

# Libraries of peers; without them a peer is skipped.
_OPTIONAL = ("jax", "orbax", "safetensors", "torch_checkpointing")


def _measures() -> Mapping[
    str, Callable[[argparse.Namespace], dict[str, Any] | list[dict[str, Any]]]
]:
    from benchmarks import cuda, latency, limits, loop, measures, ranks, tier

    def rounds(measure: Any, to: argparse.Namespace) -> list[dict[str, Any]]:
        return measure(to.peer, to.workload, to.divisor, to.root, to.rounds)

    return {
        "limits": lambda to: [limits.measure(to.divisor, to.root) for _ in range(to.rounds)],
        "latency": lambda to: latency.measure(to.root),
        "sync": functools.partial(rounds, measures.measure_sync),
        "async": functools.partial(rounds, measures.measure_async),
        "ranks": lambda to: ranks.measure(to.peer, to.workload, to.divisor, to.root),
        "loop": lambda to: loop.measure(to.workload, to.divisor, to.root),
        "tier": lambda to: tier.measure(to.divisor, to.root),
        "cuda": lambda to: cuda.measure(to.workload, to.divisor, to.root),
    }


def _import_from(folder: str) -> None:
    """Imports the library from there instead of from this project."""
    sys.path.insert(0, os.path.abspath(folder))
    import functional_ckpt

    if not os.path.abspath(functional_ckpt.__file__).startswith(os.path.abspath(folder) + os.sep):
        raise SystemExit(
            f"{folder} has no functional_ckpt: it came from {functional_ckpt.__file__}"
        )


def main(arguments: list[str] | None = None) -> None:
    """Measures and prints `{"rounds": [...]}`, `{"skipped": why}` or `{"error": what}`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("measure")
    parser.add_argument("workload")
    parser.add_argument("peer")
    parser.add_argument("--divisor", type=int, default=1)
    parser.add_argument("--root", required=True)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--before", help="where the earlier version is installed")
    to = parser.parse_args(arguments)
    if to.peer == schedule.BEFORE:
        _import_from(to.before)
    warnings.simplefilter("ignore")
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        figures = _measures()[to.measure](to)
        found: dict[str, Any] = {"rounds": figures if isinstance(figures, list) else [figures]}
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
