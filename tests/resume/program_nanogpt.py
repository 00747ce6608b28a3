"""A training like nanoGPT's: accumulation, a prefetched batch, dropout, a schedule by hand."""

import math

import resuming
import torch
from torch import nn

import functional_ckpt as fc

VOCABULARY, WIDTH, LENGTH = 17, 16, 8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, dropout=0.1, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(0.1)
        )

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        y = self.norm(x)
        x = x + self.attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(x)


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, tokens):
        x = self.wte(tokens) + self.wpe.weight
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Prefetched:
    """The next batch is drawn while this one is trained."""

    def __init__(self):
        self.tokens = self.draw()

    def draw(self):
        return torch.randint(VOCABULARY, (4, LENGTH + 1))

    def take(self):
        tokens, self.tokens = self.tokens, self.draw()
        return tokens

    def state_dict(self):
        return {"tokens": self.tokens}

    def load_state_dict(self, state):
        self.tokens = state["tokens"]


torch.manual_seed(0)
model = GPT()
decayed = [p for p in model.parameters() if p.dim() >= 2]
others = [p for p in model.parameters() if p.dim() < 2]
optimizer = torch.optim.AdamW(
    [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
)
data = Prefetched()
scaler = torch.amp.GradScaler("cpu", init_scale=256.0)


def step(number):
    for group in optimizer.param_groups:
        group["lr"] = 1e-2 * (1 + math.cos(math.pi * number / resuming.NUM_STEPS))
    optimizer.zero_grad()
    for _ in range(2):
        tokens = data.take()
        logits = model(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        scaler.scale(loss / 2).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()


items = {"model": model, "optimizer": fc.Optimizer(optimizer, model), "data": data}
if resuming.loop({**items, "scaler": scaler, "rng": fc.Rng()}, step):
    resuming.finish([model.state_dict(), optimizer.state_dict(), scaler.state_dict()])
