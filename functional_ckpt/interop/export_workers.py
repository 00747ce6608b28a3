"""Processes that write the files of one export; each opens the step by itself."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import os
from collections.abc import Generator
from concurrent.futures.process import BrokenProcessPool

from functional_ckpt import errors
from functional_ckpt.core.files.hub_configs import RUNTIME, with_dtype
from functional_ckpt.format import checkpoint_dir
from functional_ckpt.interop import hub_weights, plain_files, stored_files, weights
from functional_ckpt.interop.hub_files import Output
from functional_ckpt.interop.hub_options import Options
from functional_ckpt.storage.open import connect


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """An export, as every worker plans it by itself.

    Attributes:
        step: The step.
        item: Its item.
        options: How its tensors are written.
        dtype: The dtype of floating-point tensors; None for that of each.
        num_writers: The number of processes.
        takes_files: Whether data files of the step may be files of the output.
    """

    step: str
    item: str
    options: Options
    dtype: str | None
    num_writers: int
    takes_files: bool = True

    def output(self) -> tuple[Output, dict[str, str]]:
        """Returns the files to write, and the step's own configuration files by name."""
        opened = checkpoint_dir.open_checkpoint(*connect(self.step))
        given = weights.of_step(opened, self.item)
        configs = stored_files.configs_of(opened.tree(self.item))
        texts = {name.removeprefix(RUNTIME): text for name, text in configs.items()}
        stored = stored_files.of_item(opened, self.item)
        is_copied = stored is not None and stored.is_on_hub and self.options.takes(stored)
        is_copied = is_copied and self.takes_files
        if stored is None or not is_copied or self.dtype is not None:
            held = [] if stored is None else [n for names in stored.names.values() for n in names]
            given = hub_weights.of_config(given, texts.get("config.json"), held)
            stored = None
        if self.dtype is not None:
            given = given.cast(self.dtype)
            texts = {name: with_dtype(text, self.dtype) for name, text in texts.items()}
        return Output.of(given, self.options, stored, num_writers=self.num_writers), texts


@contextlib.contextmanager
def started(num_workers: int) -> Generator[concurrent.futures.Executor | None]:
    """Gives that many new processes, which start while the export is planned; None for one.

    A process imports torch only if tensors are converted.
    """
    if num_workers == 1:
        yield None
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        num_workers, mp_context=context, initializer=plain_files.end_with_parent
    ) as pool:
        pool.submit(os.getpid)  # starts all of them
        yield pool


def run(workers: concurrent.futures.Executor, job: Job, output: Output, path: str) -> None:
    """Writes the files of an export in processes; nothing is durable yet.

    Raises:
        StorageError: A process was killed. None runs any more, as after other errors.
    """
    writing: list[concurrent.futures.Future[None]] = []
    try:
        for number in range(job.num_writers):
            plain = output.plain_files(path, number, job.num_writers)
            if plain is None:
                writing.append(workers.submit(_write, job, path, number))
            else:
                writing.append(workers.submit(plain_files.write_files, job.step, job.item, plain))
        for each in concurrent.futures.as_completed(writing):
            each.result()
    except BrokenProcessPool as error:
        raise errors.StorageError(
            f"{path}: a worker of the export was killed, perhaps for its memory; nothing was "
            "written.",
            path=path,
        ) from error
    finally:
        concurrent.futures.wait(writing)


def _write(job: Job, path: str, number: int) -> None:
    output, _ = job.output()
    output.write(path, number, job.num_writers)
