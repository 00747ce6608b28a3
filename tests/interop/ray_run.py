"""A training by Ray Train on two gloo workers, and a driver that kills workers.

    python tests/interop/ray_run.py JOB FOLDER [ARGUMENT]

It prints its findings as JSON. Ray's workers get these functions by value.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import random
import signal
import sys
import threading
import time
from typing import Any

import ray
import ray.train
import torch
from ray.train import FailureConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_model

import functional_ckpt as fc
from functional_ckpt.interop.ray import CheckpointManager, RunConfig

PREEMPTED = 2  # of Ray's DrainNodeReason


def train(config: dict[str, Any]) -> dict[str, Any] | None:
    """Saves every step, and writes a line when it resumes and when a step is durable."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rank = ray.train.get_context().get_world_rank()
    model = prepare_model(torch.nn.Linear(8, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    items = {"model": model, "optimizer": fc.Optimizer(optimizer, model), "rng": fc.Rng()}

    def note(**line: Any) -> None:
        with open(config["log"], "a") as file:
            file.write(json.dumps({"rank": rank, "pid": os.getpid(), **line}) + "\n")

    loss = None
    with CheckpointManager(**config.get("manager", {})) as manager:
        restored = manager.restore_or(items)
        note(resumed=restored.step, latest=manager.latest_step())
        commits: list[Any] = []
        for step in range(restored.next_step, config["steps"]):
            data = torch.randn(4, 8)
            loss = model(data).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            enough = torch.tensor([float(os.path.exists(config["log"] + ".enough"))])
            torch.distributed.all_reduce(enough)
            commits.append(manager.save(step, items, metrics={"loss": loss.item()}))
            manager.report({"loss": loss.item(), "step": step})
            for commit in [each for each in commits if each is not None and each.done()]:
                if rank == 0:
                    note(durable=commit.result())
            commits = [each for each in commits if each is not None and not each.done()]
            if (enough > 0).any():
                break
            time.sleep(config.get("pause", 0))
        manager.wait_until_finished()
        if rank:
            return None
        digest = hashlib.sha256()
        for each in [*model.parameters(), *model.parameters()]:
            digest.update(each.detach().numpy().tobytes())
        return {
            "digest": digest.hexdigest(),
            "steps": manager.all_steps(),
            "directory": manager.directory,
        }


def fit(folder: pathlib.Path, name: str, **config: Any) -> Any:
    """Runs a training under a name, again from where it stopped."""
    return TorchTrainer(
        train,
        train_loop_config={"log": str(folder / f"{name}.log"), "steps": 6, **config},
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(
            name=name, storage_path=str(folder), failure_config=FailureConfig(max_failures=-1)
        ),
    ).fit()


def lines(log: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the lines of a log; the last may be of a worker that was killed."""
    if not log.exists():
        return []
    return [json.loads(line) for line in log.read_text().split("\n")[:-1]]


def kill_at_random(log: pathlib.Path, num_kills: int, seed: int) -> None:
    """Kills one of the two workers, at random, after each start; then ends the training."""
    chance = random.Random(seed)
    killed: set[int] = set()
    while len(killed) < num_kills:
        starts = [line for line in lines(log) if "resumed" in line]
        if len(starts) < 2 * len(killed) + 2:
            time.sleep(0.02)
            continue
        time.sleep(chance.uniform(0, 2))
        pid = chance.choice(starts[-2:])["pid"]
        os.kill(pid, signal.SIGKILL)
        killed.add(pid)
    while len([line for line in lines(log) if "resumed" in line]) < 2 * num_kills + 2:
        time.sleep(0.02)
    time.sleep(1)
    pathlib.Path(f"{log}.enough").touch()


def kills(folder: pathlib.Path, argument: str) -> dict[str, Any]:
    """Compares a training whose workers are killed with one that runs through."""
    num_kills, seed = map(int, argument.split(","))
    log = folder / "killed.log"
    killer = threading.Thread(target=kill_at_random, args=(log, num_kills, seed), daemon=True)
    killer.start()
    options = {"keep_policy": fc.policies.LatestN(3)}
    killed = fit(folder, "killed", steps=10**6, pause=0.02, manager=options).return_value
    killer.join()
    durable, lost, resumed = -1, 0, []
    for line in lines(log):
        durable = max(durable, line.get("durable", -1))
        if "resumed" in line:
            found = -1 if line["resumed"] is None else line["resumed"]
            lost += max(0, durable - found)
            resumed.append(found)
    whole = fit(folder, "whole", steps=killed["steps"][-1] + 1, manager=options).return_value
    return {
        "num_kills": num_kills,
        "num_lost": lost,
        "resumed": resumed,
        "is_equal": killed["digest"] == whole["digest"],
    }


def again(folder: pathlib.Path, _: str) -> dict[str, Any]:
    """Runs six steps, then three more under the same name."""
    options = {"keep_policy": fc.policies.LatestN(2)}
    first = fit(folder, "a", manager=options)
    second = fit(folder, "a", steps=9, manager=options)
    resumed = [line["resumed"] for line in lines(folder / "a.log") if "resumed" in line]
    return {
        "first": [first.return_value["steps"], first.checkpoint.path, first.metrics],
        "second": [second.return_value["steps"], second.checkpoint.path, second.metrics],
        "reported": [
            [os.path.basename(checkpoint.path), metrics["step"]]
            for checkpoint, metrics in second.best_checkpoints
        ],
        "resumed": resumed,
        "restored": sorted(fc.restore(second.checkpoint.path)),
    }


def train_until_drained() -> dict[str, Any]:
    """Saves when a node is drained, and ends some steps later."""
    policy = [fc.policies.every(10**6), fc.policies.Preemption()]
    last = step = 0
    with CheckpointManager(save_policy=policy) as manager:
        while not last or step < last + 5:
            step += 1
            commit = manager.save(step, {"state": {"step": step}})
            manager.report({"step": step})
            if commit is not None:
                last = last or step
            time.sleep(0.05)
        try:
            left = str(manager.reached_preemption(step))
        except fc.errors.UsageError as error:
            left = type(error).__name__
        manager.wait_until_finished()
        return {"steps": manager.all_steps(), "left": left}


def drained(folder: pathlib.Path, _: str) -> dict[str, Any]:
    """Drains the node while a training runs."""

    def drain() -> None:
        # A watcher that has not started yet would not be placed on a drained node.
        while not any(
            each["ActorClassName"] == "PreemptionWatcher" and each["State"] == "ALIVE"
            for each in ray._private.state.actors().values()
        ):
            time.sleep(0.5)
        deadline = int(time.time() * 1000) + 600_000
        context: Any = ray.get_runtime_context()
        client: Any = ray._raylet.GcsClient(address=context.gcs_address)
        is_accepted, reason = client.drain_node(context.get_node_id(), PREEMPTED, "", deadline)
        assert is_accepted, reason

    threading.Thread(target=drain, daemon=True).start()
    return (
        TorchTrainer(
            train_until_drained,
            scaling_config=ScalingConfig(num_workers=2),
            run_config=RunConfig(name="a", storage_path=str(folder)),
        )
        .fit()
        .return_value
    )


def refused(folder: pathlib.Path, _: str) -> dict[str, Any]:
    """Returns the error of a run with Ray's own configuration."""
    trainer = TorchTrainer(
        train,
        train_loop_config={"log": str(folder / "a.log"), "steps": 1},
        scaling_config=ScalingConfig(num_workers=1),
        run_config=ray.train.RunConfig(name="a", storage_path=str(folder)),
    )
    try:
        trainer.fit()
    except ray.train.WorkerGroupError as error:
        return {"config": str(error.worker_failures[0])}
    return {}


def main() -> None:
    """Runs a job in a cluster of its own."""
    job, folder = sys.argv[1], pathlib.Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 << 20,
        logging_level="error",
        log_to_driver="--log" in sys.argv,
    )
    try:
        jobs = {each.__name__: each for each in (kills, again, drained, refused)}
        print(json.dumps(jobs[job](folder, sys.argv[3] if len(sys.argv) > 3 else "")))
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
