"""State of running metrics: what ``self.log`` has accumulated, and torchmetrics in modules.

A Lightning checkpoint has none of it, so an epoch's averages would start over after a resume.
"""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.connectors.logger_connector.result import (
    _Metadata,
    _ResultCollection,
    _ResultMetric,
    _Sync,
)
from torchmetrics import Metric, MetricCollection

from mnemo.session.modules import Modules

_META = (
    "fx",
    "name",
    "prog_bar",
    "logger",
    "on_step",
    "on_epoch",
    "enable_graph",
    "add_dataloader_idx",
    "dataloader_idx",
    "metric_attribute",
)
_GROUPS = ("_groups", "_groups_checked", "_state_is_copy")


def capture_metrics(trainer: pl.Trainer, modules: Modules) -> dict[str, Any]:
    """Everything needed to go on with the running metrics.

    Args:
        trainer: Whose fit it is.
        modules: What ``named_modules`` of its module gives.
    """
    connector = trainer._logger_connector
    loop = trainer.fit_loop.epoch_loop
    return {
        "modules": {name: _metric_state(metric) for name, metric in _metrics_of(modules)},
        "collections": {
            name: {key: copy.deepcopy(vars(collection)[key]) for key in _GROUPS}
            for name, collection in _collections_of(modules)
        },
        "results": [_result_state(key, result) for key, result in loop._results.items()],
        "callback": dict(connector._callback_metrics),
        "logged": dict(connector._logged_metrics),
        "bar": dict(connector._progress_bar_metrics),
        "first": connector._first_loop_iter,
    }


def restore_metrics(trainer: pl.Trainer, state: dict[str, Any]) -> None:
    """The inverse of `capture_metrics`; after Lightning has made its own results afresh."""
    modules = list(trainer.lightning_module.named_modules())
    for name, metric in _metrics_of(modules):
        if name in state["modules"]:
            _restore_metric(metric, state["modules"][name])
    for name, collection in _collections_of(modules):
        vars(collection).update(state["collections"].get(name, {}))
    results = trainer.fit_loop.epoch_loop._results
    results.clear()
    for saved in state["results"]:
        _restore_result(trainer, results, saved)
    connector = trainer._logger_connector
    connector._callback_metrics = dict(state["callback"])
    connector._logged_metrics = dict(state["logged"])
    connector._progress_bar_metrics = dict(state["bar"])
    connector._first_loop_iter = state["first"]


def _metrics_of(modules: Modules) -> list[tuple[str, Metric]]:
    return [(name, module) for name, module in modules if isinstance(module, Metric)]


def _collections_of(
    modules: Modules,
) -> list[tuple[str, MetricCollection]]:
    """Metrics of a collection that update alike are grouped, and only one of them is updated."""
    return [(name, module) for name, module in modules if isinstance(module, MetricCollection)]


def _metric_state(metric: Metric) -> dict[str, Any]:
    """Accumulators, and the plain attributes in which wrappers such as `MinMaxMetric` remember."""
    return {
        name: list(value) if isinstance(value, list) else value
        for name, value in vars(metric).items()
        if _is_plain(value) or name in metric._defaults
    }


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, torch.Tensor))


def _restore_metric(metric: Metric, saved: dict[str, Any]) -> None:
    for name, value in saved.items():
        setattr(metric, name, _to(value, metric.device))


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, list):
        return [_to(item, device) for item in value]
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _result_state(key: str, result: _ResultMetric) -> dict[str, Any]:
    meta = result.meta
    return {
        "key": key,
        "meta": {name: getattr(meta, name) for name in _META}
        | {"reduce_fx": meta.reduce_fx.__name__},
        "sync": {
            "should": meta.sync.should,
            "rank_zero_only": meta.sync.rank_zero_only,
            "custom_group": meta.sync.group is not None,
        },
        "is_tensor": result.is_tensor,
        "has_reset": result.has_reset,
        "metric": _metric_state(result) if result.is_tensor else None,
        "forward": result._forward_cache,
    }


def _restore_result(trainer: pl.Trainer, results: _ResultCollection, saved: dict[str, Any]) -> None:
    if saved["sync"]["custom_group"]:
        return  # a process group cannot be stored: this value starts over at the next log call
    meta = _Metadata(**{**saved["meta"], "reduce_fx": getattr(torch, saved["meta"]["reduce_fx"])})
    meta.sync = _Sync(
        fn=trainer.strategy.reduce,
        _should=saved["sync"]["should"],
        rank_zero_only=saved["sync"]["rank_zero_only"],
    )
    result = _ResultMetric(meta, saved["is_tensor"])
    if saved["is_tensor"]:
        result.to(trainer.strategy.root_device)
        _restore_metric(result, saved["metric"])
    else:
        attribute = dict(trainer.lightning_module.named_modules()).get(
            saved["meta"]["metric_attribute"] or ""
        )
        if attribute is None:
            return
        result.value = attribute
    result._forward_cache = saved["forward"]
    result.has_reset = saved["has_reset"]
    results[saved["key"]] = result
