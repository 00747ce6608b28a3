"""A writer for `torch.distributed.checkpoint.save` and `async_save` that writes a step.

PyTorch plans the save and gathers the results; no message is added to its own. The coordinator
creates a temporary directory with the global plan, every rank writes its regions there, and the
coordinator publishes it by one rename.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from functional_ckpt import errors
from functional_ckpt.core.records import orbax, structure_json
from functional_ckpt.core.tree import memory
from functional_ckpt.core.tree.structure import Node
from functional_ckpt.format.regions import Regions
from functional_ckpt.interop import dcp_layout, dcp_pieces
from functional_ckpt.interop.dcp_layout import Layout
from functional_ckpt.interop.dcp_pieces import Grids, Piece
from functional_ckpt.policies import lines
from functional_ckpt.saving import finalize, saver
from functional_ckpt.saving.claim import check_free
from functional_ckpt.saving.lower import LoweredItem
from functional_ckpt.saving.write import ItemReport, new_token
from functional_ckpt.storage import commit
from functional_ckpt.storage.base import Storage
from functional_ckpt.storage.open import connect


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Shared:
    """The coordinator's decisions, which reach every rank with its plan.

    Attributes:
        directory: Name of the temporary directory.
        num_ranks: The number of ranks that write.
        layout: The items.
        grids: Name of an entry that is stored in several parts -> its chunks, and whether they are
            runs of each part's bytes.
        token: In the names of data files in an object store; else empty.
    """

    directory: str
    num_ranks: int
    layout: Layout
    grids: Grids
    token: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Report:
    """The regions that a rank wrote, by item, and the structures of the objects, by entry."""

    items: Mapping[str, ItemReport]
    objects: Mapping[str, Any]


class Writer(StorageWriter):
    """Writes a state dict as a step: complete and durable when the save returns.

    A step is written by `dcp.save(state_dict, storage_writer=Writer(path))`. Each key of a nested
    state dict is an item; a flat one is the item `state`. Values that are not tensors are stored as
    data, and those that are code or objects of unknown classes are refused.

    Args:
        path: The directory to create: a path or a URI. A `checkpoint_id` of the save replaces it.
        overwrite: Whether an existing checkpoint is replaced, atomically.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None = None, *, overwrite: bool = False
    ) -> None:
        self.checkpoint_id = path
        self._overwrite = overwrite
        self._rank = 0
        self._release: weakref.finalize[..., Any] | None = None
        self._start_ns = 0
        self._shared: _Shared | None = None
        self._place: tuple[Storage, str] | None = None
        self._paths: dict[str, dcp_layout.Path] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"checkpoint_id": self.checkpoint_id, "_overwrite": self._overwrite}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__(state["checkpoint_id"], overwrite=state["_overwrite"])

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Returns True: any path and URI may be given."""
        return True

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Starts a new save; a failed one is removed."""
        if checkpoint_id is not None:
            self.checkpoint_id = checkpoint_id
        self._remove_claim()

    def storage_meta(self) -> StorageMeta:
        """Returns the path."""
        return StorageMeta(checkpoint_id=self.checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Checks that the path can be written to."""
        if not kwargs.get("use_collectives", True):
            raise errors.UsageError(
                "use_collectives=False commits every rank's part by itself: a crash would leave a "
                "step in part. Save with collectives."
            )
        self._rank = kwargs.get("rank", 0)
        if self.checkpoint_id is None:
            raise errors.UsageError("Where to? Give Writer(path), or checkpoint_id= to the save.")
        # Once a save: a store knows its claim by the connection that made it.
        self._place = storage, final = connect(self.checkpoint_id)
        if is_coordinator:
            self._start_ns = time.time_ns()
            check_free(storage, final, overwrite=self._overwrite)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Returns the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Creates the temporary directory, and chooses the items and the chunks."""
        if not all(plan.usable for plan in plans):
            raise _cached()
        storage, final = self._connected()
        self._remove_claim()
        claim = contextlib.ExitStack()
        self._release = weakref.finalize(self, claim.close)
        self._release.atexit = False  # the next writer removes it; a forked child must not
        commits = commit.protocol(storage, os.path.dirname(final))
        tmp = claim.enter_context(commits.claimed(final))
        parts: dict[str, list[WriteItem]] = {}
        self._paths = {}
        for plan in plans:
            for item in plan.items:
                name = item.index.fqn
                parts.setdefault(name, []).append(item)
                self._paths.setdefault(name, dcp_layout.path_of(name, plan.planner_data))
        self._shared = _Shared(
            directory=os.path.basename(tmp),
            num_ranks=len(plans),
            layout=Layout.of(self._paths.values()),
            grids={
                name: dcp_pieces.grid_of(held)
                for name, held in parts.items()
                if len(held) > 1 and held[0].tensor_data
            },
            token=new_token() if commits.repeats_names else "",
        )
        return [dataclasses.replace(plan, storage_data=self._shared) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes this rank's regions; nothing is durable yet."""
        shared: object = plan.storage_data
        if getattr(planner, "_enable_plan_caching", False) or not isinstance(shared, _Shared):
            raise _cached()
        memory.check_no_fake_mode()
        storage, final = self._connected()
        tmp = os.path.join(os.path.dirname(final), shared.directory)
        if self._rank:
            is_tmp = commit.TMP_SUFFIX in shared.directory
            commit.check_visible(storage, tmp if is_tmp else commit.tmp_path(tmp), self._rank)
        pieces: dict[str, list[Piece]] = {}
        objects: dict[str, Any] = {}
        for item in plan.items:
            path = dcp_layout.path_of(item.index.fqn, plan.planner_data)
            name, keys = shared.layout.locate(path)
            held = pieces.setdefault(name, [])
            if item.type == WriteItemType.BYTE_IO:
                node, arrays = dcp_pieces.object_pieces(planner, item.index, name, keys)
                objects[item.index.fqn] = structure_json.to_json(node)
                held += arrays
            elif (piece := dcp_pieces.tensor_piece(planner, item, keys, shared.grids)) is not None:
                held.append(piece)
        reports: dict[str, ItemReport] = {}
        for name, held in pieces.items():
            folder = os.path.join(tmp, name)
            storage.make_directory(folder, parents=False)
            written = dcp_pieces.write(
                storage, folder, held, self._rank, shared.num_ranks, shared.token
            )
            reports[name] = ItemReport(regions=written.boxes, files=written.files, root=None)
        report = _Report(items=reports, objects=objects)
        size_bytes = sum(piece.box.size_bytes for held in pieces.values() for piece in held)
        future: Future[list[WriteResult]] = Future()
        future.set_result([WriteResult(MetadataIndex(""), size_bytes, report)])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Writes the records, makes the step durable and publishes it."""
        try:
            self._publish(metadata, results)
        finally:
            self._remove_claim()

    def _publish(self, metadata: Metadata, results: Sequence[Sequence[WriteResult]]) -> None:
        shared = self._shared
        if shared is None:
            raise errors.UsageError("Writer.finish() was called before prepare_global_plan().")
        storage, final = self._connected()
        tmp = os.path.join(os.path.dirname(final), shared.directory)
        reports: list[_Report] = [each[0].storage_data for each in results]
        roots, layout = _roots(metadata, reports, shared.layout, self._paths)
        items = [
            LoweredItem(
                name=name,
                handler="PyTreeHandler",
                root=root,
                scalars=tuple(orbax.scalar_leaves(root)),
            )
            for name, root in roots.items()
        ]
        for item in items:
            storage.make_directory(os.path.join(tmp, item.name), parents=False)
        is_alone = len(reports) == 1
        none = ItemReport(regions=[] if is_alone else Regions.of([], []), files={}, root=None)
        info = saver.checkpoint_info(None, None, None, layout.to_json(), lines.Line())
        finalize.finalize(
            storage,
            tmp,
            items,
            [{name: report.items.get(name, none) for name in roots} for report in reports],
            dataclasses.replace(info, init_time_ns=self._start_ns),
            time.time_ns(),
            shared.token,
        )
        commits = commit.protocol(storage, os.path.dirname(final))
        commits.publish_claim(tmp, final, overwrite=self._overwrite)

    def _remove_claim(self) -> None:
        """Removes the temporary directory of a save that was not published."""
        if self._release is not None:
            self._release()

    def _connected(self) -> tuple[Storage, str]:
        if self._place is None:
            raise errors.UsageError("set_up_storage_writer() was not called.")
        return self._place


def _cached() -> errors.UsageError:
    return errors.UsageError(
        "A plan of an earlier save names its temporary directory: "
        "DefaultSavePlanner(enable_plan_caching=True) cannot be used. Save without it."
    )


# ------------------------------------------------------------------------------------------ records


def _roots(
    metadata: Metadata,
    reports: Sequence[_Report],
    layout: Layout,
    paths: Mapping[str, dcp_layout.Path],
) -> tuple[dict[str, Node], Layout]:
    """Returns the structures of all items, and the layout with the containers that stay closed."""
    known = {name: node for report in reports for name, node in report.objects.items()}
    leaves: dict[str, dict[dcp_layout.Path, Node]] = {}
    closed: list[str] = []
    for fqn, record in metadata.state_dict_metadata.items():
        item, keys = layout.locate(paths.get(fqn, (fqn,)))
        if isinstance(record, TensorStorageMetadata):
            node: Node = dcp_pieces.array_node(record.size, record.properties.dtype, keys)
        elif fqn in known:
            node = structure_json.from_json(known[fqn])
            closed += [fqn] if dcp_layout.is_opened(node) else []
        else:
            raise errors.CoordinationError(f"{fqn}: no rank has written it.", key_path=fqn)
        leaves.setdefault(item, {})[keys] = node
    if not leaves:
        raise errors.UsageError("The state dict is empty: there is nothing to save.")
    named = {item: _named(dcp_layout.tree_of(below, item)) for item, below in leaves.items()}
    return named, dataclasses.replace(layout, objects=tuple(closed))


def _named(root: Node) -> Node:
    """Returns the structure with arrays named by their paths: in JSON they have no names."""
    return structure_json.from_json(structure_json.to_json(root))
