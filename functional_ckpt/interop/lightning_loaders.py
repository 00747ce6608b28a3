"""The positions of the loaders of a Lightning training. Free of Lightning.

A step is saved once its batch is over. The next batch is drawn by then, so the positions are copied
before.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch

from functional_ckpt.interop.lightning_loops import is_storable

_log = logging.getLogger("functional_ckpt")


def has_stateful_loaders(trainer: Any) -> bool:
    """Whether a loader saves its position, as `torchdata.StatefulDataLoader` does."""
    loaders = trainer.fit_loop._combined_loader.flattened
    return any(hasattr(loader, "load_state_dict") for loader in loaders)


def warn_of_ranks(trainer: Any) -> None:
    """Logs that loaders that save their position do not resume exactly on several processes."""
    if trainer.world_size > 1 and has_stateful_loaders(trainer):
        _log.warning(
            "%d processes with a loader that saves its position: Lightning keeps the position of "
            "rank 0 for all. A run that resumes may train on other batches, and draw other random "
            "numbers, than an uninterrupted one.",
            trainer.world_size,
        )


def draw_seeds(trainer: Any) -> None:
    """Draws the random numbers that the loaders draw when they start, on the same device."""
    device = torch.get_default_device()
    for loader in trainer.fit_loop._combined_loader.flattened:
        if isinstance(loader, torch.utils.data.DataLoader) and loader.generator is None:
            torch.empty((), dtype=torch.int64, device=device).random_()


class LoaderPositions:
    """Where the stateful loaders were when a step was over.

    Attributes:
        drawn: The batches of a stream without a length that Lightning has drawn in advance: the
            positions of the loaders are after them.
    """

    def __init__(self) -> None:
        self._states: Any = None
        self.drawn: list[Any] = []

    def note(self, trainer: Any) -> None:
        """Copies the positions, before the next batch is drawn."""
        self._states = copy.deepcopy(trainer.fit_loop._combined_loader._state_dicts())
        drawn = list(getattr(trainer.fit_loop._data_fetcher, "batches", ()))
        # A step holds the loaders of rank 0, as Lightning's own checkpoints do.
        if drawn and (trainer.world_size > 1 or not is_storable(drawn)):
            _log.warning(
                "A run that resumes from this step skips the batch that Lightning has drawn in "
                "advance: it is kept with one process and for batches of plain tensors only."
            )
            drawn = []
        self.drawn = drawn

    def put_into(self, fit_loop: dict[str, Any]) -> None:
        """Puts the positions into the loop's state, if they were noted."""
        if self._states is not None:
            fit_loop["state_dict"]["combined_loader"] = self._states

    def put_back(self, trainer: Any) -> None:
        """Has the training take the batches of a step before those of its loaders."""
        if self.drawn:
            fetcher = trainer.fit_loop._data_fetcher
            fetcher.batches[:0] = self.drawn
            fetcher.done = False
        self.forget()

    def forget(self) -> None:
        """Forgets the positions of a step that is saved."""
        self._states, self.drawn = None, []
