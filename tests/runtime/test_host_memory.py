from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functional_ckpt.runtime import device_copies
from functional_ckpt.runtime.host_memory import Slot, StagingBuffer, copy_in_threads

SHAPES = st.lists(st.integers(0, 20), max_size=3).map(tuple)
DTYPES = st.sampled_from(("bool", "uint8", "float32", "complex128", ml_dtypes.bfloat16))


@given(wanted=st.lists(st.tuples(SHAPES, DTYPES), max_size=10))
def test_every_slot_has_memory_of_its_own(wanted: list[tuple[tuple[int, ...], Any]]) -> None:
    slots = [Slot(shape, np.dtype(dtype)) for shape, dtype in wanted]
    places = StagingBuffer().reserve(slots)
    for place, slot in zip(places, slots, strict=True):
        assert (place.shape, place.dtype) == (slot.shape, slot.dtype)
        assert place.nbytes == slot.size_bytes
        assert place.flags.c_contiguous and place.flags.writeable
        if place.size:
            assert place.__array_interface__["data"][0] % 64 == 0
    for number, place in enumerate(places):
        place.reshape(-1).view(np.uint8)[:] = number
    for number, place in enumerate(places):
        assert (place.reshape(-1).view(np.uint8) == number).all()


def test_memory_is_used_again_and_grown_when_needed() -> None:
    buffer = StagingBuffer()
    assert buffer.size_bytes == 0
    [first] = buffer.reserve([Slot((1_000,), np.dtype("f4"))])
    address = first.__array_interface__["data"][0]
    size = buffer.size_bytes
    assert size >= 4_000
    [second] = buffer.reserve([Slot((500,), np.dtype("f4"))])
    assert second.__array_interface__["data"][0] == address and buffer.size_bytes == size
    del first, second
    [third] = buffer.reserve([Slot((100_000,), np.dtype("f4"))])
    third[:] = 1
    assert buffer.size_bytes >= 400_000
    buffer.release()
    assert buffer.size_bytes == 0
    assert (third == 1).all(), "references keep the memory"


@settings(max_examples=30)
@given(shape=SHAPES, order=st.sampled_from("CF"), step=st.sampled_from((1, 2, -1)))
def test_copies_of_any_layout(shape: tuple[int, ...], order: Any, step: int) -> None:
    source = np.random.default_rng(0).random(shape)
    source = np.asarray(source, order=order)
    if shape:
        source = source[::step]
    target = np.zeros(source.shape)
    copy_in_threads([(target, source)])
    assert (target == source).all()


@pytest.mark.parametrize("order", ["C", "F"])
def test_large_copies_are_cut_into_pieces_that_make_the_whole(order: Any) -> None:
    source = np.arange(3 * 1_500_001, dtype=np.float64).reshape(3, -1).astype("f8", order=order)
    small = np.arange(5)
    target, other = np.zeros(source.shape), np.zeros(5, int)
    copy_in_threads([(target, source), (other, small)])
    assert (target == source).all() and (other == small).all()


def test_a_failing_copy_is_raised() -> None:
    pairs = [(np.zeros(3), np.zeros(4))]
    with pytest.raises(ValueError, match="broadcast"):
        copy_in_threads(pairs)


def test_pages_that_are_locked_are_unlocked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime answers 0 for success."""
    calls: list[tuple[Any, ...]] = []

    class Runtime:
        def __getattr__(self, name: str) -> Any:
            return lambda *arguments: (calls.append((name, *arguments)), 0)[1]

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    unlock = device_copies.lock_pages(4096, 8192)
    assert unlock is not None
    unlock()
    assert [call[:2] for call in calls] == [
        ("cudaHostRegister", 4096),
        ("cudaHostUnregister", 4096),
    ]
