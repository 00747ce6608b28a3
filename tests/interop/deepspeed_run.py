"""Writes checkpoints of DeepSpeed on two gloo ranks.

    python -m torch.distributed.run --nproc-per-node 2 tests/interop/deepspeed_run.py FOLDER STAGE

It writes FOLDER/zero, the run's folder, and FOLDER/universal, which DeepSpeed's own tool makes of
it. It was run with DeepSpeed 0.19.8 for tests/interop/data.
"""

from __future__ import annotations

import os
import subprocess
import sys

import torch
import torch.distributed as dist

os.environ["DS_ACCELERATOR"] = "cpu"


class Net(torch.nn.Module):
    """Parameters of sizes that two ranks cut unevenly, frozen ones, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(7, 5)
        self.norm = torch.nn.LayerNorm(5)
        self.frozen = torch.nn.Linear(5, 5).requires_grad_(False)
        self.last = torch.nn.Linear(5, 3, bias=False)
        self.register_buffer("scale", torch.arange(3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.frozen(self.norm(self.first(x)))) * self.scale


def groups(net: torch.nn.Module) -> list[dict[str, object]]:
    """Returns the groups of the optimizer."""
    trained = [each for each in net.parameters() if each.requires_grad]
    return [
        {"params": [each for each in trained if each.dim() > 1], "weight_decay": 0.1},
        {"params": [each for each in trained if each.dim() == 1], "weight_decay": 0.0},
    ]


def main() -> None:
    """Trains three steps."""
    import deepspeed

    # It would be compiled.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # pyright: ignore[reportAttributeAccessIssue]
    folder, stage = sys.argv[1], int(sys.argv[2])
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.AdamW(groups(net), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": stage == 2},
    }
    engine, *_ = deepspeed.initialize(
        model=net, optimizer=optimizer, lr_scheduler=scheduler, config=config
    )
    for step in range(3):
        torch.manual_seed(10 * step + dist.get_rank())
        x = torch.randn(2, 7, dtype=torch.bfloat16 if stage == 2 else torch.float32)
        engine.backward(engine(x).float().square().mean())
        engine.step()
    zero = os.path.join(folder, "zero")
    engine.save_checkpoint(zero, client_state={"epoch": 4})
    if dist.get_rank() == 0:
        tool = ["deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        paths = ["--input_folder", f"{zero}/global_step3", "--output_folder", f"{folder}/universal"]
        jobs = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
        subprocess.run([sys.executable, "-m", *tool, *paths, *jobs], check=True)
    os._exit(0)  # the groups of stage 3 are not destroyed in order


if __name__ == "__main__":
    main()
