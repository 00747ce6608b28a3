"""torchtitan's checkpoint component over steps, behaviour by behaviour, on gloo ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import titan_manager_jobs as jobs
import torch
from gloo_workers import Workers

import functional_ckpt as fc

if os.environ.get("FUNCTIONAL_CKPT_FULL") != "1":
    pytest.skip("a full run has it", allow_module_level=True)
pytest.importorskip("torchtitan")


@pytest.mark.parametrize(
    "keys",
    [
        {"async_mode": "disabled"},
        {"async_mode": "async"},
        {"async_mode": "async_with_pinned_mem"},
        {"parts": 2},
    ],
    ids=lambda keys: "-".join(map(str, keys.values())),
)
def test_a_resumed_run_equals_the_uninterrupted_one(
    keys: dict[str, Any], workers: Workers, tmp_path: Path
) -> None:
    whole = workers.run(2, jobs.whole, str(tmp_path / "whole"), 7, keys)
    first = workers.run(2, jobs.whole, str(tmp_path / "run"), 4, keys)
    second = workers.run(2, jobs.whole, str(tmp_path / "run"), 7, {**keys, "seed": 9})
    for rank in range(2):
        assert [first[rank][:2], second[rank][:2]] == [[False, [2, 4]], [True, [6]]]
        assert second[rank][2] == whole[rank][2]


def test_interval_first_step_and_retention(workers: Workers, tmp_path: Path) -> None:
    keys = {"interval": 3, "enable_first_step_checkpoint": True, "keep_latest_k": 2}
    (outcome, _) = workers.run(2, jobs.whole, str(tmp_path / "run"), 10, keys)
    assert outcome[1] == [1, 3, 6, 9]
    assert jobs.listed(str(tmp_path / "run")) == ["step-6", "step-9"]


def test_another_number_of_ranks(workers: Workers, tmp_path: Path) -> None:
    keys = {"exclude_from_loading": ["dataloader"]}
    workers.run(2, jobs.whole, str(tmp_path / "run"), 4, {})
    weights = [workers.run(n, jobs.initial, str(tmp_path / "run"), keys) for n in (1, 2)]
    assert weights[0][0][1] == weights[1][0][1] == weights[1][1][1]
    assert weights[0][0][2] == {"step": 4, "ntokens_seen": 16}


def test_keys_that_are_excluded_keep_their_values(workers: Workers, tmp_path: Path) -> None:
    workers.run(2, jobs.whole, str(tmp_path / "run"), 4, {})
    keys = {"exclude_from_loading": ["train_state", "lr_scheduler"]}
    for found, _, state, is_same in workers.run(2, jobs.initial, str(tmp_path / "run"), keys):
        assert (found, state["step"], is_same) == (True, 0, False)
    keys = {"exclude_from_loading": ["other"]}
    for text in workers.run(2, jobs.refused, str(tmp_path / "run"), keys):
        assert text.startswith("ValueError: exclude_from_loading")


def test_load_step_and_load_only(workers: Workers, tmp_path: Path) -> None:
    workers.run(2, jobs.whole, str(tmp_path / "run"), 5, {})
    keys: dict[str, Any] = {"load_step": 2, "load_only": True}
    for found, _, state, _ in workers.run(2, jobs.initial, str(tmp_path / "run"), keys):
        assert (found, state["step"]) == (True, 2)
    for text in workers.run(2, jobs.refused, str(tmp_path / "run"), {"load_step": 3}):
        assert text.startswith("FileNotFoundError: checkpoint.load_step=3")
    (outcome, _) = workers.run(2, jobs.whole, str(tmp_path / "run"), 6, {"load_only": True})
    assert outcome[1] == []
    assert jobs.listed(str(tmp_path / "run")) == ["step-2", "step-4"]


@pytest.mark.parametrize("is_model_only", [True, False])
def test_an_initial_checkpoint(is_model_only: bool, workers: Workers, tmp_path: Path) -> None:
    workers.run(2, jobs.whole, str(tmp_path / "run"), 4, {})
    expected = workers.run(2, jobs.initial, str(tmp_path / "run"), {})[0][1]
    keys = {
        "initial_load_path": str(tmp_path / "run" / "step-4"),
        "initial_load_model_only": is_model_only,
    }
    for found, weights, state, _ in workers.run(2, jobs.initial, str(tmp_path / "new"), keys):
        assert (found, weights, state["step"]) == (True, expected, 0 if is_model_only else 4)


@pytest.mark.parametrize("is_model_only", [True, False])
def test_a_checkpoint_of_torchtitan_s_own_manager(
    is_model_only: bool, workers: Workers, tmp_path: Path
) -> None:
    (expected, _) = workers.run(2, jobs.native, str(tmp_path / "native"))
    keys = {
        "initial_load_path": str(tmp_path / "native" / "step-2"),
        "initial_load_model_only": is_model_only,
    }
    for found, weights, state, _ in workers.run(2, jobs.initial, str(tmp_path / "new"), keys):
        assert (found, weights, state["step"]) == (True, expected, 0 if is_model_only else 2)


def test_nothing_to_load_is_a_fresh_start(workers: Workers, tmp_path: Path) -> None:
    for found, _, _, is_same in workers.run(2, jobs.initial, str(tmp_path / "new"), {}):
        assert (found, is_same) == (False, True)


def test_the_last_step_has_the_model_only_in_the_export_s_dtype(
    workers: Workers, tmp_path: Path
) -> None:
    folder = str(tmp_path / "run")
    (expected, _) = workers.run(2, jobs.last, folder, {"export_dtype": "bfloat16"})
    model = fc.restore(tmp_path / "run" / "step-3")["model"]
    assert {value.dtype for value in model.values()} == {torch.bfloat16}
    assert [value.tolist() for value in model.values()] == [
        torch.tensor(value).bfloat16().tolist() for value in expected
    ]
    for text in workers.run(2, jobs.refused, folder, {}):
        assert "holds the model only" in text
    (expected, _) = workers.run(
        2, jobs.last, str(tmp_path / "all"), {"last_save_model_only": False}
    )
    ((found, weights, state, _), _) = workers.run(2, jobs.initial, str(tmp_path / "all"), {})
    assert (found, weights, state["step"]) == (True, expected, 3)


def test_the_hub_s_format_in_and_out(workers: Workers, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    (expected, _) = workers.run(2, jobs.last, str(tmp_path / "run"), {"last_save_in_hf": True})
    hub = tmp_path / "run" / "step-3-hf"
    loaded = load_file(hub / "model.safetensors")
    assert sorted(loaded) == sorted(
        f"model.{n}.{p}" for n in ("up", "down") for p in ("weight", "bias")
    )
    for keys, assets in [
        ({"initial_load_in_hf": True, "initial_load_path": str(hub)}, None),
        ({"initial_load_in_hf": True}, str(hub)),
    ]:
        for found, weights, *_ in workers.run(
            2, jobs.initial, str(tmp_path / f"new{assets is None}"), keys, assets
        ):
            assert (found, weights) == (True, expected)


def test_a_seed_checkpoint_starts_any_number_of_ranks(workers: Workers, tmp_path: Path) -> None:
    ((*expected,),) = workers.run(1, jobs.seed, str(tmp_path / "run"))
    rounded = [torch.tensor(value).bfloat16().float().tolist() for value in expected]
    for found, weights, state, _ in workers.run(2, jobs.initial, str(tmp_path / "run"), {}):
        assert (found, weights, state["step"]) == (True, rounded, 0)


def test_a_disabled_manager_does_nothing(workers: Workers, tmp_path: Path) -> None:
    (outcome, _) = workers.run(2, jobs.whole, str(tmp_path / "run"), 3, {"enable": False})
    assert outcome[:2] == [False, []]
    assert not (tmp_path / "run").exists()
