"""How each system saves and restores a dict of tensors, as its documentation has it done.

Durable means the same for everyone: every file and every directory was synced before the clock
stops.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks import schedule
from benchmarks.workloads import State

__all__ = ["PEERS", "Holder", "Peer", "as_numpy", "buffered_files", "from_numpy"]


class Peer:
    """A system under measurement.

    Attributes:
        is_durable: Whether its own save already syncs every file and directory.
        is_verified: Whether its restores verify the bytes that they read.
    """

    is_durable = False
    is_verified = False

    def bind(self, state: State) -> Any:
        """The setup of a user of this system, before any clock starts."""
        return state

    def save(self, bound: Any, path: str) -> None:
        """Saves into the new directory `path`."""
        raise NotImplementedError

    def save_volatile(self, bound: Any, path: str) -> None:
        """The same without syncing; only systems that are durable by themselves differ."""
        self.save(bound, path)

    def restore(self, bound: Any, path: str) -> None:
        """Restores into the tensors that were bound, really copying every byte."""
        raise NotImplementedError

    def restore_unverified(self, bound: Any, path: str) -> None:
        """The same without verification; only systems that verify differ."""
        self.restore(bound, path)

    def restore_new(self, path: str) -> Mapping[str, torch.Tensor]:
        """Restores into new memory, without a target."""
        raise NotImplementedError


class TorchSave(Peer):
    """torch.save and torch.load, memory-mapped: its fastest way to read."""

    def save(self, bound: State, path: str) -> None:
        os.makedirs(path)
        torch.save(bound, os.path.join(path, "state.pt"))

    def restore(self, bound: State, path: str) -> None:
        loaded = self._load(path)
        for name, tensor in bound.items():
            tensor.copy_(loaded[name])

    def restore_new(self, path: str) -> State:
        return {name: tensor.clone() for name, tensor in self._load(path).items()}

    def _load(self, path: str) -> State:
        return torch.load(os.path.join(path, "state.pt"), mmap=True, weights_only=True)


class Safetensors(Peer):
    """safetensors."""

    def save(self, bound: State, path: str) -> None:
        from safetensors.torch import save_file

        os.makedirs(path)
        save_file(bound, os.path.join(path, "state.safetensors"))

    def restore(self, bound: State, path: str) -> None:
        from safetensors import safe_open

        with safe_open(os.path.join(path, "state.safetensors"), framework="pt") as file:
            for name, tensor in bound.items():
                tensor.copy_(file.get_tensor(name))

    def restore_new(self, path: str) -> State:
        from safetensors.torch import load_file

        # load_file returns mapped tensors, not read ones.
        loaded = load_file(os.path.join(path, "state.safetensors"))
        return {name: tensor.clone() for name, tensor in loaded.items()}


class Dcp(Peer):
    """torch.distributed.checkpoint, four threads; its own syncing, of files only, is left out."""

    def save(self, bound: State, path: str) -> None:
        import torch.distributed.checkpoint as dcp

        writer = dcp.FileSystemWriter(path, thread_count=4, sync_files=False)
        dcp.save(dict(bound), storage_writer=writer, no_dist=True)

    def restore(self, bound: State, path: str) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.load(dict(bound), storage_reader=self._reader(path), no_dist=True)

    def restore_new(self, path: str) -> State:
        from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
        from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

        found: State = {}  # the way of DCP's own converter to torch.save
        planner = _EmptyStateDictLoadPlanner()
        _load_state_dict(found, self._reader(path), planner=planner, no_dist=True)
        return found

    def _reader(self, path: str) -> Any:
        import torch.distributed.checkpoint as dcp

        return dcp.FileSystemReader(path)


class DcpHuggingFace(Dcp):
    """DCP with its safetensors files, whose reader maps them: the fastest of DCP's to restore."""

    def save(self, bound: State, path: str) -> None:
        import torch.distributed.checkpoint as dcp

        writer = dcp.HuggingFaceStorageWriter(path, save_distributed=True, thread_count=4)
        dcp.save(dict(bound), storage_writer=writer, no_dist=True)

    def _reader(self, path: str) -> Any:
        import torch.distributed.checkpoint as dcp

        return dcp.HuggingFaceStorageReader(path, thread_count=2)


