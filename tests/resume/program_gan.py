"""A GAN: two networks, two optimizers, batch statistics."""

import resuming
import torch
from torch import nn

import functional_ckpt as fc

torch.manual_seed(0)
generator = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
critic = nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(), nn.Dropout(0.2), nn.Linear(8, 1))
g_optimizer = torch.optim.Adam(generator.parameters(), lr=0.01, betas=(0.5, 0.9))
c_optimizer = torch.optim.RMSprop(critic.parameters(), lr=0.01)
g_schedule = torch.optim.lr_scheduler.ExponentialLR(g_optimizer, 0.9)


def step(number):
    fake = generator(resuming.batch(6, 3))
    c_optimizer.zero_grad()
    (critic(fake.detach()).mean() - critic(1 + resuming.batch(6, 4)).mean()).backward()
    c_optimizer.step()
    g_optimizer.zero_grad()
    (-critic(fake).mean()).backward()
    g_optimizer.step()
    g_schedule.step()


items = {
    "generator": generator,
    "critic": critic,
    "g_optimizer": fc.Optimizer(g_optimizer, generator),
    "c_optimizer": fc.Optimizer(c_optimizer, critic),
    "g_schedule": g_schedule,
    "rng": fc.Rng(),
}
if resuming.loop(items, step):
    parts = (generator, critic, g_optimizer, c_optimizer, g_schedule)
    resuming.finish([part.state_dict() for part in parts])
