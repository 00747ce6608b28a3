"""torchmetrics: the accumulated state of a metric, persistent or not.

A metric is an `nn.Module` whose `state_dict` is empty unless asked otherwise, so as a module it
would be saved without its counts, silently. As a separate item it is saved completely.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch

from functional_ckpt import errors
from functional_ckpt.core.tree.placeholders import AS_SAVED
from functional_ckpt.handlers import classes
from functional_ckpt.handlers.base import Handler, Item, item_class
from functional_ckpt.handlers.module import ModuleHandler

_METRIC = "torchmetrics.metric.Metric"
_COLLECTION = "torchmetrics.collections.MetricCollection"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TorchMetricHandler(Handler):
    """Saves the accumulated states, update counts and module tensors of a metric or collection."""

    per_rank: bool = False

    def lower(self, value: Any) -> dict[str, Any]:
        """`{"states": {metric: {state: value}}, "update_counts": {metric: n}, "module": {...}}`."""
        metrics = dict(_metrics(value))
        leaders = _leaders(value)
        owners = {name: metrics[leaders.get(name, name)] for name in metrics}
        return {
            "states": {name: dict(owner.metric_state) for name, owner in owners.items()},
            "update_counts": {name: owner._update_count for name, owner in owners.items()},
            "module": _without_states(value, ModuleHandler().lower(value)),
        }

    def target(self, value: Any, saved: Any, *, strict: bool = True) -> Any:
        """Whatever was saved: lists of states grow as a metric is used.

        Raises:
            MismatchError: Other metrics, or metrics with other states, than the checkpoint has.
        """
        own = {name: set(metric._defaults) for name, metric in _metrics(value)}
        theirs = {name: set(states) for name, states in saved["states"].items()}
        missing = sorted(_described(own) - _described(theirs))
        unexpected = sorted(_described(theirs) - _described(own))
        if missing or unexpected:
            raise errors.MismatchError(
                f"The metrics are not the checkpoint's: missing {missing}, "
                f"unexpected {unexpected}.",
                missing=missing,
                unexpected=unexpected,
            )
        module = ModuleHandler().target(value, saved["module"])
        return {**dict.fromkeys(saved, AS_SAVED), "module": _without_states(value, module)}

    def lift(self, value: Any, tree: Any) -> Any:
        """Returns the metric, with its states restored and nothing cached."""
        ModuleHandler().lift(value, tree["module"])
        taken: set[int] = set()
        for name, metric in _metrics(value):
            for state, content in tree["states"][name].items():
                setattr(metric, state, _own(content, metric.device, taken))
            metric._update_count = tree["update_counts"][name]
            metric._computed = None
            metric._forward_cache = None
        return value


@item_class
class TorchMetric(Item):
    """A torchmetrics `Metric` or `MetricCollection`, filled in place by restore.

    Args:
        value: The metric.
        per_rank: Whether each rank has counts of its own to save, as metrics have between two calls
            of `compute`.
        replicated: `checked` makes counts that differ between ranks an error; `unchecked` saves the
            first rank's.

    Raises:
        UsageError: Not a metric.
    """

    per_rank: bool = dataclasses.field(default=False, kw_only=True)

    @property
    def handler(self) -> TorchMetricHandler:
        """The handler that the options describe."""
        return TorchMetricHandler(per_rank=self.per_rank)

    def check(self) -> None:
        """Raises `UsageError` for other values than metrics."""
        Item.check(self)
        if not is_metric(self.value):
            kind = type(self.value).__name__
            raise errors.UsageError(f"Expected a torchmetrics metric, got {kind}.")


def is_metric(value: object) -> bool:
    """Returns whether a value is a torchmetrics `Metric` or `MetricCollection`."""
    return classes.is_a(value, (_METRIC, _COLLECTION))


def _metrics(value: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in value.named_modules():
        if classes.is_a(module, (_METRIC,)):
            yield name, module


def _leaders(value: torch.nn.Module) -> dict[str, str]:
    """Metric -> the first of its compute group, the only one that is always up to date.

    The others borrow its states; many versions of torchmetrics renew the loan only to compute.
    """
    leaders: dict[str, str] = {}
    for prefix, module in value.named_modules():
        if not classes.is_a(module, (_COLLECTION,)):
            continue
        start = f"{prefix}." if prefix else ""
        collection: Any = module
        if not collection._groups_checked:
            continue  # before the first update there are groups by hope only
        for group in cast("Mapping[int, list[str]]", collection.compute_groups).values():
            leaders |= {start + name: start + group[0] for name in group}
    return leaders


def _without_states(value: torch.nn.Module, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a state dict's parameters and buffers (of a network inside), no metric states."""
    states = {
        f"{name}.{state}" if name else state
        for name, metric in _metrics(value)
        for state in metric._defaults
    }
    return {name: leaf for name, leaf in tensors.items() if name not in states}


def _described(metrics: Mapping[str, set[str]]) -> set[str]:
    return {f"{name or 'metric'}.{state}" for name, states in metrics.items() for state in states}


def _own(content: Any, device: torch.device, taken: set[int]) -> Any:
    """Returns a state on its metric's device that shares no memory with another metric's."""
    if isinstance(content, list):
        return [_own(part, device, taken) for part in cast("list[Any]", content)]
    if not isinstance(content, torch.Tensor):
        return content
    tensor = content.clone() if id(content) in taken else content
    taken.add(id(content))
    return tensor.to(device)
