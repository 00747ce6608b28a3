"""Ray Train with a checkpoint manager in the storage path of the run.

    from functional_ckpt.interop.ray import CheckpointManager, RunConfig

    def train(config):                      # runs on every worker
        ...
        with CheckpointManager(keep_policy=3) as manager:
            for step in range(manager.restore_or(items).next_step, 1000):
                ...
                manager.save(step, items, metrics=metrics)
                manager.report(metrics)

    TorchTrainer(train, scaling_config=..., run_config=RunConfig(name="a", ...)).fit()

The extra `ray` installs Ray Train.
"""

# Ray is installed only where scripts/test_integrations runs.
# pyright: reportMissingImports=false, reportUntypedBaseClass=false

from __future__ import annotations

import importlib
import json
import posixpath
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

from functional_ckpt import errors, manager
from functional_ckpt.policies.progress import Progress
from functional_ckpt.policies.save_rules import SavePolicies
from functional_ckpt.saving.background import Commit
from functional_ckpt.steps.preemption import is_preemption

# By name, as Any: type checkers need not have Ray.
train: Any
try:
    train = importlib.import_module("ray.train")
    _contexts: Any = importlib.import_module("ray.train.v2._internal.execution.context")
    _storage: Any = importlib.import_module("ray.train.v2._internal.execution.storage")
except ImportError as error:
    raise ImportError(
        "functional_ckpt.interop.ray needs ray: pip install 'functional-ckpt[ray]'"
    ) from error

__all__ = ["CheckpointManager", "RunConfig"]

_RunConfig: Any = train.RunConfig
_SCHEMES = {"local": "", "s3": "s3://", "gcs": "gs://"}
# The workers before a restart are being killed, and one may still hold the writer's lock.
_LOCK_SECONDS = 30
# Of Ray's list of checkpoints: reports, and the value of each.
_LISTS = (
    ("checkpoint_results", "checkpoint_report_indices"),
    ("pending_training_results", "pending_validation_specs"),
)


class RunConfig(_RunConfig):
    """Ray's `RunConfig`, of a run whose checkpoints are steps of a manager.

    A run that is started again under its name resumes from its latest step. Ray refuses a run of
    which a reported checkpoint is gone: steps that the keep policy has deleted are removed from
    Ray's list of them.

    Raises:
        UsageError: The configuration lets Ray delete checkpoints.
    """

    def __post_init__(self) -> None:
        """Checks the configuration and Ray's list of checkpoints."""
        super().__post_init__()
        _check_retention(self)
        filesystem, path = _storage.get_fs_and_path(self.storage_path, self.storage_filesystem)
        _forget_deleted(filesystem, posixpath.join(path, self.name))


