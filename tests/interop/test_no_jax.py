"""The default path never imports JAX or Orbax, and a user's JAX is left without a backend."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PEERS = ("jax", "jaxlib", "orbax", "flax")

USE = """
import sys, torch
import functional_ckpt as fc

def peers():
    return sorted({name.partition(".")[0] for name in sys.modules} & set(PEERS))

assert peers() == peers_before, peers()
model = torch.nn.Linear(3, 2)
optimizer = torch.optim.AdamW(model.parameters())
model(torch.ones(1, 3)).sum().backward()
optimizer.step()
items = {"model": model, "optimizer": fc.Optimizer(optimizer, model), "rng": fc.Rng(),
         "tree": {"a": [torch.ones(2).bfloat16(), 1, None]}, "config": fc.Json({"lr": 1})}
keep = [fc.policies.LatestN(2), fc.policies.BestN(1, "loss", mode="min")]
save = fc.policies.every(1)
with fc.CheckpointManager(ROOT + "/run", save_policy=save, keep_policy=keep) as manager:
    for step in range(4):
        manager.save(step, items, metrics={"loss": step}).result(60)
    manager.restore(into=items)
    manager.restore(0)
    assert manager.all_steps() == [0, 2, 3]
    manager.metadata(3)
fc.save(ROOT + "/one", items)
fc.restore(ROOT + "/one", items)
assert peers() == peers_before, peers()
"""

BACKEND = """
from jax._src import xla_bridge
assert not xla_bridge._backends, xla_bridge._backends
assert not xla_bridge.backends_are_initialized()
"""


def run(code: str, root: Path) -> None:
    header = f"PEERS = {PEERS!r}\nROOT = {str(root)!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", header + code], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_saving_and_restoring_imports_no_peer(tmp_path: Path) -> None:
    run("peers_before = []\n" + USE, tmp_path)


def test_a_user_who_imported_jax_keeps_an_uninitialised_backend(tmp_path: Path) -> None:
    before = "import jax\npeers_before = ['jax', 'jaxlib']\n"
    run(before + USE + BACKEND, tmp_path)


def test_orbaxs_policies_and_name_formats_initialise_no_backend(tmp_path: Path) -> None:
    code = """
import functional_ckpt as fc, torch
from orbax.checkpoint import checkpoint_managers as cm, path
manager = fc.CheckpointManager(
    ROOT + "/run",
    save_policy=cm.FixedIntervalPolicy(2),
    keep_policy=cm.LatestN(1),
    step_name=path.step.standard_name_format(step_prefix="s"),
)
with manager:
    for step in range(5):
        manager.save(step, {"x": torch.ones(2)})
    manager.wait_until_finished()
    assert manager.all_steps() == [4], manager.all_steps()
    manager.restore()
"""
    run(code + BACKEND, tmp_path)


def test_importing_the_package_loads_no_peer() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import functional_ckpt"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    loaded = {
        line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()
    }
    assert "functional_ckpt" in loaded
    assert not loaded & {*PEERS, "torch", "tensorstore"}
