"""How each system saves in the background: blocking, waiting, restoring."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks import peers
from benchmarks.workloads import State

__all__ = [
    "ASYNC_PEERS",
    "AsyncPeer",
    "SkipMeasure",
    "overlapped_items",
    "overlapped_option",
    "step_path",
]


class SkipMeasure(Exception):
    """This cannot be measured here, and why; no failure."""


def overlapped_option() -> dict[str, Any]:
    """Options of the manager for staging that continues after `save`.

    Raises:
        SkipMeasure: This version cannot.
    """
    import functional_ckpt as fc

    if hasattr(fc, "Overlapped"):
        return {"staging": fc.Overlapped()}
    if "staging" not in inspect.signature(fc.CheckpointManager).parameters:
        raise SkipMeasure("this version has no overlapped staging")
    return {"staging": "overlapped"}  # as versions before `Overlapped` spelled it


def overlapped_items(module: torch.nn.Module) -> tuple[dict[str, Any], torch.optim.Optimizer]:
    """A module and the optimizer that updates it, which has no state; and that optimizer.

    Without one in the same save nothing is known to stand still, and nothing is overlapped.
    """
    import functional_ckpt as fc

    optimizer = torch.optim.SGD(module.parameters(), lr=1e-4)
    return {"state": module, "optimizer": fc.Optimizer(optimizer, module)}, optimizer


def step_path(root: str, step: int) -> str:
    """The path of a step, for all systems: those that name steps themselves name them so."""
    return os.path.join(root, str(step))


class AsyncPeer:
    """A system that saves in the background.

    Attributes:
        is_durable: Whether `wait` included syncing.
        is_overlapped: Whether `save` may return before the state is captured, so that `fence` must
            be called before it changes.
        fences_steps: Whether steps of `optimizer` wait for the fence by themselves.
    """

    is_durable = False
    is_overlapped = False
    fences_steps = False

    def start(self, state: State, root: str) -> None:
        """Gets ready, before any clock starts."""
        self.state, self.root = state, root

    def optimizer(self) -> torch.optim.Optimizer:
        """An optimizer that updates the state; it has no state of its own."""
        return torch.optim.SGD(peers.Holder(self.state).parameters(), lr=1e-4)

    def save(self, step: int) -> None:
        """Starts a save; training is blocked for the duration of this call."""
        raise NotImplementedError

    def fence(self) -> None:
        """Waits until the state may change."""

    def wait(self) -> None:
        """Waits until the save is written."""
        raise NotImplementedError

    def restore(self, step: int) -> None:
        """Restores into the state's tensors."""
        raise NotImplementedError

    def close(self) -> None:
        """Stops background work."""


class DcpThread(AsyncPeer):
    """dcp.async_save in a thread, with a DefaultStager that is reused."""

    process = False
    is_pinned = False

    def start(self, state: State, root: str) -> None:
        import torch.distributed as dist
        from torch.distributed.checkpoint import staging

        super().start(state, root)
        if self.process:  # its process needs a group
            os.environ.setdefault("MASTER_ADDR", "localhost")
            store = dist.TCPStore("localhost", 0, 1, is_master=True)
            os.environ["MASTER_PORT"] = str(store.port)
            dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        self._stager = staging.DefaultStager(
            staging.StagingOptions(
                use_pinned_memory=self.is_pinned,
                use_shared_memory=self.process,
                use_async_staging=self.is_overlapped,
                use_non_blocking_copy=self.is_pinned,
            )
        )

    def save(self, step: int) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        kind = AsyncCheckpointerType.PROCESS if self.process else AsyncCheckpointerType.THREAD
        self._saving = dcp.async_save(
            dict(self.state),
            storage_writer=dcp.FileSystemWriter(
                step_path(self.root, step), thread_count=4, sync_files=False
            ),
            async_checkpointer_type=kind,
            async_stager=self._stager,
            no_dist=not self.process,
        )

    def fence(self) -> None:
        if self.is_overlapped:
            staged: Any = self._saving  # a pair of futures
            staged.staging_completion.result()

    def wait(self) -> None:
        saving: Any = self._saving
        getattr(saving, "upload_completion", saving).result()

    def restore(self, step: int) -> None:
        peers.Dcp().restore(self.state, step_path(self.root, step))

    def close(self) -> None:
        import torch.distributed as dist

        self._stager.close()
        if self.process:
            dist.destroy_process_group()


