#!/usr/bin/env python3
"""A run on four ranks is killed, resumes on two, is killed again, and ends on three.

    scripts/demo_distributed [--num_steps 60] [--workdir runs/demo_distributed]

1. Trains examples/train_fsdp.py on 4 ranks (FSDP2 over 2 x tensor parallelism over 2) without a
   break, as the reference.
2. Trains the same, with kill -9 of every process in the middle of saves: on 4 ranks, then on 2,
   then on 3, each time over another mesh.
3. Compares the state of each resumed run, before its first step, with the checkpoint as read by one
process, bit for bit.
4. Compares the loss curves and the last weights: equal up to the order in which floats are added.

Exits 1 if anything differs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import compare
import demonstrating
import torch
from absl import flags
from demonstrating import TMP_SUFFIX, DemoError, console
from rich.table import Table
from rich.text import Text

import functional_ckpt as fc

FLAGS = flags.FLAGS

flags.DEFINE_string("workdir", "runs/demo_distributed", "Where the two runs are; emptied first.")
flags.DEFINE_integer("num_steps", 60, "Batches to train on.", lower_bound=24)
flags.DEFINE_integer("save_interval_steps", 5, "Steps between checkpoints.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Of the training.")
flags.DEFINE_float("loss_tolerance", 1e-5, "How far two losses of a step may be apart.", 0.0)
flags.DEFINE_float("weight_tolerance", 1e-4, "How far two of the last weights may be apart.", 0.0)
flags.DEFINE_bool("compare_only", False, "Train nothing: look at the two runs that are there.")

EXAMPLES = Path(__file__).resolve().parent
ROOT = EXAMPLES.parent
TIMEOUT_SECONDS = 600.0
COLOURS = ("cyan", "magenta", "yellow")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """How many ranks share data, and how many share each layer."""

    data: int
    tensor: int

    @property
    def num_ranks(self) -> int:
        return self.data * self.tensor

    def __str__(self) -> str:
        return f"{self.data} x {self.tensor}"


MESHES = (Mesh(data=2, tensor=2), Mesh(data=1, tensor=2), Mesh(data=3, tensor=1))


class Run:
    """One run of train_fsdp.py in a directory of its own, as processes that can be killed."""

    def __init__(self, workdir: Path, text: Path) -> None:
        self.workdir = workdir
        self.checkpoints = workdir / "checkpoints"
        self._text = text
        self._log = workdir / "log.txt"

    def restored(self, mesh: Mesh) -> Path:
        """The directory of a resumed run's restored state."""
        return self.workdir / f"restored_on_{mesh.num_ranks}"

    def start(self, mesh: Mesh) -> subprocess.Popen[bytes]:
        """Starts, or resumes, the training on as many ranks as the mesh has."""
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc-per-node={mesh.num_ranks}", EXAMPLES / "train_fsdp.py"),
            f"--tp_size={mesh.tensor}",
            f"--workdir={self.workdir}",
            f"--restored_dir={self.restored(mesh)}",
            f"--text={self._text}",
            "--num_blocks=1",
            f"--num_steps={FLAGS.num_steps}",
            f"--ckpt_save_every={FLAGS.save_interval_steps}",
            f"--seed={FLAGS.seed}",
        ]
        self.workdir.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with self._log.open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def finish(self, mesh: Mesh) -> float:
        """Trains to the end; returns the seconds it took."""
        begin = time.monotonic()
        process = self.start(mesh)
        try:
            returncode = process.wait(TIMEOUT_SECONDS)
        finally:
            kill_tree(process)
        if returncode != 0:
            raise DemoError(f"The training failed:\n{self._log.read_text()[-3000:]}")
        return time.monotonic() - begin

    def kill_in_save(self, mesh: Mesh, num_steps: int) -> None:
        """Trains, and kills every process in the first save after `num_steps` steps."""
        stale = self.unfinished()  # of an earlier kill: the next writer removes it
        process = self.start(mesh)

        def is_time() -> bool:
            if process.poll() is not None:
                raise DemoError(f"The training ended early:\n{self._log.read_text()[-3000:]}")
            return self.num_losses() >= num_steps and bool(self.unfinished() - stale)

        try:
            wait_until(is_time)
            time.sleep(0.02)  # let the ranks write something
        finally:
            kill_tree(process)

    def num_losses(self) -> int:
        """Steps in the loss curve."""
        with contextlib.suppress(FileNotFoundError):
            return (self.workdir / "curve.jsonl").read_bytes().count(b"\n")
        return 0

    def losses(self) -> list[float]:
        """The loss curve.

        Raises:
            DemoError: A step is missing, or there twice.
        """
        lines = (self.workdir / "curve.jsonl").read_text().splitlines()
        curve = [json.loads(line) for line in lines]
        if [point["step"] for point in curve] != list(range(FLAGS.num_steps)):
            raise DemoError(f"{self.workdir}/curve.jsonl is not {FLAGS.num_steps} steps in order.")
        return [point["loss"] for point in curve]

    def steps(self) -> list[int]:
        """The committed steps."""
        with fc.CheckpointManager(self.checkpoints, read_only=True) as manager:
            return manager.all_steps()

    def unfinished(self) -> set[str]:
        """Saves that have started and are not committed."""
        with contextlib.suppress(FileNotFoundError):
            return {name for name in os.listdir(self.checkpoints) if TMP_SUFFIX in name}
        return set()


