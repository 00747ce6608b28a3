"""A network that delays, drops, cuts, repeats and refuses: reported steps are complete."""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import pytest
import torch
from proxy import Proxy
from remote_environment import set_environment, set_gcs_environment

import functional_ckpt as fc
from functional_ckpt import errors
from functional_ckpt.storage.open import connect
from functional_ckpt.verify import checkpoint

# The full count: FUNCTIONAL_CKPT_BAD_NETWORK_SAVES=200 pytest tests/remote/test_bad_network.py
_NUM_SAVES = int(os.environ.get("FUNCTIONAL_CKPT_BAD_NETWORK_SAVES", "3"))


def _state(step: int) -> dict[str, object]:
    generator = torch.Generator().manual_seed(step)
    return {"state": {f"w{i}": torch.randn(120, 300, generator=generator) for i in range(3)}}


def _is_equal(restored: object, step: int) -> bool:
    expected = _state(step)["state"]
    return all(torch.equal(restored[name], expected[name]) for name in expected)  # type: ignore[index]


@pytest.mark.timeout(3600 if _NUM_SAVES > 20 else 300)
@pytest.mark.parametrize(("kind", "lead"), [("s3", set_environment), ("gcs", set_gcs_environment)])
def test_saves_and_restores_survive_a_bad_network(
    kind: str,
    lead: Callable[[pytest.MonkeyPatch, str], None],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bucket: str = request.getfixturevalue(kind)
    proxy = Proxy(request.getfixturevalue(f"{kind}_url"), trouble=0.08, seed=8)
    lead(monkeypatch, proxy.url)
    run, rng = f"{bucket}/run", random.Random(1)
    reported: list[int] = []
    with fc.CheckpointManager(run, keep_policy=[fc.policies.LatestN(8)]) as manager:
        for step in range(_NUM_SAVES):
            try:
                manager.save(step, _state(step)).result()
            except errors.SaveError:
                assert step not in manager.all_steps()
                continue
            reported.append(step)
            chosen = rng.choice(reported[-8:])
            if chosen in manager.all_steps():
                assert _is_equal(manager.restore(chosen)["state"], chosen)
    assert len(reported) > 0.9 * _NUM_SAVES
    assert sum(proxy.troubles.values()) > _NUM_SAVES
    proxy.trouble = 0
    with fc.CheckpointManager(run) as manager:
        kept = manager.all_steps()
        assert kept == reported[-8:]
    store = connect(run)[0]
    for step in kept:
        assert checkpoint.verify_checkpoint(store, f"{run}/{step}", step) == []
    assert not [name for name in store.list(run) if "tmp" in name]
    print(f"{len(reported)} saves and restores of {_NUM_SAVES}, troubles: {proxy.troubles}")
    proxy.close()
