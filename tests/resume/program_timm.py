"""timm: a small vision model, its optimizer with layer decay, its EMA and its schedule."""

import resuming
import timm
import timm.optim
import timm.scheduler
import timm.utils
import torch

import functional_ckpt as fc

torch.manual_seed(0)
model = timm.create_model("test_resnet", num_classes=5, drop_rate=0.1)
ema = timm.utils.ModelEmaV3(model, decay=0.9)
optimizer = timm.optim.create_optimizer_v2(model, opt="lamb", lr=1e-2, layer_decay=0.8)
schedule = timm.scheduler.CosineLRScheduler(optimizer, t_initial=resuming.NUM_STEPS)


def step(number):
    images, labels = torch.randn(4, 3, 32, 32), torch.randint(5, (4,))
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()
    ema.update(model, step=number)
    schedule.step(number + 1)


items = {"model": model, "ema": ema, "optimizer": fc.Optimizer(optimizer, model)}
if resuming.loop({**items, "schedule": schedule, "rng": fc.Rng()}, step):
    resuming.finish([part.state_dict() for part in (model, ema, optimizer)])