# --------------------------------------------------------------------------------- processes


def wait_until(condition: Callable[[], bool]) -> None:
    """Looks again and again.

    Raises:
        DemoError: It took too long.
    """
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise DemoError(f"Nothing happened for {TIMEOUT_SECONDS:.0f} seconds.")
        time.sleep(0.001)


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """SIGKILLs torchrun and the ranks it started, none of which can notice before it is gone."""
    pids = children(process.pid)
    process.kill()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    wait_until(lambda: not any(map(is_running, pids)))  # a dying process still has its locks


def children(pid: int) -> list[int]:
    """The processes that a process started."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return [*map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    return []


def is_running(pid: int) -> bool:
    """Whether a process is alive, and not a zombie."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "XZ"
    return False


# --------------------------------------------------------------------------------- the story


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """A run that resumed where another was killed.

    Attributes:
        mesh: Its mesh.
        step: The step it restored.
    """

    mesh: Mesh
    step: int


def copy_text(folder: Path) -> None:
    """The repository's README and documentation, as they are now: a run must not lose its text."""
    folder.mkdir(parents=True)
    for file in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        shutil.copy(file, folder / "-".join(file.relative_to(ROOT).parts))


def train_reference(run: Run) -> None:
    """Trains without a break."""
    mesh = MESHES[0]
    console.print(f"[bold]1. The reference:[/] {FLAGS.num_steps} steps on {describe(mesh)}")
    console.print(f"   never interrupted, {run.finish(mesh):.0f} s")


