"""`fckpt` on Orbax checkpoints: ls, show, verify, diff."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orbax_writer
import pytest

from functional_ckpt.cli import main

SCENARIOS = (
    *("v0_standard", "v0_composite", "v0_named_steps", "v0_pytree_bare", "v0_zarr2_files"),
    *("v0_zarr3_ocdbt", "v0_chunked", "v1_save", "v1_training"),
)
Run = Callable[..., Any]


@pytest.fixture(scope="session")
def orbax(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fckpt_orbax")
    subprocess.run(
        [sys.executable, orbax_writer.__file__, str(root), *SCENARIOS],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        timeout=240,
        check=True,
    )
    return root


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object, code: int = 0) -> Any:
        assert main([*map(str, arguments), "--json"]) == code
        return json.loads(capsys.readouterr().out)

    return call


def test_steps_metrics_and_items_are_listed(orbax: Path, run: Run) -> None:
    record = run("ls", orbax / "v0_standard")
    assert [step["step"] for step in record["steps"]] == [1, 2, 10]
    assert [step["metrics"] for step in record["steps"]] == [
        {"accuracy": 1 / step} for step in (1, 2, 10)
    ]
    assert record["best"] == {}  # other programs leave no policies
    assert {step["writer"] for step in record["steps"]} == {"other"}
    (composite,) = run("ls", orbax / "v0_composite")["steps"]
    assert composite["items"] == {
        "state": "tree",
        "tree": "tree",
        "arrays": "tree",
        "config": "json",
    }
    assert run("ls", orbax / "v0_named_steps")["latest"] == 5
    assert run("ls", orbax / "v1_training")["latest"] == 4
    assert run("show", orbax / "v0_standard")["custom_metadata"] == {"note": "ключ"}


@pytest.mark.parametrize("name", SCENARIOS)
def test_everything_is_read_and_said_to_be_without_digests(
    orbax: Path, run: Run, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    record = run("verify", orbax / name)
    assert record["ok"]
    assert {each["has_digests"] for each in record["checkpoints"]} == {False}
    assert all(each["findings"] == [] for each in record["checkpoints"])
    assert main(["verify", str(orbax / name)]) == 0
    assert "no digests to compare with" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", ["v0_zarr3_ocdbt", "v0_zarr2_files"])
def test_unreadable_array_is_reported_with_its_leaf(orbax: Path, run: Run, name: str) -> None:
    item = orbax / name
    if name == "v0_zarr2_files":
        file = item / "params.kernel" / "0.0"
    else:
        file = max(item.rglob("d/*"), key=lambda each: each.stat().st_size)
    content = file.read_bytes()
    file.write_bytes(content[:10])
    try:
        (checkpoint,) = run("verify", item, code=1)["checkpoints"]
    finally:
        file.write_bytes(content)
    leaves = {leaf for finding in checkpoint["findings"] for leaf in finding["leaves"]}
    assert leaves == {"params.kernel"} if name == "v0_zarr2_files" else leaves
    assert {finding["problem"] for finding in checkpoint["findings"]} == {"unreadable"}


def test_two_of_orbax_are_compared_by_their_bytes(orbax: Path, run: Run) -> None:
    same = run("diff", orbax / "v0_pytree_bare", orbax / "v0_zarr2_files")
    assert same["equal"]
    other = run("diff", orbax / "v0_standard" / "1", orbax / "v0_standard" / "2", code=1)
    kinds = {each["leaf"]: each["kind"] for each in other["items"]["default"]["differences"]}
    assert kinds == {"params.kernel": "data", "params.bias": "data"}


def test_diff_compares_orbax_with_native(orbax: Path, run: Run, tmp_path: Path) -> None:
    import torch

    import functional_ckpt as fc

    state = orbax_writer.state()
    del state["optimizer"], state["0"]
    params = {key: value for key, value in state["params"].items() if key != "bias"}
    params["bias"] = torch.zeros(8, dtype=torch.bfloat16)
    fc.save(tmp_path / "ours", {"state": {**state, "params": params, "rate": 0.25}})
    record = run("diff", orbax / "v1_save", tmp_path / "ours", code=1)
    kinds = {each["leaf"]: each["kind"] for each in record["items"]["state"]["differences"]}
    assert kinds == {
        "0": "only in a",
        "optimizer.0.count": "only in a",
        "optimizer.0.mu": "only in a",
        "optimizer.1.0": "only in a",
        "optimizer.1.1": "only in a",
        "params.bias": "data",
        "rate": "value",
    }
