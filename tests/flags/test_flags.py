"""The flags of launch scripts: parsed by absl, turned into a manager."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import torch
from absl import flags as absl_flags
from etils import epath

import functional_ckpt as fc
from functional_ckpt.flags import launch, values


def parse(*arguments: str, directory: str | None = None) -> fc.flags.CheckpointFlags:
    flag_values = absl_flags.FlagValues()
    defined = fc.flags.define(directory=directory, flag_values=flag_values)
    flag_values(["program", *arguments])
    return defined


def test_nothing_is_defined_at_import() -> None:
    code = (
        "from absl import flags; before = set(flags.FLAGS); "
        "import functional_ckpt as fc; fc.flags; "
        "assert set(flags.FLAGS) == before, set(flags.FLAGS) - before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_empty_directory_is_refused() -> None:
    with pytest.raises(absl_flags.IllegalFlagValueError, match="path is empty"):
        parse("--ckpt_dir=")


def test_manager_uses_the_policies_of_the_flags(tmp_path: Path) -> None:
    defined = parse(
        f"--ckpt_dir={tmp_path}",
        "--ckpt_save_every=2",
        "--ckpt_keep_latest=2",
        "--ckpt_keep_best=loss:min",
    )
    with fc.flags.manager(defined) as manager:
        for step in range(10):
            manager.save(step, {"x": step}, metrics={"loss": abs(step - 2)})
        manager.wait_until_finished()
        assert manager.all_steps() == [2, 6, 8]


def test_keeping_the_best_keeps_the_latest_too(tmp_path: Path) -> None:
    defined = parse(f"--ckpt_dir={tmp_path}", "--ckpt_keep_best=accuracy")
    with fc.flags.manager(defined) as manager:
        for step in range(4):
            manager.save(step, {"x": step}, metrics={"accuracy": -step})
        manager.wait_until_finished()
        assert manager.all_steps() == [0, 3]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), fc.Eager(budget_bytes=10)),
        (("--ckpt_staging=eager",), fc.Eager()),
        (("--ckpt_staging=overlapped",), fc.Overlapped()),
        (("--ckpt_staging=blocking",), fc.Blocking()),
    ],
)
def test_the_staging_flag_replaces_the_scripts_own(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    expected: object,
) -> None:
    defined = parse(f"--ckpt_dir={tmp_path}", *arguments)
    given: dict[str, object] = {}
    monkeypatch.setattr(launch, "CheckpointManager", lambda _, **options: given.update(options))
    fc.flags.manager(defined, staging=fc.Eager(budget_bytes=10))
    assert given["staging"] == expected


def begin(values: dict[str, object], *arguments: str) -> fc.Restored:
    defined = parse(*arguments)
    with fc.flags.manager(defined) as manager:
        return fc.flags.restore(defined, manager, values)


def test_resume_flag_selects_the_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "functional_ckpt")
    run, other, new = (f"--ckpt_dir={tmp_path / name}" for name in ("run", "other", "new"))
    begun = begin({"x": 0}, run)
    assert (begun.step, begun.next_step, begun["x"]) == (None, 0, 0)
    assert "no checkpoint found" in caplog.text
    with fc.flags.manager(parse(run)) as manager:
        manager.save(7, {"x": 5})
    restored = begin({"x": 0}, run)
    assert (restored.step, restored.next_step, restored["x"]) == (7, 8, 5)
    assert "resuming from step 7" in caplog.text

    fc.save(tmp_path / "one", {"x": 9})
    source = f"--ckpt_resume={tmp_path / 'one'}"
    restored = begin({"x": 0}, new, source)
    assert (restored.next_step, restored["x"]) == (0, 9)
    assert begin({"x": 0}, other, f"--ckpt_resume={tmp_path / 'run' / '7'}")["x"] == 5
    assert begin({"x": 0}, other, "--ckpt_resume=none")["x"] == 0
    # A run does not overwrite another, unless requested.
    for how in (source, "--ckpt_resume=none"):
        with pytest.raises(fc.errors.StepExistsError, match="has 1 steps from 0 on"):
            begin({"x": 0}, run, how)
    assert begin({"x": 0}, run, "--ckpt_resume=none", "--ckpt_overwrite")["x"] == 0


def test_run_starts_from_a_checkpoint_in_a_store(tmp_path: Path) -> None:
    bucket = f"memory://bucket-{uuid.uuid4().hex[:8]}"
    fc.save(f"{bucket}/one", {"x": 9})
    run = f"--ckpt_dir={tmp_path / 'run'}"
    assert begin({"x": 0}, run, f"--ckpt_resume={bucket}/one")["x"] == 9
    fc.save(tmp_path / "one", {"x": 8})
    assert begin({"x": 0}, run, f"--ckpt_resume=file://{tmp_path}/one")["x"] == 8
    with pytest.raises(fc.errors.StepNotFoundError, match=f"{bucket}/two"):
        begin({"x": 0}, run, f"--ckpt_resume={bucket}/two")
    with pytest.raises(
        absl_flags.IllegalFlagValueError, match=r"got 'memory:/b/one': .* two slash"
    ):
        begin({"x": 0}, run, "--ckpt_resume=memory:/b/one")


def test_weights_only_with_ignore(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained, model = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    fc.save(tmp_path / "one", {"model": trained, "ema": {"x": 1}})
    bias = model.bias.detach().clone()
    restored = begin(
        {"model": model, "ema": {"x": 0}},
        f"--ckpt_dir={tmp_path / 'new'}",
        f"--ckpt_resume={tmp_path / 'one'}",
        "--ckpt_weights_only",
        "--ckpt_ignore=model.bias",
    )
    assert restored["ema"] == {"x": 0}
    assert torch.equal(model.weight, trained.weight)
    assert torch.equal(model.bias, bias)
    arguments = (f"--ckpt_dir={tmp_path / 'new'}", f"--ckpt_resume={tmp_path / 'one'}")
    with pytest.raises(fc.errors.UsageError, match="none of the items is a module: ema"):
        begin({"ema": {"x": 0}}, *arguments, "--ckpt_weights_only")
    larger = torch.nn.Linear(2, 4)
    with pytest.raises(fc.errors.MismatchError):
        begin({"model": larger}, *arguments)
    begin({"model": larger}, *arguments, "--nockpt_strict")
    assert "Restored with differences" in caplog.text


@pytest.mark.parametrize("interval", ["2", "2ba", "2BA"])
def test_save_every_accepts_intervals_in_steps(tmp_path: Path, interval: str) -> None:
    with fc.flags.manager(
        parse(f"--ckpt_dir={tmp_path}", f"--ckpt_save_every={interval}")
    ) as manager:
        assert [step for step in range(5) if manager.should_save(step)] == [0, 2, 4]


def test_intervals_in_time_and_progress(tmp_path: Path) -> None:
    with fc.flags.manager(parse(f"--ckpt_dir={tmp_path}", "--ckpt_save_every=1h30m")) as manager:
        assert not manager.should_save(1)
    with fc.flags.manager(parse(f"--ckpt_dir={tmp_path}", "--ckpt_save_every=1ep")) as manager:
        assert manager.should_save(5, progress=fc.Progress(epoch=1, batch=5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ckpt_save_every=often"], "flag --ckpt_save_every=often: time span: expected"),
        (["--ckpt_save_every=0"], "flag --ckpt_save_every=0: interval in steps"),
        (["--ckpt_keep_best=loss:lowest"], "flag --ckpt_keep_best=loss:lowest: expected METRIC"),
        (["--ckpt_keep_best=:max"], "flag --ckpt_keep_best=:max: expected METRIC"),
        (["--ckpt_keep_best="], "flag --ckpt_keep_best=: expected METRIC"),
        (["--ckpt_resume=/nowhere/at/all"], "'/nowhere/at/all', which is not a directory"),
        (
            ["--ckpt_resume=none", "--ckpt_weights_only"],
            "--ckpt_weights_only has no effect with --ckpt_resume=none, which restores nothing",
        ),
        (["--ckpt_resume=none", "--ckpt_ignore=a,b"], "--ckpt_ignore has no effect"),
        (["--ckpt_resume=none", "--nockpt_strict"], "--nockpt_strict has no effect"),
        (["--ckpt_weights_only"], "a run cannot resume without its optimizer"),
        (
            ["--ckpt_save_every=500ba", "--ckpt_keep_every=750"],
            "--ckpt_keep_every=750 is no multiple of --ckpt_save_every=500ba",
        ),
        (
            ["--ckpt_save_every=x", "--ckpt_keep_best=:", "--ckpt_weights_only"],
            "(?s)flag --ckpt_save_every=x: .*\nflag --ckpt_keep_best=:: .*\n"
            "flags ckpt_resume=latest, ckpt_weights_only=True, .*: --ckpt_weights_only",
        ),
    ],
)
def test_invalid_flags_are_one_error_when_they_are_parsed(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(absl_flags.IllegalFlagValueError, match=message):
        parse(f"--ckpt_dir={tmp_path / 'run'}", *arguments)
    assert not (tmp_path / "run").exists()


def test_a_script_ends_with_absls_message(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from absl import app\nimport functional_ckpt as fc\n"
        "CKPT = fc.flags.define()\napp.run(lambda argv: print('started'))\n"
    )
    command = [sys.executable, script, "--ckpt_dir=run", "--ckpt_save_every=abc"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "started" not in done.stdout
    assert "Traceback" not in done.stderr
    assert "FATAL Flags parsing error" in done.stderr
    assert "flag --ckpt_save_every=abc: time span: expected" in done.stderr


def test_values_that_a_script_sets_are_checked_again(tmp_path: Path) -> None:
    flag_values = absl_flags.FlagValues()
    defined = fc.flags.define(directory=tmp_path, flag_values=flag_values)
    flag_values(["program"])
    flag_values["ckpt_keep_best"].value = ":"
    with pytest.raises(fc.errors.UsageError, match=r"Invalid flags:\n  --ckpt_keep_best: expected"):
        fc.flags.manager(defined)


def test_the_best_steps_are_as_many_as_asked_for(tmp_path: Path) -> None:
    flags = (f"--ckpt_dir={tmp_path}", "--ckpt_keep_best=loss:min:2", "--ckpt_keep_latest=1")
    with fc.flags.manager(parse(*flags)) as manager:
        for step in range(6):
            manager.save(step, {"x": step}, metrics={"loss": step})
        manager.wait_until_finished()
        assert manager.all_steps() == [0, 1, 5]
    assert values.best("a:max:3") == fc.policies.BestN(3, "a")
    assert values.best("a:3") == fc.policies.BestN(3, "a")
    for text in ("a:0", "a:min:x", "a:3:min", "a:min:3:4", ":3", "a:-1"):
        with pytest.raises(fc.errors.UsageError, match="METRIC"):
            values.best(text)


def test_tiers_of_the_flags_come_before_the_scripts(tmp_path: Path) -> None:
    tiers = [f"--ckpt_tier={tmp_path / name}" for name in ("one", "two")]
    defined = parse(f"--ckpt_dir={tmp_path / 'run'}", *tiers)
    with fc.flags.manager(defined, tiers=[tmp_path / "own"]) as manager:
        manager.save(1, {"x": 1}).result()  # type: ignore[union-attr]
    for name in ("one", "two", "own"):
        assert fc.restore(tmp_path / name / "1")["x"] == 1


@pytest.mark.parametrize(
    ("given", "is_part"), [("--ckpt_node_local_replicas=0", True), ("", False)]
)
def test_the_directory_of_the_flags_is_each_nodes_own(
    given: str, is_part: bool, tmp_path: Path
) -> None:
    defined = parse(f"--ckpt_dir={tmp_path}", *([given] if given else []))
    with fc.flags.manager(defined) as manager:
        manager.save(1, {"x": 1}).result()  # type: ignore[union-attr]
    assert (tmp_path / "1" / "functional_ckpt.part.json").exists() is is_part


def test_help_lists_every_flag() -> None:
    flag_values = absl_flags.FlagValues()
    fc.flags.define(flag_values=flag_values)
    text = flag_values.get_help()
    for flag in ("dir", "save_every", "keep_latest", "resume", "weights_only", "ignore", "staging"):
        assert f"--{'[no]' if flag == 'weights_only' else ''}ckpt_{flag}:" in text


def test_the_help_of_a_script_has_them(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from absl import app\nimport functional_ckpt as fc\n"
        "CKPT = fc.flags.define()\napp.run(lambda argv: None)\n"
    )
    done = subprocess.run(
        [sys.executable, script, "--help"], capture_output=True, text=True, check=False
    )
    assert "--ckpt_save_every: Save interval: steps (500, 500ba)" in done.stdout
    assert "--[no]ckpt_weights_only" in done.stdout


def test_the_directory_is_required_unless_it_has_a_default(tmp_path: Path) -> None:
    with pytest.raises(absl_flags.IllegalFlagValueError, match="ckpt_dir"):
        parse()
    with fc.flags.manager(parse(directory=str(tmp_path))) as manager:
        assert manager.directory == str(tmp_path)


def test_a_script_may_have_a_directory_and_defaults_of_its_own(tmp_path: Path) -> None:
    flag_values = absl_flags.FlagValues()
    defined = fc.flags.define(
        required=False,
        save_every="2ba",
        keep_latest=1,
        keep_best="loss:min",
        flag_values=flag_values,
    )
    flag_values(["program"])
    with pytest.raises(fc.errors.UsageError, match="--ckpt_dir is required"):
        fc.flags.manager(defined)
    with fc.flags.manager(defined, directory=tmp_path / "own") as manager:
        for step in range(7):
            manager.save(step, {"x": step}, metrics={"loss": abs(step - 2)})
        manager.wait_until_finished()
        assert manager.all_steps() == [2, 6]
    flag_values(["program", f"--ckpt_dir={tmp_path / 'given'}"])
    with fc.flags.manager(defined, directory=tmp_path / "own") as manager:
        assert manager.directory == str(tmp_path / "given")


def test_every_flag_takes_a_default_of_the_script(tmp_path: Path) -> None:
    flag_values = absl_flags.FlagValues()
    defaults = fc.flags.Defaults(
        directory=epath.Path(tmp_path) / "run",
        save_every="2",
        keep_latest=3,
        keep_every=4,
        keep_best="loss:min",
        tier=["s3://bucket/run"],
        overwrite=True,
        staging="blocking",
        resume="s3://bucket/other",
        weights_only=True,
        ignore=["model.head.*"],
        strict=False,
    )
    defined = fc.flags.define(flag_values=flag_values, **defaults)
    flag_values(["program"])
    assert {name: getattr(defined, name).value for name in defaults} == defaults
    with pytest.raises(fc.errors.UsageError, match="No flags keep; the flags are directory"):
        fc.flags.define("two", flag_values=flag_values, keep=3)  # type: ignore[call-arg]


@pytest.mark.parametrize("uri", ["s3://bucket/run", "libcloud://local:bucket/run", "oci://b@n/x"])
def test_the_directory_may_be_any_uri(uri: str) -> None:
    defined = parse(f"--ckpt_dir={uri}/")
    assert os.fspath(defined.directory.value).rstrip("/") == uri


def test_the_directory_is_an_epath(tmp_path: Path) -> None:
    defined = parse(f"--ckpt_dir={tmp_path}/run")
    assert isinstance(defined.directory.value, epath.Path)
    with fc.flags.manager(defined) as manager:
        assert manager.directory == str(tmp_path / "run")


def test_a_bad_prefix_is_a_clear_error() -> None:
    with pytest.raises(fc.errors.UsageError, match="identifier"):
        fc.flags.define("two words", flag_values=absl_flags.FlagValues())
