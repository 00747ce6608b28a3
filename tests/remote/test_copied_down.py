"""A step's prefix, copied down by a client that knows nothing of us, is a checkpoint of Orbax."""

from __future__ import annotations

from pathlib import Path

import copying
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from orbax.checkpoint import v1

import functional_ckpt as fc

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    # Orbax warns that a checkpoint is read without a sharding, which is intended here.
    pytest.mark.filterwarnings("ignore:.*[Ss]harding.*:UserWarning"),
]


@pytest.mark.parametrize("how", ["straight", "by a tier"])
def test_orbax_opens_a_step_copied_down(how: str, s3: str, s3_url: str, tmp_path: Path) -> None:
    weights = torch.randn(300, 200)
    module = torch.nn.Linear(4, 3)
    items = {
        "state": {"w": weights, "half": weights[:7].bfloat16(), "n": 5, "list": [1, torch.ones(2)]},
        "model": module,
        "config": fc.Json({"lr": 0.1}),
    }
    run = f"{s3}/run"
    first = run if how == "straight" else tmp_path / "near"
    tiers = [] if how == "straight" else [fc.Tier(path=run)]
    with fc.CheckpointManager(first, tiers=tiers) as manager:
        manager.save(7, items, metrics={"loss": 0.5})
    copied = tmp_path / "copied"
    assert copying.copy_down(s3_url, s3.removeprefix("s3://"), "run/7", copied / "7") > 5

    state = ocp.PyTreeCheckpointer().restore(copied / "7" / "state")
    np.testing.assert_array_equal(state["w"], weights.numpy())
    assert str(state["half"].dtype) == "bfloat16"
    np.testing.assert_array_equal(
        np.asarray(state["half"]).astype(np.float32), weights[:7].bfloat16().float().numpy()
    )
    assert state["n"] == 5 and state["list"][0] == 1
    model = v1.load(copied / "7", checkpointable_name="model")
    np.testing.assert_array_equal(model["weight"], module.weight.detach().numpy())
    with ocp.CheckpointManager(copied) as theirs:
        assert theirs.all_steps() == [7]
        assert theirs.metadata(7).metrics == {"loss": 0.5}
