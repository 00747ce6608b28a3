"""`fckpt report`: the record of a run, and its page in a browser."""

from __future__ import annotations

import json
import math
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import full
import pytest
import torch

import functional_ckpt as fc
from functional_ckpt.cli import main, targets
from functional_ckpt.cli import report_gather as gather
from functional_ckpt.cli import report_layers as layers
from functional_ckpt.cli import report_page as page
from functional_ckpt.cli import report_record as record

pytest.importorskip("matplotlib")

STRANGE = 'a<b> & "$x_1$"'
KEEP = [fc.policies.LatestN(2), fc.policies.BestN(1, "loss", mode="min")]


def save(root: Path, steps: range = range(8), **options: Any) -> None:
    torch.manual_seed(0)
    first = torch.nn.Linear(4, 3)
    model = torch.nn.Sequential(first, torch.nn.Sequential(torch.nn.Linear(3, 2)))
    settings: dict[str, Any] = {"keep_policy": KEEP, **options}
    with fc.CheckpointManager(root, **settings) as manager:
        for step in steps:
            with torch.no_grad():
                first.weight += 0.1
            config = {"lr": 0.1 if step < 4 else 0.01, "odd": "<i>"}
            items = {"model": fc.Module(model), "config": fc.Json(config)}
            metrics = {"loss": abs(step - 3) + 0.5, STRANGE: math.nan if step == 5 else 1e9 * step}
            manager.save(step, items, metrics=metrics)
            manager.wait_until_finished()


def gathered(root: Path, **options: Any) -> record.RunReport:
    found = targets.find(str(root))
    assert isinstance(found, targets.Root)
    return gather.gather(found, gather.Options(**options))


def test_the_record_says_what_is_kept_and_why(tmp_path: Path) -> None:
    save(tmp_path)
    report = gathered(tmp_path)
    steps = {step.step: step for step in report.steps}
    assert list(steps) == list(range(8))
    assert [step for step, each in steps.items() if each.is_kept] == [3, 6, 7]
    assert steps[7].reasons == ("latest", "LatestN(2)")
    assert steps[6].reasons == ("LatestN(2)",)
    assert steps[3].reasons == ("BestN(1, 'loss', mode='min')",)
    assert steps[4].reasons == ("no policy kept it",)
    assert {each.health for each in steps.values()} == {"intact", None}
    assert all(each.size_bytes and each.seconds for each in steps.values())
    assert (report.latest, report.best) == (7, {"loss": 3})
    assert report.policies == ("LatestN(2)", "BestN(1, 'loss', mode='min')")
    assert steps[0].metrics == {"loss": 3.5, STRANGE: 0.0}


def test_the_record_has_changes_of_configuration_and_layers(tmp_path: Path) -> None:
    save(tmp_path)
    report = gathered(tmp_path)
    assert [
        (each.before, each.after, each.name, each.old, each.new) for each in report.changes
    ] == [(3, 6, "config.lr", "0.1", "0.01")]
    (model,) = report.modules
    assert (model.name, model.num_arrays, model.size_bytes) == ("model", 4, 4 * (15 + 8))
    assert [(each.name, each.size_bytes) for each in model.children] == [("0", 60), ("1", 32)]
    assert report.comparison is not None
    assert (report.comparison.before, report.comparison.after) == (6, 7)
    assert report.comparison.num_equal == 3
    ((change,),) = report.comparison.changes.values()
    with fc.CheckpointManager(tmp_path, read_only=True) as manager:
        a, b = (manager.restore(step)["model"]["0.weight"].double() for step in (6, 7))
    assert change.name == "0.weight"
    assert change.relative == pytest.approx(float((b - a).norm() / a.norm()))


def test_a_damaged_step_is_reported(tmp_path: Path) -> None:
    save(tmp_path)
    (file,) = (tmp_path / "6" / "model").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"\xaa")
    (tmp_path / "3" / "_FUNCTIONAL_CKPT").unlink()
    steps = {step.step: step for step in gathered(tmp_path).steps}
    assert steps[6].health == "damaged"
    assert "expected digest" in steps[6].problem
    assert steps[7].health == "intact"
    assert "damaged" in page.page(gathered(tmp_path))


