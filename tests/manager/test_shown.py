"""How managers, items and their results are shown at a prompt and in a notebook."""

from __future__ import annotations

import html
import os
from pathlib import Path

import torch

import functional_ckpt as fc


def test_a_manager_says_where_it_is_and_what_it_holds(tmp_path: Path) -> None:
    manager = fc.CheckpointManager(tmp_path / "run")
    root = repr(os.fspath(tmp_path / "run"))
    assert repr(manager) == f"CheckpointManager({root}, 0 steps)"
    assert manager._repr_html_() == f"<code>{html.escape(repr(manager))}</code>"
    for step in range(25):
        manager.save(step, {"state": {"x": step}}, metrics={"loss": 1 / (step + 1), "<b>": "&"})
    manager.wait_until_finished()
    assert repr(manager) == f"CheckpointManager({root}, 25 steps, latest 24)"
    shown = manager._repr_html_()
    assert shown.count("<tr>") == 21  # the heading and the last 20 steps
    assert "<td>24</td><td>latest</td>" in shown
    assert "<th>loss</th><th>&lt;b&gt;</th>" in shown
    assert "<td>0.04</td><td>&amp;</td>" in shown
    with fc.CheckpointManager(tmp_path / "run", read_only=True) as reader:
        assert repr(reader) == f"CheckpointManager({root}, 25 steps, latest 24, read-only)"
    manager.close()
    assert repr(manager) == f"CheckpointManager({root}, closed)"
    assert manager._repr_html_() == f"<code>{html.escape(repr(manager))}</code>"


def test_metadata_and_results_are_short(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    items = {"model": model, "config": fc.Json({"lr": 0.1}), "state": {"x": torch.ones(5)}}
    with fc.CheckpointManager(tmp_path) as manager:
        manager.save(7, items, metrics={"loss": 0.5}).result()  # type: ignore[union-attr]
        assert repr(manager.metadata(7)) == (
            "StepMetadata(step=7, 3 items: model, config, state, 3 arrays, 52 bytes, "
            "metrics={'loss': 0.5})"
        )
        restored = manager.restore()
    assert sorted(restored._ipython_key_completions_()) == ["config", "model", "state"]


def test_items_name_their_value_and_the_options_that_were_chosen() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    assert repr(fc.Module(model)) == "Module(Linear, 2 parameters)"
    assert repr(fc.Module(model, replicated="unchecked")) == (
        "Module(Linear, 2 parameters, replicated='unchecked')"
    )
    assert repr(fc.Optimizer(optimizer, model)) == (
        "Optimizer(AdamW, 2 parameters, model=Linear, 2 parameters)"
    )
    assert repr(fc.PyTree({"x": torch.ones(3)})) == "PyTree(dict of 1)"
    assert repr(fc.PyTree(torch.ones(3, 4))) == "PyTree(Tensor float32[3, 4])"
    assert len(repr(fc.Json("x" * 1000))) < 80
    assert repr(fc.Rng()) == "Rng()"
    assert repr(fc.PyTree({})) == "PyTree({})"
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    assert repr(fc.Stateful(scheduler)) == "Stateful(StepLR)"  # not its address


def test_items_are_trees_of_what_they_save_in_notebooks() -> None:
    model = torch.nn.Linear(3, 2)
    shown = fc.Module(model)._repr_html_()
    assert "<summary><code>Module(Linear, 2 parameters)</code></summary>" in shown
    assert "<li>weight: <code>float32[2, 3] cpu</code></li>" in shown
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
    assert "<li>lr: <code>0.25</code></li>" in fc.Optimizer(optimizer, model)._repr_html_()
    before = torch.get_rng_state()
    assert "<summary>python: 1 array, 2,500 bytes</summary>" in fc.Rng()._repr_html_()
    assert torch.equal(before, torch.get_rng_state())
    stranger = torch.nn.Linear(1, 1)
    unnamed = fc.Optimizer(torch.optim.SGD(stranger.parameters()), model)._repr_html_()
    assert "cannot be saved" in unnamed and "<li>" in unnamed


def test_records_name_what_differs_from_their_defaults() -> None:
    assert repr(fc.Progress(batch=10, max_duration="2ep")) == (
        "Progress(batch=10, max_duration='2ep')"
    )
    tier = fc.Tier(path="s3://bucket/run", keep=fc.policies.LatestN(3))
    assert repr(tier) == "Tier(path='s3://bucket/run', keep=LatestN(3))"
    assert repr(fc.step_names.StepName(prefix="step")) == "StepName(prefix='step')"
    template = fc.step_names.StepTemplate(template="ep{epoch}-ba{batch}")
    assert repr(template) == "StepTemplate(template='ep{epoch}-ba{batch}')"
    assert repr(fc.handlers.Fill(torch.zeros(1000))) == "Fill(Tensor float32[1000])"


def test_a_report_of_many_differences_is_short(tmp_path: Path) -> None:
    fc.save(tmp_path / "one", {"state": {str(n): 0 for n in range(500)}})
    report = fc.restore(tmp_path / "one", into={"state": {"0": 1}}, strict=False).report
    assert len(report.unexpected) == 499
    assert repr(report).startswith("RestoreReport(unexpected=[state")
    assert repr(report).endswith(", and 496 more])")
    assert str(report).count("\n") == 498  # every one
    assert repr(type(report)()) == "RestoreReport()"


def test_metadata_and_restored_items_are_trees_in_notebooks(tmp_path: Path) -> None:
    items = {
        "state": {"a<b": torch.ones(2, 3), "log": list(range(60))},
        "config": fc.Json({"lr": 1}),
    }
    fc.save(tmp_path / "one", items, metrics={"loss": 0.5})
    metadata, restored = fc.metadata(tmp_path / "one"), fc.restore(tmp_path / "one")
    for shown in (metadata._repr_html_(), restored._repr_html_()):
        assert "<li>metrics: <code>{&#x27;loss&#x27;: 0.5}</code></li>" in shown
        assert "<summary>state: 1 array, 24 bytes</summary>" in shown
        assert "<li>a&lt;b: <code>float32[2, 3]" in shown
        assert "<li>and 10 more</li>" in shown
        assert "<li>lr: <code>1</code></li>" in shown
        assert "custom metadata" not in shown
    assert (
        "differences"
        in fc.restore(
            tmp_path / "one", into={"state": {"a<b": torch.ones(2, 3), "new": 1}}, strict=False
        )._repr_html_()
    )
