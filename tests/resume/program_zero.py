"""DDP with ZeRO-1: each rank has the state of the parameters that it updates."""

import resuming
import sharded_net
import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer

import functional_ckpt as fc

dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.parallel.DistributedDataParallel(sharded_net.Net())
torch.manual_seed(dist.get_rank())
optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.02)
items = {"model": model, "optimizer": fc.Optimizer(optimizer, model), "rng": fc.Rng()}
if resuming.loop(items, lambda number: sharded_net.step(model, optimizer)):
    resuming.finish([model.state_dict(), optimizer.optim.state_dict()])
dist.destroy_process_group()
