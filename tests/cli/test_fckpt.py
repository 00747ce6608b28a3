"""`fckpt` as a user runs it: a process of its own, its output, its exit code."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

import functional_ckpt as fc
from functional_ckpt.cli import main, show

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "functional_ckpt.cli"]
ESCAPE = "\x1b"


def environment(**changes: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR", "FORCE_COLOR")}
    path = os.pathsep.join([str(ROOT), *sys.path])  # a build may not have installed anything
    return {**kept, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8", **changes}


def fckpt(*arguments: object, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        env=environment(**changes),
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )


def output_of(*arguments: object, code: int = 0, **changes: str) -> str:
    done = fckpt(*arguments, **changes)
    assert done.stderr == ""
    assert done.returncode == code
    assert ESCAPE not in done.stdout
    return done.stdout


def json_of(*arguments: object, code: int = 0) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(output_of(*arguments, "--json", code=code), parse_constant=refuse)


def error_of(*arguments: object, code: int = 2) -> str:
    done = fckpt(*arguments)
    assert done.returncode == code
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def columns(text: str, first: str) -> list[str]:
    """The cells of the line with a given first cell."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    return next(cells for cells in lines if cells[0] == first)


def tree(step: int) -> dict[object, object]:
    shared = torch.arange(600.0)
    return {
        "w": torch.full((3, 4), float(step)),
        "shared": {"one": shared, "two": shared},
        "same": torch.ones(2, dtype=torch.bfloat16),
        3: (1, 2.5, None),
        "empty": {},
        "name": "run é",
    }


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli") / "run"
    with fc.CheckpointManager(root) as manager:
        for step in (5, 10, 20):
            items = {
                "model": torch.nn.Linear(3, 2),
                "state": tree(step),
                "config": fc.Json({"lr": 0.1}),
            }
            metrics = {"accuracy": step / 20, "val_loss": float("nan") if step == 20 else 1 / step}
            manager.save(step, items, metrics=metrics, custom_metadata={"git": "abc", "note": ""})
        manager.wait_until_finished()
        manager.record_metrics(10, {"late": 7})
    return root


