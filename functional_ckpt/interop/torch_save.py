"""Files of `torch.save`, read by `torch.load(weights_only=True)` and nothing else."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime
import os
import re
import zipfile
import zlib
from collections.abc import Generator, Mapping, MutableMapping, Sequence, Set
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from torch.torch_version import TorchVersion
from torch.utils.weak import WeakTensorKeyDictionary

from functional_ckpt import errors
from functional_ckpt.interop import hostile
from functional_ckpt.interop.atomic_output import atomic_output
from functional_ckpt.interop.pickles import Record, UnpicklingError
from functional_ckpt.interop.source import Format, items_of, source_of

_ZIP, _LEGACY = b"PK\x03\x04", b"\x80\x02"
_CONTAINERS = (dict, collections.OrderedDict, list, tuple)
_PLAIN = (bool, int, float, complex, str, bytes)


@dataclasses.dataclass(slots=True)
class _Bytes:
    """The bytes of tensors that share memory.

    Attributes:
        path: Their file.
        crcs: The CRC-32 of each record of this size in it.
        version: The version of the tensors when they were read.
        is_sound: Whether they were compared.
    """

    path: str
    crcs: set[int]
    version: int
    is_sound: bool = False


_read: MutableMapping[torch.Tensor, _Bytes] = WeakTensorKeyDictionary()


class TensorReference:
    """Stands in a file of torch_xla's serialization for a tensor in a file of its own."""

    tid: int


