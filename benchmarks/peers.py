"""How each system saves and restores a dict of tensors, as its documentation has it done.

Durable means the same for everyone: every file and every directory was synced before the clock
stops.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import torch

__all__ = ["PEERS", "Peer", "sync_tree"]

State = dict[str, torch.Tensor]


def sync_tree(path: str) -> None:
    """Syncs every file below a directory, then every directory, then its parent."""
    folders = [os.path.dirname(path)]
    for folder, _, names in os.walk(path):
        folders.append(folder)
        for name in names:
            _sync(os.path.join(folder, name))
    for folder in folders:
        _sync(folder)


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Peer:
    """A system under measurement; `is_durable` says whether its own save already syncs all."""

    is_durable = False

    def save(self, state: State, path: str) -> None:
        """Saves into the new directory `path`."""
        raise NotImplementedError

    def restore(self, state: State, path: str) -> None:
        """Restores into the tensors of `state`, really copying every byte."""
        raise NotImplementedError


class TorchSave(Peer):
    """torch.save and torch.load, memory-mapped."""

    def save(self, state: State, path: str) -> None:
        os.makedirs(path)
        torch.save(state, os.path.join(path, "state.pt"))

    def restore(self, state: State, path: str) -> None:
        loaded = torch.load(os.path.join(path, "state.pt"), mmap=True, weights_only=True)
        for name, tensor in state.items():
            tensor.copy_(loaded[name])


class Safetensors(Peer):
    """safetensors."""

    def save(self, state: State, path: str) -> None:
        from safetensors.torch import save_file

        os.makedirs(path)
        save_file(state, os.path.join(path, "state.safetensors"))

    def restore(self, state: State, path: str) -> None:
        from safetensors import safe_open

        with safe_open(os.path.join(path, "state.safetensors"), framework="pt") as file:
            for name, tensor in state.items():
                tensor.copy_(file.get_tensor(name))


class Dcp(Peer):
    """torch.distributed.checkpoint, four threads, its own syncing left to the measurement."""

    def save(self, state: State, path: str) -> None:
        import torch.distributed.checkpoint as dcp

        writer = dcp.FileSystemWriter(path, thread_count=4, sync_files=False)
        dcp.save(dict(state), storage_writer=writer, no_dist=True)

    def restore(self, state: State, path: str) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.load(dict(state), storage_reader=dcp.FileSystemReader(path), no_dist=True)


class Orbax(Peer):
    """orbax.checkpoint's StandardCheckpointer over numpy views; it does not sync."""

    def save(self, state: State, path: str) -> None:
        import orbax.checkpoint as ocp

        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, {name: tensor.numpy() for name, tensor in state.items()})

    def restore(self, state: State, path: str) -> None:
        import orbax.checkpoint as ocp

        with ocp.StandardCheckpointer() as checkpointer:
            target = {name: tensor.numpy() for name, tensor in state.items()}
            loaded: Mapping[str, Any] = checkpointer.restore(path, target)
        for name, tensor in state.items():
            tensor.copy_(torch.from_numpy(loaded[name]))


class Ours(Peer):
    """functional_ckpt; always durable, with digests written and verified."""

    is_durable = True

    def save(self, state: State, path: str) -> None:
        import functional_ckpt as fc

        fc.save(path, {"state": state})

    def restore(self, state: State, path: str) -> None:
        import functional_ckpt as fc

        fc.restore(path, {"state": _InPlace(state)})


def _InPlace(state: State) -> Any:  # noqa: N802
    """An item whose tensors are filled where they lie, as a module's are."""
    import functional_ckpt as fc

    class Handler(fc.Handler):
        def lower(self, value: Any) -> Any:
            return value

        def target(self, value: Any, saved: Any, *, strict: bool = True) -> Any:
            return {name: fc.Fill(tensor) for name, tensor in value.items()}

        def lift(self, value: Any, tree: Any) -> Any:
            return value

    return fc.CheckpointItem(state, Handler())


PEERS: Mapping[str, Callable[[], Peer]] = {
    "torch.save": TorchSave,
    "safetensors": Safetensors,
    "dcp": Dcp,
    "orbax": Orbax,
    "functional_ckpt": Ours,
}


def fresh(path: str) -> str:
    """The path, with nothing there."""
    shutil.rmtree(path, ignore_errors=True)
    return path
