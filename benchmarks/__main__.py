"""`scripts/bench [--quick]`: each measurement in a child process, peers interleaved."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import peers, report, workloads

Figures = dict[str, list[dict[str, Any]]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints a table, and writes JSON and Markdown."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="an eighth of the data, fewer rounds")
    parser.add_argument("--rounds", type=int, help="measurements of each (default 5, quick 3)")
    parser.add_argument("--workloads", nargs="*", default=list(workloads.WORKLOADS))
    parser.add_argument("--peers", nargs="*", default=list(peers.PEERS))
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--dir", help="where to write the checkpoints (default: a temporary one)")
    options = parser.parse_args(arguments)
    rounds = options.rounds or (3 if options.quick else 5)
    divisor = 8 if options.quick else 1
    found: Figures = {}
    with tempfile.TemporaryDirectory(dir=options.dir or os.getcwd(), prefix=".bench-") as root:
        for index in range(rounds):
            for name, words in _measurements(options.peers, options.workloads):
                print(f"round {index + 1}/{rounds}: {name}", file=sys.stderr)
                found.setdefault(name, []).append(_run([words[0], root, str(divisor), *words[1:]]))
    machine = f"{os.cpu_count()} cores, {platform.system()} {platform.release()}"
    summary = {
        "machine": machine,
        "rounds": rounds,
        "quick": options.quick,
        "medians": {name: _summary(figures) for name, figures in found.items()},
        "figures": found,
    }
    text = report.markdown(summary)
    options.out.mkdir(parents=True, exist_ok=True)
    stem = "quick" if options.quick else "full"
    (options.out / f"{stem}.json").write_text(json.dumps(summary, indent=1))
    (options.out / f"{stem}.md").write_text(text)
    print(text)
    return 0


def _measurements(names: Sequence[str], loads: Sequence[str]) -> list[tuple[str, list[str]]]:
    listed = [("limits", ["limits"]), ("latency", ["latency"])]
    for load in loads:
        listed += [(f"{load}/{name}", [name, load]) for name in names]
        listed.append((f"{load}/blocked", ["blocked", load]))
    return listed


def _run(words: Sequence[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.child", *words]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _summary(figures: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    return {
        key: {
            "median": statistics.median(each[key] for each in figures),
            "min": min(each[key] for each in figures),
            "max": max(each[key] for each in figures),
        }
        for key in figures[0]
    }


if __name__ == "__main__":
    sys.exit(main())
