"""Tensor parallelism over two ranks."""

import resuming
import sharded_net
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import functional_ckpt as fc

dist.init_process_group("gloo")
torch.manual_seed(0)  # every rank sees the same batch
model = sharded_net.Net()
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
items = {"model": model, "optimizer": fc.Optimizer(optimizer, model), "rng": fc.Rng()}
if resuming.loop(items, lambda number: sharded_net.step(model, optimizer)):
    resuming.finish([model.state_dict(), optimizer.state_dict()])
dist.destroy_process_group()
