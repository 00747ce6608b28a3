"""docs/learn/tutorial.md: its program is killed, run again, and prints and saves as it shows."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from full import IS_FULL

from functional_ckpt.cli import main

pytestmark = pytest.mark.skipif(not IS_FULL, reason="starts a process that is killed")

PAGE = Path(__file__).parents[2] / "docs" / "learn" / "tutorial.md"
TEXT = PAGE.read_text(encoding="utf-8")
_BLOCK = r"^``` ?{}\n(.*?)^```$"
PROGRAM, USE = re.findall(
    _BLOCK.format(r"\{\.python \.no-run\}"), TEXT, flags=re.DOTALL | re.MULTILINE
)
CONSOLES = re.findall(_BLOCK.format("console"), TEXT, flags=re.DOTALL | re.MULTILINE)


def loss_of(step: int, output: str) -> str:
    (loss,) = re.findall(rf"^step {step}: loss (\S+)$", output, flags=re.MULTILINE)
    return loss


def words(output: str) -> list[str]:
    return re.sub(r"loss \S+", "loss", output).splitlines()


def test_the_tutorial_happens_as_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(PROGRAM, encoding="utf-8")
    killed = ""
    with subprocess.Popen(
        [sys.executable, "train.py"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            killed += line
            if line.startswith("step 100:"):
                process.send_signal(signal.SIGKILL)
                break
    assert words(CONSOLES[0])[1:-1] == words(killed)

    exec(compile(PROGRAM, "train.py", "exec"), {"__name__": "__main__"})
    resumed = capsys.readouterr().out
    assert resumed.startswith(("starting at step 81\n", "starting at step 101\n"))
    if resumed.startswith("starting at step 81\n"):  # the kill came before the commit
        assert loss_of(100, resumed) == loss_of(100, killed)
        assert words(CONSOLES[1])[2:] == words(resumed)

    commands = [
        line.split()[2:]
        for console in CONSOLES[2:]
        for line in console.splitlines()
        if line.startswith("$ fckpt")
    ]
    assert [command[0] for command in commands] == ["ls", "show", "verify", "diff"]
    assert [main(command) for command in commands] == [0, 0, 0, 1]
    assert "199   latest" in capsys.readouterr().out
    exec(compile(USE, "use.py", "exec"), {"__name__": "__main__"})
