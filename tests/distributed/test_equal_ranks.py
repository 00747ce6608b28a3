"""One copy is stored of a value that several ranks have: the values must be equal."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import equal_jobs
import pytest
from gloo_workers import Workers

import functional_ckpt as fc

KINDS = ("tensor parallel", "experts", "moments", "large", "numpy", "bytes", "buffer")
LEAVES = {
    "tensor parallel": "state.weight",
    "experts": "state.experts.0.weight",
    "moments": "state.state.weight.exp_avg",
    "buffer": "state.scale",
    "other trees": "state.shared",
}
CONFLICTS = {
    "tensor or text": ("tensor float32[3]", "str 'text'"),
    "tensor or None": ("tensor float32[3]", "None"),
    "text or dict": ("str 'text'", "a dict of 0"),
    "list or dict": ("a list of 1", "a dict of 1"),
    "list or tuple": ("a list of 1", "a tuple of 1"),
    "dict or OrderedDict": ("a dict of 1", "a ordered_dict of 1"),
    "longer list": ("a list of 1", "a list of 2"),
    "tensor or ndarray": ("tensor float32[3]", "ndarray float32[3]"),
    "other dtype": ("tensor float64[3]", "tensor float32[3]"),
    "carried dtype": ("tensor float8_e5m2[3]", "tensor float8_e4m3fn[3]"),
    "other dims": ("tensor float32[3]", "tensor float32[1, 3]"),
    "tied or not": (
        "tensor float32[3] with {'tied to': 'x.0'}",
        "tensor float32[3] with {'tied to': None}",
    ),
    "other field": ("a named_tuple of 1 with {", "a named_tuple of 1 with {"),
    "later": ("a list of 2", "a list of 1"),
}
STAGINGS: tuple[dict[str, Any], ...] = (
    {"staging": fc.Overlapped()},
    {"staging": fc.Eager(budget_bytes=16)},
    {"staging": fc.Blocking()},
)


def test_values_that_differ_between_ranks_are_refused_by_name_on_every_rank(
    workers: Workers, tmp_path: Path
) -> None:
    kinds = (*KINDS, "other trees", "replicas", "meshes")
    for found in workers.run(2, equal_jobs.save_all_differing, tmp_path, kinds):
        assert set(found) == set(kinds)
        for what, text in found.items():
            leaf = LEAVES.get(what, "state.w")
            assert text.startswith(f"{leaf} (1,) {leaf}"), text
            assert "rank 0 and rank 1 hold different values under one name" in text
    assert fc.restore(tmp_path / "100")["state"]["w"].tolist() == [1.0] * 3


def test_structures_that_contradict_each_other_are_refused_by_save_on_every_rank(
    workers: Workers, tmp_path: Path
) -> None:
    kinds = tuple(kind for kind in CONFLICTS if kind != "later")
    for found in workers.run(2, equal_jobs.save_all_conflicting, tmp_path, kinds):
        assert list(found) == list(CONFLICTS)
        for what, text in found.items():
            one, other = CONFLICTS[what]
            assert re.match(r"\(0, 1\) state(\.x|\['x'\])", text), text
            assert f"rank 0 holds {one}" in text and f", rank 1 holds {other}" in text, text


@pytest.mark.parametrize("options", STAGINGS, ids=str)
def test_nothing_is_written_of_values_that_differ(
    options: dict[str, Any], workers: Workers, tmp_path: Path
) -> None:
    for failure in workers.failures(3, equal_jobs.save_differing, tmp_path, "moments", options):
        assert "CoordinationError" in failure.kinds
        assert set(failure.ranks) == {1, 2}
    assert [path.name for path in tmp_path.iterdir()] == [".functional_ckpt"]


@pytest.mark.parametrize(("at", "num_leaves", "latest"), [(1, 10, 1), (3, 10, 3), (5, 200, 8)])
def test_values_that_differ_later_are_found(
    at: int, num_leaves: int, latest: int, workers: Workers, tmp_path: Path
) -> None:
    found = workers.run(2, equal_jobs.drift, tmp_path, at, num_leaves)
    assert found[0] == found[1]
    assert at <= found[0] <= latest


def test_per_rank_values_are_restored_to_their_ranks(workers: Workers, tmp_path: Path) -> None:
    assert workers.run(2, equal_jobs.save_per_rank, tmp_path) == [[True] * 5] * 2


@pytest.mark.parametrize("staging", [fc.Eager(), fc.Blocking()], ids=str)
def test_unchecked_values_are_all_those_of_the_first_rank(
    staging: Any, workers: Workers, tmp_path: Path
) -> None:
    workers.run(4, equal_jobs.save_unchecked, tmp_path, staging)
    tree = fc.restore(tmp_path / "0")["t"]
    assert tree.pop("sharded").tolist() == [0.0] * 4 + [1.0] * 4
    assert all((value == 0).all() for value in tree.values())


@pytest.mark.parametrize("wrapper", ["ddp", ""])
def test_batch_norm_statistics_are_those_of_the_first_rank(
    wrapper: str, workers: Workers, tmp_path: Path
) -> None:
    found = workers.run(2, equal_jobs.save_batch_norm, tmp_path, wrapper)
    assert found[0][:2] != found[1][:2]
    model = fc.restore(tmp_path / "2")["model"]
    assert [model["1.running_mean"].tolist(), model["1.running_var"].tolist()] == found[0][:2]
    warned = [text for text in found[0][2] if text.startswith("Batch norm statistics differ")]
    assert len(warned) == (0 if wrapper else 1)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("differs", "config: ranks 0 and 1 save different JSON"),
        ("json or tree", "config: rank 1 saves it as a tree, rank 0 as JSON"),
        ("per rank or not", "config: rank 1 saves it as a tree, rank 0 as a tree for each rank"),
        ("shape", "config.lr: rank 0 holds tensor float32[3], rank 1 holds tensor float32[4]"),
        ("number or array", "config.lr: rank 0 holds a plain number, rank 1 holds tensor float32"),
        ("replicated", "config.lr: ranks 0 and 1 give its item another replicated="),
    ],
)
def test_items_of_different_kinds_are_refused_on_every_rank(
    kind: str, text: str, workers: Workers, tmp_path: Path
) -> None:
    for failure in workers.failures(2, equal_jobs.save_json, tmp_path, kind):
        assert failure.kinds[0] == "CoordinationError"
        assert text in failure.text
