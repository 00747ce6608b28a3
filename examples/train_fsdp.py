#!/usr/bin/env python3
"""Trains a small transformer on text, byte by byte, with FSDP2 x tensor parallelism, on CPUs.

    torchrun --standalone --nproc-per-node=4 examples/train_fsdp.py --tp_size=2

Stop it however you like and run it again with any other number of processes and any --tp_size: it
resumes after the last committed step. Every process stores its own shards, and reads the data of
its new shards; nothing is gathered. A step's batch depends on the step alone and is split over the
data-parallel ranks, so the loss curve is that of a run that was never stopped, up to the order in
which floats are added.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 (the customary name)
from absl import app, flags
from curve import Curve
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import functional_ckpt as fc

FLAGS = flags.FLAGS
ROOT = Path(__file__).resolve().parents[1]

flags.DEFINE_string("workdir", "runs/fsdp", "Where checkpoints/ and curve.jsonl are.")
flags.DEFINE_multi_string(
    "text", [str(ROOT / "README.md"), str(ROOT / "docs")], "Files, or folders of .md files."
)
flags.DEFINE_integer("tp_size", 1, "Ranks that share each layer; the others share data.", 1)
flags.DEFINE_integer("num_steps", 200, "Batches to train on.", lower_bound=1)
flags.DEFINE_integer("batch_size", 12, "Windows of text in a batch, all ranks together.", 1)
flags.DEFINE_integer("context", 48, "Bytes in a window.", lower_bound=2)
flags.DEFINE_integer("width", 48, "Of the residual stream.", lower_bound=4)
flags.DEFINE_integer("hidden", 150, "Of the feed-forward layers.", lower_bound=1)
flags.DEFINE_integer("num_heads", 4, "Attention heads in a block.", lower_bound=1)
flags.DEFINE_integer("num_blocks", 2, "Blocks of the transformer.", lower_bound=1)
flags.DEFINE_float("learning_rate", 3e-3, "The peak of the schedule.", lower_bound=0.0)
flags.DEFINE_integer("seed", 0, "Of the weights and of the batches.")
flags.DEFINE_string(
    "restored_dir", None, "Also save the restored state there, gathered by rank 0, to compare."
)

CKPT = fc.flags.define(required=False, save_every="20ba", keep_latest=3, keep_best="loss:min")

# Settings that a run cannot change when it resumes; the number of ranks may change.
FIXED = (
    *("num_steps", "batch_size", "context", "width", "hidden", "num_heads", "num_blocks"),
    *("learning_rate", "seed"),
)
# 256 bytes and a start token. An odd number: the vocabulary's shards are never all of one size.
BEGINNING = 256
VOCABULARY = 257


class Attention(nn.Module):
    """Causal self-attention; every tensor-parallel rank computes some of the heads."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.head_size = width // num_heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = [
            layer(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        ]
        attended = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        return self.out(attended.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a feed-forward layer, each on the normalised residual stream."""

    def __init__(self, width: int, hidden: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class LanguageModel(nn.Module):
    """A transformer that predicts every byte of a window from those before it.

    Returns the sum of the losses, so that ranks with separate windows can add them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, FLAGS.width)
        self.position = nn.Embedding(FLAGS.context, FLAGS.width)
        self.blocks = nn.ModuleList(
            Block(FLAGS.width, FLAGS.hidden, FLAGS.num_heads) for _ in range(FLAGS.num_blocks)
        )
        self.norm = nn.LayerNorm(FLAGS.width)
        self.head = nn.Linear(FLAGS.width, VOCABULARY, bias=False)

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        before = F.pad(windows[:, :-1], (1, 0), value=BEGINNING)
        x = self.embedding(before) + self.position(torch.arange(windows.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), windows.flatten(), reduction="sum")


def parallelize(model: LanguageModel, mesh: DeviceMesh) -> None:
    """Cuts the layers along `tp`, then everything along `dp`.

    Tensor parallelism does not shard norms and positions: each `tp` rank has all of them.
    """
    layers: dict[str, Any] = {
        "embedding": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    for name in ("attention.query", "attention.key", "attention.value", "up"):
        layers[f"blocks.*.{name}"] = ColwiseParallel()
    for name in ("attention.out", "down"):
        layers[f"blocks.*.{name}"] = RowwiseParallel()
    parallelize_module(model, mesh["tp"], layers)
    for block in model.blocks:
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])


