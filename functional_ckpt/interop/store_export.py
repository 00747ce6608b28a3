"""The export of a step into S3: complete, or nothing. Free of torch."""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool

from functional_ckpt import errors
from functional_ckpt.format import checkpoint_dir
from functional_ckpt.interop import part_files, plain_files
from functional_ckpt.interop.hub_files import Output
from functional_ckpt.interop.part_files import Sent
from functional_ckpt.interop.plain_files import PlainFile
from functional_ckpt.storage import queries
from functional_ckpt.storage.base import Stat, Storage
from functional_ckpt.storage.open import connect


def check(path: str) -> None:
    """Raises an error unless an export can be made at a URI.

    Raises:
        StepExistsError: Something is there.
        UsageError: It is in a store that cannot put files together.
    """
    part_files.uploads_of(path)
    storage, found = connect(path)
    if queries.exists(storage, found):
        raise errors.StepExistsError(
            f"{found} exists and is never overwritten; remove it or choose another path.",
            path=found,
        )


def write(
    step: str,
    item: str,
    output: Output,
    path: str,
    texts: Mapping[str, str],
    *,
    num_workers: int,
) -> None:
    """Makes the files of an export; the index is the last one.

    Args:
        step: The step. Within S3 large runs of bytes are copied by the store, and not verified.
        item: Its item.
        output: The files.
        path: The URI, where nothing is.
        texts: Small files, by name.
        num_workers: The number of processes.

    Raises:
        UsageError: Tensors are to be converted, which takes a local path.
        StorageError: The store refuses, or a worker was killed; nothing is left.
    """
    shares = [output.plain_files(path, rank, num_workers) for rank in range(num_workers)]
    if any(share is None for share in shares):
        raise errors.UsageError(
            f"{path}: tensors are converted, or written in torch's format, at local paths only. "
            "Export without --dtype, or to a local path.",
            path=path,
        )
    storage, _ = connect(path)
    uploads = part_files.uploads_of(path)
    sources = _sources(step, item) if part_files.is_s3(step) else {}
    versions = {name: stat.version for name, stat in sources.items() if stat.version is not None}
    begun: dict[str, str] = {}
    written: list[str] = []

    def publish(name: str, action: Callable[[], object]) -> None:
        try:
            action()
        except errors.StepExistsError:
            raise  # the object is another writer's
        except BaseException:
            written.append(name)
            raise
        written.append(name)

    try:
        for share in shares:
            for file in share or ():
                begun[file.path] = uploads.start(file.path)
        jobs = [[(file, begun[file.path]) for file in share or ()] for share in shares]
        sent = _send(step, item, [job for job in jobs if job], versions, path)
        _check_same(step, item, sources)
        small = {} if output.options.is_one_file else texts
        for name, text in small.items():
            _publish_new(storage, os.path.join(path, name), text.encode(), publish)
        for name, found in sent.items():
            publish(name, lambda n=name, f=found: uploads.complete(n, begun[n], f.tags))
            del begun[name]
            _check_size(storage, name, found)
        if (data := output.index_content()) is not None:
            _publish_new(storage, os.path.join(path, output.options.index), data, publish)
    except BaseException:
        for name, upload in begun.items():
            with contextlib.suppress(errors.CheckpointError):
                uploads.abort(name, upload)
        for name in written:
            with contextlib.suppress(errors.CheckpointError):
                storage.remove(name)
        raise


def _send(
    step: str,
    item: str,
    jobs: Sequence[Sequence[tuple[PlainFile, str]]],
    versions: part_files.Versions,
    path: str,
) -> dict[str, Sent]:
    """Has processes send the files, each some of them; one process needs no other."""
    if len(jobs) == 1:
        results = [part_files.send_files(step, item, jobs[0], versions)]
    else:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(
            len(jobs), mp_context=context, initializer=plain_files.end_with_parent
        ) as pool:
            sending = [
                pool.submit(part_files.send_files, step, item, job, versions) for job in jobs
            ]
            try:
                results = [each.result() for each in sending]
            except BrokenProcessPool as error:
                raise errors.StorageError(
                    f"{path}: a worker of the export was killed, perhaps for its memory; nothing "
                    "was written.",
                    path=path,
                ) from error
    names = [[file.path for file, _ in job] for job in jobs]
    return {
        name: sent
        for some, found in zip(names, results, strict=True)
        for name, sent in zip(some, found, strict=True)
    }


def _sources(step: str, item: str) -> dict[str, Stat]:
    """Returns the data files of an item by URI.

    Raises:
        CorruptCheckpointError: One is missing, or of another size than its record says.
    """
    opened = checkpoint_dir.open_checkpoint(*connect(step))
    saved = opened.tree(item)
    records = {} if saved.record is None else saved.record.files
    there = opened.storage.walk(saved.path) if records else {}
    found: dict[str, Stat] = {}
    for name, record in records.items():
        uri = f"{saved.path}/{name}"
        stat = there.get(name)
        size = "nothing" if stat is None else f"{stat.size_bytes:,} bytes"
        if stat is None or stat.size_bytes != record.size_bytes:
            raise errors.CorruptCheckpointError(
                f"{uri}: expected {record.size_bytes:,} bytes, found {size}.", path=uri
            )
        found[uri] = stat
    return found


def _check_same(step: str, item: str, sources: Mapping[str, Stat]) -> None:
    """Raises `StorageError` if an object was replaced: not all services compare the versions."""
    there = _sources(step, item) if sources else {}
    for uri, stat in sources.items():
        if there[uri].version != stat.version:
            raise errors.StorageError(
                f"{uri}: the object changed while the step was exported.", path=uri
            )


def _publish_new(
    storage: Storage,
    path: str,
    data: bytes,
    publish: Callable[[str, Callable[[], object]], None],
) -> None:
    def create() -> None:
        if storage.objects is None or not storage.objects.create(path, data):
            raise errors.StepExistsError(f"{path} exists.", path=path)

    publish(path, create)


def _check_size(storage: Storage, path: str, sent: Sent) -> None:
    stat = storage.stat(path)
    if stat is None or stat.size_bytes != sent.size_bytes:
        size = "nothing" if stat is None else f"{stat.size_bytes:,} bytes"
        raise errors.StorageError(
            f"{path}: expected {sent.size_bytes:,} bytes, the store has {size}.", path=path
        )
