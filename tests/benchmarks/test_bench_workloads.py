"""Workloads, the order of a run, files and meters: the basis of the figures."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import (
    async_peers,
    files,
    loop,
    measures,
    meters,
    peers,
    ranks,
    report,
    schedule,
    workloads,
)

ROOT = Path(__file__).parents[2]
MIB = 2**20


@pytest.mark.parametrize(
    ("name", "count", "size_bytes"),
    [
        ("big", 16, 2048 * MIB),
        ("small", 2000, 2000 * MIB),
        ("tiny", 20000, 20000 * 4096),
        ("big-16", 1, 128 * MIB),
        ("tiny-16", 1250, 1250 * 4096),
    ],
)
def test_arrays_are_as_many_and_as_large_as_said(name: str, count: int, size_bytes: int) -> None:
    assert len(workloads.leaves(name)) == count
    assert workloads.size_bytes(name) == size_bytes


def test_gpt2_has_its_parameters_in_bfloat16_and_two_moments_in_float32() -> None:
    leaves = workloads.leaves("gpt2")
    parameters = sum(leaf.size_bytes for leaf in leaves if leaf.dtype is torch.bfloat16) // 2
    assert parameters == 124_439_808
    rest = sum(leaf.size_bytes for leaf in leaves if leaf.dtype is torch.float32)
    assert rest == parameters * 8 + 4 * 148  # and a step for each of 148 parameters


@pytest.mark.parametrize("name", ["big", "gpt2"])
def test_data_is_random_finite_and_repeatable(name: str) -> None:
    leaves = [leaf for leaf in workloads.leaves(name, 16) if leaf.size_bytes < 4 * MIB][:20]
    leaves = leaves or [workloads.Leaf(name="t", shape=(64, 64))]
    state = workloads.fill(leaves)
    assert all(torch.isfinite(t).all() and (t != 0).all() for t in state.values())
    assert max(len(t.unique()) for t in state.values()) > 1000
    assert workloads.digest(state) == workloads.digest(workloads.fill(leaves))
    assert workloads.digest(state) != workloads.digest(workloads.fill(leaves, seed=1))


def test_a_digest_sees_one_bit_a_name_and_a_dtype() -> None:
    state = {"a": torch.rand(8), "b": torch.rand(4)}
    digest = workloads.digest(state)
    assert workloads.digest({"a": state["a"], "c": state["b"]}) != digest
    assert workloads.digest({"a": state["a"], "b": state["b"].view(torch.int32)}) != digest
    state["b"].view(torch.int32)[2] ^= 1
    assert workloads.digest(state) != digest


def test_every_byte_changes_between_saves_but_where_frozen() -> None:
    state = workloads.make("tiny", 100)
    before = {name: tensor.clone() for name, tensor in state.items()}
    assert workloads.change("tiny", state) == workloads.size_bytes("tiny", 100)
    assert all((state[name] != before[name]).all() for name in state)
    again = {name: tensor.clone() for name, tensor in state.items()}
    changed = workloads.change("frozen", state)
    assert changed == sum(t.nbytes for n, t in state.items() if not torch.equal(t, again[n]))
    assert 0 < changed <= sum(tensor.nbytes for tensor in state.values()) // 100


def test_a_poke_changes_every_tensor() -> None:
    state = workloads.fill(workloads.leaves("gpt2", 16)[2:8])
    before = {name: tensor.clone() for name, tensor in state.items()}
    workloads.poke(state)
    assert not any(torch.equal(state[name], before[name]) for name in state)


def test_systems_take_turns_and_each_is_measured_once() -> None:
    loads = ["big", "ranks"]
    first = list(schedule.tasks(0, loads, [], list(schedule.MEASURES)))
    assert schedule.BEFORE not in {task.peer for task in first}
    with_before = schedule.tasks(0, loads, [], list(schedule.MEASURES), has_before=True)
    assert {t.measure for t in with_before if t.peer == schedule.BEFORE} == {"sync"}
    second = list(schedule.tasks(1, loads, [], list(schedule.MEASURES)))
    assert len(set(first)) == len(first) and set(first) == set(second) and first != second
    assert {task.workload for task in first} == {"big", "ranks", "-"}


def test_systems_are_chosen_by_name_or_by_what_stands_before_the_dot() -> None:
    wanted = ["functional_ckpt", "dcp.thread"]
    found = [t.peer for t in schedule.tasks(0, ["big"], wanted, ["sync", "async"])][3:]
    assert found == [
        "functional_ckpt",
        "dcp.thread",
        "functional_ckpt.eager",
        "functional_ckpt.overlapped",
    ]


def test_a_holder_shares_memory_with_the_state() -> None:
    state = workloads.make("tiny", 4000)
    holder = peers.Holder(state)
    state["t00001"].fill_(3)
    assert holder.get_parameter("t00001").eq(3).all()


def test_the_cache_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(os.urandom(MIB))
    (tmp_path / "empty").touch()
    assert files.resident_fraction(str(tmp_path)) == 1.0
    if files.drop_cache(str(tmp_path)) == 1.0:
        pytest.skip("a file system in memory cannot drop its cache")
    assert files.resident_fraction(str(tmp_path)) == 0.0
    assert files.fill_cache(str(tmp_path)) == 1.0


def test_hard_links_occupy_the_disk_once(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 8192)
    os.link(tmp_path / "a", tmp_path / "b")
    files.sync_tree(str(tmp_path))
    assert sum(files.inodes(str(tmp_path)).values()) == 8192


@pytest.mark.parametrize("where", ["anonymous", "shared"])
def test_memory_that_is_let_go_is_in_the_peak(where: str) -> None:
    def hold() -> None:
        # Not from the heap, which may hold as much already.
        kind = mmap.MAP_SHARED if where == "shared" else mmap.MAP_PRIVATE
        held = mmap.mmap(-1, 32 * MIB, flags=kind | mmap.MAP_ANONYMOUS)
        for offset in range(0, 32 * MIB, 4096):
            held[offset] = 1
        time.sleep(0.05)

    with meters.PeakMemory() as memory:
        hold()
    assert 32 * MIB <= memory.peak < 48 * MIB
    assert memory.end < 24 * MIB


def test_saves_of_the_loop_are_further_apart_than_a_durable_write() -> None:
    assert loop.steps_between(2.0, 0.5) * 0.5 > 2.0
    assert loop.steps_between(0.001, 0.5) == 3


def test_a_child_measures_ours(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.child", "async", "tiny", "functional_ckpt.eager"]
    command += ["--divisor", "1000", "--root", str(tmp_path), "--rounds", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    first, second = json.loads(done.stdout.splitlines()[-1])["rounds"]
    assert second["blocked_3_seconds"] > 0 and "blocked_1_seconds" not in second
    figures = first
    assert figures["size_bytes"] == 20 * 4096 <= figures["disk_bytes"]
    times = {name: value for name, value in figures.items() if name.endswith("_seconds")}
    # The clock of the processor may not have moved.
    assert all(value > 0 or "cpu_seconds" in name for name, value in times.items()), times


@pytest.mark.parametrize("peer", ["torch.save", "safetensors", "functional_ckpt"])
def test_every_figure_of_a_system_that_restores_what_it_saved(peer: str, tmp_path: Path) -> None:
    for figures in measures.measure_sync(peer, "tiny", 1000, str(tmp_path), rounds=2):
        assert figures["size_bytes"] == 20 * 4096 <= figures["disk_bytes"]
        assert set(report.SYNC) <= set(figures)


def test_a_system_that_restores_other_bytes_has_no_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Forgetful(peers.TorchSave):
        def restore(self, bound: workloads.State, path: str) -> None:
            super().restore(bound, path)
            next(iter(bound.values()))[-1] += 1

    monkeypatch.setattr(peers, "PEERS", {"forgetful": Forgetful})
    with pytest.raises(measures.UnequalWorkError, match="forgetful did not restore"):
        measures.measure_sync("forgetful", "tiny", 1000, str(tmp_path))


def test_skipped_measurements_have_a_reason(tmp_path: Path) -> None:
    with pytest.raises(async_peers.SkipMeasure, match="no way to save shards"):
        ranks.measure("torch.save", "ranks", 1, str(tmp_path))


def test_a_child_measures_an_earlier_version_from_its_folder(tmp_path: Path) -> None:
    package = tmp_path / "installed" / "functional_ckpt"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise OSError('this is the earlier version')")
    command = [sys.executable, "-m", "benchmarks.child", "sync", "tiny", schedule.BEFORE]
    command += ["--root", str(tmp_path), "--before", str(package.parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode and "this is the earlier version" in done.stderr
