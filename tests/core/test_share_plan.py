"""Plans of ranks that read for each other."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from functional_ckpt.core.arrays.chunks import ChunkGrid
from functional_ckpt.core.arrays.share_plan import Region, StoredArray, plan_sharing
from functional_ckpt.core.arrays.spec import ArraySpec, Box

SIZE = st.integers(1, 6)


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    begin = [draw(st.integers(0, size)) for size in shape]
    end = [draw(st.integers(low, size)) for low, size in zip(begin, shape, strict=True)]
    return Box(tuple(begin), tuple(b - a for a, b in zip(begin, end, strict=True)))


@given(st.data(), st.integers(1, 200))
def test_every_part_of_a_shared_chunk_reaches_who_wants_it(data: st.DataObject, limit: int) -> None:
    shape = data.draw(st.tuples(SIZE, SIZE))
    arrays = {
        name: StoredArray(
            spec=ArraySpec(shape, "float32"),
            grid=ChunkGrid(shape, data.draw(st.tuples(SIZE, SIZE))),
        )
        for name in "ab"
    }
    wants = data.draw(
        st.lists(
            st.lists(st.builds(Region, st.sampled_from("ab"), boxes(shape)), max_size=3),
            min_size=1,
            max_size=4,
        )
    )
    rounds = plan_sharing(arrays, wants, round_bytes=limit)
    chunks = list(itertools.chain.from_iterable(rounds))
    assert len({(chunk.array, chunk.index) for chunk in chunks}) == len(chunks)
    for chunk in chunks:
        region = arrays[chunk.array].grid.box(chunk.index)
        expected = [
            (rank, number, region.intersect(want.box))
            for rank, wanted in enumerate(wants)
            for number, want in enumerate(wanted)
            if want.array == chunk.array and region.intersect(want.box)
        ]
        assert [(part.rank, part.want, part.box) for part in chunk.parts] == expected
        assert chunk.reader in {part.rank for part in chunk.parts}
    for chunks_of_round in rounds:
        for rank in range(len(wants)):
            read = [c for c in chunks_of_round if c.reader == rank]
            sizes = [4 * arrays[c.array].grid.box(c.index).num_elements for c in read]
            assert len(sizes) <= 1 or sum(sizes) <= limit


def test_read_plan_does_not_share_single_requests() -> None:
    array = StoredArray(spec=ArraySpec((8, 4), "float32"), grid=ChunkGrid((8, 4), (4, 4)))
    rows = [[Region("a", Box((4 * rank, 0), (4, 4)))] for rank in range(2)]
    assert plan_sharing({"a": array}, rows, round_bytes=100) == ()


def test_replicas_share_the_reading_evenly() -> None:
    array = StoredArray(spec=ArraySpec((64, 4), "float32"), grid=ChunkGrid((64, 4), (4, 4)))
    everything = [[Region("a", Box.whole((64, 4)))]] * 4
    (chunks,) = plan_sharing({"a": array}, everything, round_bytes=10_000)
    readers = [chunk.reader for chunk in chunks]
    assert [readers.count(rank) for rank in range(4)] == [4, 4, 4, 4]
