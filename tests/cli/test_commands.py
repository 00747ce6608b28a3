"""Commands on a run: words for steps, removal, values, statistics."""

from __future__ import annotations

import datetime
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import functional_ckpt as fc
from functional_ckpt import errors, testing, verify
from functional_ckpt.cli import main, step_words, watch

METRICS = ("loss", "accuracy", "grad_norm", "epoch", "lr", "tokens/s", "val/perplexity", "seconds")


def save(root: Path, steps: tuple[int, ...] = (10, 20, 30, 40), **options: Any) -> None:
    with fc.CheckpointManager(options.pop("directory", root), **options) as manager:
        for step in steps:
            weight = torch.arange(6.0).reshape(2, 3) + step
            weight[0, 0] = math.nan if step == 20 else 0.0
            items = {
                "state": {"w": weight, "half": torch.ones(3, dtype=torch.bfloat16), "note": "a"},
                "config": fc.Json({"lr": 3e-4, "layers": [1, {"size": 2}]}),
            }
            metrics = {name: float(100 - step) for name in METRICS} | {"accuracy": step / 100}
            manager.save(step, items, metrics=metrics)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    save(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command in this process: its output and its exit code."""
    monkeypatch.setenv("NO_COLOR", "1")

    def call(*arguments: object, width: int = 80) -> tuple[str, int]:
        monkeypatch.setenv("COLUMNS", str(width))
        capfd.readouterr()
        code = main(list(map(str, arguments)))
        done = capfd.readouterr()
        return done.out + done.err, code

    return call


class Mine:
    """A keep policy of the user's own: it keeps every step."""

    def __repr__(self) -> str:
        return "Mine()"

    def should_preserve(self, checkpoints: Any, /, *, context: Any) -> list[bool]:
        return [True] * len(checkpoints)


def steps_in(run: Path) -> list[int]:
    with fc.CheckpointManager(run, read_only=True) as manager:
        return manager.all_steps()


# ------------------------------------------------------------------------------------ ls


@pytest.mark.parametrize("width", [40, 60, 80, 120, 160])
def test_a_listing_fits_the_terminal_and_counts_the_metrics_it_leaves_out(
    run: Path, call: Any, width: int
) -> None:
    text, code = call("ls", run, width=width)
    assert code == 0
    assert max(map(len, text.splitlines()[1:])) <= width
    for step in (10, 20, 30, 40):
        (line,) = (each for each in text.splitlines() if each.split()[:1] == [str(step)])
        assert "KiB" in line
        assert "s ago" in line
        assert ("latest" in line) == (step == 40)
    heading = next(line for line in text.splitlines() if line.startswith("step")).split()
    shown = [name for name in METRICS if name in heading]
    assert shown == list(METRICS[: len(shown)])
    left_out = len(METRICS) - len(shown)
    assert (f"+{left_out} metric" in text) == (left_out > 0)
    assert ("saved" in heading) == (width >= 120)


def test_a_listing_shows_what_is_asked_for(run: Path, call: Any) -> None:
    text, _ = call("ls", run, "-l", "--metrics", "lr,loss", "--sort", "loss", "--last", 2)
    rows = [
        line.split()[0]
        for line in text.splitlines()
        if line.split()[:1] and line[:4].strip().isdigit()
    ]
    assert rows == ["20", "10"]
    heading = next(line for line in text.splitlines() if line.startswith("step")).split()
    assert heading == ["step", "saved", "age", "size", "lr", "loss"]
    text, _ = call("ls", run, "--metrics", "all")
    assert all(name in text for name in METRICS)
    text, code = call("ls", run, "--sort", "speed")
    assert (code, "No step has the metric 'speed'; they have: accuracy" in text) == (2, True)
    steps = json.loads(call("--json", "ls", run, "--reverse")[0])["steps"]
    assert [each["step"] for each in steps] == [40, 30, 20, 10]


def test_stars_mark_what_a_policy_of_the_run_ranks(run: Path, call: Any, tmp_path: Path) -> None:
    text, _ = call("ls", run)
    assert "★" not in text  # no policy ranks, whatever the metrics are called
    best = json.loads(call("ls", run, "--json", "--best", "grad_norm:min")[0])["best"]
    assert best == {"grad_norm": {"mode": "min", "step": 40}}
    ranks = [fc.policies.BestN(1, "loss", mode="max"), fc.policies.LatestN(2), Mine()]
    save(tmp_path / "ranked", keep_policy=[*ranks, fc.policies.BestN(1, "speed")])
    best = json.loads(call("ls", tmp_path / "ranked", "--json")[0])["best"]
    assert best == {"loss": {"mode": "max", "step": 10}}
    assert call("ls", tmp_path / "ranked")[0].count("★") == 1
    # The mode is the policy's, although the name suggests another one.
    assert json.loads(call("show", tmp_path / "ranked", "best:loss", "--json")[0])["step"] == 10
    (tmp_path / "ranked" / ".functional_ckpt" / "history.jsonl").unlink()
    assert json.loads(call("ls", tmp_path / "ranked", "--json")[0])["best"] == {}
    assert json.loads(call("show", tmp_path / "ranked", "best:loss", "--json")[0])["step"] == 40


# ------------------------------------------------------------------------------------ steps


@pytest.mark.parametrize(
    ("word", "step"),
    [("20", 20), ("latest", 40), ("best:loss", 40), ("best:accuracy:min", 10), ("best:lr:max", 10)],
)
def test_a_step_is_named_by_a_word(run: Path, call: Any, word: str, step: int) -> None:
    assert json.loads(call("show", run, word, "--json")[0])["step"] == step
    verified = json.loads(call("verify", run, "--step", word, "--json")[0])["checkpoints"]
    assert [each["step"] for each in verified] == [step]


def test_late_metrics_decide_the_best_step(run: Path, call: Any) -> None:
    with fc.CheckpointManager(run, read_only=True) as manager:
        manager.record_metrics(30, {"bleu": 1.0})
    assert json.loads(call("show", run, "best:bleu", "--json")[0])["step"] == 30


def test_a_word_that_names_no_step_says_what_does(run: Path, call: Any, tmp_path: Path) -> None:
    assert "expected a step's number, latest, or best:METRIC" in call("show", run, "newest")[0]
    text, code = call("show", run, "best:speed")
    assert (code, "they have: accuracy, epoch, grad_norm, loss" in text) == (2, True)
    with fc.CheckpointManager(tmp_path / "empty"):
        pass
    text, code = call("show", tmp_path / "empty", "best:loss")
    assert (code, "has no step yet" in text) == (2, True)


def test_without_a_command_the_help_is_printed(call: Any) -> None:
    text, code = call()
    assert code == 2 and all(name in text for name in ("usage: fckpt", "verify", "export"))


def test_metrics_with_colons_in_their_names() -> None:
    metrics = {1: {"a:max": 1.0, "a": 2.0}, 2: {"a:max": 0.0, "a": 3.0}}
    assert step_words.find_metric("a:max", metrics[1]) == ("a:max", None)
    assert step_words.find_metric("a:min", metrics[1]) == ("a", "min")
    assert step_words.best_steps(metrics, {}, ["a:max:min"]) == {"a:max": ("min", 2)}
    with pytest.raises(errors.UsageError, match="'lowest' is the mode of 'a', expected min or max"):
        step_words.find_metric("a:lowest", metrics[1])
    assert step_words.best_steps(metrics, {"a": "max", "b": "max"}) == {"a": ("max", 2)}


def test_diff_compares_a_step_with_the_latest(run: Path, call: Any) -> None:
    record = json.loads(call("diff", run, 10, "--json")[0])
    assert (record["a"]["step"], record["b"]["step"]) == (10, 40)
    record = json.loads(call("diff", run, "best:accuracy", "latest", "--json")[0])
    assert record["equal"] is True


def test_diff_lists_the_largest_differences_first(tmp_path: Path, call: Any) -> None:
    for name, factor in (("a", 0.0), ("b", 1.0)):
        leaves = {f"w{n}": torch.full((2,), n * factor) for n in range(1, 12)}
        fc.save(tmp_path / name, {"state": leaves})
    text, code = call("diff", tmp_path / "a", tmp_path / "b")
    assert code == 1
    listed = [line.split()[0] for line in text.splitlines() if line.startswith("w")]
    assert listed == ["w11", "w10", "w9", "w8", "w7"]
    assert "and 6 leaves with smaller differences (--all)" in text
    text, _ = call("diff", tmp_path / "a", tmp_path / "b", "--all")
    assert sum(line.startswith("w") for line in text.splitlines()) == 11


# ------------------------------------------------------------------------------------ cat, stats


def test_cat_prints_values(run: Path, call: Any) -> None:
    assert call("cat", run, "config.layers.1.size") == ("2\n", 0)
    assert call("cat", run, "config")[0] == '{"lr": 0.0003, "layers": [1, {"size": 2}]}\n'
    assert call("cat", run, "state.note")[0] == "a\n"
    assert call("cat", run, "state.w", "--step", 10)[0].split() == [
        *("[[", "0.,", "11.,", "12.],", "[13.,", "14.,", "15.]]"),
    ]
    assert json.loads(call("cat", run, "state.half", "--json")[0])["value"] == [1.0, 1.0, 1.0]
    for name, needle in (
        ("state.v", "such as w"),
        ("config.rl", "'rl' is not in"),
        ("x", "no item"),
    ):
        text, code = call("cat", run, name)
        assert (code, needle in text) == (2, True), text


@pytest.mark.parametrize("width", [60, 80, 120])
def test_stats_fit_the_terminal_and_name_each_leaf(tmp_path: Path, call: Any, width: int) -> None:
    names = [f"layers.{number}.attention.output.weight" for number in range(3)]
    fc.save(tmp_path / "a", {"model": {name: torch.full((9,), -1.23456) for name in names}})
    text, code = call("stats", tmp_path / "a", width=width)
    assert code == 0
    assert max(map(len, text.splitlines())) <= width
    rows = [line for line in text.splitlines()[2:] if not line.startswith("not shown: ")]
    joined = "".join(line.split()[0] for line in rows)
    assert joined == "".join(f"model.{name}" for name in names)
    assert "-1.235" in text and "NaN" not in text


def test_stats_are_numpys(tmp_path: Path, call: Any) -> None:
    values = torch.randn(100, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values[3, 4], values[5, 6], values[0, 0] = math.nan, -math.inf, 0.0
    large = torch.full((50,), 1e8) + torch.arange(50.0)
    tree = {"w": values, "big": large, "bits": torch.zeros(3, dtype=torch.bool)}
    fc.save(tmp_path / "a", {"state": tree})
    text, code = call("stats", tmp_path / "a", "--json")
    assert code == 1  # a value is not finite
    found = {each["leaf"]: each for each in json.loads(text)["arrays"]}
    finite = values[values.isfinite()].numpy()
    for name, expected in (
        ("min", finite.min()),
        ("max", finite.max()),
        ("mean", finite.mean()),
        ("std", finite.std()),
        ("norm", float((finite**2).sum()) ** 0.5),
    ):
        assert found["w"][name] == pytest.approx(expected, rel=1e-12)
    counts = [found["w"][name] for name in ("num_nan", "num_inf", "num_zeros", "num_elements")]
    assert counts == [1, 1, 1, 700]
    assert found["big"]["std"] == pytest.approx(large.double().numpy().std(), rel=1e-9)
    assert found["bits"]["num_zeros"] == 3
    text, code = call("stats", tmp_path / "a", "--leaf", "state.b*")
    assert code == 0
    assert "state.w" not in text
    assert "no array is named like 'x'" in call("stats", tmp_path / "a", "--leaf", "x")[0]


# ------------------------------------------------------------------------------------ removal


def test_rm_removes_steps_but_not_the_latest_by_accident(run: Path, call: Any) -> None:
    assert call("rm", run, 10, "--dry-run")[0] == f"{run}: would remove step 10\n"
    assert steps_in(run) == [10, 20, 30, 40]
    text, code = call("rm", run, 10, "latest")
    assert (code, "Add --latest-too" in text) == (2, True)
    assert steps_in(run) == [10, 20, 30, 40]
    text, code = call("rm", run, 10, 11)
    assert (code, "11" in text) == (2, True)
    assert call("rm", run, 10, "best:loss")[1] == 2
    assert call("rm", run, 10, 20) == (f"{run}: removed step 10, step 20\n", 0)
    assert steps_in(run) == [30, 40]
    assert call("rm", run, "latest", "--latest-too")[1] == 0
    assert steps_in(run) == [30]
    assert "is one checkpoint" in call("rm", run / "30", 30)[0]


def test_a_live_writers_steps_are_not_removed(run: Path, call: Any) -> None:
    with fc.CheckpointManager(run):
        for arguments in (["rm", run, 10], ["prune", run, "--keep-latest", 1]):
            text, code = call(*arguments)
            assert (code, "locked" in text.lower() or "writer" in text) == (2, True), text
    assert steps_in(run) == [10, 20, 30, 40]


def test_prune_says_why_and_removes_the_same(run: Path, call: Any) -> None:
    options = ["--keep-latest", 1, "--keep-best", "accuracy:min:2", "--keep-every", 20]
    text, _ = call("prune", run, *options, "--dry-run", "--json")
    planned = {each["step"]: (each["kept"], each["reasons"]) for each in json.loads(text)["steps"]}
    assert planned == {
        10: (True, ["best 2 accuracy"]),
        20: (True, ["every 20 steps", "best 2 accuracy"]),
        30: (False, []),
        40: (True, ["latest", "latest 1", "every 20 steps"]),
    }
    assert steps_in(run) == [10, 20, 30, 40]
    text, code = call("prune", run, *options)
    assert code == 0
    assert "no policy keeps it" in text
    assert steps_in(run) == [10, 20, 40]
    assert "they have:" in call("prune", run, "--keep-best", "speed:2")[0]


def test_prune_takes_the_policies_of_the_run(run: Path, call: Any, tmp_path: Path) -> None:
    text, code = call("prune", run)
    assert (code, "the run keeps every step. Choose the steps to keep" in text) == (2, True)
    keep = [fc.policies.LatestN(1), fc.policies.EveryNSteps(20)]
    with fc.CheckpointManager(run, keep_policy=keep) as manager:
        manager.save(41, {"state": {"x": torch.ones(2)}})
    save(run, (50,))  # keeps all: its policies are the run's now
    assert "the run keeps every step" in call("prune", run)[0]
    log = run / ".functional_ckpt" / "history.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("".join(f"{each}\n" for each in lines if '"step": 50' not in each))
    text, code = call("prune", run, "--dry-run", "--json")
    planned = {each["step"]: each["reasons"] for each in json.loads(text)["steps"]}
    assert planned == {
        20: ["EveryNSteps(20)"],
        40: ["EveryNSteps(20)"],
        41: [],
        50: ["latest", "LatestN(1)"],
    }
    assert call("prune", run)[1] == 0
    assert steps_in(run) == [20, 40, 50]
    save(tmp_path / "own", keep_policy=Mine())
    assert "policies of its own (Mine())" in call("prune", tmp_path / "own")[0]
    log.unlink()
    assert "policies of the run are not known" in call("prune", run)[0]


def test_prune_keeps_what_is_not_uploaded_yet(tmp_path: Path, call: Any) -> None:
    far = testing.FaultyStorage()
    tier = fc.Tier(path=tmp_path / "far", storage=far)
    manager = fc.CheckpointManager(tmp_path / "run", tiers=[tier])
    far.inject(testing.Fault(mode="lasting", kinds=("write",)))
    for step in (1, 2):
        manager.save(step, {"state": {"x": torch.ones(2)}}).result()  # type: ignore[union-attr]
    manager.close()
    text, code = call("prune", tmp_path / "run", "--keep-latest", 1, "--json")
    assert code == 0, text
    assert json.loads(text)["steps"][0] == {
        "step": 1,
        "kept": True,
        "reasons": ["not uploaded yet"],
    }
    assert steps_in(tmp_path / "run") == [1, 2]
    record = tmp_path / "run" / ".functional_ckpt" / "uploads.json"
    record.write_bytes(record.read_bytes().replace(b"[1, 2]", b"[3, 2]"))
    text, code = call("prune", tmp_path / "run", "--keep-latest", 1)
    assert (code, "it is unknown which steps are not uploaded yet" in text) == (1, True), text
    assert steps_in(tmp_path / "run") == [1, 2]


# ------------------------------------------------------------------------------------ watch


def test_the_next_step_is_due_as_the_last_ones_were() -> None:
    start = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)

    def due(steps: list[int], minutes: float, **changes: Any) -> str:
        infos = [
            fc.policies.StepInfo(
                step=step, time=start + datetime.timedelta(minutes=2 * n), **changes
            )
            for n, step in enumerate(steps)
        ]
        return watch.next_due(infos, start + datetime.timedelta(minutes=minutes))

    assert due([10, 20, 30], 4.5) == "step 40 is due in about 1 min"
    assert due([10, 20, 30], 9) == "step 40 was due 3 min ago"
    assert due([10, 20, 35], 4.5) == "the next step is due in about 1 min"
    assert due([10, 20, 30], 100) == ""  # the run is over
    assert due([10, 20], 2.5) == ""
    assert due([10, 20, 30], 4.5, is_abandoned=True) == ""


def test_watch_prints_new_steps_until_it_is_interrupted(tmp_path: Path) -> None:
    save(tmp_path / "run", (1,))
    command = [sys.executable, "-m", "functional_ckpt.cli", "watch", str(tmp_path / "run")]
    with subprocess.Popen(
        [*command, "--interval", "0.1"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("step 1 ")
        save(tmp_path / "run", (2,))
        line = process.stdout.readline()
        assert line.startswith("step 2 ")
        assert "loss=98" in line
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stdout.read() == ""


# ------------------------------------------------------------------------------------ usage


def test_a_misspelt_command_is_guessed(call: Any) -> None:
    assert "there is no command 'vrify'; did you mean verify?" in call("vrify")[0]
    text, code = call()
    assert code == 2
    assert "usage: fckpt" in text
    assert "prune" in text


def test_every_command_has_an_example(call: Any) -> None:
    commands = ("ls", "du", "watch", "show", "cat", "stats", "verify", "diff", "rm", "prune")
    for command in (*commands, "convert", "export", "convert_zero"):
        text, code = call(command, "--help", width=200)
        assert code == 0
        assert f"Example: fckpt {command} " in " ".join(text.split())


@pytest.mark.parametrize("option", ["--last", "--depth"])
@pytest.mark.parametrize("count", ["0", "-1", "x", "1.5", "\u0663"])
def test_counts_are_numbers_above_zero(run: Path, call: Any, option: str, count: str) -> None:
    command = "ls" if option == "--last" else "show"
    text, code = call(command, run, f"{option}={count}")
    assert (code, "expected a number above zero" in text) == (2, True)
    assert call(command, run, option, 1)[1] == 0


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "x", "0.05"])
def test_intervals_are_seconds(run: Path, call: Any, seconds: str) -> None:
    text, code = call("watch", run, f"--interval={seconds}")
    assert (code, "expected seconds, at least 0.1" in text) == (2, True)


@pytest.mark.parametrize("to", ["gs://bucket/out --to hf", "s3://bucket/out --to torch"])
def test_an_export_to_a_store_is_refused_before_anything_is_read(
    run: Path, call: Any, to: str
) -> None:
    text, code = call("export", run, *to.split(), "--item", "nothing")
    assert (code, "local paths only" in text) == (2, True), text


@pytest.mark.parametrize("width", [60, 80, 120])
def test_show_cuts_values_and_names_before_types_and_sizes(
    tmp_path: Path, call: Any, width: int
) -> None:
    layers = {f"encoder.self_attention.{n}": {"exp_avg": torch.ones(64, 32)} for n in range(3)}
    fc.save(tmp_path / "a", {"state": {**layers, "names": ["encoder.layers.0.weight" * 3]}})
    text, code = call("show", tmp_path / "a", width=width)
    lines = text.splitlines()[1:]
    assert (code, max(map(len, lines)) <= width) == (0, True)
    assert text.count("   float32   [64, 32]   8.0 KiB") == 3
    assert text.count("exp_avg") == 3
    assert "str" in text and "…" in text


def test_show_separates_items_by_an_empty_line(run: Path, call: Any) -> None:
    lines = call("show", run)[0].splitlines()
    for name in ("state", "config"):
        (place,) = (number for number, line in enumerate(lines) if line.startswith(f"{name}  "))
        assert not lines[place - 1]


# ------------------------------------------------------------------------------------ the shell


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("prune", "x", "--dryrun"), "fckpt prune: there is no argument '--dryrun'; did you mean"),
        (("prune", "x", "--dryrun"), "--dry-run?"),
        (("show", "x", "--itm=a"), "did you mean --item?"),
        (("ls", "a", "b"), "fckpt ls: there is no argument 'b'; see fckpt ls --help"),
        (("shwo", "a"), "there is no command 'shwo'; did you mean show?"),
    ],
)
def test_a_misspelt_argument_names_the_one_that_was_meant(
    call: Any, arguments: tuple[str, ...], message: str
) -> None:
    text, code = call(*arguments)
    assert code == 2
    assert message in text
    assert len(text.splitlines()) == 1


