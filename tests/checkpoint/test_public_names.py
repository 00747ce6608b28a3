"""Old names lead to the new ones, and say so."""

import contextlib
from pathlib import Path

import pytest

import functional_ckpt as fc
from functional_ckpt import checkpoint
from functional_ckpt.distributed.coordinator import SingleProcess


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Metric", fc.TorchMetric),
        ("Handler", fc.handlers.Handler),
        ("AS_SAVED", fc.handlers.AS_SAVED),
        ("StepName", fc.step_names.StepName),
    ],
)
def test_a_moved_name_warns_with_its_new_place(old: str, new: object) -> None:
    with pytest.warns(DeprecationWarning, match=f"fc.{old} is now fc."):
        assert getattr(fc, old) is new
    assert old not in fc.__all__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timeout_seconds": 0}, "timeout_seconds must be a number of seconds > 0; got 0"),
        ({"timeout_seconds": 5, "coordinator": SingleProcess()}, "not both"),
        ({"process_group": object(), "coordinator": SingleProcess()}, "not both"),
    ],
)
def test_a_timeout_that_cannot_be_is_refused(
    tmp_path: Path, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(fc.errors.UsageError, match=message):
        fc.CheckpointManager(tmp_path / "run", **arguments)  # type: ignore[arg-type]


def test_a_group_without_torch_distributed_is_refused(tmp_path: Path) -> None:
    message = "process_group was given, but torch.distributed is not initialised"
    with pytest.raises(fc.errors.UsageError, match=message):
        fc.CheckpointManager(tmp_path / "run", process_group=object())
    with pytest.raises(fc.errors.UsageError, match=message):
        fc.save(tmp_path / "one", {"x": 1}, process_group=object())
    assert not list(tmp_path.iterdir())


class Closed(SingleProcess):
    """A group that notes whether it was closed."""

    is_closed = False

    def close(self) -> None:
        type(self).is_closed = True


@pytest.mark.parametrize("is_right", [True, False])
def test_a_save_by_a_group_closes_its_coordinator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_right: bool
) -> None:
    monkeypatch.setattr(checkpoint, "default_coordinator", lambda group: Closed())
    Closed.is_closed = False
    with contextlib.nullcontext() if is_right else pytest.raises(fc.errors.UnsupportedLeafError):
        value = 1 if is_right else object()
        fc.save(tmp_path / "one", {"x": {"y": value}}, process_group=object())
    assert Closed.is_closed
