from __future__ import annotations

import copy
import warnings

import pytest
import torch

from functional_ckpt import errors
from functional_ckpt.handlers import TorchMetric, default_registry

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torchmetrics
    from torchmetrics import classification, wrappers


def batch(step: int):
    generator = torch.Generator().manual_seed(step)
    scores = torch.rand(16, 3, generator=generator).softmax(-1)
    return scores, torch.randint(3, (16,), generator=generator)


def _collection(**options):
    options = {"num_classes": 3, **options}
    return torchmetrics.MetricCollection(
        {
            "precision": classification.MulticlassPrecision(**options),
            "recall": classification.MulticlassRecall(**options),
            "auroc": classification.MulticlassAUROC(**options),
        },
        prefix="val_",
    )


METRICS = {
    "sums": lambda: classification.MulticlassAccuracy(3),
    "lists": lambda: classification.MulticlassAUROC(3),
    "collection": _collection,
    "wrapper": lambda: wrappers.ClasswiseWrapper(
        classification.MulticlassAccuracy(3, average=None)
    ),
}


def comparable(result):
    if isinstance(result, dict):
        return {key: value.tolist() for key, value in result.items()}
    return result.tolist()


@pytest.mark.parametrize("used_target", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("num_updates", [1, 3])
@pytest.mark.parametrize("name", METRICS)
def test_accumulated_states_come_back(save, name, num_updates, used_target):
    metric = METRICS[name]()
    assert not metric.state_dict()  # the value that a module handler would save
    for step in range(num_updates):
        metric.update(*batch(step))
    stored = save(metric)
    fresh = METRICS[name]()
    if used_target:
        for step in range(20, 23):
            fresh.update(*batch(step))
        fresh.compute()
    assert stored.restore(fresh) is fresh
    assert comparable(fresh.compute()) == comparable(copy.deepcopy(metric).compute())
    for step in range(num_updates, num_updates + 2):
        metric.update(*batch(step))
        fresh.update(*batch(step))
    assert comparable(fresh.compute()) == comparable(metric.compute())


def test_lowering_leaves_compute_groups_alone(save):
    collection, twin = _collection(), _collection()
    for step in range(3):
        collection.update(*batch(step))
        twin.update(*batch(step))
        save(collection)
    assert comparable(collection.compute()) == comparable(twin.compute())


class Total(torchmetrics.Metric):
    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, value: torch.Tensor) -> None:
        self.total += value

    def compute(self) -> torch.Tensor:
        return self.total


class Doubled(Total):
    def compute(self) -> torch.Tensor:
        return 2 * self.total


def test_metrics_of_a_compute_group_are_saved_up_to_date(save):
    collection = torchmetrics.MetricCollection([Total(), Doubled()])
    collection.update(torch.tensor(1.0))
    assert collection.compute_groups == {0: ["Total", "Doubled"]}
    # As some versions of torchmetrics leave a group: the first is ahead, the others follow later.
    collection._modules["Doubled"].total = torch.tensor(1.0)
    collection._modules["Total"].update(torch.tensor(6.0))
    restored = save(collection).restore(None)
    assert {name: s["total"].item() for name, s in restored["states"].items()} == {
        "Total": 7.0,
        "Doubled": 7.0,
    }
    assert restored["update_counts"] == {"Total": 2, "Doubled": 2}


def test_metrics_of_a_compute_group_share_no_memory_after_a_restore(save):
    collection, fresh = (torchmetrics.MetricCollection([Total(), Doubled()]) for _ in range(2))
    for value in (1.0, 2.0):
        collection.update(torch.tensor(value))
    stored = save(collection)
    assert len(stored.arrays) == 1
    stored.restore(fresh)
    fresh.update(torch.tensor(4.0))
    assert {name: value.item() for name, value in fresh.compute().items()} == {
        "Total": 7.0,
        "Doubled": 14.0,
    }


def test_mean_and_running_metrics(save):
    metric = torchmetrics.MeanMetric()
    metric.update(torch.tensor([1.0, 2.0]), weight=torch.tensor([1.0, 3.0]))
    fresh = save(metric).restore(torchmetrics.MeanMetric())
    assert fresh.compute() == metric.compute() == 1.75
    assert fresh.update_count == 1


def test_a_metric_with_a_network_inside(save):
    class Scored(torchmetrics.MeanMetric):
        def __init__(self) -> None:
            super().__init__()
            self.network = torch.nn.Linear(2, 1)
            self.persistent(True)

    metric = Scored()
    metric.update(torch.tensor(3.0))
    fresh = save(metric).restore(Scored())
    assert torch.equal(fresh.network.weight, metric.network.weight)
    assert fresh.compute() == 3.0


def test_other_metrics_are_a_mismatch(save):
    with pytest.raises(errors.MismatchError) as caught:
        save(torchmetrics.MeanMetric()).restore(torchmetrics.SumMetric())
    assert caught.value.missing == ("metric.sum_value",)
    assert caught.value.unexpected == ("metric.mean_value", "metric.weight")


def test_a_model_that_holds_metrics_is_a_model(save):
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.metric = torch.nn.Linear(1, 1), torchmetrics.MeanMetric()

    assert list(save(Model()).arrays) == ["layer.weight", "layer.bias"]
    with pytest.raises(errors.UsageError, match="Expected a torchmetrics metric, got Linear"):
        TorchMetric(torch.nn.Linear(1, 1))
    assert isinstance(default_registry().bind(torchmetrics.MeanMetric()), TorchMetric)
