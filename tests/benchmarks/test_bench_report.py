"""Medians, ratios, bars and tables of the benchmark, from figures made up."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import fake_run as made
import pytest

from benchmarks import bars, plots, report, results, summary
from benchmarks.results import Result, Run, Task


def bar(run: Run, start: str) -> bars.Bar:
    found = [each for each in bars.bars(summary.summarize(run)) if each.name.startswith(start)]
    assert len(found) == 1, [each.name for each in found]
    return found[0]


def test_a_spread_is_the_median_and_the_ends() -> None:
    run = Run(
        settings=made.SETTINGS,
        results=tuple(
            made.result("latency", repeat, refused_save_seconds=seconds)
            for repeat, seconds in enumerate((5.0, 1.0, 2.0))
        ),
    )
    assert summary.summarize(run).spread("latency", "refused_save_seconds") == summary.Spread(
        median=2.0, low=1.0, high=5.0, count=3
    )


def test_the_limit_is_the_fastest_raw_way_for_as_many_bytes() -> None:
    found = summary.summarize(made.run())
    assert summary.limit_seconds(found, "save_durable_seconds", made.GIB) == 0.5
    assert summary.limit_seconds(found, "restore_cold_seconds", 4 * made.GIB) == 3.0
    assert summary.limit_seconds(found, "blocked_3_seconds", 2 * made.GIB) == 0.2
    assert summary.limit_seconds(found, "cpu_seconds", made.GIB) is None
    nothing = summary.summarize(Run(settings=made.SETTINGS))
    assert summary.limit_seconds(nothing, "save_durable_seconds", made.GIB) is None


def test_the_best_peer_is_never_ourselves() -> None:
    found = summary.summarize(
        made.run(
            made.sync("big", "functional_ckpt", 1.0, 0.2),
            made.sync("big", "dcp", 3.0, 0.9),
            made.sync("big", "orbax", 2.0, 2.0),
        )
    )
    assert found.best_peer("sync", "big", "save_durable_seconds") == ("orbax", 2.0)
    assert found.best_peer("sync", "big", "restore_warm_seconds") == ("dcp", 0.9)
    assert found.best_peer("sync", "small", "restore_warm_seconds") is None
    assert found.peers("sync", "big") == ["dcp", "orbax", "functional_ckpt"]


def test_unequal_work_is_refused() -> None:
    ours = made.sync("big", "functional_ckpt", 1.0, 0.2)
    with pytest.raises(summary.UnequalWorkError, match="sync/big/dcp has digest other"):
        summary.summarize(made.run(ours, made.sync("big", "dcp", 1.0, 1.0, digest="other")))
    with pytest.raises(summary.UnequalWorkError, match="sync/big/dcp has size_bytes 7"):
        summary.summarize(made.run(ours, made.sync("big", "dcp", 1.0, 1.0, size_bytes=7)))


@pytest.mark.parametrize(
    ("measured", "bound", "at_most", "reached"),
    [
        (1.4, 1.4, False, True),
        (1.39, 1.4, False, False),
        (1.304, 1.3, True, True),  # 1.30 in the table
        (1.306, 1.3, True, False),
        (None, 1.3, True, None),
    ],
)
def test_a_bar_counts_as_the_table_shows_it(
    measured: float | None, bound: float, at_most: bool, reached: bool | None
) -> None:
    found = bars.Bar(name="a", measured=measured, bound=bound, at_most=at_most)
    assert found.is_reached is reached


def test_bars_of_durable_saves() -> None:
    run = made.run(
        made.sync("big", "functional_ckpt", 1.25, 0.25),
        made.sync("big", "torch.save", 2.0, 0.5),
        made.sync("big", "dcp", 3.0, 0.2),
    )
    durable = bar(run, "`big`: durable save, speed over the best peer (torch.save)")
    assert (durable.measured, durable.is_reached) == (1.6, True)
    limit = bar(run, "`big`: durable save, speed over the best raw")
    assert (limit.measured, limit.is_reached) == (0.8, False)
    assert bar(run, "`big`: restore in place, warm, speed over a copy").measured == 0.8
    beside = bar(run, "`big`: restore in place, warm, verified, speed over the best peer (dcp)")
    assert (beside.measured, beside.is_reached) == (0.8, False)
    assert bar(run, "`small`: durable save, speed over the best peer").is_reached is None


def test_an_earlier_version_is_no_peer_but_a_bar_of_its_own() -> None:
    run = made.run(
        made.sync("big", "functional_ckpt", 1.25, 0.25),
        made.sync("big", "functional_ckpt.before", 1.0, 0.1),
        made.sync("big", "dcp", 2.0, 0.25),
    )
    before = bar(run, "`big`: durable save, speed over the earlier version")
    assert (before.measured, before.is_reached) == (0.8, False)
    assert bar(run, "`big`: durable save, speed over the best peer (dcp)").measured == 1.6
    assert bar(run, "`small`: durable save, speed over the earlier").is_reached is None


def test_restores_without_verification_have_a_bar_of_their_own() -> None:
    run = made.run(
        made.sync("tiny", "functional_ckpt", 1.0, 0.5, restore_unverified_seconds=0.4),
        made.sync("tiny", "safetensors", 1.0, 0.4, restore_unverified_seconds=0.4),
    )
    verified = bar(run, "`tiny`: restore in place, warm, verified")
    unverified = bar(run, "`tiny`: restore in place, warm, unverified")
    assert (verified.measured, unverified.measured) == (pytest.approx(0.8), 1.0)
    page = report.markdown(summary.summarize(run), [])
    assert "| restore in place, warm, unverified | **functional_ckpt** | 0.40 s |" in page


def test_unchanged_bytes_cost_neither_space_nor_time_in_the_background() -> None:
    frozen = {"changed_bytes": 100, "new_disk_bytes": 104, "durable_3_seconds": 0.5}
    run = made.run(
        made.background("frozen", "functional_ckpt.eager", 0.25, **frozen),
        made.background("gpt2", "functional_ckpt.eager", 0.25, durable_3_seconds=2.75),
    )
    assert bar(run, "`frozen`: bytes written").measured == pytest.approx(1.04)
    assert bar(run, "`frozen`: background time").measured == pytest.approx(0.1)
    assert bar(made.run(), "`frozen`: background time").measured is None


def test_what_blocks_is_compared_among_systems_that_stage_alike() -> None:
    run = made.run(
        made.background("big", "functional_ckpt.eager", 0.25),
        made.background("big", "functional_ckpt.overlapped", 0.004),
        made.background("big", "torch_checkpointing.overlapped", 0.001),
        made.background("big", "dcp.thread", 0.5),
    )
    assert bar(run, "`big`: blocked in the third save, eager").measured == 1.25
    assert bar(run, "`big`: the same over the best peer (dcp.thread)").measured == 0.5
    assert bar(run, "`big`: blocked in the third save, overlapped").measured == pytest.approx(4.0)
    page = report.markdown(summary.summarize(run), [])
    ours = "| blocked, 3rd save | **functional_ckpt.{}** | {} | {} | {} |"
    assert ours.format("eager", "0.25 s", "8", "2.00x") in page
    assert ours.format("overlapped", "4 ms", "500", "0.25x") in page


def test_a_loop_is_compared_with_one_beside_another_writer() -> None:
    loop = made.result(
        "loop/big", loop_alone_seconds=9.0, loop_other_seconds=10.0, loop_overlapped_seconds=10.2
    )
    found = bar(made.run(loop), "a training loop")
    assert found.measured == pytest.approx(2.0) and found.is_reached


def test_the_page_has_every_figure_with_its_ratios() -> None:
    failed = Result(
        task=Task(measure="sync", workload="big", peer="orbax"),
        repeat=0,
        wall_seconds=1.0,
        error="OSError: no | space",
    )
    run = made.run(
        made.sync("big", "functional_ckpt", 1.25, 0.25),
        made.sync("big", "dcp", 2.5, 0.5, cold_resident=0.5),
        failed,
    )
    page = report.markdown(summary.summarize(run), ["durable"])
    assert "| save, durable | **functional_ckpt** | 1.25 s | 1.6 | 2.00x | 0.80x |" in page
    assert "| save, durable | dcp | 2.50 s | 0.8 | 1.00x | 0.40x |" in page
    assert "| restore in place, cold | dcp | the cache was not dropped | | | |" in page
    assert "| sync/big/orbax | failed: OSError: no \\| space |" in page
    assert '--8<-- "docs/benchmarks/durable.svg"' in page
    assert "| memcpy 2 threads" not in page and "| memcpy 2 | 0.20 s" in page


def test_repeats_show_their_spread() -> None:
    repeats = (made.limits(0), made.limits(1))
    page = report.markdown(summary.summarize(Run(settings=made.SETTINGS, results=repeats)), [])
    assert "medians of 2," in page and "| memcpy 2 | 0.20 s (0.20 s–0.20 s) | 10 |" in page


def test_a_gpu_is_set_beside_its_bus() -> None:
    found = made.result(
        "cuda/big", size_bytes=7, pinned_d2h_seconds=0.2, eager_blocked_3_seconds=0.25
    )
    page = report.markdown(summary.summarize(made.run(found)), [])
    assert "| eager blocked 3 | 0.25 s | 1.250x | pinned d2h |" in page


def test_the_page_of_a_run_that_has_hardly_begun() -> None:
    page = report.markdown(summary.summarize(Run(settings=made.SETTINGS)), [])
    assert "not measured" in page and "reached" not in page


def test_plots_are_drawn_from_the_figures_alone(tmp_path: Path) -> None:
    found = summary.summarize(
        made.run(
            made.sync("big", "functional_ckpt", 1.25, 0.25),
            made.sync("big", "dcp", 2.5, 0.5),
            made.background("big", "functional_ckpt.eager", 0.25),
        )
    )
    drawn = plots.draw(found, tmp_path)
    assert drawn == ["durable", "blocked", "restore_cold", "restore_warm", "memory"]
    first = [(tmp_path / f"{name}.svg").read_bytes() for name in drawn]
    assert all(each.startswith(b"<svg") and b"currentColor" in each for each in first)
    assert not any(b"<style" in each or b"\n\n" in each for each in first)  # for a page as it is
    assert plots.draw(found, tmp_path) == drawn
    assert [(tmp_path / f"{name}.svg").read_bytes() for name in drawn] == first


def test_run_in_a_store_resumes(tmp_path: Path) -> None:
    failed = dataclasses.replace(
        made.sync("big", "dcp", 1.0, 1.0), figures=None, error="it broke", repeat=1
    )
    run = made.run(made.sync("big", "dcp", 1.0, 1.0), failed)
    results.store(run, tmp_path / "results.json")
    assert results.load(tmp_path / "results.json") == run
    task = Task(measure="sync", workload="big", peer="dcp")
    assert run.has(task, 0) and not run.has(task, 1) and not run.has(task, 2)
    again = dataclasses.replace(made.sync("big", "dcp", 2.0, 1.0), repeat=1)
    assert run.with_result(again).has(task, 1)
    skipped = dataclasses.replace(again, figures=None, skipped="no GPU")
    assert not run.is_skipped(task) and run.with_result(skipped).is_skipped(task)
    assert len(run.with_result(again).results) == len(run.results)


def test_a_result_is_one_of_three() -> None:
    with pytest.raises(ValueError, match="limits has not one of"):
        Result(task=Task(measure="limits"), repeat=0, wall_seconds=0.0)


def test_a_slow_tier_is_held_against_none() -> None:
    figures = {"save_of_32_mib_seconds": 0.010, "save_of_32_mib_with_slow_tier_seconds": 0.0104}
    run = made.run(made.result("tier", 0, **figures))
    found = bar(run, "a save beside a tier of 10 MB/s")
    assert found.measured == pytest.approx(1.04) and found.is_reached
    assert bar(made.run(), "a save beside a tier of 10 MB/s").measured is None
    page = report.markdown(summary.summarize(run), [])
    assert "| save of 32 mib with slow tier | 1.04e+04 µs" in page
