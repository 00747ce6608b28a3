"""How much of a leaf is looked at where it is compared by samples."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch

from functional_ckpt.saving import overlap_check, parts, replicas


def test_a_large_leaf_is_sampled_from_its_beginning_to_its_end() -> None:
    flat = np.arange(2**20, dtype=np.uint32).view(np.uint8)
    limit = overlap_check._NUM_SAMPLES * overlap_check._SAMPLE_BYTES
    found = np.frombuffer(overlap_check._samples(flat), np.uint32)
    assert found.nbytes == limit
    assert found[0] == 0 and found[-1] > 2**20 * (1 - 2 / overlap_check._NUM_SAMPLES)
    assert overlap_check._samples(flat[:limit]) == flat[:limit].tobytes()
    assert overlap_check._samples(flat[:-3]) == overlap_check._samples(flat[:-16])


@pytest.mark.parametrize("num_leaves", [0, 1, 2, 63, 64, 65, 1000, 6400])
def test_of_many_leaves_a_few_are_sampled_evenly(num_leaves: int) -> None:
    found = overlap_check.sampled(range(num_leaves))
    assert min(num_leaves, 32) <= len(found) <= 64
    assert not num_leaves or (found[0] == 0 and found[-1] >= num_leaves * 31 // 32 - 1)


@pytest.mark.parametrize("shape", [(10**6,), (1000, 1000), (3, 10**6), (10**6, 3), (2,) * 22])
def test_a_grid_has_many_elements_and_not_too_many(shape: tuple[int, ...]) -> None:
    taken = np.broadcast_to(np.float32(1), shape)[replicas._grid(shape, 4)]
    assert replicas._MAX_ELEMENTS / 4 <= taken.size <= replicas._MAX_ELEMENTS * 1.5
    assert replicas._grid((3, 4), 4) == (...,)


def test_elements_on_a_device_are_enqueued_and_empty_parts_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parts.device_copies, "is_streamed", lambda view: True)
    transfers, part = mock.Mock(), mock.Mock(view=torch.ones(3), dtype="float32")
    empty = mock.Mock(view=torch.ones(0), dtype="float32")
    host = np.zeros(3, np.float32)
    parts.start_copy([(part, host), (empty, np.zeros(0, np.float32))], transfers, 1)
    [(target, source)] = transfers.enqueue.call_args.args[0]
    assert source is part.view and target.data_ptr() == host.ctypes.data
