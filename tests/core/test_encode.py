from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from functional_ckpt import errors
from functional_ckpt.core.arrays.spec import ArraySpec
from functional_ckpt.core.tree import decode, encode, memory
from functional_ckpt.core.tree.structure import ArrayNode
from functional_ckpt.testing import differences, strategies


@settings(max_examples=200)
@given(tensor=strategies.tensors())
def test_a_tensor_through_its_bytes(tensor: torch.Tensor) -> None:
    node = encode.array_node(tensor, "t")
    assert node is not None and node.spec.shape == tuple(tensor.shape)
    destination = decode.allocate(node)
    destination.array[...] = encode.host_view(encode.source_of(tensor, node), node.spec.dtype)
    restored = destination.finish()
    assert differences(restored, tensor) == []


@given(tensor=strategies.tensors())
def test_a_source_is_the_tensors_own_memory(tensor: torch.Tensor) -> None:
    node = encode.array_node(tensor, "t")
    assert node is not None
    source = encode.source_of(tensor, node)
    if tensor.numel():
        assert source.data_ptr() == tensor.data_ptr()
        host = encode.host_view(source, node.spec.dtype)
        assert host.__array_interface__["data"][0] == tensor.data_ptr()


@pytest.mark.parametrize(
    "array",
    [np.arange(3)[::-1], np.arange(3, dtype=">i4"), np.float32(1.5), np.arange(6).reshape(2, 3)],
)
def test_a_source_of_numpy_reads_the_same(array: np.ndarray) -> None:
    node = encode.array_node(array, "a")
    assert node is not None
    np.testing.assert_array_equal(encode.source_of(array, node).numpy(), array)


def test_sources_never_warn_of_read_only_memory() -> None:
    array = np.arange(3)
    array.flags.writeable = False
    node = encode.array_node(array, "a")
    assert node is not None
    source = encode.source_of(array, node)
    source[0] = 7
    assert array[0] == 0


def test_subclasses_of_plain_types_are_not_plain() -> None:
    class Name(str):
        pass

    assert encode.value_node(Name("x")) is None
    assert encode.value_node(True) != encode.value_node(1)


@pytest.mark.parametrize(
    ("first", "second", "is_shared"),
    [
        (lambda t: t, lambda t: t, True),
        (lambda t: t, lambda t: t.detach(), True),
        (lambda t: t, lambda t: torch.nn.Parameter(t), True),
        (lambda t: t, lambda t: t.clone(), False),
        (lambda t: t, lambda t: t[:2], False),
        (lambda t: t, lambda t: t.t(), False),
        (lambda t: t, lambda t: t.view(torch.int32), False),
        (lambda t: t[:0], lambda t: t[:0], False),
        (lambda t: t.numpy(), lambda t: t.numpy(), True),
        (lambda t: t.numpy(), lambda t: t, False),
    ],
)
def test_storage_key_is_equal_for_tied_leaves_only(first, second, is_shared: bool) -> None:
    tensor = torch.arange(9.0).reshape(3, 3)
    one, other = memory.storage_key(first(tensor)), memory.storage_key(second(tensor))
    assert (one is not None and one == other) == is_shared


@pytest.mark.parametrize("dtype", ["int4", "uint4", "int1", "bits16"])
def test_dtypes_that_torch_cannot_copy(dtype: str) -> None:
    tensor = torch.empty(2, dtype=getattr(torch, dtype))
    with pytest.raises(errors.UnsupportedLeafError, match=f"torch.{dtype} cannot be stored"):
        encode.array_node(tensor, "t")


def test_a_dtype_of_another_torch_is_named() -> None:
    node = ArrayNode(
        kind="tensor", spec=ArraySpec((2,), "uint8"), name="t", detail={"dtype": "float3"}
    )
    with pytest.raises(errors.UsageError, match="has no dtype 'float3'"):
        decode.allocate(node)


def test_numpy_only_dtypes_restore_as_numpy() -> None:
    node = ArrayNode(kind="tensor", spec=ArraySpec((2,), "int4"), name="t")
    destination = decode.allocate(node)
    destination.array[...] = [-8, 7]
    assert [int(x) for x in destination.finish()] == [-8, 7]


def test_dressing_is_undone_by_dress() -> None:
    for tensor in (
        torch.nn.Parameter(torch.ones(2)),
        torch.nn.Parameter(torch.ones(2), requires_grad=False),
        torch.nn.Buffer(torch.ones(2)),
        torch.nn.Buffer(torch.ones(2), persistent=False),
        torch.ones(2, requires_grad=True),
        torch.ones(2),
    ):
        dressed = decode.apply_tensor_role(tensor.detach().clone(), encode.tensor_role(tensor))
        assert encode.tensor_role(dressed) == encode.tensor_role(tensor)
        assert dressed.requires_grad == tensor.requires_grad


def test_strides_are_kept_only_where_memory_is_gapless() -> None:
    dense = encode.array_node(torch.ones(2, 3, 4).permute(2, 0, 1), "t")
    gappy = encode.array_node(torch.ones(4, 6)[:, ::2], "t")
    assert dense is not None and gappy is not None
    assert dense.detail == {"strides": [1, 12, 4]} and gappy.detail == {}
    value = decode.allocate(dense).finish()
    assert isinstance(value, torch.Tensor) and value.stride() == (1, 12, 4)
    assert math.prod(value.shape) == 24


@pytest.mark.parametrize(
    ("shape", "strides", "is_expanded"),
    [((3, 2), (0, 1), True), ((1, 3, 2), (0, 1, 3), False), ((1,), (0,), False), ((), (), False)],
)
def test_a_single_element_with_stride_0_shares_no_memory(
    shape: tuple[int, ...], strides: tuple[int, ...], is_expanded: bool
) -> None:
    assert memory.is_expanded(torch.zeros(6).as_strided(shape, strides)) is is_expanded


def test_the_known_descriptions_of_tensors_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "_MAX_DESCRIBED", 5)
    monkeypatch.setattr(encode, "_described", {})
    for size in range(12):
        assert encode.ordinary_node(torch.zeros(size), "a").spec.shape == (size,)
        assert 1 <= len(encode._described) <= 5
