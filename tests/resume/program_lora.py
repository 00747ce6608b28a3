"""LoRA with PEFT: only the adapters are saved; the base is initialised again."""

import peft
import resuming
import torch

import functional_ckpt as fc

torch.manual_seed(0)
base = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
config = peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"], lora_dropout=0.1)
model = peft.get_peft_model(base, config)
trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
optimizer = torch.optim.AdamW([p for _, p in trained], lr=0.05)


def step(number):
    optimizer.zero_grad()
    model(resuming.batch(4, 4)).square().mean().backward()
    optimizer.step()


items = {
    "model": fc.Module(model, only=["*lora_*", "*modules_to_save*"]),
    "optimizer": fc.Optimizer(optimizer, trained),
    "rng": fc.Rng(),
}
if resuming.loop(items, step):
    resuming.finish([model.state_dict(), optimizer.state_dict()])
