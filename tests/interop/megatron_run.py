"""Writes a checkpoint of Megatron-Core: a model with tensor parallelism on two gloo ranks.

    python -m torch.distributed.run --nproc-per-node 2 tests/interop/megatron_run.py FOLDER

It writes FOLDER/run, as Megatron-LM lays it out, and FOLDER/expected.pt. It was run with
megatron-core 0.16.1 for tests/interop/data. The CPU stands in for CUDA where Megatron asks for it.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist

warnings.simplefilter("ignore")


def main() -> None:
    """Saves iteration 7 on two ranks."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
    from megatron.core.dist_checkpointing.optimizer import (
        get_param_id_to_sharded_param_map,
        optim_state_to_sharding_state,
    )
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnBackend

    cuda: Any = torch.cuda
    cuda.synchronize = lambda *_: None
    cuda.set_device = lambda *_: None
    cuda.current_device = lambda: "cpu"
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=8,
        num_attention_heads=2,
        ffn_hidden_size=16,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        tensor_model_parallel_size=2,
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(),
        vocab_size=16,
        max_sequence_length=4,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for parameter in model.parameters():
        is_cut = getattr(parameter, "tensor_model_parallel", False)
        torch.manual_seed(parameter.numel() + rank * is_cut)  # copies on both ranks stay equal
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    shards = model.sharded_state_dict()
    saved = optimizer.state_dict()
    step = saved["state"][0]["step"]
    names = get_param_id_to_sharded_param_map(shards, model.parameters())
    optim_state_to_sharding_state(saved, names, exclude_keys=("step",))
    pieces = [
        *shards.values(),
        *(each for state in saved["state"].values() for each in state.values()),
    ]
    gathered: list[Any] = [None, None]
    dist.all_gather_object(
        gathered,
        [
            (each.key, each.global_shape, each.global_offset, each.data)
            for each in pieces
            if isinstance(each, ShardedTensor)
        ],
    )
    saved["state"]["common_step"] = step
    run = os.path.join(sys.argv[1], "run")
    folder = os.path.join(run, "iter_0000007")
    os.makedirs(folder, exist_ok=True)
    dist.barrier()
    dist_checkpointing.save(
        {
            "model": shards,
            "optimizer": {"optimizer": saved},
            "rng_state": ShardedObject("rng_state", {"rank": rank}, (2,), (rank,)),
            "args": argparse.Namespace(lr=0.01, attention_backend=AttnBackend.auto),
            "iteration": 7,
            "checkpoint_version": 3.0,
        },
        folder,
    )
    expected: dict[str, torch.Tensor] = {}
    for key, shape, offset, data in [each for some in gathered for each in some]:
        full = expected.setdefault(key, torch.full(shape, torch.nan))
        data = data.detach().reshape((1,) * (len(shape) - data.dim()) + data.shape)
        full[tuple(slice(at, at + n) for at, n in zip(offset, data.shape, strict=True))] = data
    if rank == 0:
        with open(os.path.join(run, "latest_checkpointed_iteration.txt"), "w") as file:
            file.write("7")
        torch.save(expected, os.path.join(sys.argv[1], "expected.pt"))
    dist.barrier()


if __name__ == "__main__":
    main()
