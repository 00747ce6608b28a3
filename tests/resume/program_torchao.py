"""torchao's 8-bit AdamW, whose state is quantized."""

import resuming
import torch
import torchao.optim

import functional_ckpt as fc

torch.compiler.set_stance("force_eager")  # compiling takes longer than the rest
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64))
optimizer = torchao.optim.AdamW8bit(model.parameters(), lr=1e-2)


def step(number):
    optimizer.zero_grad()
    model(resuming.batch(8, 64)).square().mean().backward()
    optimizer.step()


items = {"model": model, "optimizer": fc.Optimizer(optimizer, model), "rng": fc.Rng()}
if resuming.loop(items, step):
    resuming.finish([model.state_dict(), optimizer.state_dict()])