def test_every_help_has_an_example(call: Any) -> None:
    text, _ = call("--help")
    commands = [line.split()[0] for line in text.splitlines() if line.startswith("    ")]
    names = [name for name in commands if name.isidentifier() and name.islower()]
    assert {"ls", "report", "convert_zero"} <= set(names)
    for name in names:
        text, code = call(name, "--help")
        assert code == 0
        assert f"Example: fckpt {name} " in " ".join(text.split())


def test_the_package_is_the_command() -> None:
    command = [sys.executable, "-m", "functional_ckpt", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("fckpt ")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("fckpt prune --dr", {"--dry-run"}),
        ("fckpt show {run} --step ", {"latest", "10", "40", "best:loss", "best:tokens/s"}),
        ("fckpt diff {run} 10 la", {"latest"}),
    ],
)
def test_shells_complete_commands_options_and_steps(
    run: Path, tmp_path: Path, line: str, expected: set[str]
) -> None:
    pytest.importorskip("argcomplete")
    line, out = line.format(run=run), tmp_path / "out"
    shell = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line))}
    shell |= {"_ARGCOMPLETE_SUPPRESS_SPACE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(out)}
    command = [sys.executable, "-m", "functional_ckpt"]
    subprocess.run(command, env={**os.environ, **shell, "IFS": "\v"}, check=True)
    assert expected <= set(out.read_text().split("\v"))


def test_every_command_takes_a_uri(tmp_path: Path, call: Any) -> None:
    run = f"memory://{tmp_path.name}-{os.getpid()}/run"
    save(Path("unused"), directory=run)
    commands: list[tuple[object, ...]] = [
        *(("ls", run), ("show", run), ("show", f"{run}/40"), ("cat", run, "config.lr")),
        *(("verify", run), ("stats", run), ("rm", run, 10), ("prune", run, "--keep-latest", 2)),
        ("export", run, tmp_path / "torch", "--to", "torch"),
        ("convert", f"{run}/40", tmp_path / "step"),
        ("convert", tmp_path / "torch", f"{run}2"),
        ("diff", f"{run}2", f"{run}2"),
    ]
    if importlib.util.find_spec("matplotlib") is not None:
        commands.append(("report", run, "-o", tmp_path / "report.html"))
    for command in commands:
        text, code = call(*command)
        assert code == 0, (command, text)
    assert call("diff", run, 30)[1] == 1
    with fc.CheckpointManager(run, read_only=True) as manager:
        assert manager.all_steps() == [30, 40]


def test_a_checkpoint_is_verified_from_python(run: Path) -> None:
    assert verify.verify(run / "40") == []
    (file,) = (run / "40" / "state").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    assert [each.problem for each in verify.verify(run / "40") if each.is_damage] == ["content"]
