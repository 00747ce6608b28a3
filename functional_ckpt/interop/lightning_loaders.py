"""The positions of the loaders of a Lightning training. Free of Lightning.

A step is saved once its batch is over. The next batch is drawn by then, so the positions are copied
before. With several processes each has positions of its own, in a per-rank item, which also has the
generators of samplers: for one process too, as Lightning does not save them.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import torch

from functional_ckpt.interop.lightning_loops import FINISHED, is_storable
from functional_ckpt.interop.trainer_rng import is_of_this_many

_log = logging.getLogger("functional_ckpt")

LOADERS = "loaders"  # the item
_STATES = "combined_loader"  # in the state of Lightning's loop


def has_stateful_loaders(trainer: Any) -> bool:
    """Returns whether a loader saves its position, as `torchdata.StatefulDataLoader` does."""
    loaders = trainer.fit_loop._combined_loader.flattened
    return any(hasattr(loader, "load_state_dict") for loader in loaders)


class LoaderPositions:
    """Where the loaders were when a step was over.

    Attributes:
        drawn: The batches of a stream without a length that Lightning has drawn in advance: the
            positions of the loaders are after them.
    """

    def __init__(self) -> None:
        self._states: Any = None  # of the stateful loaders
        self._generators: list[torch.Tensor] = []  # the states to set at the first batch
        self._starts: list[list[torch.Tensor]] = []  # for each loader: when the epoch was started
        self.drawn: list[Any] = []

    def watch(self, trainer: Any) -> None:
        """Notes the generators of the loaders when Lightning starts them for the first time."""
        fit_loop, self._starts, self._generators = trainer.fit_loop, [], []
        load = fit_loop._load_combined_loader_states  # called before the loaders are started

        def note_and_load() -> None:
            for loader in fit_loop._combined_loader.flattened:
                _note_wrapped(loader)
            if not (self._starts or self._generators):
                self.note_start(trainer)
            load()

        fit_loop._load_combined_loader_states = note_and_load

    def unwatch(self, trainer: Any) -> None:
        """Takes the note of `watch` back."""
        vars(trainer.fit_loop).pop("_load_combined_loader_states", None)

    def note_start(self, trainer: Any) -> None:
        """Notes the generators of the loaders, before an epoch is started."""
        loaders = trainer.fit_loop._combined_loader.flattened
        self._starts = [_states_of(_generators(loader)) for loader in loaders]

    def note(self, trainer: Any) -> None:
        """Copies the positions, before the next batch is drawn."""
        self._states = copy.deepcopy(trainer.fit_loop._combined_loader._state_dicts())
        drawn = list(getattr(trainer.fit_loop._data_fetcher, "batches", ()))
        if not is_storable(drawn):
            _log.warning(
                "A run that resumes from this step skips the batch that Lightning has drawn in "
                "advance: only batches of tensors and plain values are kept."
            )
            drawn = []
        self.drawn = drawn

    def take(
        self, trainer: Any, checkpoint: dict[str, Any], key: str, *, is_epoch_over: bool
    ) -> dict[str, Any]:
        """Puts the positions into Lightning's checkpoint; returns this process's own state.

        Args:
            trainer: The Trainer.
            checkpoint: Lightning's; without positions, if there are several processes.
            key: The name of the callback's state in it.
            is_epoch_over: Whether the next epoch has not been started.
        """
        state = checkpoint["loops"]["fit_loop"]["state_dict"]
        if self._states is not None:
            state[_STATES] = self._states
        own: dict[str, Any] = {}
        if trainer.world_size > 1 and _STATES in state:
            own = {"positions": state.pop(_STATES), "drawn": self.drawn}
            checkpoint["callbacks"].pop(key, None)  # it has the batches that were drawn
        generators = _all_generators(trainer)
        if generators:
            own["generators"] = _states_of(generators)
        if generators and not is_epoch_over:
            loaders = trainer.fit_loop._combined_loader.flattened
            own["starts"] = [
                _start_of(loader, start)
                for loader, start in zip(loaders, self._starts, strict=False)
            ]
        return own

    def load(self, manager: Any, step: int, checkpoint: dict[str, Any]) -> None:
        """Puts this process's positions of a step into Lightning's checkpoint.

        If another number of processes saved the step, they are those of other data.
        """
        state = checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {})
        own: dict[str, Any] = {}
        if not is_of_this_many(manager, step):
            _log.warning(
                "Step %d was saved by another number of processes than %d: random numbers are "
                "derived from those of the step, and within an epoch loaders that save their "
                "position start the epoch's data again.",
                step,
                manager.num_ranks,
            )
            state.pop(_STATES, None)
            self.drawn = []
        elif LOADERS in manager.metadata(step).items:
            own = manager.restore(step, only=LOADERS)[LOADERS]
        if "positions" in own:
            state[_STATES], self.drawn = own["positions"], own["drawn"]
        # Lightning releases the states before the loaders are started again.
        self._states = copy.deepcopy(state.get(_STATES))
        self._generators, self._starts = own.get("generators", []), own.get("starts", [])

    def restart(self, trainer: Any, set_globals: Callable[[], None] | None = None) -> None:
        """Starts the loaders again, from the positions of a step.

        Lightning starts them before their samplers know the epoch, and draws random numbers then.
        """
        fit_loop = trainer.fit_loop
        combined, fetcher = fit_loop._combined_loader, fit_loop._data_fetcher
        starts = self._starts
        self.set_generators(trainer)
        if not starts:  # the epoch is started here
            self.note_start(trainer)
        if getattr(fetcher, "batches", ()) and not self._states:
            return  # a stream that cannot be started again without the loss of a batch
        for loader, start in zip(combined.flattened, starts, strict=False):
            _set_states(_generators(loader), start)
        for loader in combined.flattened:
            for sampler in _samplers(loader):
                if hasattr(sampler, "set_epoch"):
                    sampler.set_epoch(fit_loop.epoch_progress.current.processed)
        if self._states:
            combined._load_state_dicts(self._states)
        for loader in combined.flattened:
            if (getattr(loader, "next_iter_state", None) or {}).get(FINISHED):
                loader._get_iterator = functools.partial(_start_undrawn, loader)
        if set_globals is not None:
            set_globals()
        with contextlib.ExitStack() as started:
            for loader, start in zip(combined.flattened, starts, strict=False):
                started.enter_context(_repeated(loader, start))
            iter(fetcher)
        if self.drawn:  # the batches of the step come before those of its loaders
            fetcher.batches[:0] = self.drawn
            fetcher.done = False
        self.forget()

    def set_generators(self, trainer: Any) -> None:
        """Sets the generators of the loaders as the step has them."""
        generators = _all_generators(trainer)
        if self._generators and len(generators) != len(self._generators):
            _log.warning(
                "The loaders have %d random generators, the step has %d: none is set.",
                len(generators),
                len(self._generators),
            )
        _set_states(generators, self._generators)

    def forget(self) -> None:
        """Forgets the positions of a step that is saved."""
        self._states, self.drawn = None, []


def _samplers(loader: Any) -> list[Any]:
    """Returns a loader's samplers, and those that they wrap."""
    found: list[Any] = []
    left = [getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
    while left:
        sampler = left.pop(0)
        if sampler is None or any(sampler is each for each in found):
            continue
        found.append(sampler)
        left += [getattr(sampler, "sampler", None), _wrapped(sampler)]
    return found


def _wrapped(sampler: Any) -> Any:
    """Returns the sampler that Lightning's distributed sampler wraps; None for all others."""
    return getattr(getattr(sampler, "dataset", None), "_sampler", None)


def _generators(loader: Any) -> list[torch.Generator]:
    known = (getattr(each, "generator", None) for each in (loader, *_samplers(loader)))
    return list({id(each): each for each in known if isinstance(each, torch.Generator)}.values())


def _all_generators(trainer: Any) -> list[torch.Generator]:
    loaders = trainer.fit_loop._combined_loader.flattened
    return [each for loader in loaders for each in _generators(loader)]


def _states_of(generators: Sequence[torch.Generator]) -> list[torch.Tensor]:
    return [each.get_state() for each in generators]


def _set_states(generators: Sequence[torch.Generator], states: Sequence[torch.Tensor]) -> None:
    if len(states) == len(generators):  # as many as the step has, if it has any
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


class _Noted:
    """A sampler that Lightning wraps, and its generators before it was started.

    torchdata starts it several times; the last order counts.
    """

    def __init__(self, sampler: Any, generators: Sequence[torch.Generator]) -> None:
        self._sampler, self._generators = sampler, generators
        self.before: list[torch.Tensor] = []
        self.is_repeated = False  # whether each start is the one before

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[Any]:
        if self.is_repeated:
            _set_states(self._generators, self.before)
        else:
            self.before = _states_of(self._generators)
        return iter(self._sampler)


def _noted(loader: Any) -> _Noted | None:
    found = (_wrapped(sampler) for sampler in _samplers(loader))
    return next((each for each in found if isinstance(each, _Noted)), None)


def _note_wrapped(loader: Any) -> None:
    for sampler in _samplers(loader):
        wrapped = _wrapped(sampler)
        if wrapped is not None and not isinstance(wrapped, _Noted):
            sampler.dataset._sampler = _Noted(wrapped, _generators(loader))


def _start_of(loader: Any, start: list[torch.Tensor]) -> list[torch.Tensor]:
    """Returns the states of a loader's generators from which it has the order of this epoch."""
    noted = _noted(loader)
    return start if noted is None else noted.before or start


@contextlib.contextmanager
def _repeated(loader: Any, start: list[torch.Tensor]) -> Generator[None]:
    """Has a sampler that Lightning wraps give the order that starts from these states."""
    noted = _noted(loader)
    if noted is None:
        yield
        return
    noted.before, noted.is_repeated = start, True
    try:
        yield
    finally:
        noted.is_repeated = False


def _start_undrawn(loader: Any) -> Any:
    """Starts a loader that resumes after its end, and is started once more by itself."""
    del loader._get_iterator
    device, generators = torch.get_default_device(), _generators(loader)
    states = _states_of(generators)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        iterator = loader._get_iterator()
    _set_states(generators, states)
    return iterator
