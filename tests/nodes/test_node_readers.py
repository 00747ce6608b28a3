"""One node's directory, as it is seen without `node_local`."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from thread_ranks import ThreadCoordinator, results, run_ranks

import functional_ckpt as fc
from functional_ckpt import errors
from functional_ckpt.cli.__main__ import main
from functional_ckpt.core.nodes.part import PART_FILE


def save(root: Path, *steps: int, nodes: str = "ab") -> None:
    def job(group: ThreadCoordinator) -> None:
        node = fc.NodeLocal(replicas=0, node=nodes[group.rank])
        directory = root / nodes[group.rank]
        with fc.CheckpointManager(directory, node_local=node, coordinator=group) as made:
            for step in steps:
                items = {"tree": {f"of{group.rank}": torch.full((100,), step)}}
                made.save(step, items).result()

    results(run_ranks(len(nodes), job, timeout_seconds=30.0))


def copy_files(source: Path, target: Path) -> None:
    """Copies the data files that only another node has."""
    for path in source.rglob("*"):
        copy = target / path.relative_to(source)
        if path.is_file() and not copy.exists():
            shutil.copy(path, copy)


def test_a_reader_says_which_part_it_sees(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 3, 5)
    root = tmp_path / "a"
    text = "part 1 of 2 nodes: 1 file of b not here"
    with caplog.at_level(logging.WARNING, "functional_ckpt"):
        reader = fc.CheckpointManager(root, read_only=True)
    assert f"3 ({text}), 5 ({text})" in caplog.text
    assert (reader.all_steps(), reader.latest_step()) == ([], None)
    for restore in (
        lambda: reader.restore(3),
        lambda: reader.restore(),
        lambda: fc.restore(root / "3"),
        lambda: fc.interop.open(root / "3"),
    ):
        with pytest.raises(errors.StepNotFoundError, match=f"{text}. Open it with"):
            restore()
    with pytest.raises(errors.StepNotFoundError, match="part 2 of 2 nodes: 1 file of a not here"):
        fc.restore(tmp_path / "b" / "5")


def test_the_advice_works(tmp_path: Path) -> None:
    save(tmp_path, 3)

    def job(group: ThreadCoordinator) -> Any:
        node = fc.NodeLocal(node="ab"[group.rank], replicas=0)
        directory = tmp_path / "ab"[group.rank]
        with fc.CheckpointManager(
            directory, node_local=node, coordinator=group, read_only=True
        ) as made:
            return made.restore(3)["tree"]

    for rank, tree in enumerate(results(run_ranks(2, job, timeout_seconds=30.0))):
        assert torch.equal(tree[f"of{rank}"], torch.full((100,), 3))


def test_a_complete_part_is_an_ordinary_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 3, 5)
    copy_files(tmp_path / "b" / "5", tmp_path / "a" / "5")
    root = tmp_path / "a"
    reader = fc.CheckpointManager(root, read_only=True)
    assert (reader.all_steps(), reader.latest_step()) == ([5], 5)
    assert fc.restore(root / "5").step == 5
    assert main(["verify", str(root / "5")]) == 0
    assert "intact" in capsys.readouterr().out
    (root / "5" / PART_FILE).write_bytes(b"{}")
    assert main(["verify", str(root / "5")]) == 1
    assert PART_FILE in capsys.readouterr().out


def test_commands_name_the_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 3)
    root = tmp_path / "b"
    text = "part 2 of 2 nodes: 1 file of a not here"
    assert main(["ls", str(root)]) == 0
    shown = capsys.readouterr().out
    assert f"3: committed, {text}" in shown and "node_local=fc.NodeLocal()" in " ".join(
        shown.split()
    )
    assert main(["ls", "--json", str(root)]) == 0
    assert json.loads(capsys.readouterr().out)["parts"] == {"3": text}
    assert main(["show", str(root), "3"]) == 0
    assert text in capsys.readouterr().out
    assert main(["verify", str(root)]) == 0
    assert f"intact here; {text}" in " ".join(capsys.readouterr().out.split())


def test_verify_finds_damage_in_a_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 3)
    (own,) = {
        path.relative_to(tmp_path / "a")
        for path in (tmp_path / "a" / "3").rglob("*")
        if path.is_file()
    } - {path.relative_to(tmp_path / "b") for path in (tmp_path / "b" / "3").rglob("*")}
    file = tmp_path / "a" / own
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert main(["verify", "--json", str(tmp_path / "a")]) == 1
    (result,) = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [each["problem"] for each in result["findings"]] == ["content"]
    file.unlink()  # its own file: no other node has it
    assert main(["verify", "--json", str(tmp_path / "a")]) == 1
    (result,) = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [each["problem"] for each in result["findings"]] == ["missing"]


def test_a_writer_without_node_local_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 3)
    root = tmp_path / "a"
    vote = root / "4.orbax-checkpoint-tmp-0123456789ab"
    shutil.copytree(root / "3", vote)
    before = sorted(root.rglob("*"))
    with pytest.raises(errors.UsageError, match=r"one node's parts of steps \(3, 4\).*node_local="):
        fc.CheckpointManager(root)
    assert [path for path in before if not path.exists()] == []
    assert main(["prune", str(root), "--keep", "latest:1"]) != 0
    assert (root / "3").exists()
