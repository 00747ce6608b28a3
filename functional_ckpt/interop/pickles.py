"""The only module that names `pickle`: records without behaviour, and the error.

PyTorch's distributed checkpoints keep their index in a pickle. It is read into inert records:
whatever class or function the pickle names, nothing of it is imported and nothing of it is run.
"""

from __future__ import annotations

import argparse
import collections
import io
import pickle
from typing import Any, cast

import torch

from functional_ckpt.interop import hostile

UnpicklingError = pickle.UnpicklingError


class Record:
    """Placeholder for an object of any class: keeps its constructor arguments, and does nothing."""

    def __new__(cls, *arguments: Any) -> Record:
        """Takes any arguments, as unpickling gives them."""
        record = super().__new__(cls)
        record.arguments = arguments
        return record

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        """Keeps fields; a state that is no dict of fields, or a pair of them, is dropped."""
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.__dict__.update(part)


def plain(value: Any) -> Any:
    """Returns a value with the fields of records, or their arguments, instead of them."""
    if isinstance(value, Record):
        fields = {name: each for name, each in vars(value).items() if name != "arguments"}
        arguments = list(value.arguments)
        return plain(fields or (arguments[0] if len(arguments) == 1 else arguments))
    if isinstance(value, argparse.Namespace):  # where a package lets PyTorch load the class itself
        return plain(vars(value))
    if isinstance(value, dict):
        return {key: plain(each) for key, each in cast("dict[Any, Any]", value).items()}
    if type(value) in (list, tuple):
        return type(value)(plain(each) for each in value)
    return value


class _Inert(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        if module == "torch":
            if name == "Size":
                return tuple
            if isinstance(dtype := getattr(torch, name, None), torch.dtype):
                return dtype
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        return Record


def read_inert(data: bytes, path: str) -> Any:
    """Returns the content of a pickle with a `Record` instead of every object.

    Raises:
        CorruptCheckpointError: It is not a pickle, or a broken one.
    """
    hostile.check_pickle(data, path)
    with hostile.clear_failures(path):
        return _Inert(io.BytesIO(data)).load()