class Orbax(Peer):
    """orbax.checkpoint's StandardCheckpointer over numpy views; it does not sync."""

    def bind(self, state: State) -> Any:
        return {name: as_numpy(tensor) for name, tensor in state.items()}

    def save(self, bound: Any, path: str) -> None:
        import orbax.checkpoint as ocp

        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, bound)

    def restore(self, bound: Any, path: str) -> None:
        import orbax.checkpoint as ocp

        with ocp.StandardCheckpointer() as checkpointer:
            loaded: Mapping[str, Any] = checkpointer.restore(path, bound)
        for name, array in bound.items():
            array[...] = loaded[name]

    def restore_new(self, path: str) -> State:
        import orbax.checkpoint as ocp

        with ocp.StandardCheckpointer() as checkpointer:
            loaded: Mapping[str, Any] = checkpointer.restore(path)
        return {name: from_numpy(array) for name, array in loaded.items()}


class TorchCheckpointing(Peer):
    """torch_checkpointing, synchronous."""

    def __init__(self) -> None:
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.config import SyncCheckpointSaverConfig

        self._manager = CheckpointManager(
            CheckpointManager.Config(
                save=SyncCheckpointSaverConfig(), storage_config=buffered_files()
            )
        )

    def save(self, bound: State, path: str) -> None:
        self._manager.save(path, {"state": bound})

    def restore(self, bound: State, path: str) -> None:
        self._manager.load(path, into={"state": bound})

    def restore_new(self, path: str) -> State:
        return self._manager.load(path, into={"state": None})["state"]  # read, not mapped


class Holder(torch.nn.Module):
    """A module whose parameters are the tensors of a state: they share memory."""

    def __init__(self, state: State) -> None:
        super().__init__()
        for name, tensor in state.items():
            self.register_parameter(name, torch.nn.Parameter(tensor))


class Ours(Peer):
    """functional_ckpt; always durable, with digests written and verified."""

    is_durable = True
    is_verified = True

    def bind(self, state: State) -> Holder:
        return Holder(state)

    def save(self, bound: Holder, path: str) -> None:
        import functional_ckpt as fc

        fc.save(path, {"state": bound})

    def save_volatile(self, bound: Holder, path: str) -> None:
        import functional_ckpt as fc
        from functional_ckpt.storage.local import LocalStorage

        class Volatile(LocalStorage):
            def sync(self, path: str) -> None:
                del path

        fc.save(path, {"state": bound}, storage=Volatile())

    def restore(self, bound: Holder, path: str) -> None:
        import functional_ckpt as fc

        fc.restore(path, {"state": bound})

    def restore_unverified(self, bound: Holder, path: str) -> None:
        import functional_ckpt as fc

        fc.restore(path, {"state": bound}, verify=False)

    def restore_new(self, path: str) -> State:
        import functional_ckpt as fc

        return dict(fc.restore(path)["state"])


PEERS: Mapping[str, Callable[[], Peer]] = {
    "torch.save": TorchSave,
    "safetensors": Safetensors,
    "dcp": Dcp,
    "dcp.huggingface": DcpHuggingFace,
    "orbax": Orbax,
    "torch_checkpointing": TorchCheckpointing,
    "functional_ckpt": Ours,
    schedule.BEFORE: Ours,  # its process imports the earlier version
}


def buffered_files() -> Any:
    """Disables O_DIRECT in torch_checkpointing: its unaligned writes fail on ext4 (0.1.1)."""
    from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

    return LocalFileSystemStorageConfig(use_direct_io=False)


def as_numpy(tensor: torch.Tensor) -> Any:
    """The tensor's memory as an array; numpy has no bfloat16 of its own."""
    if tensor.dtype is not torch.bfloat16:
        return tensor.numpy()
    import ml_dtypes

    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def from_numpy(array: Any) -> torch.Tensor:
    """A tensor over an array's memory, or over a copy where it is read-only."""
    import numpy as np

    host = np.asarray(array)
    host = host if host.flags.writeable else host.copy()
    if host.dtype.name == "bfloat16":
        return torch.from_numpy(host.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(host)