def train_with_kills(run: Run) -> None:
    """Trains on one mesh after the other; all but the last run are killed."""
    console.print("[bold]2. The same training, with kill -9 of all processes at once[/]")
    for index, mesh in enumerate(MESHES[:-1], start=1):
        run.kill_in_save(mesh, FLAGS.num_steps * index // len(MESHES))
        console.print(f"   [{COLOURS[index - 1]}]{describe(mesh)}[/]: {what_is_left(run)}")
        # The next run prunes steps: its restored state is compared afterwards.
        step = str(run.steps()[-1])
        shutil.copytree(run.checkpoints / step, kept_steps(run, MESHES[index]) / step)
    seconds = run.finish(MESHES[-1])
    console.print(f"   [{COLOURS[-1]}]{describe(MESHES[-1])}[/]: finished, {seconds:.0f} s")


def kept_steps(run: Run, mesh: Mesh) -> Path:
    """Where there is a copy of the step that the run on `mesh` restores."""
    return run.workdir / f"step_for_{mesh.num_ranks}"


def describe(mesh: Mesh) -> str:
    return f"{mesh.num_ranks} ranks (FSDP {mesh.data} x TP {mesh.tensor})"


def what_is_left(run: Run) -> str:
    """Describes the state of a run after a kill."""
    committed = run.steps()[-1]
    lost = run.num_losses() - 1 - committed
    torn = sorted(run.unfinished())
    if not torn:
        return f"killed {lost} steps after step {committed} was committed"
    folder = run.checkpoints / torn[-1]
    num_files = sum(len(files) for _, _, files in os.walk(folder))
    step = torn[-1].partition(TMP_SUFFIX)[0]
    return f"killed while saving step {step} ({num_files} files written): back to step {committed}"


# --------------------------------------------------------------------------------- comparing


def compare_restored(run: Run) -> list[Resumed]:
    """Compares the restored state of each resumed run with that read by a single process."""
    console.print("[bold]3. The restored state of the ranks, gathered[/]")
    table = Table("", "step", "leaves", "bytes", "", box=None, padding=(0, 2), header_style="dim")
    resumed: list[Resumed] = []
    differences: list[str] = []
    for before, mesh in itertools.pairwise(MESHES):
        gathered = dict(compare.leaves(dict(fc.restore(run.restored(mesh)))))
        (kept,) = kept_steps(run, mesh).iterdir()
        read = dict(compare.leaves(dict(fc.restore(kept, only=["model", "optimizer"]))))
        wrong = [
            name
            for name in {**gathered, **read}
            if name not in gathered
            or name not in read
            or not compare.is_same(gathered[name], read[name])
        ]
        num_bytes = sum(leaf.nbytes for leaf in read.values() if isinstance(leaf, torch.Tensor))
        verdict = "[red]differ" if wrong else "[green]the same, bit for bit"
        table.add_row(
            f"from {before} to {mesh}", kept.name, f"{len(read)}", f"{num_bytes:,}", verdict
        )
        differences += [f"restored on {mesh.num_ranks} ranks: {name}" for name in wrong]
        resumed.append(Resumed(mesh=mesh, step=int(kept.name)))
    console.print(table)
    if differences:
        raise DemoError("\n".join(differences))
    return resumed


def compare_curves(reference: Run, run: Run, resumed: Sequence[Resumed]) -> None:
    """Shows the curve, run by run, and how far it is from the reference's."""
    console.print("[bold]4. The loss curve, against that of the run that was never stopped[/]")
    expected, losses = reference.losses(), run.losses()
    starts = [0, *(each.step + 1 for each in resumed), FLAGS.num_steps]
    console.print(chart(losses, starts))
    table = Table("", "steps", "largest difference", "", box=None, padding=(0, 2))
    table.columns[0].header_style = "dim"
    table.header_style = "dim"
    too_far: list[str] = []
    for mesh, colour, (start, end) in zip(MESHES, COLOURS, itertools.pairwise(starts), strict=True):
        pairs = zip(losses[start:end], expected[start:end], strict=True)
        largest = max(abs(one - other) for one, other in pairs)
        is_near = largest <= FLAGS.loss_tolerance
        if not is_near:
            too_far.append(f"steps {start} to {end - 1}: the losses are {largest:.2g} apart")
        verdict = f"[green]within {FLAGS.loss_tolerance:g}" if is_near else "[red]too far"
        table.add_row(
            f"[{colour}]{describe(mesh)}", f"{start} to {end - 1}", f"{largest:.1e}", verdict
        )
    console.print(table)
    if too_far:
        raise DemoError("\n".join(too_far))


def chart(losses: Sequence[float], starts: Sequence[int], height: int = 8) -> Text:
    """The curve in characters, in the colour of the run that computed each point."""
    width = min(len(losses), 72)
    low, high = min(losses), max(losses)
    rows = [[" "] * width for _ in range(height)]
    styles = [""] * width
    for column in range(width):
        step = column * (len(losses) - 1) // max(width - 1, 1)
        row = round((high - losses[step]) / max(high - low, 1e-9) * (height - 1))
        rows[row][column] = "●"
        phase = sum(step >= start for start in starts[1:-1])
        styles[column] = COLOURS[phase]
    text = Text()
    for index, row in enumerate(rows):
        label = {0: f"{high:.2f}", height - 1: f"{low:.2f}"}.get(index, "")
        text.append(f"   {label:>5} ", style="dim")
        for character, style in zip(row, styles, strict=True):
            text.append(character, style=style)
        text.append("\n")
    text.rstrip()
    return text


def compare_ends(reference: Run, run: Run) -> None:
    """How far the last weights are apart."""
    last = FLAGS.num_steps - 1
    weights = [fc.restore(each.checkpoints / str(last))["model"] for each in (reference, run)]
    if weights[0].keys() != weights[1].keys():
        raise DemoError("The two runs end with other parameters.")
    largest = max((weights[0][name] - weights[1][name]).abs().max().item() for name in weights[0])
    console.print(
        f"   after step {last}, no weight differs from its twin by more than {largest:.1e}"
    )
    if not largest <= FLAGS.weight_tolerance:
        raise DemoError(f"The last weights are {largest:.2g} apart.")


def demo(workdir: Path) -> None:
    begin = time.monotonic()
    text = workdir / "text"
    reference, interrupted = Run(workdir / "reference", text), Run(workdir / "interrupted", text)
    if not FLAGS.compare_only:
        for folder in (text, reference.workdir, interrupted.workdir):
            shutil.rmtree(folder, ignore_errors=True)
        copy_text(text)
        train_reference(reference)
        train_with_kills(interrupted)
    resumed = compare_restored(interrupted)
    compare_curves(reference, interrupted, resumed)
    compare_ends(reference, interrupted)
    seconds = time.monotonic() - begin
    console.print(
        f"[bold green]One run, on 4, 2 and 3 ranks.[/] {seconds:.0f} s, everything is in {workdir}"
    )


if __name__ == "__main__":
    demonstrating.run(demo)
