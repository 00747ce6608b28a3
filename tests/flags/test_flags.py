"""The flags of launch scripts: parsed by absl, turned into a manager."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags as absl_flags

import functional_ckpt as fc


def parse(*arguments: str, directory: str | None = None) -> fc.flags.CheckpointFlags:
    values = absl_flags.FlagValues()
    defined = fc.flags.define(directory=directory, flag_values=values)
    values(["program", *arguments])
    return defined


def test_nothing_is_defined_at_import() -> None:
    code = (
        "from absl import flags; before = set(flags.FLAGS); "
        "import functional_ckpt as fc; fc.flags; "
        "assert set(flags.FLAGS) == before, set(flags.FLAGS) - before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_manager_saves_and_keeps_what_the_flags_say(tmp_path: Path) -> None:
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


def test_resume(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "functional_ckpt")
    defined = parse(f"--ckpt_dir={tmp_path / 'run'}")
    with fc.flags.manager(defined) as manager:
        assert fc.flags.restore(defined, manager, {"x": 0}) is None
        assert "starting anew" in caplog.text
        manager.save(7, {"x": 5})
        manager.wait_until_finished()
        restored = fc.flags.restore(defined, manager, {"x": 0})
        assert restored is not None
        assert (restored.step, restored["x"]) == (7, 5)
        assert "resuming from step 7" in caplog.text
    fc.save(tmp_path / "other", {"x": 9})
    elsewhere = parse(f"--ckpt_dir={tmp_path / 'new'}", f"--ckpt_resume={tmp_path / 'other'}")
    with fc.flags.manager(elsewhere) as manager:
        restored = fc.flags.restore(elsewhere, manager, {"x": 0})
        assert restored is not None
        assert restored["x"] == 9
    over = parse(f"--ckpt_dir={tmp_path / 'run'}", f"--ckpt_resume={tmp_path / 'other'}")
    with (
        fc.flags.manager(over) as manager,
        pytest.raises(fc.errors.UsageError, match="already has step 7"),
    ):
        fc.flags.restore(over, manager, {"x": 0})


@pytest.mark.parametrize("value", ["loss:lowest", ":max", ""])
def test_a_malformed_best_is_a_clear_error(value: str, tmp_path: Path) -> None:
    defined = parse(f"--ckpt_dir={tmp_path}", f"--ckpt_keep_best={value}")
    with pytest.raises(fc.errors.UsageError, match="METRIC"):
        fc.flags.manager(defined)


def test_the_directory_is_required_unless_it_has_a_default(tmp_path: Path) -> None:
    with pytest.raises(absl_flags.IllegalFlagValueError, match="ckpt_dir"):
        parse()
    with fc.flags.manager(parse(directory=str(tmp_path))) as manager:
        assert manager.directory == str(tmp_path)


def test_a_bad_prefix_is_a_clear_error() -> None:
    with pytest.raises(fc.errors.UsageError, match="identifier"):
        fc.flags.define("two words", flag_values=absl_flags.FlagValues())
