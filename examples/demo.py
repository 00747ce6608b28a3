#!/usr/bin/env python3
"""A training run that is killed in the middle of its saves ends as if nothing had happened.

    scripts/demo [--num_kills 3] [--num_steps 300] [--workdir runs/demo]

1. Trains examples/train_digits.py without a break, as the reference.
2. Trains the same with kill -9 in the middle of saves, and resumes each time.
3. Compares the ends, bit for bit: weights, optimizer, schedule, random numbers, data, loss curve.
4. Opens the last step with Orbax under JAX, and runs the network there.

Exits 1 if anything differs.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import compare
import demonstrating
from absl import flags
from demonstrating import TMP_SUFFIX, DemoError, console
from rich.table import Table

FLAGS = flags.FLAGS

flags.DEFINE_string("workdir", "runs/demo", "Where the two runs are; emptied first.")
flags.DEFINE_integer("num_steps", 300, "Batches to train on.", lower_bound=20)
flags.DEFINE_integer("num_kills", 3, "How often a save is cut off.", lower_bound=1)
flags.DEFINE_integer("save_interval_steps", 10, "Steps between checkpoints.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Of the training and of the moments of the kills.")
flags.DEFINE_bool("compare_only", False, "Train nothing: look at the two runs that are there.")

EXAMPLES = Path(__file__).resolve().parent


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TornSave:
    """The state after a kill during a save.

    Attributes:
        step: The step that was being saved.
        num_files: Files of it that were there.
        committed: The latest complete step.
    """

    step: int
    num_files: int
    committed: int | None


class Run:
    """One run of train_digits.py in a directory of its own, as a process that can be killed."""

    def __init__(self, workdir: Path) -> None:
        self.workdir = workdir
        self.checkpoints = workdir / "checkpoints"
        self._log = workdir / "log.txt"

    def start(self) -> subprocess.Popen[bytes]:
        """Starts, or resumes, the training."""
        command = [
            *(sys.executable, EXAMPLES / "train_digits.py"),
            f"--workdir={self.workdir}",
            f"--num_steps={FLAGS.num_steps}",
            f"--ckpt_save_every={FLAGS.save_interval_steps}",
            f"--seed={FLAGS.seed}",
        ]
        self.workdir.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log)

    def finish(self) -> float:
        """Trains to the end; returns the seconds it took."""
        begin = time.monotonic()
        if self.start().wait() != 0:
            raise DemoError(f"The training failed:\n{self._log.read_text()[-2000:]}")
        return time.monotonic() - begin

    def kill_in_save(self, num_saves: int, delay_seconds: float) -> TornSave | None:
        """Trains until a save is under way, and kills the process then and there.

        Args:
            num_saves: Which save to cut off, counted from the start of the process.
            delay_seconds: Time after the start of the save.

        Returns:
            The state; None when the save was faster, or the training was over.
        """
        process = self.start()
        try:
            # Leftovers of the last kill are not a new save: the process removes them first.
            stale = self._unfinished()
            under_way: set[str] = set()
            while process.poll() is None:
                found = self._unfinished()
                stale &= found
                if started := found - stale - under_way:
                    num_saves -= len(started)
                if num_saves <= 0:
                    time.sleep(delay_seconds)
                    break
                under_way = found - stale
                time.sleep(0.0002)  # a save takes a hundred times as long
        finally:
            process.kill()
            process.wait()
        torn = self._unfinished()
        if not torn:
            return None
        name = torn.pop()
        steps = [int(path.name) for path in self.checkpoints.iterdir() if path.name.isdigit()]
        return TornSave(
            step=int(name.partition(TMP_SUFFIX)[0]),
            num_files=sum(len(files) for _, _, files in os.walk(self.checkpoints / name)),
            committed=max(steps, default=None),
        )

    def _unfinished(self) -> set[str]:
        try:
            return {name for name in os.listdir(self.checkpoints) if TMP_SUFFIX in name}
        except FileNotFoundError:
            return set()


def train_with_kills(run: Run) -> list[TornSave]:
    """Kills the run repeatedly; each time it resumes from the last complete step."""
    chance = random.Random(FLAGS.seed)
    torn_saves: list[TornSave] = []
    longest_seconds = 0.03
    for _ in range(10 * FLAGS.num_kills):
        torn = run.kill_in_save(chance.randint(3, 5), chance.uniform(0, longest_seconds))
        if torn is None:
            longest_seconds /= 2  # the disk is faster than that
            continue
        torn_saves.append(torn)
        console.print(
            f"   killed while saving step {torn.step} ({torn.num_files} files written): "
            f"back to step {torn.committed}"
        )
        if len(torn_saves) == FLAGS.num_kills:
            return torn_saves
    raise DemoError("The saves were over before they could be cut off; try more --num_steps.")


def show(result: compare.Comparison) -> None:
    """Prints the comparison, item by item."""
    table = Table("item", "leaves", "", box=None, padding=(0, 2), header_style="dim")
    wrong = {text.partition(":")[0].partition(".")[0] for text in result.differences}
    rows = [*result.num_leaves.items(), ("curve", result.num_losses)]
    for item, count in rows:
        verdict = "[red]differs" if item in wrong else "[green]the same, bit for bit"
        table.add_row(item, f"{count}", verdict)
    console.print(table)


def run_tool(command: Iterable[str | Path]) -> str:
    """Runs a program to its end; its last line of output."""
    done = subprocess.run([*command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise DemoError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr[-2000:]}")
    return done.stdout.strip().splitlines()[-1]


def train_both(reference: Run, interrupted: Run) -> None:
    """Trains once without a break, and once with kills."""
    console.print(f"[bold]1. The reference:[/] {FLAGS.num_steps} steps on handwritten digits")
    seconds = reference.finish()
    console.print(f"   never interrupted, {seconds:.0f} s")
    console.print("[bold]2. The same training, with kill -9 in the middle of saves[/]")
    torn = train_with_kills(interrupted)
    interrupted.finish()
    console.print(f"   killed and resumed {len(torn)} times, then finished")


def compare_ends(reference: Run, interrupted: Run) -> int:
    """Compares the two runs; returns their last step."""
    console.print("[bold]3. The two ends, compared[/]")
    result = compare.compare(reference.workdir, interrupted.workdir)
    show(result)
    if result.differences:
        raise DemoError("The runs differ:\n" + "\n".join(result.differences))
    return result.step


def open_in_orbax(run: Run, step: int) -> None:
    """Opens a step with Orbax in a process that has JAX, and runs the network there."""
    console.print(f"[bold]4. Step {step}, opened with Orbax under JAX[/]")
    script = EXAMPLES / "open_in_orbax.py"
    opened = json.loads(run_tool([sys.executable, script, run.checkpoints, str(step)]))
    console.print(f"   {opened['leaves']} of {opened['leaves']} leaves equal PyTorch's")
    console.print(f"   the network, run in JAX: {opened['accuracy']:.2%} of the test images right")


def list_steps(run: Run) -> None:
    """The output of `fckpt ls` for the run."""
    console.print(f"[bold]$ fckpt ls {run.checkpoints}[/]", soft_wrap=True)
    command = [sys.executable, "-m", "functional_ckpt.cli", "ls", str(run.checkpoints)]
    if subprocess.run(command, check=False).returncode != 0:
        raise DemoError("fckpt ls failed.")


def demo(workdir: Path) -> None:
    begin = time.monotonic()
    reference, interrupted = Run(workdir / "reference"), Run(workdir / "interrupted")
    if not FLAGS.compare_only:
        for run in (reference, interrupted):
            shutil.rmtree(run.workdir, ignore_errors=True)
        train_both(reference, interrupted)
    step = compare_ends(reference, interrupted)
    open_in_orbax(interrupted, step)
    list_steps(interrupted)
    seconds = time.monotonic() - begin
    console.print(f"[bold green]Nothing was lost.[/] {seconds:.0f} s, everything is in {workdir}")


if __name__ == "__main__":
    demonstrating.run(demo)
