"""Parts of an object cover its bytes exactly, and only the last may be small."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from functional_ckpt.core.files.part_plan import (
    MAX_PARTS,
    MIN_PART_BYTES,
    Made,
    Part,
    Run,
    Stored,
    least_bytes,
    plan_parts,
)

MIN, MAX = 5, 12
Bytes = list[tuple[object, int]]


def stored(file: str, start: int, size_bytes: int) -> Stored:
    return Stored(file, start, start + size_bytes)


RUNS = st.lists(
    st.one_of(
        st.builds(stored, st.sampled_from("ab"), st.integers(0, 40), st.integers(1, 40)),
        st.builds(Made, st.integers(0, 99), st.integers(1, 16)),
    ),
    max_size=12,
)


def content(runs: list[Run]) -> Bytes:
    """Returns where each byte is from."""
    found: Bytes = []
    for run in runs:
        start = run.start if isinstance(run, Stored) else 0
        origin = run.file if isinstance(run, Stored) else run.number
        found += [(origin, start + number) for number in range(run.size_bytes)]
    return found


def size_of(part: Part) -> int:
    return sum(run.size_bytes for run in part.runs)


@given(RUNS)
def test_parts_cover_the_object(runs: list[Run]) -> None:
    parts = plan_parts(runs, min_bytes=MIN, max_bytes=MAX)
    assert content([run for part in parts for run in part.runs]) == content(runs)
    assert all(size_of(part) >= MIN for part in parts[:-1])
    for part in parts:
        if part.is_copied:
            assert len(part.runs) == 1 and isinstance(part.runs[0], Stored)
            assert size_of(part) <= MAX
        else:  # bounded, so that the memory of a part is
            assert size_of(part) < 3 * MIN + 16


@given(RUNS)
def test_little_goes_through_the_client(runs: list[Run]) -> None:
    """All runs that are made or short, and less than a part before each copied run."""
    sent = [part for part in plan_parts(runs, min_bytes=MIN, max_bytes=MAX) if not part.is_copied]
    small = [run for run in runs if isinstance(run, Made) or run.size_bytes < 2 * MIN]
    assert sum(map(size_of, sent)) <= sum(run.size_bytes for run in small) + MIN * len(runs)


def test_the_parts_of_a_file_of_two_shards() -> None:
    runs: list[Run] = [Made(0, 4), stored("a", 100, 20), stored("b", 50, 30), stored("b", 80, 10)]
    assert plan_parts(runs, min_bytes=MIN, max_bytes=100) == [
        Part([Made(0, 4), stored("a", 100, 1)], is_copied=False),
        Part([stored("a", 101, 19)], is_copied=True),
        Part([stored("b", 50, 40)], is_copied=True),
    ]


def test_no_object_has_too_many_parts() -> None:
    assert least_bytes(10**9) == MIN_PART_BYTES
    assert -(-(5 * 2**40) // least_bytes(5 * 2**40)) < MAX_PARTS
