"""Q-learning: a replay buffer, a target network, an environment with a generator of its own."""

import random

import numpy as np
import resuming
import torch
from torch import nn

import functional_ckpt as fc


class Buffer:
    """The last transitions, in a ring."""

    def __init__(self, size=32):
        self.rows, self.position, self.count = np.zeros((size, 6), np.float32), 0, 0

    def add(self, row):
        self.rows[self.position] = row
        self.position = (self.position + 1) % len(self.rows)
        self.count = min(self.count + 1, len(self.rows))

    def sample(self, size):
        return torch.from_numpy(self.rows[np.random.randint(0, self.count, size)])

    def state_dict(self):
        return vars(self).copy()

    def load_state_dict(self, state):
        vars(self).update(state)


torch.manual_seed(0), random.seed(1), np.random.seed(2)
env_rng = np.random.default_rng(3)
online, target = nn.Linear(2, 2), nn.Linear(2, 2)
target.load_state_dict(online.state_dict())
optimizer = torch.optim.Adam(online.parameters(), lr=0.05)
buffer = Buffer()


class Env:
    """A point that is pushed about."""

    def __init__(self):
        self.place = np.zeros(2, np.float32)

    def push(self, action):
        self.place = 0.9 * self.place + env_rng.normal(size=2).astype(np.float32) + action
        return self.place.copy(), -float(np.abs(self.place).sum())

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


env = Env()


def step(number):
    for _ in range(4):
        before = env.place.copy()
        values = online(torch.from_numpy(before))
        action = random.randrange(2) if random.random() < 0.3 else int(values.argmax())
        after, reward = env.push(action - 0.5)
        buffer.add([*before, action, reward, *after])
    rows = buffer.sample(8)
    wanted = rows[:, 3] + 0.9 * target(rows[:, 4:]).max(1).values.detach()
    got = online(rows[:, :2]).gather(1, rows[:, 2:3].long())[:, 0]
    optimizer.zero_grad()
    (got - wanted).square().mean().backward()
    optimizer.step()
    if number % 4 == 3:
        target.load_state_dict(online.state_dict())


items = {
    "online": online,
    "target": target,
    "optimizer": fc.Optimizer(optimizer, online),
    "buffer": fc.Stateful(buffer),
    "env": fc.Stateful(env),
    "rng": fc.Rng({"env": env_rng}),
}
if resuming.loop(items, step):
    tables = [torch.from_numpy(buffer.rows), torch.from_numpy(env.place)]
    resuming.finish([online.state_dict(), target.state_dict(), optimizer.state_dict(), *tables])
