"""Step names written with variables, as Composer's: `ep{epoch}-ba{batch}`."""

from __future__ import annotations

import dataclasses
import re
import string
from collections.abc import Callable
from typing import Any, Final

from functional_ckpt import errors
from functional_ckpt.policies.progress import Progress
from functional_ckpt.policies.spelled import Spelled
from functional_ckpt.steps.names import (
    CompositeStepName,
    NameFormat,
    as_name_format,
    check_component,
)

# Variable -> its value of a progress. Times are in integral seconds.
_OF_PROGRESS: Final[dict[str, Callable[[Progress], int]]] = {
    "iteration": lambda progress: progress.iteration,
    "epoch": lambda progress: progress.epoch,
    "batch": lambda progress: progress.batch,
    "batch_in_epoch": lambda progress: progress.batch_in_epoch,
    "sample": lambda progress: progress.sample,
    "sample_in_epoch": lambda progress: progress.sample_in_epoch,
    "token": lambda progress: progress.token,
    "token_in_epoch": lambda progress: progress.token_in_epoch,
    "total_wct": lambda progress: int(progress.total_seconds),
    "epoch_wct": lambda progress: int(progress.epoch_seconds),
    "batch_wct": lambda progress: int(progress.batch_seconds),
}
# All ranks share a step's directory, which the primary names.
_OF_PRIMARY: Final = ("rank", "local_rank", "node_rank")
_OF_RUN: Final = ("run_name", "world_size", "local_world_size")
_KEYS: Final = ("step", "batch", "epoch")  # the first in a template stands for the step
_VARIABLES: Final = ("step", *_OF_PROGRESS, *_OF_PRIMARY, *_OF_RUN)
_DIGITS: Final = "0123456789"  # stands for a number of any length
_PADDED = re.compile(r"(?:0([1-9][0-9]?))?d?")


