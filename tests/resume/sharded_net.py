"""A network and a step that programs of several ranks share."""

import resuming
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(7, 10), nn.Linear(10, 6), nn.LayerNorm(6)

    def forward(self, x):
        return self.norm(self.down(torch.relu(self.up(x))))


def step(model, optimizer):
    optimizer.zero_grad()
    model(resuming.batch(4, 7)).pow(3).mean().backward()
    optimizer.step()
