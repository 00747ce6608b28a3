from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from functional_ckpt import errors
from functional_ckpt.handlers import Generator, Rng, RngHandler

BIT_GENERATORS = [
    np.random.PCG64,
    np.random.PCG64DXSM,
    np.random.MT19937,
    np.random.Philox,
    np.random.SFC64,
]


def draw() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.rand(),
        np.random.randn(),
        torch.rand(1).item(),
        torch.randn(3)[1].item(),
    ]


def make_generators(seed: int):
    return {
        "python": random.Random(seed),
        "state": np.random.RandomState(seed),
        **{kind.__name__: np.random.Generator(kind(seed)) for kind in BIT_GENERATORS},
        "torch": torch.Generator().manual_seed(seed),
    }


def draw_from(generator):
    if isinstance(generator, torch.Generator):
        return torch.randn(5, generator=generator).tolist()
    if isinstance(generator, random.Random):
        return [generator.gauss(0, 1), generator.random(), generator.getrandbits(200)]
    few = generator.integers if hasattr(generator, "integers") else generator.randint
    # An odd number of 32-bit draws leaves half a word in the generator.
    return [few(0, 9, dtype=np.uint32), *generator.standard_normal(3), few(0, 9, dtype=np.uint32)]


def test_global_generators_resume_exactly(save):
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    draw()  # leaves a second gaussian waiting in Python's and numpy's
    stored = save(Rng())
    wanted = draw(), draw()
    assert stored.restore(Rng()) == {}
    assert (draw(), draw()) == wanted


def test_rng_lower_does_not_advance_generators(save):
    generators = make_generators(5)
    twins = make_generators(5)
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    save(Rng(generators))
    first = draw()
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    assert draw() == first
    for name, generator in generators.items():
        assert draw_from(generator) == draw_from(twins[name]), name


def test_named_generators_are_set_in_place(save):
    generators = make_generators(5)
    for generator in generators.values():
        draw_from(generator)
    stored = save(Rng(generators))
    wanted = {name: draw_from(g) for name, g in generators.items()}
    fresh = make_generators(6)
    restored = stored.restore(Rng(fresh))
    assert {name: draw_from(g) for name, g in fresh.items()} == wanted
    assert all(restored[name] is fresh[name] for name in fresh)


@pytest.mark.parametrize("name", make_generators(0))
def test_a_generator_by_itself(save, name):
    generator = make_generators(5)[name]
    draw_from(generator)
    stored = save(generator)
    wanted = draw_from(generator)
    fresh = make_generators(6)[name]
    assert stored.restore(fresh) is fresh
    assert draw_from(fresh) == wanted


def test_rng_states_are_compact(save):
    arrays = save(Rng({"r": random.Random(1)})).arrays
    assert arrays["python.words"].dtype == np.uint32
    assert arrays["python.words"].shape == (625,)
    assert arrays["generators.r.words"].shape == (625,)
    assert sum(array.nbytes for array in arrays.values()) < 20_000


def test_each_rank_has_its_own():
    assert Rng().handler.per_rank
    assert Generator(random.Random()).handler.per_rank


def test_other_generators_are_a_mismatch(save):
    stored = save(Rng({"a": random.Random(1), "b": np.random.default_rng(1)}))
    before = random.getstate()
    with pytest.raises(errors.MismatchError) as caught:
        stored.restore(Rng({"b": np.random.Generator(np.random.SFC64(1)), "c": random.Random(1)}))
    assert caught.value.missing == ("c",)
    assert caught.value.unexpected == ("a",)
    assert caught.value.mismatched == ("b is numpy SFC64, saved was numpy PCG64",)
    assert random.getstate() == before
    with pytest.raises(errors.MismatchError, match=r"is Python's, version 3, saved was torch's"):
        save(torch.Generator()).restore(random.Random())


@pytest.mark.parametrize("wrong", [np.random, random.SystemRandom(), 3])
def test_rng_refuses_other_objects(wrong):
    with pytest.raises(errors.UsageError, match="g: expected a random"):
        Rng({"g": wrong})
    with pytest.raises(errors.UsageError, match="value: expected a random"):
        Generator(wrong)


@pytest.mark.parametrize("wrong", [123, None, "seed", torch.ones(1)])
def test_a_generator_item_refuses_anything_else_at_once(wrong):
    with pytest.raises(errors.UsageError, match=type(wrong).__name__):
        Generator(wrong)


def test_another_number_of_cuda_devices(save):
    handler = RngHandler()
    saved = {**save(Rng()).saved(), "cuda": [None] * (torch.cuda.device_count() + 3)}
    with pytest.raises(errors.MismatchError, match=r"\d+ CUDA devices.*same_devices=False"):
        handler.target({}, saved)
    RngHandler(same_devices=False).target({}, saved)
    handler.target({}, {**saved, "cuda": []})


@pytest.mark.cuda
def test_rng_restores_cuda_generators(save):
    torch.cuda.manual_seed_all(1)
    torch.rand(3, device="cuda")
    own = torch.Generator("cuda").manual_seed(4)
    stored = save(Rng({"own": own}))
    wanted = torch.rand(3, device="cuda"), torch.rand(3, device="cuda", generator=own)
    stored.restore(Rng({"own": own}))
    assert torch.equal(torch.rand(3, device="cuda"), wanted[0])
    assert torch.equal(torch.rand(3, device="cuda", generator=own), wanted[1])
    with pytest.raises(errors.MismatchError, match="own is torch's with 5056 bytes"):
        stored.restore(Rng({"own": torch.Generator()}))


def _drawn(rng: Rng, states: object) -> list[float]:
    rng.handler.lift(rng.value, states)
    own = rng.value["own"]
    assert isinstance(own, np.random.Generator)
    return [random.random(), float(np.random.rand()), torch.rand(1).item(), float(own.random())]


def test_other_ranks_derive_streams_of_their_own():
    rng = Rng({"own": np.random.default_rng(5)}, other_ranks="derive")
    trees = []
    for seed in range(2):
        torch.manual_seed(seed)
        trees.append(rng.handler.lower(rng.value))
    drawn = [_drawn(rng, rng.handler.resize(trees, rank, 3)) for rank in range(3)]
    again = [_drawn(rng, rng.handler.resize(trees, rank, 3)) for rank in range(3)]
    assert drawn == again
    saved = [_drawn(rng, tree) for tree in trees]
    every = [number for numbers in (*drawn, *saved[:1]) for number in numbers]
    assert len(set(every)) == len(every)
    # Any saved state counts, and so does the number of ranks.
    torch.manual_seed(7)
    others = [trees[0], rng.handler.lower(rng.value)]
    assert _drawn(rng, rng.handler.resize(others, 0, 3)) != drawn[0]
    assert _drawn(rng, rng.handler.resize(trees, 0, 4)) != drawn[0]


def test_other_ranks_are_an_error_unless_asked():
    with pytest.raises(errors.MismatchError, match="saved by 2 ranks"):
        Rng().handler.resize([None, None], 0, 3)
    with pytest.raises(errors.UsageError, match="other_ranks"):
        Rng(other_ranks="ignore")  # pyright: ignore[reportArgumentType]
