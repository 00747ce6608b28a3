"""Lightning, on one rank or more: shuffled, accumulated, a backbone that is unfrozen later."""

import warnings

import lightning.pytorch as pl
import resuming
import torch

import functional_ckpt as fc
from functional_ckpt.interop.lightning import ManagerIO, SaveCallback

EPOCHS = 4


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.backbone = torch.nn.Linear(4, 8)
        self.head = torch.nn.Sequential(torch.nn.Dropout(0.3), torch.nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        (x,) = batch
        return (self.head(self.backbone(x))[:, 0] - x.sum(1)).square().mean()

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.05)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.8)]


class Tick(pl.Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        resuming.tick(trainer.current_epoch + 1)


warnings.simplefilter("ignore")
pl.seed_everything(5, verbose=False)
x = torch.randn(32, 4, generator=torch.Generator().manual_seed(3))
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=4, shuffle=True)
policies = [fc.policies.every("1ep"), fc.policies.Preemption()]
io = ManagerIO(resuming.ROOT / "ckpt", save_policy=policies, keep_policy=2)
unfreeze = pl.callbacks.BackboneFinetuning(unfreeze_backbone_at_epoch=2, verbose=False)
trainer = pl.Trainer(
    default_root_dir=str(resuming.ROOT),
    max_epochs=EPOCHS,
    accelerator="cpu",
    strategy="ddp_find_unused_parameters_true" if resuming.NUM_RANKS > 1 else "auto",
    devices=resuming.NUM_RANKS,
    accumulate_grad_batches=2,
    plugins=[io],
    callbacks=[unfreeze, Tick(), SaveCallback(io)],
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    logger=False,
)
module = Module()
trainer.fit(module, loader, ckpt_path=io.latest())
if trainer.current_epoch == EPOCHS and not trainer.received_sigterm:
    resuming.finish([module.state_dict(), trainer.optimizers[0].state_dict()])