class Text:
    """Windows of text: those of a step are the same for any number of ranks.

    Args:
        paths: Files, or folders of .md files.
    """

    def __init__(self, paths: list[str]) -> None:
        files: list[Path] = []
        for path in map(Path, paths):
            files += sorted(path.rglob("*.md")) if path.is_dir() else [path]
        data = b"\n".join(file.read_bytes() for file in files)
        self.digest = hashlib.sha256(data).hexdigest()
        tokens = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
        num_test = max(len(tokens) // 10, FLAGS.context + 1)
        self._train, self._test = tokens[:-num_test], tokens[-num_test:]
        if len(self._train) <= FLAGS.context:
            raise app.UsageError(f"{len(data)} bytes of text are too few for --context.")

    def batch(self, step: int) -> torch.Tensor:
        """The windows to train on at a step, from anywhere in the text."""
        generator = torch.Generator().manual_seed(FLAGS.seed * 1_000_003 + step)
        last = len(self._train) - FLAGS.context
        return self._windows(
            self._train, torch.randint(last, (FLAGS.batch_size,), generator=generator)
        )

    def test(self) -> torch.Tensor:
        """Windows of the last tenth of the text, which is not trained on."""
        last = len(self._test) - FLAGS.context
        return self._windows(self._test, torch.linspace(0, last - 1, FLAGS.batch_size).long())

    @staticmethod
    def _windows(text: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        return text[starts[:, None] + torch.arange(FLAGS.context)]


class Trainee:
    """The model with the ranks it is spread over, and its loss."""

    def __init__(self, model: LanguageModel, mesh: DeviceMesh) -> None:
        self.model = model
        self._data_parallel = mesh["dp"]

    def loss(self, windows: torch.Tensor) -> torch.Tensor:
        """This rank's share of the batch's mean loss, times the ranks: FSDP averages over them."""
        size, rank = self._data_parallel.size(), self._data_parallel.get_local_rank()
        own = windows.tensor_split(size)[rank]  # not always as many on every rank
        return self.model(own) * (size / windows.numel())

    def mean(self, loss: torch.Tensor) -> float:
        """The loss of the global batch."""
        total = loss.detach().double()
        dist.all_reduce(total, group=self._data_parallel.get_group())
        return total.item() / self._data_parallel.size()

    @torch.no_grad()
    def evaluate(self, windows: torch.Tensor) -> float:
        """The mean loss of windows that are not trained on."""
        return self.mean(self.loss(windows))


def gathered(tree: Any) -> Any:
    """The tree with full tensors instead of DTensors; a collective."""
    if isinstance(tree, dict):
        return {key: gathered(child) for key, child in tree.items()}
    if isinstance(tree, list):
        return [gathered(child) for child in tree]
    return tree.full_tensor() if isinstance(tree, DTensor) else tree


def save_gathered(path: Path, model: nn.Module, optimizer: fc.Optimizer) -> None:
    """Writes the live state as one plain checkpoint, by rank 0 alone."""
    state = {
        "model": gathered(dict(model.state_dict())),
        "optimizer": gathered(optimizer.handler.lower(optimizer.value)),
    }
    if dist.get_rank() == 0:
        fc.save(path, state, overwrite=True)


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def train(workdir: Path, mesh: DeviceMesh) -> None:
    text = Text(FLAGS.text)
    torch.manual_seed(FLAGS.seed)  # every rank makes the same weights, then keeps its shards
    model = LanguageModel()
    parallelize(model, mesh)
    trainee = Trainee(model, mesh)
    # Some parameters live on the mesh `dp x tp`, some on `dp`: foreach would mix them in one call.
    optimizer = torch.optim.AdamW(model.parameters(), lr=FLAGS.learning_rate, foreach=False)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=FLAGS.learning_rate, total_steps=FLAGS.num_steps
    )
    config = {name: FLAGS[name].value for name in FIXED} | {"text": text.digest}
    items = {  # built once: each save captures the current values
        "model": model,
        "optimizer": fc.Optimizer(optimizer, model),
        "scheduler": scheduler,
        "config": fc.Json(config),
    }

    with fc.flags.manager(
        CKPT, directory=workdir / "checkpoints", save_policy=fc.policies.Preemption()
    ) as manager:
        if (latest := manager.latest_step()) is not None:
            saved = manager.restore(latest, only="config")["config"]
            if saved != config:
                raise app.UsageError(f"{workdir} holds a run with {saved}, not with {config}.")
        restored = fc.flags.restore(CKPT, manager, items)  # each rank reads the data of its shards
        start = restored.next_step
        if restored.step is not None:
            shape = f"{mesh['dp'].size()} x {mesh['tp'].size()} ranks"
            say(f"resumed after step {restored.step} on {shape}")
            if FLAGS.restored_dir:
                save_gathered(Path(FLAGS.restored_dir), model, items["optimizer"])
        curve = Curve(workdir / "curve.jsonl", start) if dist.get_rank() == 0 else None

        for step in range(start, FLAGS.num_steps):
            loss = trainee.loss(text.batch(step))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            mean = trainee.mean(loss)
            if curve is not None:
                curve.add(step=step, loss=mean, learning_rate=scheduler.get_last_lr()[0])

            metrics, is_last = None, step == FLAGS.num_steps - 1
            if is_last or manager.should_save(step):
                metrics = {"loss": trainee.evaluate(text.test())}
                say(f"step {step}: loss {mean:.4f}, {metrics}")
            manager.save(step, items, metrics=metrics, force=is_last)
            if manager.reached_preemption(step):
                say(f"received SIGTERM, saved step {step}")
                break


def main(args: list[str]) -> None:
    if args[1:]:
        raise app.UsageError(f"Unknown arguments: {' '.join(args[1:])}")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    num_ranks, tp_size = dist.get_world_size(), FLAGS.tp_size
    if num_ranks % tp_size or FLAGS.num_heads % tp_size or FLAGS.hidden % tp_size:
        raise app.UsageError(
            f"--tp_size={tp_size} must divide the number of ranks ({num_ranks}), --num_heads and "
            "--hidden."
        )
    if num_ranks // tp_size > FLAGS.batch_size:
        raise app.UsageError("--batch_size must give every data-parallel rank a window.")
    mesh = init_device_mesh("cpu", (num_ranks // tp_size, tp_size), mesh_dim_names=("dp", "tp"))
    workdir = Path(FLAGS.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    train(workdir, mesh)
    dist.destroy_process_group()


if __name__ == "__main__":
    app.run(main)
