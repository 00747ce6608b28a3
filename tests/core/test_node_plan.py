"""Plans of reads where files are on nodes, against a model of the sources."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from functional_ckpt.core.arrays.chunks import ChunkGrid
from functional_ckpt.core.arrays.node_plan import Chunk, Copy, Holders, Part, plan_node_reads
from functional_ckpt.core.arrays.share_plan import Region, StoredArray
from functional_ckpt.core.arrays.spec import ArraySpec, Box

SIZE = st.integers(1, 5)


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    begin = [draw(st.integers(0, size)) for size in shape]
    end = [draw(st.integers(low, size)) for low, size in zip(begin, shape, strict=True)]
    return Box(tuple(begin), tuple(b - a for a, b in zip(begin, end, strict=True)))


@given(st.data(), st.integers(1, 200), st.booleans())
def test_every_part_is_read_once_from_the_nearest_intact_source(
    data: st.DataObject, limit: int, shares: bool
) -> None:
    shape = data.draw(st.tuples(SIZE, SIZE))
    grid = ChunkGrid(shape, data.draw(st.tuples(SIZE, SIZE)))
    arrays = {"a": StoredArray(spec=ArraySpec(shape, "float32"), grid=grid)}
    num_ranks = data.draw(st.integers(1, 4))
    node_of = tuple(data.draw(st.integers(0, 2)) for _ in range(num_ranks))
    region = st.builds(Region, st.just("a"), boxes(shape))
    wants = [data.draw(st.lists(region, max_size=2)) for _ in range(num_ranks)]
    files = {"a": {position: f"f{position}" for position in range(1, grid.num_chunks)}}
    nodes_of = {file: data.draw(st.sets(st.integers(0, 2))) for file in files["a"].values()}
    holders = Holders(
        node_of=node_of,
        files=files,
        nodes_of=nodes_of,
        num_nodes=3,
        num_tiers=data.draw(st.integers(0, 2)),
    )
    every = [Copy(Chunk("a", index), source) for index in grid.indices() for source in range(5)]
    damaged = data.draw(st.sets(st.sampled_from(every)))
    plan = plan_node_reads(
        arrays, wants, holders, round_bytes=limit, damaged=damaged, shares=shares
    )
    expected = {
        Part(rank, number, index)
        for rank, of_rank in enumerate(wants)
        for number, want in enumerate(of_rank)
        for index in grid.indices(want.box)
    }
    read = [(part, node_of[part.rank]) for part in plan.alone]
    for each in itertools.chain.from_iterable(plan.rounds):
        assert each.source >= 3 or node_of[each.reader] == each.source
        read += [(Part(p.rank, p.want, each.chunk.at), each.source) for p in each.parts]
    assert len({part for part, _ in read}) == len(read)
    assert {part for part, _ in read} | {p for p in expected if Chunk("a", p.at) in plan.lost} == (
        expected
    )
    for part, source in read:
        chunk = Chunk("a", part.at)
        held = nodes_of.get(f"f{grid.position(part.at)}", {0, 1, 2}) & set(node_of)
        nodes = {node for node in held if Copy(chunk, node) not in damaged}
        tiers = [3 + n for n in range(holders.num_tiers) if Copy(chunk, 3 + n) not in damaged]
        own = node_of[part.rank]
        assert source == own if own in nodes else source in (nodes or set(tiers[:1]))
