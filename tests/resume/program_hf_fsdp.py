"""transformers.Trainer with FSDP2, beside the Trainer's own checkpoints.

accelerate takes ranks without an accelerator for DDP, and leaves FSDP out without a word. Here it
takes them for GPUs; all else is its own.
"""

import accelerate.state
import resuming
import transformers

make_accelerator = transformers.Trainer.create_accelerator_and_postprocess


def make_accelerator_for_fsdp(trainer):
    assert trainer.args.device.type == "cpu"  # makes the state
    gpus = accelerate.state.DistributedType.MULTI_GPU
    accelerate.state.PartialState._shared_state["distributed_type"] = gpus
    make_accelerator(trainer)
    assert trainer.is_fsdp_enabled


transformers.Trainer.create_accelerator_and_postprocess = make_accelerator_for_fsdp
resuming.ARGUMENTS |= {
    "fsdp": True,
    "fsdp_config": {"transformer_layer_cls_to_wrap": ["Sequential"]},
    "save_strategy": "steps",
    "save_steps": 4,
    "save_total_limit": 1,
}

import program_hf_trainer  # noqa: E402, F401 - runs it
