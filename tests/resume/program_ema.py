"""An image model as timm trains one: EMA of weights and buffers, layer decay, a warm-up schedule.

For machines without timm, whose own classes are in program_timm.py.
"""

import copy
import math

import resuming
import torch
from torch import nn

import functional_ckpt as fc


class ModelEma(nn.Module):
    """A copy whose values follow those of a model, with a warm-up of the decay."""

    def __init__(self, model, decay):
        super().__init__()
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.num_updates = decay, 0

    @torch.no_grad()
    def update(self, model):
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        for mine, live in zip(
            self.module.state_dict().values(), model.state_dict().values(), strict=True
        ):
            if mine.is_floating_point():
                mine.lerp_(live, 1 - decay)
            else:
                mine.copy_(live)

    def get_extra_state(self):
        return {"num_updates": self.num_updates}

    def set_extra_state(self, state):
        self.num_updates = state["num_updates"]


class WarmUpCosine:
    """A schedule by hand, with the learning rates that the groups started with."""

    def __init__(self, optimizer, warm_up):
        self.optimizer, self.warm_up, self.step_num = optimizer, warm_up, 0
        self.base = [group["lr"] for group in optimizer.param_groups]

    def step(self):
        self.step_num += 1
        rest = max(0, self.step_num - self.warm_up) / resuming.NUM_STEPS
        scale = min(1, self.step_num / self.warm_up) * (1 + math.cos(math.pi * rest)) / 2
        for group, base in zip(self.optimizer.param_groups, self.base, strict=True):
            group["lr"] = base * scale * group["lr_scale"]

    def state_dict(self):
        return {key: value for key, value in vars(self).items() if key != "optimizer"}

    def load_state_dict(self, state):
        vars(self).update(state)


torch.manual_seed(0)
model = nn.Sequential(
    nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU()),
    nn.Sequential(nn.Conv2d(8, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU()),
    nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(8, 5)),
)
groups = [
    {"params": [p for p in layer.parameters() if (p.ndim > 1) == decays], "lr_scale": 0.8**depth}
    | ({} if decays else {"weight_decay": 0.0})
    for depth, layer in enumerate(reversed(model))
    for decays in (True, False)
]
optimizer = torch.optim.NAdam(groups, lr=1e-2, weight_decay=0.05, decoupled_weight_decay=True)
ema, schedule = ModelEma(model, 0.9), WarmUpCosine(optimizer, 3)


def step(number):
    images, labels = torch.randn(4, 3, 16, 16), torch.randint(5, (4,))
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(images), labels, label_smoothing=0.1).backward()
    optimizer.step()
    ema.update(model)
    schedule.step()


items = {"model": model, "ema": ema, "optimizer": optimizer, "schedule": schedule, "rng": fc.Rng()}
if resuming.loop(items, step):
    resuming.finish([part.state_dict() for part in (model, ema, optimizer, schedule)])