@dataclasses.dataclass(frozen=True, slots=True)
class _Field:
    """A variable in a template."""

    name: str
    width: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class StepTemplate(Spelled):
    """Names of steps with Composer's variables.

    Of the progress, which `save` must then be given: `iteration`, `epoch`, `batch`, `sample`,
    `token`, `batch_in_epoch`, `sample_in_epoch`, `token_in_epoch`, and the wall-clock times
    `total_wct`, `epoch_wct`, `batch_wct` in integral seconds. Of the run: `run_name`, `world_size`,
    `local_world_size`. `rank`, `local_rank` and `node_rank` are the primary's, 0: ranks share a
    step's directory. `{step}` identifies a step by its name, `{batch}` if steps are batches,
    `{epoch}` if steps are epochs: one of them is required. `{batch:06d}` fills with zeros.

    Attributes:
        template: The name, with variables in braces.
        run_name: Value of `{run_name}`.
        world_size: Value of `{world_size}`.
        local_world_size: Value of `{local_world_size}`.

    >>> names = StepTemplate(template="ep{epoch}-ba{batch:04d}")
    >>> names.name_of(500, Progress(epoch=2, batch=500))
    'ep2-ba0500'
    >>> names.parse("ep2-ba0500")
    500
    """

    template: str
    run_name: str | None = None
    world_size: int | None = None
    local_world_size: int | None = None
    _parts: tuple[str | _Field, ...] = dataclasses.field(init=False, repr=False, compare=False)
    _pattern: re.Pattern[str] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Raises UsageError for unknown variables, and names that do not identify their step."""
        if not isinstance(self.template, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise errors.UsageError(
                f"template of step names: expected a string; got {self.template!r}."
            )
        parts = tuple(_parsed(self.template))
        names = [part.name for part in parts if isinstance(part, _Field)]
        for name in _OF_RUN:
            if name in names and getattr(self, name) is None:
                raise errors.UsageError(
                    f"template of step names {self.template!r}: expected {name}=... with it."
                )
        if not set(_KEYS) & set(names):
            raise errors.UsageError(
                f"template of step names {self.template!r}: expected {{step}}, {{batch}} or "
                "{epoch} in it; nothing else identifies the step of a name."
            )
        object.__setattr__(self, "_parts", parts)
        object.__setattr__(self, "_pattern", self._compiled(parts))
        check_component("template of step names", self._text(dict.fromkeys(names, 0)))

    def name_of(self, step: int, progress: Progress | None) -> str:
        """Returns the name of a step with this training progress.

        Raises:
            UsageError: The name needs a progress and there is none, or its batch or epoch, which
                stands for the step, is another number.
        """
        # A run may resume with another number of ranks: on disk these are numbers like any other.
        values: dict[str, int] = {
            "step": step,
            "world_size": self.world_size or 0,
            "local_world_size": self.local_world_size or 0,
        }
        for part in self._parts:
            if isinstance(part, _Field) and part.name in _OF_PROGRESS:
                if progress is None:
                    raise errors.UsageError(
                        f"step name {self.template!r}: {{{part.name}}} needs "
                        f"save(progress=fc.Progress(...)) with step {step}.",
                        step=step,
                    )
                values[part.name] = _OF_PROGRESS[part.name](progress)
        if values[key := self._key] != step:
            raise errors.UsageError(
                f"step name {self.template!r}: {{{key}}} stands for the step; expected step "
                f"{values[key]} at {key} {values[key]}, got step {step}. Number the steps by "
                f"{key}, or put {{step}} into the template.",
                step=step,
            )
        return self._text(values)

    def build_name(self, step: int) -> str:
        """Returns the name of a step where no progress is needed for it."""
        return self.name_of(step, None)

    def names(self, step: int) -> tuple[str, ...]:
        """Returns nothing: the possible names of a step are only known from the directory."""
        del step
        return ()

    def parse(self, name: str) -> int | None:
        """Returns the step of a name that the template produces, else None."""
        match = self._pattern.fullmatch(name) if len(name) <= 255 else None
        if match is None:
            return None
        fields = [part for part in self._parts if isinstance(part, _Field)]
        counts = [field for field in fields if self._fixed(field.name) is None]
        values = {field.name: int(text) for field, text in zip(counts, match.groups(), strict=True)}
        # Padded otherwise, or with two values for one variable, it does not follow the template.
        return values[self._key] if self._text(values) == name else None

    @property
    def _key(self) -> str:
        names = {part.name for part in self._parts if isinstance(part, _Field)}
        return next(key for key in _KEYS if key in names)

    def _fixed(self, name: str) -> str | None:
        """Returns the text of a variable that is the same for all steps."""
        if name in _OF_PRIMARY:
            return "0"
        return self.run_name if name == "run_name" else None

    def _text(self, values: dict[str, int]) -> str:
        return "".join(
            part
            if isinstance(part, str)
            else self._fixed(part.name) or f"{values[part.name]:0{part.width}d}"
            for part in self._parts
        )

    def _compiled(self, parts: tuple[str | _Field, ...]) -> re.Pattern[str]:
        pattern, before = "", ""
        for part in parts:
            text = part if isinstance(part, str) else self._fixed(part.name)
            is_beside = before[-1:].isdigit() and (text is None or text[:1].isdigit())
            if is_beside and (text is None or before == _DIGITS):
                raise errors.UsageError(
                    f"template of step names {self.template!r}: expected something other than "
                    "digits beside each number; else a name can be read in two ways."
                )
            pattern += "([0-9]+)" if text is None else re.escape(text)
            before = _DIGITS if text is None else text or before
        return re.compile(pattern)


def new_name(names: NameFormat, step: int, progress: Progress | None) -> str:
    """Returns the name under which a step is written now."""
    if isinstance(names, CompositeStepName):
        return new_name(names.write, step, progress)
    if isinstance(names, StepTemplate):
        return names.name_of(step, progress)
    return names.build_name(step)


def _parsed(template: str) -> list[str | _Field]:
    parts: list[str | _Field] = []
    try:
        found = list(string.Formatter().parse(template))
    except ValueError as error:
        raise errors.UsageError(f"template of step names {template!r}: {error}") from error
    for literal, name, spec, conversion in found:
        if literal:
            parts.append(literal)
        if name is None:
            continue
        if name not in _VARIABLES:
            raise errors.UsageError(
                f"template of step names {template!r}: expected variables out of "
                f"{', '.join(_VARIABLES)}; got {{{name}}}."
            )
        padded = _PADDED.fullmatch(spec or "")
        if padded is None or conversion or (spec and name in (*_OF_RUN, *_OF_PRIMARY)):
            raise errors.UsageError(
                f"template of step names {template!r}: expected {{{name}}} or, for counts, "
                f"{{{name}:06d}}; got {spec or conversion!r} in it."
            )
        parts.append(_Field(name, int(padded[1] or 1)))
    return parts


def name_format_of(
    value: NameFormat | str | None, *, adapt: Callable[[Any], Any] = lambda value: value
) -> NameFormat:
    """Converts a user's argument to a format; a string is the template of a `StepTemplate`.

    Args:
        value: A format, a template, or None for the plain number.
        adapt: Called with a format first, to convert foreign formats.

    Raises:
        UsageError: It is neither.
    """
    if isinstance(value, str):
        return StepTemplate(template=value)
    return as_name_format(value, adapt=adapt)
