"""transformers.Trainer, on one rank or more: dropout, accumulation, an evaluation at epoch ends."""

import resuming
import torch
import transformers

import functional_ckpt as fc
from functional_ckpt.interop.trainer import ManagerCallback, train


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1)
        )

    def forward(self, x, labels):
        y = self.layers(x)[:, 0]
        return {"loss": (y - labels).square().mean(), "logits": y}


class Tick(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        resuming.tick(state.global_step)


transformers.set_seed(5)
x = torch.randn(40, 4, generator=torch.Generator().manual_seed(3))
rows = [{"x": each, "labels": each.sum()} for each in x]
arguments = transformers.TrainingArguments(
    output_dir=str(resuming.ROOT / "out"),
    max_steps=resuming.NUM_STEPS,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    learning_rate=0.05,
    logging_steps=1,
    eval_strategy="epoch",
    report_to=[],
    disable_tqdm=True,
    use_cpu=True,
    ddp_backend="gloo" if resuming.NUM_RANKS > 1 else None,
    seed=5,
    dataloader_pin_memory=False,
    **{"save_strategy": "no", **resuming.ARGUMENTS},
)
with fc.CheckpointManager(resuming.ROOT / "ckpt", **resuming.OPTIONS) as manager:
    trainer = transformers.Trainer(
        model=Model(),
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows[:4],
        callbacks=[ManagerCallback(manager), Tick()],
    )
    train(trainer, manager)
if trainer.state.global_step == resuming.NUM_STEPS:
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    state = [trainer.model.state_dict(), trainer.optimizer.state_dict(), losses]
    resuming.finish(state)
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
