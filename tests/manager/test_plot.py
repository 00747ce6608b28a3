"""`manager.plot()`, and the listener that shows progress bars."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest
import torch

import functional_ckpt as fc
from functional_ckpt.events import Shown


def test_a_plot_shows_kept_and_removed_steps(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    keep = [fc.policies.LatestN(1), fc.policies.BestN(1, "loss", mode="min")]
    with fc.CheckpointManager(tmp_path, keep_policy=keep) as manager:
        for step in range(5):
            metrics = {"loss": 1.0 + abs(step - 2), "a_$1": 10.0**step}
            manager.save(step, {"x": torch.ones(2)}, metrics=metrics)
            manager.wait_until_finished()
        figure = manager.plot()
        loss, other = (axes for axes in figure.axes if axes.get_title(loc="left"))
        assert [axes.get_title(loc="left") for axes in (loss, other)] == ["loss", "a_$1"]
        drawn = [np.asarray(each.get_xdata()).tolist() for each in loss.lines]
        assert drawn == [[0, 1, 2, 3, 4], [0, 1, 3], [2, 4], [4], [2]]
        assert other.get_yscale() == "log"
        assert len(manager.plot("loss").axes) == 1
        assert figure._repr_png_().startswith(b"\x89PNG")  # pyright: ignore[reportAttributeAccessIssue]
        with pytest.raises(fc.errors.UsageError, match="No step has the metric 'los'"):
            manager.plot("los")


def test_an_empty_run_has_an_empty_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with fc.CheckpointManager(tmp_path) as manager:
        assert manager.plot().axes


class Bars(fc.listeners.ProgressBar):
    """Notes the progress that would be shown."""

    def __init__(self) -> None:
        self.shown: dict[str, list[tuple[int, int]]] = {}

    @contextlib.contextmanager
    def bar(self, title: str) -> Generator[Shown]:
        noted = self.shown.setdefault(title, [])
        yield lambda done, total: noted.append((done, total))
        noted.append((-1, -1))  # the end


def test_bars_show_saves_restores_and_uploads(tmp_path: Path) -> None:
    bars = Bars()
    tier = tmp_path / "tier"
    with fc.CheckpointManager(tmp_path / "run", tiers=[tier], on_event=bars) as manager:
        manager.save(3, {"x": {"a": torch.ones(1000), "b": torch.ones(7)}})
        manager.wait_until_finished()
        manager.restore(3)
    assert set(bars.shown) == {"saving step 3", "restoring step 3", f"step 3 to {tier}"}
    for noted in bars.shown.values():
        assert noted[-1] == (-1, -1)
    for title in ("saving step 3", "restoring step 3"):
        done, total = bars.shown[title][-2]
        assert done == total == 4028
    assert bars.shown["saving step 3"] == [(0, 4028), (4000, 4028), (4028, 4028), (-1, -1)]
    done, total = bars.shown[f"step 3 to {tier}"][-2]
    assert done == total > 4028


class Broken(fc.listeners.ProgressBar):
    """A bar that fails, as where the terminal is gone."""

    def __init__(self, at: str) -> None:
        self.at = at

    def fail(self, at: str) -> None:
        if at == self.at:
            raise OSError(5, "the terminal is gone")

    @contextlib.contextmanager
    def bar(self, title: str) -> Generator[Shown]:
        self.fail("start")
        yield lambda *_: self.fail("progress")
        self.fail("end")


@pytest.mark.parametrize("at", ["start", "progress", "end"])
def test_a_bar_that_fails_fails_no_save_restore_or_upload(
    at: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tier = tmp_path / "tier"
    items = {"x": {"a": torch.ones(1000)}}
    with fc.CheckpointManager(tmp_path / "run", tiers=[tier], on_event=Broken(at)) as manager:
        manager.save(3, items)
        manager.wait_until_finished()
        assert manager.restore(3)["x"]["a"].eq(1).all()
    assert fc.restore(tier / "3")["x"]["a"].eq(1).all()
    assert "the progress bar failed: restoring step 3" in caplog.messages


def test_a_hook_and_an_event_are_shown_in_a_line(tmp_path: Path) -> None:
    with fc.CheckpointManager(tmp_path) as manager:
        hook = fc.hooks.SaveHook(manager, {"x": torch.ones(1)})
    assert repr(hook) == f"SaveHook(CheckpointManager({str(tmp_path)!r}, closed), ['x'])"
    event = fc.Event(kind="staged", step=3, directory="d", num_bytes=10_240, seconds=0.5)
    assert repr(event) == "<Event: step 3 staged, 10.0 KiB, 0.500 s>"
    assert "12 B" in str(fc.Event(kind="written", step=3, directory="d", num_bytes=12))