class CheckpointManager(manager.CheckpointManager):
    """The manager of a training function of Ray Train, in the storage path of its run.

    Every worker makes one, and saves and restores together with the others.

    Args:
        folder: The directory of the steps, within that of the run.
        save_policy: As of `fc.CheckpointManager`. `fc.policies.Preemption()` saves once when Ray
            drains a node of the run. The training continues: Ray restarts it when the node is gone.
        options: Other arguments of `fc.CheckpointManager`.

    Raises:
        UsageError: The run has a `RunConfig` of Ray's, or lets Ray delete checkpoints; its storage
            is none of local or shared directories, `s3://` and `gs://`; or it has several workers
            and no process group of torch.distributed.
    """

    def __init__(
        self, folder: str = "steps", *, save_policy: SavePolicies | None = None, **options: Any
    ) -> None:
        context: Any = train.get_context()
        config: Any = _contexts.get_train_context().train_run_context.run_config
        if not isinstance(config, RunConfig):
            raise errors.UsageError(
                "The run has a ray.train.RunConfig, with which it cannot be started again once the "
                "keep policy has deleted a step. Import RunConfig from functional_ckpt.interop.ray."
            )
        _check_retention(config)
        storage: Any = context.get_storage()
        self._filesystem: Any = storage.storage_filesystem
        self._folder = posixpath.join(storage.experiment_fs_path, folder)
        self._unreported: Commit | None = None
        self._drained: frozenset[str] = frozenset()
        self._saves_drained = False
        if save_policy is not None:
            given = save_policy if isinstance(save_policy, Sequence) else [save_policy]
            save_policy = [each for each in given if not is_preemption(each)]
            self._saves_drained = len(save_policy) < len(given)
        directory = _scheme(config, self._filesystem) + self._folder
        for remaining in reversed(range(_LOCK_SECONDS)):  # all workers try as many times
            try:
                super().__init__(directory, save_policy=save_policy, **options)
                break
            except errors.LockedError:
                if not remaining:
                    raise
            time.sleep(1)
        if self.num_ranks != context.get_world_size():
            self.close()
            raise errors.UsageError(
                f"The run has {context.get_world_size()} workers, and {self.num_ranks} would save "
                "together. Use TorchTrainer, which starts a process group of all workers."
            )

    def save(
        self,
        step: int,
        items: Mapping[str, Any],
        *,
        metrics: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
        custom_metadata: Mapping[str, Any] | None = None,
        force: bool = False,
    ) -> Commit | None:
        """Saves a step if a policy accepts it; see `fc.CheckpointManager.save`."""
        drained = self._draining() - self._drained if self._saves_drained else frozenset[str]()
        commit = super().save(
            step,
            items,
            metrics=metrics,
            progress=progress,
            custom_metadata=custom_metadata,
            force=force or bool(drained),
        )
        self._drained |= drained
        self._unreported = commit or self._unreported
        return commit

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Reports metrics, and the step that was saved since the last report, to Ray.

        Every worker calls it. Ray's checkpoint is the step itself: nothing is copied. It is
        registered in the background when the step is durable, with these metrics.

        Args:
            metrics: Name -> value, as of `ray.train.report`.
        """
        commit, self._unreported = self._unreported, None
        checkpoint = None
        if commit is not None:
            name = posixpath.basename(self.path(commit.step))
            path = posixpath.join(self._folder, name)
            checkpoint = train.Checkpoint(path, self._filesystem)

        def wait(checkpoint: Any, name: str) -> Any:
            if commit is not None:
                commit.result()
            return checkpoint

        train.report(
            dict(metrics),
            checkpoint=checkpoint,
            checkpoint_upload_mode=train.CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=wait,
            delete_local_checkpoint_after_upload=False,
        )

    def reached_preemption(self, step: int) -> bool:
        """Raises `UsageError`: for Ray a training function that returns has finished."""
        raise errors.UsageError(
            "A training function that returns has finished, and Ray does not start it again. Do "
            "not leave the loop: with policies.Preemption() a step is saved when a node is "
            "drained, and Ray restarts the training from there."
        )

    def _draining(self) -> frozenset[str]:
        """Returns the nodes that Ray is about to take away, equal on all workers."""
        info: Any = train.get_preemption_info()
        return frozenset() if info is None else frozenset(info.preempted_node_ids)


def _check_retention(config: Any) -> None:
    if config.checkpoint_config.num_to_keep is not None:
        raise errors.UsageError(
            f"CheckpointConfig(num_to_keep={config.checkpoint_config.num_to_keep}): Ray would "
            "delete the files of steps that the manager counts on, and not atomically. Give the "
            "manager a keep_policy, such as LatestN(3) or BestN(3, 'loss'), instead."
        )


def _scheme(config: Any, filesystem: Any) -> str:
    """Returns the prefix of a run's paths in URIs; empty for local paths."""
    scheme = _SCHEMES.get(filesystem.type_name)
    is_given = config.storage_filesystem is not None or "?" in config.storage_path
    if scheme is None or (scheme and is_given):
        raise errors.UsageError(
            f"storage_path={config.storage_path!r} of the type {filesystem.type_name!r}: expected "
            "a local or shared directory, or a URI s3:// or gs:// without storage_filesystem and "
            "parameters; credentials and endpoints come from the environment."
        )
    return scheme


def _forget_deleted(filesystem: Any, run: str) -> None:
    """Removes checkpoints that no longer exist from Ray's list of a run, if there is one."""
    path = posixpath.join(run, _storage.CHECKPOINT_MANAGER_SNAPSHOT_FILENAME)
    if not _storage._exists_at_fs_path(filesystem, path):
        return
    with filesystem.open_input_stream(path) as file:
        data: bytes = file.read()

    def exists(result: Mapping[str, Any]) -> bool:
        reported = posixpath.join(run, result["checkpoint_dir_name"])
        return cast("bool", _storage._exists_at_fs_path(filesystem, reported))

    try:
        state: dict[str, Any] = json.loads(data)
        num_reported = len(state["checkpoint_results"])
        for name, other in _LISTS:
            pairs = zip(state[name], state[other], strict=True)
            left = [(result, value) for result, value in pairs if exists(result)]
            state[name], state[other] = [one for one, _ in left], [value for _, value in left]
        results, latest = state["checkpoint_results"], state["latest_checkpoint_result"]
        if latest is not None and not exists(latest):
            state["latest_checkpoint_result"] = results[-1] if results else None
    except (ValueError, KeyError, TypeError) as error:
        filesystem.move(path, f"{path}.broken")
        warnings.warn(
            f"{path}: Ray's list of checkpoints is broken ({error}), as of a run that was killed "
            "while writing it. It is set aside; the steps are not affected.",
            stacklevel=4,
        )
        return
    if len(results) == num_reported:
        return
    with filesystem.open_output_stream(f"{path}.tmp") as file:
        file.write(json.dumps(state).encode())
    filesystem.move(f"{path}.tmp", path)