def test_a_large_run_is_neither_read_nor_compared_unless_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path)
    monkeypatch.setattr(gather, "_CHEAP_BYTES", 1)
    report = gathered(tmp_path)
    assert {step.health for step in report.steps if step.is_kept} == {"not verified"}
    assert report.comparison is None
    report = gathered(tmp_path, compare=["best:loss", "latest"], verify=True)
    assert {step.health for step in report.steps if step.is_kept} == {"intact"}
    assert report.comparison is not None
    assert (report.comparison.before, report.comparison.after) == (3, 7)


@pytest.mark.parametrize("dtype", ["bfloat16", "int64", "bool", "complex64", "float8_e5m2"])
def test_arrays_of_any_type_are_compared_slab_by_slab(
    tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "_SLAB_BYTES", 8)
    with fc.CheckpointManager(tmp_path) as manager:
        for step in (1, 2):
            values = torch.tensor([1.0, 1.0, 1.0, step - 1.0] * 4).to(getattr(torch, dtype))
            manager.save(step, {"x": {"a": values, "zero": torch.zeros(2) * step}})
    comparison = gathered(tmp_path).comparison
    assert comparison is not None
    ((change,),) = comparison.changes.values()
    assert change.name == "a"
    assert change.relative == pytest.approx((1 / 3) ** 0.5)


class Checker(HTMLParser):
    """Collects open tags, and everything that a browser would load."""

    VOID = frozenset(["meta", "link"])

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        names = ("src", "href", "xlink:href")
        self.loaded += [value or "" for name, value in attrs if name in names]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_sound_and_loads_nothing(tmp_path: Path, capsys: Any) -> None:
    save(tmp_path / "run")
    out = tmp_path / "report.html"
    assert main(["--json", "report", str(tmp_path / "run"), "-o", str(out)]) == 0
    text = out.read_text()
    assert json.loads(capsys.readouterr().out) == {
        "schema": "fckpt.report/1", "path": str(tmp_path / "run"), "output": str(out),
        "num_bytes": len(text.encode()),
    }  # fmt: skip
    checker = Checker(text)
    assert checker.open == []
    assert all(each.startswith(("#", "data:,")) for each in checker.loaded)
    assert "<script" not in text and "<b> &" not in text and "<i>" not in text.split("Steps")[1]
    assert "a&lt;b&gt; &amp; &quot;$x_1$&quot;" in text
    assert "#01010" not in text, "a colour is not the page's own"
    assert len(text) < 300_000


def test_an_empty_run_has_a_page(tmp_path: Path) -> None:
    fc.CheckpointManager(tmp_path).close()
    text = page.page(gathered(tmp_path))
    assert Checker(text).open == []
    assert "There is no step yet." in text


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["report", str(tmp_path)]) == 2
    assert "pip install 'functional-ckpt[report]'" in capsys.readouterr().err


@pytest.mark.skipif(not full.IS_FULL, reason="FUNCTIONAL_CKPT_FULL=1 opens the page in Chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_chromium_shows_the_page(tmp_path: Path, width: int, scheme: Any) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("needs Chromium")
    api = pytest.importorskip("playwright.sync_api")
    save(tmp_path / "run", range(40))
    out = tmp_path / "report.html"
    assert main(["report", str(tmp_path / "run"), "-o", str(out)]) == 0
    said: list[str] = []
    requested: list[str] = []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        size = {"width": width, "height": 900}
        shown = browser.new_context(viewport=size, color_scheme=scheme).new_page()
        for kind in ("console", "pageerror", "requestfailed"):
            shown.on(kind, lambda what: said.append(str(what)))
        shown.on("request", lambda request: requested.append(request.url))
        shown.goto(out.as_uri())
        assert shown.evaluate("document.documentElement.scrollWidth") <= width
        colors = shown.evaluate(
            "[document.body, document.querySelector('svg text')].map("
            "e => [getComputedStyle(e).backgroundColor, getComputedStyle(e).fill])"
        )
        assert shown.evaluate("document.querySelectorAll('svg').length") == 4
        browser.close()
    assert (said, requested) == ([], [out.as_uri()])
    is_dark = sum(map(int, colors[0][0][4:-1].split(","))) < 300
    assert is_dark == (scheme == "dark")
    assert (sum(map(int, colors[1][1][4:-1].split(","))) > 400) == is_dark, "text is not readable"
