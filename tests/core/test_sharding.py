"""Placements of any mesh, up to 1,024 ranks: they tile the array, and they are torch's own."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mesh_shapes import MESHES, SIZES
from torch.distributed.tensor import Partial, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from functional_ckpt import errors
from functional_ckpt.core.arrays import sharding as sharding_lib
from functional_ckpt.core.arrays.chunks import choose_grid
from functional_ckpt.core.arrays.sharding import DimShard, Sharding
from functional_ckpt.core.arrays.spec import ArraySpec
from functional_ckpt.core.tree import structure


@st.composite
def shardings(draw: st.DrawFn) -> tuple[tuple[int, ...], Sharding]:
    """A shape and a sharding of it."""
    mesh_shape = draw(st.sampled_from(MESHES))
    shape = tuple(draw(st.lists(st.sampled_from(SIZES), min_size=1, max_size=3)))
    while math.prod(shape) > 5_000:
        shape = shape[:-1]
    cuts = st.one_of(
        st.none(),
        st.builds(DimShard, st.integers(0, len(shape) - 1)),
        st.builds(DimShard, st.integers(0, len(shape) - 1), st.sampled_from((2, 3, 8))),
    )
    spread = tuple(draw(cuts) for _ in mesh_shape)
    ranks = tuple(draw(st.permutations(range(math.prod(mesh_shape)))))
    return shape, Sharding(mesh_shape, ranks, spread)


def as_torch(cut: DimShard | None) -> Placement:
    if cut is None:
        return Replicate()
    if cut.split_factor == 1:
        return Shard(cut.dim)
    return _StridedShard(cut.dim, split_factor=cut.split_factor)


def torch_parts(tensor: torch.Tensor, sharding: Sharding) -> dict[tuple[int, ...], torch.Tensor]:
    """Mesh coordinate -> its part by torch's own splitting."""
    parts: dict[tuple[int, ...], torch.Tensor] = {(): tensor}
    for size, cut in zip(sharding.mesh_shape, sharding.placements, strict=True):
        found: dict[tuple[int, ...], torch.Tensor] = {}
        for coordinate, part in parts.items():
            split: Any = as_torch(cut)
            pieces = [part] * size
            if cut is not None:
                pieces, _ = split._split_tensor(part, size, with_padding=False)
            found |= {(*coordinate, here): piece for here, piece in enumerate(pieces)}
        parts = found
    return parts


@given(case=shardings())
@settings(max_examples=120)
def test_every_element_is_held_by_as_many_ranks_as_there_are_replicas(
    case: tuple[tuple[int, ...], Sharding],
) -> None:
    shape, sharding = case
    held = np.zeros(shape, np.int64)
    for rank in sharding.ranks:
        for piece in sharding.pieces(shape, rank):
            assert piece.box.shape == piece.local.shape
            held[piece.box.slices()] += 1
    copies = math.prod(
        size
        for size, cut in zip(sharding.mesh_shape, sharding.placements, strict=True)
        if cut is None
    )
    assert (held == copies).all()


@given(case=shardings())
@settings(max_examples=120)
def test_pieces_are_what_torch_splits(case: tuple[tuple[int, ...], Sharding]) -> None:
    shape, sharding = case
    whole = torch.arange(math.prod(shape)).reshape(shape)
    for coordinate, expected in torch_parts(whole, sharding).items():
        pieces = sharding.pieces_at(shape, coordinate)
        rank = sharding.ranks[int(np.ravel_multi_index(coordinate, sharding.mesh_shape))]
        assert sharding.coordinate(rank) == coordinate
        if expected.numel() == 0:
            assert sum(piece.box.num_elements for piece in pieces) == 0
            continue
        got = torch.full(sharding.local_shape(shape, rank), -1)
        for piece in pieces:
            got[piece.local.slices()] = whole[piece.box.slices()]
        assert torch.equal(got, expected)


@given(case=shardings())
@settings(max_examples=120)
def test_no_chunk_reaches_over_an_edge_between_ranks(
    case: tuple[tuple[int, ...], Sharding],
) -> None:
    shape, sharding = case
    grid = choose_grid(ArraySpec(shape, "float32"), sharding.chunk_alignment(shape))
    chunks = [grid.box(index) for index in grid.indices()]
    for rank in sharding.ranks[:64]:
        for piece in sharding.pieces(shape, rank):
            meeting = [box for index in grid.indices(piece.box) for box in [grid.box(index)]]
            assert all(piece.box.contains(box) for box in meeting)
            assert sum(box.num_elements for box in meeting) == piece.box.num_elements
    assert sum(box.num_elements for box in chunks) == math.prod(shape)


@given(case=shardings(), data=st.data())
@settings(max_examples=60)
def test_replicas_are_the_ranks_with_the_same_pieces(
    case: tuple[tuple[int, ...], Sharding], data: st.DataObject
) -> None:
    shape, sharding = case
    rank = data.draw(st.sampled_from(sharding.ranks))
    replicas = sharding.replicas(rank)
    assert list(replicas) == sorted(replicas)
    assert rank in replicas
    mine = sharding.pieces(shape, rank)
    assert all(sharding.pieces(shape, other) == mine for other in replicas)
    if any(piece.box.num_elements for piece in mine):
        others = set(sharding.ranks[:64]) - set(replicas)
        assert all(sharding.pieces(shape, other) != mine for other in others)


def test_a_rank_outside_the_mesh_holds_nothing() -> None:
    sharding = Sharding((2,), (4, 7), (DimShard(0),))
    assert sharding.coordinate(5) is None
    assert sharding.pieces((3,), 5) == ()
    assert sharding.local_shape((3,), 5) == (0,)
    assert sharding.replicas(5) == ()
    assert [piece.box.shape for piece in sharding.pieces((3,), 7)] == [(1,)]


def test_ranks_are_counted_within_the_group_that_saves() -> None:
    sharding = Sharding((2,), (4, 7), (DimShard(0),))
    assert sharding.to_group_ranks((4, 5, 7)).ranks == (0, 2)
    with pytest.raises(errors.UnsupportedLeafError, match="rank 7, which is outside"):
        sharding.to_group_ranks((4, 5))


def test_a_mesh_that_does_not_fit_its_ranks_is_refused() -> None:
    for ranks, spread in itertools.product([(0, 1), (0, 1, 2)], [(None,), (None, None)]):
        if len(ranks) == 2 and len(spread) == 1:
            continue
        with pytest.raises(errors.UsageError, match="Mesh shape"):
            Sharding((2,), ranks, spread)


def test_partial_sums_are_refused_by_name() -> None:
    class Summing:
        device_mesh = type("Mesh", (), {"mesh": torch.arange(2)})()
        placements = (Partial("sum"),)

    with pytest.raises(errors.UnsupportedLeafError, match=r"Partial\(sum\).*redistribute"):
        sharding_lib.sharding_of(Summing())


def test_a_plain_tensor_is_one_piece() -> None:
    assert sharding_lib.sharding_of(torch.zeros(2)) is None
    (piece,) = sharding_lib.pieces_of(torch.zeros(2, 3))
    assert piece.box == piece.local
    assert piece.box.shape == (2, 3)


def test_a_sharding_in_words() -> None:
    cuts = (DimShard(dim=1), None, DimShard(dim=0, split_factor=2))
    sharding = Sharding((2, 1, 2), (0, 1, 2, 3), cuts)
    assert structure.sharding_text(sharding, (4, 6)) == (
        "[4, 6], dim 1, replicated, dim 0 in 2 on a mesh of [2, 1, 2]"
    )
    assert structure.sharding_text(None, (3,)) == "[3], not sharded"
