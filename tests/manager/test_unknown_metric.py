"""A keep policy by a metric that no step has is logged once, before steps are pruned by it."""

from __future__ import annotations

from pathlib import Path

import pytest

import functional_ckpt as fc


def test_a_metric_that_no_step_has_is_named_once_with_those_there_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keep = [fc.policies.BestN(1, "acuracy"), fc.policies.BestN(1, lambda found: found["f1"])]
    with fc.CheckpointManager(tmp_path, keep_policy=keep) as manager:
        for step in range(4):
            manager.save(step, {"x": step}, metrics={"accuracy": step, "loss": -step})
        manager.wait_until_finished()
        assert manager.all_steps() == [3]
    lines = [text for text in caplog.messages if "no step has the metric" in text]
    assert len(lines) == 2
    assert "'acuracy'" in lines[0] and "recorded metrics: accuracy, loss" in lines[0]


@pytest.mark.parametrize(
    "keep",
    [
        fc.policies.BestN(1, "late", keep_without_metrics=True),
        fc.policies.BestN(1, "loss"),
        fc.policies.BestN(9, "late"),  # nothing is pruned by it yet
    ],
)
def test_a_metric_that_prunes_nothing_wrongly_is_not_mentioned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, keep: fc.policies.BestN
) -> None:
    with fc.CheckpointManager(tmp_path, keep_policy=keep) as manager:
        for step in range(3):
            manager.save(step, {"x": step}, metrics={"loss": -step})
    assert not [text for text in caplog.messages if "no step has" in text]
