"""The saved data: random, never zeros, generated in every child process from one seed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
import xxhash

__all__ = ["WORKLOADS", "Leaf", "State", "change", "digest", "leaves", "make", "poke", "size_bytes"]

State = dict[str, torch.Tensor]

_MIB = 2**20
_WIDTH = 768
_NOISE_WORDS = 4 * _MIB
# Random bits that make finite floats: sign, two bits of the exponent and the mantissa are kept.
_MASKS = {
    torch.float32: (np.uint32, 0x81FFFFFF, 0x3E000000),
    torch.bfloat16: (np.uint16, 0x81FF, 0x3E00),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """One tensor of a workload; the name has no dots, so that it can be a parameter's."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def size_bytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


def _arrays(count: int, shape: tuple[int, ...]) -> Callable[[int], list[Leaf]]:
    def build(divisor: int) -> list[Leaf]:
        number = max(1, count // divisor)
        return [Leaf(name=f"t{index:05d}", shape=shape) for index in range(number)]

    return build


def _gpt2(divisor: int) -> list[Leaf]:
    """GPT-2 of 124 million parameters, tied embeddings once, with AdamW's two moments and step."""
    shapes: dict[str, tuple[int, ...]] = {
        "wte": (50257 // divisor, _WIDTH),
        "wpe": (1024, _WIDTH),
    }
    for layer in range(max(1, 12 // divisor)):
        for name, shape in {
            "ln_1_weight": (_WIDTH,),
            "ln_1_bias": (_WIDTH,),
            "attn_qkv_weight": (_WIDTH, 3 * _WIDTH),
            "attn_qkv_bias": (3 * _WIDTH,),
            "attn_proj_weight": (_WIDTH, _WIDTH),
            "attn_proj_bias": (_WIDTH,),
            "ln_2_weight": (_WIDTH,),
            "ln_2_bias": (_WIDTH,),
            "mlp_fc_weight": (_WIDTH, 4 * _WIDTH),
            "mlp_fc_bias": (4 * _WIDTH,),
            "mlp_proj_weight": (4 * _WIDTH, _WIDTH),
            "mlp_proj_bias": (_WIDTH,),
        }.items():
            shapes[f"h{layer:02d}_{name}"] = shape
    shapes |= {"ln_f_weight": (_WIDTH,), "ln_f_bias": (_WIDTH,)}
    found = [Leaf(name=n, shape=shape, dtype=torch.bfloat16) for n, shape in shapes.items()]
    for name, shape in shapes.items():
        found += [
            Leaf(name=f"{name}__exp_avg", shape=shape),
            Leaf(name=f"{name}__exp_avg_sq", shape=shape),
            Leaf(name=f"{name}__step", shape=()),
        ]
    return found


def _sixteenth(build: Callable[[int], list[Leaf]]) -> Callable[[int], list[Leaf]]:
    return lambda divisor: build(16 * divisor)


_BIG = _arrays(16, (4096, 8192))
_TINY = _arrays(20000, (1024,))
WORKLOADS: Mapping[str, Callable[[int], list[Leaf]]] = {
    "big": _BIG,
    "small": _arrays(2000, (512, 512)),
    "tiny": _TINY,
    "gpt2": _gpt2,
    "big-16": _sixteenth(_BIG),
    "gpt2-16": _sixteenth(_gpt2),
    "tiny-16": _sixteenth(_TINY),
    "frozen": _gpt2,
    "ranks": _BIG,
}


def leaves(name: str, divisor: int = 1) -> list[Leaf]:
    """The tensors of a workload: names and sizes, no data.

    Args:
        name: A key of `WORKLOADS`.
        divisor: How many times fewer (or, of an embedding, shorter) they are.
    """
    return WORKLOADS[name](divisor)


def size_bytes(name: str, divisor: int = 1) -> int:
    """Bytes of a workload."""
    return sum(leaf.size_bytes for leaf in leaves(name, divisor))


def make(name: str, divisor: int = 1, seed: int = 0) -> State:
    """The tensors of a workload, filled from one seed."""
    return fill(leaves(name, divisor), seed)


def fill(specs: Iterable[Leaf], seed: int = 0) -> State:
    """Random tensors; incompressible but for the exponent's upper bits, as weights are."""
    random = np.random.Generator(np.random.SFC64(seed))
    noise = random.integers(0, 2**64, _NOISE_WORDS, np.uint64, endpoint=False)
    state: State = {}
    for leaf in specs:
        kind, mask, base = _MASKS[leaf.dtype]
        # torch's memory, as parameters have it: numpy's starts 16 bytes after a page, and the
        # kernel copies to there at a quarter of the speed.
        words = torch.empty(-(-leaf.size_bytes // 8), dtype=torch.uint64).numpy()
        for start in range(0, len(words), _NOISE_WORDS // 2):
            # The same noise from another offset and with another key: as random, at memory speed.
            piece = words[start : start + _NOISE_WORDS // 2]
            offset = int(random.integers(_NOISE_WORDS // 2))
            key = random.integers(0, 2**64, dtype=np.uint64)
            np.bitwise_xor(noise[offset : offset + len(piece)], key, out=piece)
        raw = words.view(kind)[: math.prod(leaf.shape)]
        raw &= kind(mask)
        raw |= kind(base)
        signed = raw.view(np.dtype(f"i{raw.itemsize}"))
        state[leaf.name] = torch.from_numpy(signed).view(leaf.dtype).reshape(leaf.shape)
    return state


def digest(state: Mapping[str, Any]) -> str:
    """Of every name, dtype and byte."""
    hasher = xxhash.xxh3_128()
    for name in sorted(state):
        tensor = state[name].detach()
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hasher.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return hasher.hexdigest()


def poke(state: State) -> None:
    """Changes every tensor a little, at once: a save that did not capture its bytes is found.

    A second call restores the bytes.
    """
    for tensor in state.values():
        tensor.view(-1)[:1].view(torch.uint8).bitwise_not_()


def change(name: str, state: State) -> int:
    """A training step's worth of change before the next save: all bytes, or 1 % where `frozen`.

    Returns:
        The number of bytes that changed.
    """
    total = sum(tensor.nbytes for tensor in state.values())
    budget = total // 100 if name == "frozen" else total
    changed = 0
    for tensor in sorted(state.values(), key=lambda tensor: tensor.nbytes):
        if changed + tensor.nbytes > budget:
            break
        tensor += 0.25  # large enough to change every bfloat16
        changed += tensor.nbytes
    return changed