def _numpy_globals() -> list[Any]:
    """Classes in pickled numpy arrays (in RNG states): data, not code."""
    rebuild: Any = np.zeros(1).__reduce__()[0]
    scalar: Any = cast("Any", np.float64(0)).__reduce__()[0]
    kinds = {type(np.dtype(code)) for code in np.typecodes["All"]}
    return [
        np.ndarray,
        np.dtype,
        *kinds,
        # numpy 1 and 2 call the same functions by different names
        *((rebuild, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
        *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    ]


_GLOBALS: list[Any] = [
    *_numpy_globals(),
    datetime.timedelta,  # a span of time and a text, in files of Composer
    TorchVersion,
    (TensorReference, "torch_xla.utils.serialization.TensorReference"),
]

RECORDS: tuple[tuple[Any, str], ...] = tuple(
    (Record, name)
    for name in (
        "argparse.Namespace",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
        "megatron.core.enums.ModelType",
        "megatron.core.transformer.enums.AttnBackend",
        "megatron.core.transformer.enums.CudaGraphScope",
        "signal.Signals",
    )
)
"""Classes in files of DeepSpeed and Megatron; `pickles.plain` returns their objects' fields."""


def fits(path: str) -> bool:
    """Returns whether it is a file that `torch.save` may have written."""
    if not os.path.isfile(path):
        return False
    with hostile.clear_failures(path), open(path, "rb") as file:
        start = file.read(4)
    if start == _ZIP:
        # `load` reports the error of a broken one.
        with (
            contextlib.suppress(errors.CorruptCheckpointError),
            hostile.clear_failures(path),
            zipfile.ZipFile(path) as archive,
        ):
            return any(name.endswith("/data.pkl") for name in archive.namelist())
        return True
    return start.startswith(_LEGACY)


def has_keys(path: str, keys: Set[str]) -> bool:
    """Returns whether it is a file of `torch.save` with these keys; raises as `load` does."""
    if not fits(path):
        return False
    content = load(path)
    return isinstance(content, Mapping) and keys <= cast("Mapping[str, Any]", content).keys()


def load(path: str, *, allowed: Sequence[Any] = ()) -> Any:
    """Returns the content of a file of `torch.save`; its tensors are memory-mapped on the CPU.

    Args:
        path: The file.
        allowed: More classes that it may hold, such as `RECORDS`.

    Raises:
        StepNotFoundError: There is no such file.
        UsageError: It holds a pickled object; nothing was loaded.
        CorruptCheckpointError: It is broken, or no such file.
    """
    hostile.check_file(path)
    with hostile.clear_failures(path), open(path, "rb") as file:
        is_zip = file.read(4) == _ZIP  # older files cannot be mapped
    known = hostile.check_archive(path) if is_zip else {}
    size_bytes = os.path.getsize(path)
    content = load_stream(path, path, size_bytes=size_bytes, mmap=is_zip, allowed=allowed)
    found: dict[int, _Bytes] = {}
    for tensor in hostile.tensors(content):
        if tensor.layout != torch.strided or tensor.is_meta:
            continue
        storage = tensor.untyped_storage()
        # A writer may leave the CRC-32 out: `torch.serialization.set_crc32_options(False)`.
        if (crcs := known.get(storage.nbytes())) and 0 not in crcs:
            bytes_ = _Bytes(path, crcs, tensor._version)
            _read[tensor] = found.setdefault(storage.data_ptr(), bytes_)
    return content


def check_bytes(value: object) -> None:
    """Raises `CorruptCheckpointError` if the CRC-32 of a tensor that `load` returned is wrong.

    Bytes are compared once, and not after a change in memory.
    """
    if not isinstance(value, torch.Tensor):
        return
    found = _read.get(value)
    if found is None or found.is_sound or value._version != found.version:
        return
    data = torch.empty(0, dtype=torch.uint8, device="cpu").set_(value.untyped_storage())
    if zlib.crc32(data.numpy().data) not in found.crcs:
        raise errors.CorruptCheckpointError(
            f"{found.path}: the bytes of a tensor ({value.dtype}, {list(value.shape)}) do not "
            "match their CRC-32 in the file: it is damaged. Copy it again from its source.",
            path=found.path,
        )
    found.is_sound = True


def load_stream(
    file: str | BinaryIO,
    what: str,
    *,
    size_bytes: int,
    mmap: bool = False,
    allowed: Sequence[Any] = (),
) -> Any:
    """Returns the content of a file or stream of `torch.save`; raises as `load`.

    `what` is its name in errors. Mapping takes a path.
    """
    with (
        hostile.clear_failures(what),
        _clear_errors(what),
        torch.serialization.safe_globals([*_GLOBALS, *allowed]),
    ):
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
        hostile.check_repetition(content, what, size_bytes)
        return content


@contextlib.contextmanager
def _clear_errors(path: str) -> Generator[None]:
    try:
        yield
    except UnpicklingError as error:
        # "Unsupported global: GLOBAL a.b.C was not ..." or "Unsupported class a.b.C"
        found = re.search(r"(?:GLOBAL|class|load) ([\w.]+\.[\w.]+)", str(error))
        if found is None:
            raise _unreadable(path, error) from error
        raise errors.UsageError(
            f"{path}: it holds a pickled object, {found[1]}, which is never loaded, because that "
            "can run any code. Where you trust the file, load it where that class can be imported, "
            "save the parts that you need as tensors and plain values with torch.save, and open "
            "that file.",
            path=path,
        ) from error
    except (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:
        if isinstance(error, errors.CheckpointError):
            raise
        if "allocate memory" in str(error):
            raise MemoryError(str(error)) from error
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: Exception) -> errors.CheckpointError:
    first = str(error).strip().partition("\n")[0]
    return errors.CorruptCheckpointError(
        f"{path}: torch.load cannot read it ({type(error).__name__}: {first:.200}); the file is "
        "damaged, or was not written by torch.save.",
        path=path,
    )


def save(content: Any, path: str | os.PathLike[str]) -> None:
    """Writes a new file with `torch.save`, so that `torch.load(weights_only=True)` reads it.

    Args:
        content: Tensors and plain values in dicts, lists and tuples. NumPy's arrays are written as
            tensors.
        path: The file to create.

    Raises:
        StepExistsError: The path exists.
        UnsupportedLeafError: There is something that torch.save would pickle; nothing was written.
    """
    content = _with_tensors(content, set())
    with atomic_output(path) as tmp:
        try:
            torch.save(content, tmp)
            torch.load(tmp, map_location="cpu", weights_only=True, mmap=True)
        except (UnpicklingError, TypeError, AttributeError) as error:
            name, kind = _refused(content) or ("", "an object in it")
            raise errors.UnsupportedLeafError(
                f"{os.fspath(path)}: torch.load(weights_only=True) refuses {name}{kind}. "
                "Write other items (fckpt export --item), or write --to dcp.",
                path=path,
                key_path=name or None,
            ) from error


def _with_tensors(value: Any, above: set[int]) -> Any:
    """Returns the content with NumPy's arrays and numbers as tensors and plain numbers.

    A container without any is returned as it is: shared values stay shared.
    """
    if isinstance(value, np.generic):
        return value.item()
    if type(value) is np.ndarray and value.dtype.kind in "biufc":
        with contextlib.suppress(TypeError):  # torch lacks some, such as longdouble
            return torch.from_numpy(np.array(value, value.dtype.newbyteorder("="), order="C"))
    if type(value) not in _CONTAINERS or id(value) in above:
        return value
    above.add(id(value))
    old = list(value.values() if isinstance(value, dict) else value)
    new = [_with_tensors(each, above) for each in old]
    above.discard(id(value))
    if all(a is b for a, b in zip(old, new, strict=True)):
        return value
    made: Any = type(value)  # one of _CONTAINERS
    return made(zip(value, new, strict=True) if isinstance(value, dict) else new)


def _refused(content: Any) -> tuple[str, str] | None:
    """Returns the name of the first leaf that torch.load refuses, and its kind; None if unknown."""
    todo: list[tuple[str, Any]] = [("", content)]
    seen: set[int] = set()
    while todo:
        name, value = todo.pop()
        if type(value) in _CONTAINERS:
            if id(value) not in seen:
                seen.add(id(value))
                pairs = value.items() if isinstance(value, dict) else enumerate(value)
                children = [(f"{name}.{key}" if name else str(key), each) for key, each in pairs]
                todo += reversed(children)
        elif not isinstance(value, (torch.Tensor, *_PLAIN)) and value is not None:
            return name, f", {type(value).__module__}.{type(value).__qualname__}"
    return None


FORMAT = Format(
    name="torch",
    description="a file of torch.save",
    matches=fits,
    open=lambda path: source_of(path, "torch", items_of(load(path), path)),
)
