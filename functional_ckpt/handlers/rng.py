"""Random number generators: Python's, numpy's and torch's, each as compact arrays.

Lowering advances no generator. numpy's `SeedSequence` counters (`Generator.spawn`) are not part of
a bit generator's state and are not saved.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import torch

from functional_ckpt import errors
from functional_ckpt.core.arrays import spec as spec_lib
from functional_ckpt.core.tree.placeholders import AS_SAVED
from functional_ckpt.handlers.base import Handler, Item, item_class

GeneratorLike: TypeAlias = (
    random.Random | np.random.Generator | np.random.RandomState | torch.Generator
)


@dataclasses.dataclass(frozen=True, slots=True)
class GeneratorHandler(Handler):
    """Saves and sets the state of one generator object; each rank has its own."""

    per_rank: bool = True

    def lower(self, value: Any) -> Any:
        """Returns the generator's state as arrays and plain values."""
        return _state(value)

    def target(self, value: Any, saved: Any, *, strict: bool = True) -> Any:
        """Whatever was saved.

        Raises:
            MismatchError: The checkpoint's generator is of another kind.
        """
        if problem := _difference(value, saved):
            raise errors.MismatchError(f"The generator {problem}.", mismatched=[problem])
        return AS_SAVED

    def lift(self, value: Any, tree: Any) -> Any:
        """Returns the generator, set to the saved state."""
        _set_state(value, tree)
        return value


@item_class
class Generator(Item):
    """One random number generator, set by restore.

    Args:
        value: A `random.Random`, numpy `Generator` or `RandomState`, or `torch.Generator`.
    """

    @property
    def handler(self) -> GeneratorHandler:
        """The handler that the options describe."""
        return GeneratorHandler()

    def check(self) -> None:
        """Raises `UsageError` for a value whose state cannot be saved."""
        Item.check(self)
        _check_generator(self.value, "value")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RngHandler(Handler):
    """Saves and sets the process's global generators, and named ones; each rank has its own.

    The generators of CUDA devices are saved once CUDA has been initialised in the process: before,
    nothing can have been drawn from them, and a save does not initialise it.

    Attributes:
        same_devices: Whether another number of CUDA devices than at the save is an error. If not,
            device `i` takes the state of device `i`; devices without a partner are unchanged.
        other_ranks: The behaviour on another number of ranks: `error`, or `derive`. Every
            derived stream is seeded by SHA-256 of all the saved states, the rank, the number of
            ranks and the stream's index: one checkpoint on one number of ranks always gives the
            same numbers, and no two ranks the same ones. It continues no saved stream.
    """

    per_rank: bool = True
    same_devices: bool = True
    other_ranks: Literal["error", "derive"] = "error"

    def lower(self, value: Any) -> dict[str, Any]:
        """Returns the states `python`, `numpy`, `torch`, `cuda` (a list) and named `generators`."""
        generators = _named(value)
        return {
            "python": python_state(random.getstate()),
            "numpy": np.random.get_state(legacy=False),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
            "generators": {name: _state(generator) for name, generator in generators.items()},
        }

    def target(self, value: Any, saved: Any, *, strict: bool = True) -> Any:
        """Whatever was saved.

        Raises:
            MismatchError: Other named generators, generators of another kind, or another number of
                CUDA devices than the checkpoint has.
        """
        generators = _named(value)
        missing = sorted(generators.keys() - saved["generators"].keys())
        unexpected = sorted(saved["generators"].keys() - generators.keys())
        mismatched = [
            f"{name} {problem}"
            for name, generator in generators.items()
            if name in saved["generators"]
            and (problem := _difference(generator, saved["generators"][name]))
        ]
        ours = np.random.get_state(legacy=False)["bit_generator"]
        if saved["numpy"]["bit_generator"] != ours:
            mismatched.append(
                f"numpy's global generator is {ours}, saved was {saved['numpy']['bit_generator']}"
            )
        mismatched += self._device_problems(len(saved["cuda"]))
        if missing or unexpected or mismatched:
            raise errors.MismatchError(
                "The random number generators are not the checkpoint's:"
                + "".join(f"\n  not in the checkpoint: {name}" for name in missing)
                + "".join(f"\n  only in the checkpoint: {name}" for name in unexpected)
                + "".join(f"\n  {problem}" for problem in mismatched),
                missing=missing,
                unexpected=unexpected,
                mismatched=mismatched,
            )
        return AS_SAVED

    def lift(self, value: Any, tree: Any) -> Any:
        """Returns the named generators; they and the global ones are set to the saved states."""
        generators = _named(value)
        random.setstate(_from_python_state(tree["python"]))
        np.random.set_state(tree["numpy"])
        torch.set_rng_state(tree["torch"])
        for device, state in enumerate(tree["cuda"][: _num_cuda_devices()]):
            torch.cuda.set_rng_state(state, device)
        for name, generator in generators.items():
            _set_state(generator, tree["generators"][name])
        return value

    def can_resize(self) -> bool:
        """Returns whether another number of ranks derives new streams."""
        return self.other_ranks == "derive"

    def resize(self, trees: Sequence[Any], rank: int, num_ranks: int) -> Any:
        """Returns one rank's states: of the kinds that rank 0 saved, newly seeded."""
        if self.other_ranks == "error":
            return Handler.resize(self, trees, rank, num_ranks)
        digest = hashlib.sha256()
        for part in _parts(list(trees)):
            digest.update(part)
        digest.update(struct.pack("<qq", rank, num_ranks))
        return _reseeded(trees[0], digest.digest())

    def _device_problems(self, num_saved: int) -> list[str]:
        num_here = _num_cuda_devices()
        if not self.same_devices or num_saved in (0, num_here):
            return []
        return [
            f"the checkpoint has the generators of {num_saved} CUDA devices, this process sees "
            f"{num_here}; fc.Rng(same_devices=False) restores those that both have"
        ]


