"""The inventory of a node's directory, as the nodes exchange it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from functional_ckpt.core.nodes.part import PART_FILE, NodeFiles, PartRecord
from functional_ckpt.core.nodes.rules import HeldPart
from functional_ckpt.core.records.file_list import FileRecord
from functional_ckpt.steps import node_inventory
from functional_ckpt.steps.names import StepName
from functional_ckpt.storage.local import LocalStorage

FILES = {"model/a0": b"aaa", "model/a1": b"", "model/b0": b"bb"}


def record(step: int, commit_id: str) -> PartRecord:
    nodes = [
        NodeFiles(
            name=node,
            directory=node * 3,
            ranks=(rank,),
            files={k: FileRecord.of(v) for k, v in FILES.items() if node in k[6:]},
        )
        for rank, node in enumerate("ab")
    ]
    return PartRecord(commit_id=commit_id, step=step, generation=2, nodes=tuple(nodes))


def write(folder: Path, part: PartRecord, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PART_FILE).write_bytes(part.to_json())


def test_parts_votes_and_parts_aside_are_listed(tmp_path: Path) -> None:
    parts = {k: record(k, f"commit-{k}") for k in (1, 2, 3)}
    write(tmp_path / "1", parts[1], FILES)
    # A copy in transit, or one that was cut short, is not held.
    write(tmp_path / "2.orbax-checkpoint-tmp-0123", parts[2], {**FILES, "model/b0": b"b"})
    write(tmp_path / node_inventory.ASIDE / "3.commit-3", parts[3], {"model/b0": b"bb"})
    (tmp_path / "4").mkdir()  # an ordinary step
    write(tmp_path / "notes", parts[1], {})
    write(tmp_path / "5.orbax-checkpoint-tmp-0123", parts[1], {})
    (tmp_path / "5.orbax-checkpoint-tmp-0123" / PART_FILE).unlink()  # not a vote
    found = node_inventory.inventory(LocalStorage(), str(tmp_path), StepName())
    assert found == (
        HeldPart(
            name="3",
            path=".functional_ckpt/aside/3.commit-3",
            record=parts[3],
            is_renamed=True,
            is_aside=True,
            files=frozenset({"model/b0"}),
        ),
        HeldPart(name="1", path="1", record=parts[1], is_renamed=True, files=frozenset(FILES)),
        HeldPart(
            name="2",
            path="2.orbax-checkpoint-tmp-0123",
            record=parts[2],
            is_renamed=False,
            files=frozenset({"model/a0", "model/a1"}),
        ),
    )
    assert node_inventory.aside_path("1", "commit-1") == ".functional_ckpt/aside/1.commit-1"


def test_a_part_with_a_damaged_record_is_named_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "1", record(1, "x"), FILES)
    (tmp_path / "1" / PART_FILE).write_bytes(b"{}")
    with caplog.at_level(logging.WARNING, "functional_ckpt"):
        assert node_inventory.inventory(LocalStorage(), str(tmp_path), StepName()) == ()
    assert "the part is not used, and stays" in caplog.text


def test_an_inventory_arrives_as_it_was_sent(tmp_path: Path) -> None:
    storage, root = LocalStorage(), str(tmp_path)
    write(tmp_path / "1", record(1, "x"), FILES)
    write(tmp_path / "2.orbax-checkpoint-tmp-0123", record(2, "y"), {"model/a1": b""})
    made = node_inventory.make_directory_id(storage, root)
    assert node_inventory.make_directory_id(storage, root) == made
    node_inventory.write_generation(storage, root, 7)
    node_inventory.retire(storage, root, ["old", "older"])
    node_inventory.retire(storage, root, ["old"])
    sent = node_inventory.take(storage, root, StepName())
    assert (sent.generation, sent.retired, len(sent.parts)) == (7, ("old", "older"), 2)
    assert sent.directory == made
    assert node_inventory.from_bytes(sent.to_bytes(), "a") == sent


def test_an_empty_directory_holds_nothing(tmp_path: Path) -> None:
    found = node_inventory.take(LocalStorage(), str(tmp_path / "none"), StepName())
    assert found == node_inventory.Inventory()
