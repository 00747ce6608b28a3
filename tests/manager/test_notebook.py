"""A notebook in a real kernel: the display of objects, names that complete, progress bars."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import pytest

nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

_CELLS = [
    """import torch
import functional_ckpt as fc
from functional_ckpt.listeners import ProgressBar
model = torch.nn.Linear(4, 2)
manager = fc.CheckpointManager("run", keep_policy=fc.policies.BestN(1, "loss", mode="min"))
manager.save(3, {"model": model, "config": fc.Json({"lr": 0.1})}, metrics={"loss": 0.5}).result()
manager""",
    "manager.metadata()",
    "restored = manager.restore()\nrestored",
    "fc.Module(model)",
    "fc.policies.every('1h30m')",
    "manager.close()\nmanager",
    """shown = []
get_ipython().display_pub.register_hook(
    lambda message: shown.append(message["content"]["data"]["text/html"]) or message
)
with fc.CheckpointManager("far", on_event=ProgressBar()) as watched:
    watched.save(1, {"state": {"x": torch.zeros(1000)}}).result()
    watched.restore()
print(*shown, sep="\\n")""",
    """print(get_ipython().Completer.complete(None, "restored['")[1])""",
]


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Runs the cells; returns the output of each, by MIME type."""
    from nbclient import NotebookClient
    from nbformat.v4 import new_code_cell, new_notebook

    folder = tmp_path_factory.mktemp("notebook")
    (folder / "kernels" / "own").mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = json.dumps({"argv": argv, "display_name": "own", "language": "python"})
    (folder / "kernels" / "own" / "kernel.json").write_text(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(folder))
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        book = new_notebook(cells=[new_code_cell(each) for each in _CELLS])
        resources = {"metadata": {"path": str(folder)}}
        NotebookClient(book, kernel_name="own", timeout=300, resources=resources).execute()
    return [_shown(cell) for cell in book.cells]


def _shown(cell: Any) -> dict[str, str]:
    found: dict[str, str] = {}
    for output in cell.outputs:
        for kind, text in output.get("data", {}).items():
            found[kind] = found.get(kind, "") + text
        found["stream"] = found.get("stream", "") + output.get("text", "")
    return found


def test_objects_are_short_and_say_their_state(cells: list[dict[str, str]]) -> None:
    manager, metadata, restored, module, policy, closed, _, _ = cells
    assert manager["text/plain"].endswith("run', 1 step, latest 3)")
    assert "<td>3</td><td>latest</td>" in manager["text/html"]
    assert metadata["text/plain"].startswith("StepMetadata(step=3, 2 items: model, config")
    assert "<summary>model: 2 arrays, 40 bytes</summary>" in metadata["text/html"]
    assert restored["text/plain"] == "Restored(step=3, items=['config', 'model'])"
    assert "<li>lr: <code>0.1</code></li>" in restored["text/html"]
    assert module["text/plain"] == "Module(Linear, 2 parameters)"
    assert "<li>weight: <code>float32[2, 4] cpu</code></li>" in module["text/html"]
    assert policy["text/plain"] == "every('1h30m')"
    assert closed["text/plain"].endswith("run', closed)")
    assert "closed" in closed["text/html"] and "<table>" not in closed["text/html"]


def test_bars_move_and_go_away(cells: list[dict[str, str]]) -> None:
    bars = cells[-2]
    assert bars["text/html"] == ""  # both bars are gone
    first, *updates, last = bars["stream"].splitlines()  # of the restore, which is in this thread
    assert first.endswith("<progress max=100 value=0></progress> 0 %")
    assert "restor" in first
    assert updates[-1].endswith("<progress max=100 value=100></progress> 100 %")
    assert last == ""


def test_names_of_restored_items_complete(cells: list[dict[str, str]]) -> None:
    assert cells[-1]["stream"] == "['config', 'model']\n"