def is_generator(value: object) -> bool:
    """Returns whether a value is a generator whose state can be saved."""
    return isinstance(
        value, (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
    ) and not isinstance(value, random.SystemRandom)


def _check_generator(value: object, name: str) -> None:
    """Raises `UsageError` unless the state of a value can be saved."""
    if not is_generator(value):
        raise errors.UsageError(
            f"{name}: expected a random.Random, numpy Generator or RandomState, or "
            f"torch.Generator, got {type(value).__name__}.",
            key_path=name,
        )


def _num_cuda_devices() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _state(generator: GeneratorLike) -> Any:
    if isinstance(generator, random.Random):
        return python_state(generator.getstate())
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return {"torch": generator.get_state()}


def _set_state(generator: GeneratorLike, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(_from_python_state(state))
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state["torch"])


def python_state(state: tuple[Any, ...]) -> dict[str, Any]:
    """Returns the state of a `random.Random` as an array and plain values."""
    version, words, gauss_next = state
    return {"version": version, "words": np.array(words, np.uint32), "gauss_next": gauss_next}


def _from_python_state(state: Mapping[str, Any]) -> tuple[Any, ...]:
    return (state["version"], tuple(state["words"].tolist()), state["gauss_next"])


def _difference(generator: GeneratorLike, saved: Any) -> str | None:
    """Why this generator cannot take a saved state; None if it can."""
    ours, theirs = _kind(_state(generator)), _kind(saved)
    return None if ours == theirs else f"is {ours}, saved was {theirs}"


def _kind(state: Any) -> str:
    if not isinstance(state, Mapping):
        return type(state).__name__
    known = cast("Mapping[str, Any]", state)
    if "bit_generator" in known:
        legacy = " (RandomState)" if "has_gauss" in known else ""
        return f"numpy {known['bit_generator']}{legacy}"
    if "version" in known:
        return f"Python's, version {known['version']}"
    tensor = known.get("torch")
    size = tensor.shape[0] if isinstance(tensor, (torch.Tensor, spec_lib.ArraySpec)) else "no"
    return f"torch's with {size} bytes of state"


_CUDA_STATE_BYTES = 16  # Philox: a seed and an offset, 8 bytes each


@item_class
class Rng(Item):
    """The process's generators: Python's, numpy's legacy one, torch's on the CPU and on CUDA.

    Args:
        value: Named generators (name -> generator), set by restore; None for none.
        same_devices: Whether another number of CUDA devices than at the save is an error; if not,
            those that both have are restored.
        other_ranks: The behaviour on another number of ranks than at the save: an `error`, or
            `derive` new streams from the saved ones, different on every rank.

    Raises:
        UsageError: Not a generator, or one without a state.
    """

    value: Mapping[str, GeneratorLike] | None = None
    same_devices: bool = dataclasses.field(default=True, kw_only=True)
    other_ranks: Literal["error", "derive"] = dataclasses.field(default="error", kw_only=True)

    @property
    def handler(self) -> RngHandler:
        """The handler that the options describe."""
        return RngHandler(same_devices=self.same_devices, other_ranks=self.other_ranks)

    def __post_init__(self) -> None:
        """Raises `UsageError` for a value whose state cannot be saved, and for unknown options."""
        self.check()
        object.__setattr__(self, "value", dict(_named(self.value)))

    def check(self) -> None:
        """Raises `UsageError` for a value whose state cannot be saved, and for unknown options."""
        Item.check(self)
        if self.other_ranks not in ("error", "derive"):
            raise errors.UsageError(
                f"other_ranks must be 'error' or 'derive'; got {self.other_ranks!r}."
            )
        if not isinstance(self.value, Mapping | None):
            raise errors.UsageError(
                f"fc.Rng takes a mapping of names to generators; got {type(self.value).__name__}. "
                "fc.Generator takes one generator."
            )
        for name, generator in _named(self.value).items():
            _check_generator(generator, name)


def _named(value: Any) -> Mapping[str, GeneratorLike]:
    return {} if value is None else cast("Mapping[str, GeneratorLike]", value)


def _parts(tree: Any) -> Iterator[bytes]:
    """Everything in a tree of states, in a fixed order, each with its length."""
    if isinstance(tree, Mapping):
        known = cast("Mapping[str, Any]", tree)
        for key in sorted(known):
            yield from _parts(key)
            yield from _parts(known[key])
    elif isinstance(tree, list | tuple):
        for child in cast("Sequence[Any]", tree):
            yield from _parts(child)
    else:
        array = np.asarray(tree) if isinstance(tree, torch.Tensor | np.ndarray) else None
        data = repr(tree).encode() if array is None else array.tobytes()
        yield struct.pack("<q", len(data)) + data


def _reseeded(tree: Any, entropy: bytes) -> Any:
    """States of the same kinds, each with a new seed."""
    if isinstance(tree, torch.Tensor):
        return _torch_state(tree, entropy)
    if isinstance(tree, Mapping):
        known = cast("Mapping[str, Any]", tree)
        if "version" in known:
            return python_state(random.Random(entropy).getstate())
        if "bit_generator" in known:
            return _numpy_state(known, entropy)
        return {key: _reseeded(known[key], _below(entropy, key)) for key in sorted(known)}
    states = cast("Sequence[Any]", tree)
    return [_reseeded(state, _below(entropy, str(i))) for i, state in enumerate(states)]


def _below(entropy: bytes, key: str) -> bytes:
    return hashlib.sha256(entropy + key.encode()).digest()


def _torch_state(saved: torch.Tensor, entropy: bytes) -> torch.Tensor:
    seed = int.from_bytes(entropy[:8], "little") >> 1
    if saved.numel() == _CUDA_STATE_BYTES:
        return torch.frombuffer(bytearray(struct.pack("<qq", seed, 0)), dtype=torch.uint8)
    return torch.Generator("cpu").manual_seed(seed).get_state()


def _numpy_state(saved: Mapping[str, Any], entropy: bytes) -> Any:
    bit_generator = getattr(np.random, saved["bit_generator"])
    new = bit_generator(np.frombuffer(entropy, np.uint32))
    if "has_gauss" in saved:
        return np.random.RandomState(new).get_state(legacy=False)
    return new.state
