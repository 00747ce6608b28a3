"""Steps that cannot be removed: the error names each, whatever is removed beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest

from functional_ckpt import errors
from functional_ckpt.steps import rollback


class Tier:
    """A tier whose steps `stuck` cannot be removed."""

    root = "run"

    def __init__(self, stuck: Sequence[int]) -> None:
        self.errors = {step: errors.StorageError(f"step {step} stays", step=step) for step in stuck}
        self.hidden: set[str] = set()

    def held(self, steps: Sequence[int]) -> list[int]:
        return list(steps)

    def names_of(self, steps: Sequence[int]) -> dict[int, str]:
        return {step: str(step) for step in steps}

    def remove(self, steps: Sequence[int]) -> dict[int, errors.StorageError]:
        return {step: self.errors[step] for step in steps if step in self.errors}

    def hide(self, names: Any) -> None:
        self.hidden.update(names)

    def unhide(self, names: Any) -> None:
        self.hidden.difference_update(names)


def remove(tier: Tier, doomed: Sequence[int], *, together: bool) -> errors.StorageError:
    with pytest.raises(errors.StorageError) as caught:
        rollback.remove(cast("Any", [tier]), doomed, together=together)
    return caught.value


def test_the_error_of_a_single_step_is_raised_as_it_is() -> None:
    tier = Tier([3])
    assert remove(tier, [4, 3], together=False) is tier.errors[3]


@pytest.mark.parametrize("together", [False, True])
def test_the_errors_of_several_steps_are_raised_as_one(together: bool) -> None:
    tier = Tier([3, 4])
    error = remove(tier, [4, 3, 2], together=together)
    assert error.step == 4 and error.__cause__ is tier.errors[4]
    assert "steps could not be removed" in str(error)
    assert "step 4 stays; step 3 stays" in str(error)
    assert ("out of sight" in str(error)) is together
    assert tier.hidden == ({"3", "4"} if together else set())
