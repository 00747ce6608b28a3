"""A loop with accelerate: prepared parts, accumulation."""

import accelerate
import resuming
import torch

import functional_ckpt as fc

torch.manual_seed(0)
accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
schedule = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)
model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)


def step(number):
    for _ in range(2):
        with accelerator.accumulate(model):
            accelerator.backward(model(resuming.batch(4, 4)).square().mean())
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


items = {"model": model, "optimizer": fc.Optimizer(optimizer, model), "schedule": schedule}
if resuming.loop({**items, "rng": fc.Rng()}, step):
    resuming.finish([part.state_dict() for part in (model, optimizer, schedule)])
