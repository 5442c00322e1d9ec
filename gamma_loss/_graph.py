"""Torch: a loss and a solve as single calls in a graph of Dynamo, which would guard all it sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gamma_loss import _compute
from gamma_loss._settings import LossSettings

_INPUTS = ("context", "context_mask", "mask", "weights")


@torch.compiler.disable  # type: ignore[untyped-decorator]
def outside_graphs(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call a function that ends a graph: the members of a group read each other's numbers."""
    return function(*arguments, **options)


def loss_in_graph(
    logps: dict[str, Tensor], inputs: tuple[Any, ...], options: dict[str, Any]
) -> tuple[Tensor, ...]:
    """Return a loss and its aux; a bad setting is the plain error of `LossSettings`."""
    options = {name: value for name, value in options.items() if name != "group"}
    settings = _values(LossSettings(**options))
    found: tuple[Tensor, ...] = _loss(tuple(logps), tuple(logps.values()), inputs, settings)
    return found


def solve_in_graph(
    gaps: Tensor, inputs: tuple[Any, ...], options: dict[str, Any]
) -> tuple[Tensor, ...]:
    """Return a solution."""
    found: tuple[Tensor, ...] = _solve(gaps, inputs, _values(LossSettings(**options)))
    return found


def _values(settings: LossSettings) -> tuple[Any, ...]:
    return tuple(getattr(settings, name) for name in _NAMES)


_NAMES = tuple(LossSettings.__dataclass_fields__)


def _constants(values: tuple[Any, ...]) -> dict[str, Any]:
    """Return settings by name; a number that is a symbol becomes a constant of the graph."""
    values = tuple(float(each) if isinstance(each, torch.SymFloat) else each for each in values)
    return dict(zip(_NAMES, values, strict=True))


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _loss(
    names: tuple[str, ...], logps: tuple[Tensor, ...], inputs: Any, values: Any
) -> tuple[Tensor, ...]:
    known = _constants(values) | dict(zip(_INPUTS, inputs, strict=True))
    loss, aux = _compute.loss(dict(zip(names, logps, strict=True)), **known)
    return loss, *aux


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _solve(gaps: Tensor, inputs: Any, values: Any) -> tuple[Tensor, ...]:
    return _compute.solve(gaps, _constants(values), None, **dict(zip(_INPUTS, inputs, strict=True)))