@pytest.fixture
def root(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def damage(path: Path) -> str:
    """Flips a bit in the data of `shared` of a step; returns the file, relative to the step."""
    needle = torch.arange(600.0).numpy().tobytes()
    file = next(each for each in sorted(path.rglob("*.safetensors")) if needle in each.read_bytes())
    content = bytearray(file.read_bytes())
    content[content.find(needle) + 9] ^= 4
    file.write_bytes(content)
    return file.relative_to(path).as_posix()


# ------------------------------------------------------------------------------------ ls


def test_ls_lists_the_steps(saved: Path) -> None:
    text = output_of("ls", saved)
    assert "3 steps" in text
    assert "items model, state, config" in text
    assert columns(text, "5")[-2:] == ["0.25", "0.2"]
    assert columns(text, "20")[1] == "latest"
    assert "★" not in text
    assert "ago" in text
    text = output_of("ls", saved, "--best", "accuracy", "--best", "val_loss")
    assert "1 ★" in columns(text, "20")
    assert "0.1 ★" in columns(text, "10")  # NaN is never best


def test_ls_best_option_overrides_the_mode(saved: Path) -> None:
    assert "0.2 ★" in columns(output_of("ls", saved, "--best", "val_loss:max"), "5")
    best = json_of("ls", saved, "--best", "accuracy:min")["best"]
    assert best["accuracy"] == {"mode": "min", "step": 5}
    assert "have: accuracy, late, val_loss" in error_of("ls", saved, "--best", "speed")


def test_ls_json_has_the_documented_members(saved: Path) -> None:
    record = json_of("ls", saved, "--best", "val_loss")
    assert set(record) == {"schema", "path", "latest", "best", "steps", "unfinished"}
    assert record["schema"] == "fckpt.ls/1"
    assert record["path"] == str(saved)
    assert record["latest"] == 20
    assert record["best"]["val_loss"] == {"mode": "min", "step": 10}
    assert [step["step"] for step in record["steps"]] == [5, 10, 20]
    last = record["steps"][-1]
    assert set(last) == {
        *(
            "step",
            "path",
            "time",
            "size_bytes",
            "added_bytes",
            "items",
            "metrics",
            "writer",
            "problem",
        ),
    }
    assert last["items"] == {"model": "tree", "state": "tree", "config": "json"}
    assert last["metrics"] == {"accuracy": 1.0, "val_loss": "nan"}
    assert record["steps"][1]["metrics"]["late"] == 7
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", last["time"])
    assert last["size_bytes"] == sum(
        file.stat().st_size for file in (saved / "20").rglob("*") if file.is_file()
    )
    assert (last["writer"], last["problem"]) == ("functional_ckpt", None)


def test_ls_shows_what_is_unfinished_and_what_is_damaged(root: Path) -> None:
    (root / "30.orbax-checkpoint-tmp").mkdir()
    (root / "10" / "_FUNCTIONAL_CKPT").write_text("{}")
    text = output_of("ls", root, COLUMNS="400")
    assert "30.orbax-checkpoint-tmp: unfinished" in text
    assert columns(text, "10")[-1] == "damaged"
    assert "step 10 is damaged: " in text
    record = json_of("ls", root)
    assert record["unfinished"] == ["30.orbax-checkpoint-tmp"]
    assert [step["problem"] is None for step in record["steps"]] == [True, False, True]


def test_ls_of_a_directory_without_a_step(tmp_path: Path) -> None:
    fc.CheckpointManager(tmp_path / "run").close()
    assert "0 steps" in output_of("ls", tmp_path / "run")
    assert json_of("ls", tmp_path / "run")["steps"] == []
    assert json_of("ls", tmp_path / "run")["latest"] is None


@pytest.mark.parametrize(
    "names",
    [
        fc.step_names.StepName(prefix="ckpt"),
        fc.step_names.StepName(zero_pad=6),
        fc.step_names.StepName(prefix="a_b", zero_pad=3),
    ],
)
def test_steps_of_every_name_are_recognised(tmp_path: Path, names: fc.step_names.StepName) -> None:
    with fc.CheckpointManager(tmp_path / "run", step_name=names) as manager:
        for step in (7, 1234):
            manager.save(step, {"x": {"a": 1}})
    for name in ("eval_logs", "7.orbax-checkpoint-tmp", "99x", ".8"):
        (tmp_path / "run" / name).mkdir()
    record = json_of("ls", tmp_path / "run")
    assert [step["step"] for step in record["steps"]] == [7, 1234]
    assert json_of("show", tmp_path / "run", "--step", 7)["step"] == 7
    assert json_of("show", tmp_path / "run" / names.build_name(1234))["step"] == 1234


def test_steps_of_two_names_must_be_chosen_between(tmp_path: Path) -> None:
    for prefix in (None, "eval"):
        with fc.CheckpointManager(
            tmp_path, step_name=fc.step_names.StepName(prefix=prefix)
        ) as manager:
            manager.save(4 if prefix else 3, {"x": {"a": 1}})
    assert "choose with --prefix" in error_of("ls", tmp_path)
    assert json_of("ls", tmp_path, "--prefix", "eval")["latest"] == 4
    assert json_of("ls", tmp_path, "--prefix", "")["latest"] == 3


# ------------------------------------------------------------------------------------ show


def test_show_draws_the_tree(saved: Path) -> None:
    text = output_of("show", saved, COLUMNS="400")  # wide enough for any test directory
    assert text.splitlines()[0] == str(saved / "20")
    assert "step 20" in text
    assert "accuracy=1, val_loss=nan" in text
    assert "git=abc, note=\n" in text
    assert columns(text, "├─ w")[1:] == ["float32", "[3, 4]", "48 B"]
    assert "tied to shared.one" in text
    assert columns(text, "├─ same")[1:] == ["bfloat16", "[2]", "4 B"]
    assert columns(text, "├─ empty")[1:] == ["dict", "empty"]
    assert columns(text, "└─ name")[1:] == ["str", "'run é'"]
    assert '"lr": 0.1' in text


def test_many_lines_are_laid_out_as_few(
    saved: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above a thousand lines `show` prints plain text: rich takes 0.4 ms for each."""
    monkeypatch.setenv("COLUMNS", "400")
    outputs: list[str] = []
    for max_rows in (1000, 0):
        monkeypatch.setattr(show, "_MAX_TABLE_ROWS", max_rows)
        assert main(["show", str(saved)]) == 0
        outputs.append(re.sub(r"\d+ s ago", "now", capsys.readouterr().out))
    assert outputs[0] == outputs[1]
    assert columns(outputs[1], "├─ w")[1:] == ["float32", "[3, 4]", "48 B"]


def test_show_of_one_item_and_of_little_depth(saved: Path) -> None:
    text = output_of("show", saved / "5", "--item", "state", "--depth", "1")
    assert "model" not in text
    assert "one" not in text
    assert columns(text, "├─ shared")[1:] == ["2.3 KiB", "1 array"]


def test_show_json_has_the_documented_members(saved: Path) -> None:
    record = json_of("show", saved, "--step", 10)
    assert set(record) == {
        *("schema", "path", "step", "time", "writer", "size_bytes", "metrics"),
        *("progress", "custom_metadata", "items"),
    }
    assert record["schema"] == "fckpt.show/1"
    assert record["metrics"] == {"accuracy": 0.5, "val_loss": 0.1, "late": 7}
    assert record["custom_metadata"] == {"git": "abc", "note": ""}
    assert record["items"]["config"] == {"format": "json", "value": {"lr": 0.1}}
    state = record["items"]["state"]
    assert {k: state[k] for k in ("format", "num_arrays", "size_bytes")} == {
        "format": "tree",
        "num_arrays": 3,
        "size_bytes": 48 + 2400 + 4,
    }
    leaves = {leaf["name"]: leaf for leaf in state["leaves"]}
    assert leaves["w"] == {
        "name": "w",
        "path": ["w"],
        "kind": "tensor",
        "dtype": "float32",
        "shape": [3, 4],
        "size_bytes": 48,
        "tied_to": None,
        "detail": {},
    }
    assert leaves["shared.two"]["tied_to"] == "shared.one"
    assert leaves["3.1"] == {"name": "3.1", "path": [3, 1], "kind": "float", "value": 2.5}
    assert leaves["empty"]["kind"] == "dict"


def test_a_checkpoint_without_steps(tmp_path: Path) -> None:
    fc.save(tmp_path / "a_1", {"m": {"x": torch.ones(2)}})
    assert json_of("show", tmp_path / "a_1")["step"] is None
    assert len(json_of("ls", tmp_path / "a_1")["steps"]) == 1
    assert json_of("verify", tmp_path / "a_1")["ok"]
    assert "1 array" in output_of("show", tmp_path / "a_1" / "m")  # an item, too


def test_names_cannot_talk_to_the_terminal(tmp_path: Path) -> None:
    fc.save(tmp_path / "x", {"m": {f"{ESCAPE}[31mred": 1, "[bold]plain": f"{ESCAPE}]0;title\7"}})
    text = output_of("show", tmp_path / "x")
    assert "\\x1b[31mred" in text
    assert "[bold]plain" in text


# ------------------------------------------------------------------------------------ verify


def test_verify_of_intact_steps_exits_zero(saved: Path) -> None:
    text = output_of("verify", saved)
    assert [line.split()[:4] for line in text.splitlines()[:3]] == [
        ["✓", "step", str(step), "intact"] for step in (5, 10, 20)
    ]
    assert "3 of 3 are intact." in text
    assert output_of("verify", saved, "--step", "5", "--step", "20").count("✓") == 2
    assert output_of("verify", saved / "5", saved / "10").count("✓") == 2


def test_verify_tells_item_leaves_and_file(root: Path) -> None:
    file = damage(root / "20")
    text = output_of("verify", root, code=1)
    assert "✗ step 20  damaged" in text
    assert file in text
    assert "lost: 2 leaves of state: shared.one, shared.two" in text
    assert "2 of 3 are intact; the latest intact step is 10." in text
    record = json_of("verify", root, code=1)
    assert set(record) == {"schema", "ok", "checkpoints"}
    assert (record["schema"], record["ok"]) == ("fckpt.verify/1", False)
    last = record["checkpoints"][-1]
    assert set(last) == {
        *("path", "step", "ok", "has_digests", "num_files", "size_bytes", "findings"),
    }
    (finding,) = last["findings"]
    assert set(finding) == {
        *("item", "leaves", "file", "problem", "expected", "got", "shared_with")
    }
    assert finding["item"] == "state"
    assert finding["leaves"] == ["shared.one", "shared.two"]
    assert (finding["file"], finding["problem"]) == (file, "content")
    assert [each["ok"] for each in record["checkpoints"]] == [True, True, False]


def test_verify_of_a_step_whose_record_is_gone(root: Path) -> None:
    for name in ("_FUNCTIONAL_CKPT", "_CHECKPOINT_METADATA"):
        (root / "5" / name).unlink()
    assert "_FUNCTIONAL_CKPT" in output_of("verify", root, "--step", "5", code=1)
    assert "_FUNCTIONAL_CKPT" in output_of("verify", root / "5", code=1)


def test_verify_of_swapped_steps(root: Path) -> None:
    for name, new in (("5", "aside"), ("10", "5"), ("aside", "10")):
        (root / name).rename(root / new)
    findings = [
        f for each in json_of("verify", root, code=1)["checkpoints"] for f in each["findings"]
    ]
    assert [finding["problem"] for finding in findings] == ["swapped", "swapped"]


def test_verify_of_a_missing_path_exits_two(tmp_path: Path) -> None:
    fc.CheckpointManager(tmp_path / "run").close()
    assert "no step yet" in error_of("verify", tmp_path / "run")


# ------------------------------------------------------------------------------------ diff


def test_diff_of_equal_checkpoints(saved: Path) -> None:
    text = output_of("diff", saved / "5", saved / "5")
    assert "Every leaf is equal." in text
    assert json_of("diff", saved, saved / "20")["equal"] is True


def test_two_steps_of_one_directory(saved: Path) -> None:
    record = json_of("diff", saved, 5, 10, "--item", "state", code=1)
    assert [each["leaf"] for each in record["items"]["state"]["differences"]] == ["w"]
    num_leaves = len(json_of("show", saved, 5)["items"]["state"]["leaves"])
    assert record["items"]["state"]["num_equal"] == num_leaves - 1
    assert (record["a"]["step"], record["b"]["step"]) == (5, 10)
    assert json_of("show", saved, 5)["step"] == 5
    assert "got 'x'" in error_of("diff", saved, "x", 10)
    assert "has no step 6" in error_of("diff", saved, 5, 6)


def test_diff_reads_only_what_its_digests_tell_apart(root: Path) -> None:
    # Were equal digests not enough, the damaged leaf of both would be an error here.
    damage(root / "5")
    damage(root / "10")
    record = json_of("diff", root / "5", root / "10", "--item", "state", code=1)
    (difference,) = record["items"]["state"]["differences"]
    assert difference["leaf"] == "w"
    assert difference["kind"] == "data"
    assert difference["max_abs"] == 5
    assert (difference["num_different"], difference["num_elements"]) == (12, 12)


def test_diff_reports_structural_differences(tmp_path: Path) -> None:
    nan = float("nan")
    first = {
        "a": torch.tensor([1.0, nan, -0.0]),
        "gone": 1,
        "same": nan,
        "value": 1,
        "kind": (1,),
        "dtype": torch.ones(2),
        "shape": torch.ones(2),
        "raw": b"abc",
        "int": torch.tensor([2**62]),
        "key": {3: 1},
        "flag": torch.tensor([True]),
        "complex": torch.tensor([1 + 1j]),
    }
    second = {
        "a": torch.tensor([1.0, nan, 0.5]),
        "new": [],
        "same": nan,
        "value": 2,
        "kind": [1],
        "dtype": torch.ones(2, dtype=torch.half),
        "shape": torch.ones(3),
        "raw": b"abd",
        "int": torch.tensor([-(2**62)]),
        "key": {"3": 1},
        "flag": torch.tensor([False]),
        "complex": torch.tensor([1 - 2j]),
    }
    fc.save(
        tmp_path / "a", {"m": first, "c": fc.Json({"x": [1, {"y": 2}], "z": 0}), "old": {"x": 1}}
    )
    fc.save(tmp_path / "b", {"m": second, "c": fc.Json({"x": [1, {"y": 3}], "w": 0})})
    record = json_of("diff", tmp_path / "a", tmp_path / "b", code=1)
    assert set(record) == {"schema", "equal", "a", "b", "items"}
    assert record["schema"] == "fckpt.diff/1"
    assert record["items"]["old"]["only_in"] == "a"
    m = record["items"]["m"]
    assert set(m) == {"equal", "only_in", "num_equal", "differences"}
    found = {(each["leaf"], each["kind"]): each for each in m["differences"]}
    assert set(found) == {
        *{("a", "data"), ("gone", "only in a"), ("new", "only in b"), ("value", "value")},
        *{("kind", "kind"), ("dtype", "kind"), ("shape", "kind"), ("raw", "data"), ("int", "data")},
        *{("key.3", "only in a"), ("key.3", "only in b"), ("flag", "data"), ("complex", "data")},
    }
    assert found["a", "data"]["num_different"] == 1
    assert found["a", "data"]["max_abs"] == 0.5
    assert found["int", "data"]["max_abs"] == 2.0**63
    assert found["flag", "data"]["max_abs"] == 1
    assert found["complex", "data"]["max_abs"] == 3
    assert found["raw", "data"]["max_abs"] is None
    assert m["num_equal"] == 2  # `same`, and the leaf in `kind`
    c = {(each["leaf"], each["kind"]) for each in record["items"]["c"]["differences"]}
    assert c == {("x.1.y", "value"), ("z", "only in a"), ("w", "only in b")}
    text = output_of("diff", tmp_path / "a", tmp_path / "b", code=1)
    assert columns(text, "value") == ["value", "value", "1", "2"]
    assert ["a", "tensor float32[3]", "1 of 3", "0.5"] in [
        re.split(r"\s{2,}", line) for line in text.splitlines()
    ]


def test_diff_of_arrays_larger_than_a_chunk(tmp_path: Path) -> None:
    big = torch.zeros(5000, 4000)  # several chunks
    fc.save(tmp_path / "a", {"m": {"x": big}})
    big[4999, 3999] = -3
    big[0, 1] = float("nan")
    fc.save(tmp_path / "b", {"m": {"x": big}})
    (found,) = json_of("diff", tmp_path / "a", tmp_path / "b", code=1)["items"]["m"]["differences"]
    assert (found["num_different"], found["max_abs"]) == (2, "nan")


def test_diff_meets_damage_only_where_it_must_read(root: Path) -> None:
    damage(root / "20")
    fc.save(root / "other", {"state": {**tree(20), "shared": {"one": torch.zeros(600)}}})
    error = error_of("diff", root / "20", root / "other", "--item", "state", code=1)
    assert "digest" in error
    assert "shared.one" in error


# ------------------------------------------------------------------------------------ wrong calls


def test_errors_are_one_line(saved: Path, tmp_path: Path) -> None:
    assert "there is no such file or directory" in error_of("ls", tmp_path / "nothing")
    (tmp_path / "file").touch()
    assert "of no other format" in error_of("show", tmp_path / "file")
    assert "neither a checkpoint nor" in error_of("verify", tmp_path)
    assert "has no step 7; the latest are: 5, 10, 20" in error_of("show", saved, "--step", "7")
    assert "has no item 'x'" in error_of("show", saved, "--item", "x")
    assert "neither has an item" in error_of("diff", saved, saved, "--item", "x")
    assert "--step chooses" in error_of("show", saved / "5", "--step", "10")
    assert "is one item" in error_of("verify", saved / "5" / "state")
    assert "unknown protocol" in error_of("ls", "nothing://bucket/x")
    assert "did you mean ls?" in error_of("lss")
    assert "expected a step" in error_of("show", saved, "--step", "-1")


def test_a_damaged_record_is_damage_and_not_a_traceback(root: Path) -> None:
    (root / "20" / "state" / "_FUNCTIONAL_CKPT").write_bytes(b"\xff" * 100)
    assert "_FUNCTIONAL_CKPT" in error_of("show", root, code=1)
    assert "_FUNCTIONAL_CKPT" in error_of("diff", root, root / "5", code=1)


def test_help_and_version_exit_zero() -> None:
    text = output_of("--help")
    for command in ("ls", "show", "verify", "diff"):
        assert command in text
        assert "exit codes" in output_of(command, "--help")
    try:
        version = metadata.version("functional-ckpt")
    except metadata.PackageNotFoundError:
        version = "(not installed)"
    assert output_of("--version") == f"fckpt {version}\n"


def test_the_console_script_is_this(capsys: pytest.CaptureFixture[str], saved: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"fckpt": "functional_ckpt.cli:main"}
    assert main(["ls", str(saved)]) == 0
    assert "3 steps" in capsys.readouterr().out
    assert main(["ls", str(saved / "nothing")]) == 2
    assert capsys.readouterr().err.startswith("fckpt: ")


# ------------------------------------------------------------------------------------ imports


def loaded_by(*arguments: object) -> set[str]:
    command = [sys.executable, "-X", "importtime", "-m", "functional_ckpt.cli"]
    done = subprocess.run(
        [*command, *map(str, arguments)],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


@pytest.mark.parametrize("command", ["ls", "show", "verify", "diff"])
def test_no_command_loads_torch_or_jax(saved: Path, command: str) -> None:
    paths = [saved / "5", saved / "5"] if command == "diff" else [saved]
    loaded = loaded_by(command, *paths)
    assert "functional_ckpt" in loaded
    assert not loaded & {"torch", "jax", "jaxlib", "orbax"}
    if command in ("ls", "show"):  # records need no arrays
        assert not loaded & {"tensorstore", "numpy", "ml_dtypes", "etils"}


@pytest.mark.parametrize("to", ["hf", "safetensors"])
def test_exports_load_torch_only_to_convert(tmp_path: Path, to: str) -> None:
    state = {name: torch.ones(3) for name in "ab"}
    fc.save(tmp_path / "step", {"model": state})
    options = ["--to", to, *(["--key-prefix", "net.", "--workers", "2"] if to == "hf" else [])]
    assert "torch" not in loaded_by("export", tmp_path / "step", tmp_path / "out", *options)
    if to == "hf":
        assert len(fc.interop.huggingface.load(tmp_path / "out")) == 2


@pytest.mark.parametrize(("options", "limit"), [((), 280), (("--json",), 208)])
def test_ls_starts_fast(saved: Path, options: tuple[str, ...], limit: int) -> None:
    """By modules, about half a millisecond each: the time itself depends on the machine."""
    loaded = loaded_by("ls", saved, *options)
    assert len(loaded) <= limit
    assert not loaded & {"asyncio", "importlib.metadata", "urllib.request"}
    assert not loaded & {f"functional_ckpt.{n}" for n in ("storage.object_store", "interop")}
    assert ("rich" in loaded) is not bool(options)


# ------------------------------------------------------------------------------------ terminals


def on_terminal(*arguments: object, **changes: str) -> tuple[int, str]:
    """Runs the command on a terminal of its own."""
    leader, follower = pty.openpty()
    with subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        env=environment(TERM="xterm-256color", COLUMNS="100", LINES="40", **changes),
        stdin=subprocess.DEVNULL,
        stdout=follower,
        stderr=follower,
    ) as process:
        os.close(follower)
        chunks: list[bytes] = []
        while select.select([leader], [], [], 60)[0]:
            try:
                chunk = os.read(leader, 65536)
            except OSError:  # the other side is closed
                break
            chunks.append(chunk)
        code = process.wait(60)
    os.close(leader)
    return code, b"".join(chunks).decode()


def test_on_a_terminal_there_are_colours_and_progress(root: Path) -> None:
    code, text = on_terminal("ls", root)
    assert code == 0
    assert f"{ESCAPE}[1;36m" in text  # the steps
    damage(root / "20")
    code, text = on_terminal("verify", root)
    assert code == 1
    assert "verifying step 20" in text
    assert f"{ESCAPE}[1;31m✗" in text
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    assert max(map(len, re.split(r"[\r\n]", plain))) <= 100


def test_no_color_is_respected(root: Path) -> None:
    code, text = on_terminal("ls", root, NO_COLOR="1")
    assert code == 0
    colours = re.findall(r"\x1b\[([0-9;]*)m", text)
    assert not any(30 <= int(part) <= 107 for each in colours for part in each.split(";") if part)


def test_a_reader_that_goes_away_is_no_error(saved: Path) -> None:
    for arguments in (["show", str(saved)], ["ls", str(saved), "--json"], ["verify", str(saved)]):
        process = subprocess.Popen(
            [*COMMAND, *arguments],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        process.stderr.close()
        assert process.wait(60) == 128 + 13


@pytest.mark.parametrize("command", ["ls", "show", "verify", "diff"])
def test_a_terminal_without_unicode(saved: Path, command: str) -> None:
    paths = {"diff": [saved / "5", saved / "10"], "ls": [saved, "--best", "val_loss"]}
    done = subprocess.run(
        [*COMMAND, command, *map(str, paths.get(command, [saved]))],
        env=environment(PYTHONIOENCODING="ascii"),
        capture_output=True,
        check=False,
    )
    assert done.stderr == b""
    assert done.returncode == (1 if command == "diff" else 0)
    text = done.stdout.decode("ascii")
    if command == "show":
        assert "run \\xe9" in text
        assert "|-" in text or "+-" in text
    if command == "ls":
        assert "0.1 *" in text


def test_a_narrow_terminal_loses_no_leaf_name(root: Path) -> None:
    file = damage(root / "20")
    text = output_of("verify", root, "--step", "20", code=1, COLUMNS="40")
    assert file.replace("/", "") in re.sub(r"[\s/]", "", text)


def test_steps_under_names_of_a_template(tmp_path: Path) -> None:
    names = fc.step_names.StepTemplate(template="ep{epoch}-ba{batch}")
    with fc.CheckpointManager(tmp_path, step_name=names, latest_link="latest") as manager:
        for batch in (9, 10):
            progress = fc.Progress(epoch=2, batch=batch)
            manager.save(batch, {"state": {"x": torch.ones(2)}}, progress=progress)
    listed = json_of("ls", tmp_path)
    assert [each["step"] for each in listed["steps"]] == [9, 10]
    assert listed["latest"] == 10
    shown = json_of("show", tmp_path)
    assert shown["path"] == str(tmp_path / "ep2-ba10")
    assert shown["progress"]["epoch"] == 2
    assert "progress  epoch=2, batch=10" in output_of("show", tmp_path / "latest")
    assert json_of("verify", tmp_path)["ok"]
