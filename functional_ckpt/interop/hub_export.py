"""The export of a step as a directory of weights: planned, written, published.

Free of torch as far as no tensor is converted: a command starts in a tenth of the time.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Mapping
from typing import Any

from functional_ckpt import errors
from functional_ckpt.core.files.hub_configs import CONFIGS
from functional_ckpt.distributed.collective import collective, fails_on_all
from functional_ckpt.distributed.coordinator import Coordinator, SingleProcess
from functional_ckpt.interop import export_workers, plain_files, store_export
from functional_ckpt.interop.atomic_output import atomic_output, check_replaceable
from functional_ckpt.interop.hf_config import Config, read_config
from functional_ckpt.interop.hub_files import Output
from functional_ckpt.interop.hub_options import FileFormat, Options, is_weights
from functional_ckpt.interop.weights import Weights
from functional_ckpt.storage.local import LocalStorage
from functional_ckpt.storage.paths import is_remote, resolve


def export(
    step: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    item: str = "model",
    max_shard_size: int | str | None = None,
    like: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    key_prefix: str = "",
    variant: str | None = None,
    format: FileFormat = "safetensors",
    config: Config | None = None,
    overwrite: bool = False,
    num_workers: int = 1,
    process_group: Any = None,
) -> None:
    """Exports as `huggingface.export` does; a dtype is given by its name in torch."""
    if num_workers < 1 or (num_workers > 1 and process_group is not None):
        raise errors.UsageError("Pass num_workers of at least 1, or process_group; not both.")
    target = resolve(path)
    is_stored = is_remote(target)
    if is_stored:
        if overwrite or process_group is not None:
            raise errors.UsageError(
                f"{target}: an export into a store overwrites nothing, and is made by num_workers "
                "and not by ranks.",
                path=target,
            )
        store_export.check(target)
    group = _ranks(process_group)
    options = Options.of(path, max_shard_size, key_prefix, variant, format, like)
    job = export_workers.Job(
        step=os.fspath(step),
        item=item,
        options=options,
        dtype=dtype,
        num_writers=max(num_workers, group.num_ranks),
        takes_files=not is_stored,
    )
    with export_workers.started(1 if is_stored else num_workers) as workers:
        with fails_on_all(group, "export"):
            output, texts = job.output()
            checked(output.given, options, path)
            texts = texts if config is None else read_config(config)
        if is_stored:
            store_export.write(job.step, item, output, target, texts, num_workers=num_workers)
            return

        def write_files(tmp: str) -> None:
            if workers is not None:
                export_workers.run(workers, job, output, tmp)
            elif (plain := output.plain_files(tmp, group.rank, group.num_ranks)) is not None:
                plain_files.write_files(job.step, item, plain)
            else:
                output.write(tmp, group.rank, group.num_ranks)

        write(output, path, texts, write_files, overwrite=overwrite, group=group)


def _ranks(process_group: Any) -> Coordinator:
    if process_group is None:
        return SingleProcess()
    from functional_ckpt.distributed.torch_store import default_coordinator

    return default_coordinator(process_group)


def checked(given: Weights, options: Options, path: str | os.PathLike[str]) -> Weights:
    """Returns the tensors; raises `UnsupportedLeafError` for those that the format cannot store."""
    if options.format == "safetensors":
        plain_files.require(given.dtypes.items(), path)
    return given


def write(
    output: Output,
    path: str | os.PathLike[str],
    texts: Mapping[str, str],
    write_files: Callable[[str], None],
    *,
    overwrite: bool,
    group: Coordinator | None = None,
) -> None:
    """Writes and publishes the output; the primary makes the directory and the small files."""
    group = group or SingleProcess()
    with contextlib.ExitStack() as publishing:
        with collective(group, "start an export", lambda values: values[0]) as turn:
            if group.rank == 0:
                tmp = publishing.enter_context(_opened(output, path, texts, overwrite=overwrite))
                turn.value = tmp.encode()
        tmp = turn.outcome.decode()
        with collective(group, "write an export"):
            write_files(tmp)
        with collective(group, "publish an export"):
            publishing.close()


@contextlib.contextmanager
def _opened(
    output: Output, path: str | os.PathLike[str], texts: Mapping[str, str], *, overwrite: bool
) -> Generator[str]:
    """Gives the path to write at; writes the index, and publishes, at the end."""
    if overwrite:
        check_replaceable(path, lambda name: name in CONFIGS or is_weights(name))
    storage = LocalStorage()
    with atomic_output(path, storage, overwrite=overwrite) as tmp:
        if not output.options.is_one_file:
            storage.make_directory(tmp)
            for name, text in texts.items():
                storage.write(os.path.join(tmp, name), text.encode())
        yield tmp
        output.write_index(tmp)
