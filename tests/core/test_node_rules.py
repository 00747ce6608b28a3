"""The part record, and the decision at a start: the table of docs/design/017."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import pytest

from functional_ckpt import errors
from functional_ckpt.core.nodes import part, rules
from functional_ckpt.core.nodes.part import NodeFiles, PartRecord
from functional_ckpt.core.nodes.rules import HeldPart
from functional_ckpt.core.records.file_list import FileRecord


def record(
    commit_id: str = "x", step: int = 1, generation: int = 1, nodes: str = "ab", serial: int = 0
) -> PartRecord:
    parts = [
        NodeFiles(
            name=name,
            directory=name.upper(),
            ranks=(2 * i, 2 * i + 1),
            files={f"model/{name}": FileRecord.of(b"" * i)},
        )
        for i, name in enumerate(nodes)
    ]
    return PartRecord(
        commit_id=commit_id, step=step, generation=generation, serial=serial, nodes=tuple(parts)
    )


def held(of: PartRecord, files: str, kind: str = "step") -> HeldPart:
    name = str(of.step)
    path = {"step": name, "vote": f"{name}.tmp", "aside": f"aside/{name}.{of.commit_id}"}[kind]
    return HeldPart(
        name=name,
        path=path,
        record=of,
        is_renamed=kind != "vote",
        is_aside=kind == "aside",
        files=frozenset(f"model/{each}" for each in files),
    )


def decide(
    inventories: Mapping[str, Sequence[HeldPart]], retired: Collection[str] = ()
) -> rules.Decision:
    return rules.decide(
        inventories, directories={name.upper() for name in inventories}, retired=retired
    )


def moved(parts: Sequence[HeldPart], decision: rules.Decision) -> list[tuple[str, str]]:
    return [(move.action, move.part.path) for move in rules.moves(parts, decision)]


def test_a_part_record_is_read_as_it_was_written() -> None:
    written = record(nodes="abc", serial=3)
    read = part.parse(written.to_json(), "path")
    assert read == written
    assert read.owner("model/b") == "b"
    assert read.node_of(5).name == "c"
    assert list(read.files) == ["model/a", "model/b", "model/c"]
    assert read.nodes[0].digest == written.nodes[0].digest != read.nodes[1].digest
    with pytest.raises(KeyError):
        read.node_of(6)


def test_every_damaged_byte_of_a_part_record_is_found() -> None:
    data = record().to_json()
    for k in range(len(data)):
        damaged = bytearray(data)
        damaged[k] ^= 1
        with pytest.raises(errors.CorruptCheckpointError, match="where/it/is"):
            part.parse(bytes(damaged), "where/it/is")
    with pytest.raises(errors.CorruptCheckpointError):
        part.parse(data[:-1], "where/it/is")


@pytest.mark.parametrize(
    "changed",
    [
        {"commit_id": "../x"},
        {"commit_id": ""},
        {"step": -1},
        {"generation": 1.5},
        {"nodes": ()},
        {"nodes": record(nodes="ab").nodes[1:]},
        {"nodes": record(nodes="aa").nodes},
        {
            "nodes": (
                *record(nodes="a").nodes,
                NodeFiles(name="b", directory="B", ranks=(1,), files={}),
            )
        },
    ],
)
def test_a_malformed_part_record_is_refused(changed: dict[str, object]) -> None:
    values: dict[str, object] = {"commit_id": "x", "step": 1, "generation": 1}
    values |= {"nodes": record().nodes} | changed
    with pytest.raises(errors.CorruptCheckpointError):
        part.parse(PartRecord(**values).to_json(), "path")  # pyright: ignore[reportArgumentType]


def test_a_renamed_part_on_any_node_rolls_the_votes_forward() -> None:
    x = record()
    a, b = [held(x, "a")], [held(x, "b", "vote")]
    decision = decide({"a": a, "b": b})
    assert decision.roll_forward == ("x",)
    assert decision.newest is not None
    assert decision.newest.holders == {"model/a": ("a",), "model/b": ("b",)}
    assert moved(a, decision) == []
    assert moved(b, decision) == [("rename", "1.tmp")]


def test_votes_are_aborted_if_every_directory_is_here_and_none_was_renamed() -> None:
    x = record()
    a, b = [held(x, "a", "vote")], [held(x, "b", "vote")]
    decision = decide({"a": a, "b": b})
    assert (decision.abort, decision.usable) == (("x",), ())
    assert moved(a, decision) == [("remove", "1.tmp")]
    # Node b was killed before it voted.
    assert decide({"a": a, "b": []}).abort == ("x",)
    # The nodes have other names, and there is another one.
    parts = {"c": b, "d": a, "e": list[HeldPart]()}
    assert rules.decide(parts, directories={"A", "B", "E"}) == decision


def test_a_vote_stays_while_a_directory_is_missing_that_may_have_renamed_its_part() -> None:
    x = record(nodes="abc")
    parts = {"a": [held(x, "a", "vote")], "b": [held(x, "b", "vote")]}
    decision = decide(parts)
    assert decision.abort == decision.roll_forward == decision.usable == ()
    assert [(each.nodes, each.why) for each in decision.waiting] == [
        (("a", "b"), "not renamed on a, b; c may have renamed it")
    ]
    assert moved(parts["a"], decision) == []
    # A node of that name, with another disk.
    assert rules.decide({**parts, "c": []}, directories={"A", "B", "D"}) == decision
    # A later run has saved without it.
    y = record("y", generation=2)
    newest = decide({"a": [held(y, "a")], "b": [held(y, "b")]}).newest
    assert rules.outdated(decision.waiting, newest) == decision.waiting
    assert rules.outdated(decision.waiting, None) == ()


def test_parts_are_combined_by_commit_id_alone() -> None:
    x, y = record("x"), record("y")
    decision = decide({"a": [held(x, "a")], "b": [held(y, "b")]})
    assert decision.usable == ()
    assert [each.why for each in decision.incomplete] == [
        "1 of its 2 files are on no node; written by b",
        "1 of its 2 files are on no node; written by a",
    ]


def test_an_abandoned_line_does_not_win_by_its_step_number() -> None:
    x, y = record("x", step=9, generation=1), record("y", step=4, generation=2)
    decision = decide({n: [held(x, n), held(y, n)] for n in "ab"})
    assert [commit.record.commit_id for commit in decision.usable] == ["x", "y"]
    assert decision.aside == ()


def test_of_two_commits_of_a_step_the_newer_one_is_the_step() -> None:
    x, y = record("x"), record("y", generation=2)
    parts = {"a": [held(x, "ab"), held(y, "a", "aside")], "b": [held(y, "b", "vote")]}
    decision = decide(parts)
    assert [commit.record.commit_id for commit in decision.usable] == ["y"]
    assert (decision.aside, decision.bring_back) == (("x",), ("y",))
    assert moved(parts["a"], decision) == [("aside", "1"), ("rename", "aside/1.y")]
    assert moved(parts["b"], decision) == [("rename", "1.tmp")]
    # If the newer one is lost with node b, the older one is the step again.
    parts = {"a": [held(x, "ab", "aside"), held(y, "a")], "b": list[HeldPart]()}
    decision = decide(parts)
    assert [commit.record.commit_id for commit in decision.usable] == ["x"]
    assert moved(parts["a"], decision) == [("aside", "1"), ("rename", "aside/1.x")]


def test_an_overwritten_step_is_older_within_its_generation() -> None:
    x, y = record("y", serial=3), record("x", serial=4)
    decision = decide({"a": [held(x, "ab"), held(y, "ab", "aside")]})
    assert [commit.record.serial for commit in decision.usable] == [4]


def test_a_commit_whose_removal_was_interrupted_is_removed_everywhere() -> None:
    x = record()
    decision = decide({"a": [], "b": [held(x, "ab")]}, retired={"x", "gone"})
    assert (decision.retired, decision.usable) == (("x",), ())
    assert moved([held(x, "ab")], decision) == [("remove", "1")]


def test_a_step_is_replicated_once_enough_nodes_hold_every_file() -> None:
    x = record(nodes="abc")
    one = {"model/a": "a", "model/b": "b", "model/c": "c"}
    two = {"model/a": "ab", "model/b": "bc", "model/c": "ca"}
    assert not rules.is_replicated(x, one, 1, num_nodes=3)
    assert rules.is_replicated(x, one, 0, num_nodes=3)
    assert rules.is_replicated(x, one, 2, num_nodes=1)
    assert rules.is_replicated(x, two, 1, num_nodes=3)
    assert not rules.is_replicated(x, two, 2, num_nodes=3)
    assert not rules.is_replicated(x, {**two, "model/b": "bb"}, 1, num_nodes=3)


def test_steps_may_be_pruned_once_a_newer_one_is_replicated() -> None:
    steps = [record(str(k), step=k) for k in range(1, 4)]
    a = [held(steps[0], "ab"), held(steps[1], "ab"), held(steps[2], "a")]
    b = [held(steps[0], "ab"), held(steps[1], "ab"), held(steps[2], "b")]
    usable = decide({"a": a, "b": b}).usable
    assert [each.record.step for each in rules.prunable(usable, 1, num_nodes=2)] == [1]
    assert [each.record.step for each in rules.prunable(usable, 0, num_nodes=2)] == [1, 2]
    assert rules.prunable(usable[2:], 1, num_nodes=2) == ()


def test_a_generation_is_higher_than_any_that_is_known() -> None:
    assert rules.next_generation([], []) == 1
    assert rules.next_generation([3, 0], [held(record(generation=7), "a")]) == 8
