"""FSDP2 from the meta device: model and optimizer are made without memory, restored in one call."""

import resuming
import sharded_net
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import functional_ckpt as fc

dist.init_process_group("gloo")
torch.manual_seed(dist.get_rank())
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
with torch.device("meta"):
    model = sharded_net.Net()
for module in (model.up, model.down, model):
    fully_shard(module, mesh=mesh)
if not any(path.name.isdigit() for path in (resuming.ROOT / "ckpt").glob("*")):  # a new run
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
items = {"model": model, "optimizer": fc.Optimizer(optimizer, model), "rng": fc.Rng()}
if resuming.loop(items, lambda number: sharded_net.step(model, optimizer)):
    resuming.finish([model.state_dict(), optimizer.state_dict()])
dist.destroy_process_group()