class DcpProcess(DcpThread):
    """The same in a process of its own, which reads the stager's shared memory."""

    process = True


class DcpPinned(DcpThread):
    """From a GPU into pinned memory, which is reused; `save` waits for the copies."""

    is_pinned = True


class DcpPinnedOverlapped(DcpPinned):
    """The same on a stream and in a thread of its own."""

    is_overlapped = True


class OrbaxManager(AsyncPeer):
    """orbax.checkpoint.CheckpointManager, asynchronous, over numpy views."""

    def start(self, state: State, root: str) -> None:
        import orbax.checkpoint as ocp

        super().start(state, root)
        options = ocp.CheckpointManagerOptions(enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(root, options=options)
        self._bound = {name: peers.as_numpy(tensor) for name, tensor in state.items()}

    def save(self, step: int) -> None:
        import orbax.checkpoint as ocp

        args: Any = ocp.args
        self._manager.save(step, args=args.StandardSave(self._bound))

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def restore(self, step: int) -> None:
        import orbax.checkpoint as ocp

        args: Any = ocp.args
        loaded = self._manager.restore(step, args=args.StandardRestore(self._bound))
        for name, array in self._bound.items():
            array[...] = loaded[name]

    def close(self) -> None:
        self._manager.close()


class TorchCheckpointingEager(AsyncPeer):
    """torch_checkpointing that stages before `save` returns."""

    def start(self, state: State, root: str) -> None:
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.config import AsyncCheckpointSaverConfig
        from torch_checkpointing.staging import CheckpointStagerConfig

        super().start(state, root)
        staging = CheckpointStagerConfig(use_async_staging=self.is_overlapped)
        saver = AsyncCheckpointSaverConfig(staging_config=staging)
        self._manager = CheckpointManager(
            CheckpointManager.Config(save=saver, storage_config=peers.buffered_files())
        )

    def save(self, step: int) -> None:
        self._writing = self._manager.save(step_path(self.root, step), {"state": self.state})

    def fence(self) -> None:
        with self._manager.lock():
            pass

    def wait(self) -> None:
        if self._writing is not None:
            self._writing.result()

    def restore(self, step: int) -> None:
        self._manager.load(step_path(self.root, step), into={"state": self.state})

    def close(self) -> None:
        self._manager.close()


class TorchCheckpointingOverlapped(TorchCheckpointingEager):
    """Its default: staging continues after `save` returned, a lock guards the optimizer's step."""

    is_overlapped = True


class OursEager(AsyncPeer):
    """functional_ckpt.CheckpointManager over a module."""

    is_durable = True
    fences_steps = True

    def start(self, state: State, root: str) -> None:
        import functional_ckpt as fc

        super().start(state, root)
        module = peers.Holder(state)
        self.items: dict[str, Any] = {"state": module}
        options: dict[str, Any] = {}
        if self.is_overlapped:
            self.items, self._optimizer = overlapped_items(module)
            options = overlapped_option()
        self.manager = fc.CheckpointManager(root, **options)

    def optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer if self.is_overlapped else super().optimizer()

    def save(self, step: int) -> None:
        self._commit = self.manager.save(step, self.items)

    def fence(self) -> None:
        if self.is_overlapped:
            self.manager.fence()

    def wait(self) -> None:
        self._commit.result()

    def restore(self, step: int) -> None:
        self.manager.restore(step, self.items)

    def close(self) -> None:
        self.manager.close()


class OursOverlapped(OursEager):
    """The same with staging that continues after `save` returned, until the fence."""

    is_overlapped = True


ASYNC_PEERS: Mapping[str, Callable[[], AsyncPeer]] = {
    "dcp.thread": DcpThread,
    "dcp.process": DcpProcess,
    "orbax.manager": OrbaxManager,
    "torch_checkpointing.eager": TorchCheckpointingEager,
    "torch_checkpointing.overlapped": TorchCheckpointingOverlapped,
    "functional_ckpt.eager": OursEager,
    "functional_ckpt.overlapped": OursOverlapped,
}
