"""Pictures of margins, reward gaps and logged metrics. Needs matplotlib: the extra ``plots``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from gamma_loss import _checks
from gamma_loss._backend import Array, get_backend
from gamma_loss.losses import GammaLossAux

try:
    from matplotlib.axes import Axes
except ImportError as e:
    raise ImportError("gamma_loss.plots needs matplotlib: pip install 'gamma-loss[plots]'") from e

__all__ = ["plot_margin_history", "plot_margins", "plot_reward_gaps", "plot_smoothing_history"]

Vector: TypeAlias = np.ndarray[Any, Any]
History: TypeAlias = Iterable[Mapping[str, Any]]

# Okabe and Ito's, which readers with any colour vision can tell apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
GREY = "#777777"
DOTS: dict[str, Any] = {"s": 7, "alpha": 0.5, "lw": 0}
BARS: dict[str, Any] = {"density": True, "histtype": "stepfilled", "alpha": 0.5}
GAP, MARGIN = "reward gap $g_i$ (reward units)", "target margin $γ_i$ (reward units)"


def plot_margins(
    pairs: GammaLossAux | Array,
    margins: Array | None = None,
    *,
    gamma0: float | None = None,
    ax: Axes | None = None,
    **style: Any,
) -> Axes:
    """Draw target margins against reward gaps: Figure 5 of the paper (arXiv:2506.03690).

    Parameters
    ----------
    pairs : GammaLossAux or array, shape (pairs,)
        Second result of a loss, whose masked pairs are left out, or reward gaps in reward units.
    margins : array, shape (pairs,), optional
        With gaps as an array: their margins γ_i in reward units. Margins that are missing, or given
        with an aux, are a TypeError, and margins of another shape a ValueError.
    gamma0 : float, optional
        The mean margin of the pool in reward units, to draw a line there.
    ax : matplotlib.axes.Axes, optional
        Where to draw; a new figure by default. A further call on the same axes takes the next of
        six colours.
    **style
        For `matplotlib.axes.Axes.scatter`, such as ``label``, which makes a legend.

    Returns
    -------
    matplotlib.axes.Axes

    Examples
    --------
    >>> import numpy as np
    >>> from gamma_loss import gamma_preference_loss
    >>> loss, aux = gamma_preference_loss(np.array([-1.0, 0.0, 3.0]), gamma0=1.0, tau=1.0)
    >>> ax = plot_margins(aux, gamma0=1.0)
    >>> ax.figure.savefig("margins.png")  # doctest: +SKIP
    """
    if isinstance(pairs, GammaLossAux) is (margins is not None):
        raise TypeError("margins must be given with an array of reward gaps, and not with an aux")
    gaps = _unmasked(pairs, "reward_gaps")
    heights = _unmasked(pairs, "margins") if margins is None else _numbers("margins", margins)
    if gaps.shape != heights.shape:
        raise ValueError(f"margins must have the shape of pairs, {gaps.shape}, got {heights.shape}")
    ax = _axes(ax, GAP, MARGIN)
    style = DOTS | {"color": _colour(ax.collections)} | style
    ax.scatter(gaps, heights, **style)
    return _finish(ax, "label" in style, gamma0)


def plot_reward_gaps(
    pairs: GammaLossAux | Array, *, bins: Any = 50, ax: Axes | None = None, **style: Any
) -> Axes:
    """Draw the distribution of reward gaps: Figure 2 of the paper (arXiv:2506.03690).

    Parameters
    ----------
    pairs : GammaLossAux or array, shape (pairs,)
        As for `plot_margins`. Gaps that are not finite are left out; no finite gap is a ValueError.
    bins : int or sequence of float
        Number or edges (reward units) of the histogram's bins.
    ax : matplotlib.axes.Axes, optional
        As for `plot_margins`.
    **style
        For `matplotlib.axes.Axes.hist`, such as ``label``, or ``density=False`` for counts.

    Returns
    -------
    matplotlib.axes.Axes

    Examples
    --------
    >>> import numpy as np
    >>> ax = plot_reward_gaps(np.random.default_rng(0).normal(size=100), label="training pairs")
    """
    gaps = _unmasked(pairs, "reward_gaps")
    gaps = gaps[np.isfinite(gaps)]
    if not gaps.size:
        raise ValueError("pairs must have a finite gap that is not masked, got none")
    style = BARS | style
    ax = _axes(ax, GAP, "density (per reward unit)" if style["density"] else "pairs")
    ax.hist(gaps, bins, **{"color": _colour(ax.patches)} | style)
    return _finish(ax, "label" in style)


def plot_margin_history(
    history: History, *, gamma0: float | None = None, ax: Axes | None = None, **style: Any
) -> Axes:
    """Draw how the batch's margins develop in training: their mean, smallest and largest.

    Parameters
    ----------
    history : iterable of dict
        Logged `gamma_loss.metrics`, such as a transformers or TRL trainer's ``state.log_history``.
        Rows without ``gamma/mean``, ``gamma/min`` and ``gamma/max`` are skipped; a history without
        others is a ValueError. A row is drawn at its ``step``, or else at its number, from 1.
    gamma0, ax
        As for `plot_margins`.
    **style
        For `matplotlib.axes.Axes.plot`, which draws the mean.

    Returns
    -------
    matplotlib.axes.Axes

    Examples
    --------
    >>> row = {"gamma/mean": 4.0, "gamma/min": 3.6, "gamma/max": 4.9}
    >>> ax = plot_margin_history([{"step": 10, **row}, {"step": 20, **row}], gamma0=4.0)
    """
    steps, mean, least, largest = _rows(history, "gamma/mean", "gamma/min", "gamma/max")
    ax = _axes(ax, "training step", MARGIN)
    band = None if "label" in style else "smallest to largest in the batch"
    style = {"color": _colour(ax.collections), "label": "mean of the batch"} | style
    ax.fill_between(steps, least, largest, color=style["color"], alpha=0.25, lw=0, label=band)
    ax.plot(steps, mean, **style)
    return _finish(ax, True, gamma0)


def plot_smoothing_history(history: History, *, ax: Axes | None = None, **style: Any) -> Axes:
    """Draw how the label smoothing that the margins amount to develops in training.

    Above 0 the margins smooth the labels, below 0 they sharpen them (Theorem 3.1 of the paper; the
    mean over the batch of the ε that gives cDPO the slope of the shifted loss).

    Parameters
    ----------
    history : iterable of dict
        As for `plot_margin_history`; rows without ``gamma/implied_smoothing`` are skipped.
    ax : matplotlib.axes.Axes, optional
        As for `plot_margins`.
    **style
        For `matplotlib.axes.Axes.plot`.

    Returns
    -------
    matplotlib.axes.Axes

    Examples
    --------
    >>> ax = plot_smoothing_history([{"gamma/implied_smoothing": e} for e in (0.01, 0.03, 0.02)])
    """
    steps, smoothing = _rows(history, "gamma/implied_smoothing")
    ax = _axes(ax, "training step", "implied label smoothing $ε$ (share of labels)")
    ax.plot(steps, smoothing, **{"color": _colour(ax.lines)} | style)
    return _finish(ax, "label" in style)


def _unmasked(pairs: GammaLossAux | Array, field: str) -> Vector:
    """Return a field of an aux where its mask is True, or an array as it is."""
    if not isinstance(pairs, GammaLossAux):
        return _numbers("pairs", pairs)
    shown = _numbers("mask", get_backend(pairs.mask).astype(pairs.mask, pairs.margins.dtype)) > 0
    return _numbers(field, getattr(pairs, field))[shown]


def _numbers(name: str, array: Array) -> Vector:
    return _checks.to_numpy(name, array).astype(np.float64)  # type: ignore[no-any-return]


def _rows(history: History, *names: str) -> list[Vector]:
    """Return the steps, and the named metrics at each."""
    rows = [
        [float(row.get("step", number)), *(float(row[name]) for name in names)]
        for number, row in enumerate(history, 1)
        if all(name in row for name in names)
    ]
    if not rows:
        raise ValueError(f"history must have a row with {', '.join(names)}, got none")
    return list(np.array(rows).T)


def _colour(artists: Sequence[Any]) -> str:
    """Return the colour that comes next on axes."""
    return COLOURS[len(artists) % len(COLOURS)]


def _axes(ax: Axes | None, x: str, y: str) -> Axes:
    """Return axes with labels, new ones if there are none."""
    if ax is None:
        from matplotlib import pyplot as plt  # here, as it chooses a backend

        _, ax = plt.subplots(figsize=(5.6, 4.2), layout="constrained")
    ax.set(xlabel=x, ylabel=y)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _finish(ax: Axes, legend: bool, gamma0: float | None = None) -> Axes:
    """Draw the line at γ0 and a legend, if there is something for them."""
    if gamma0 is not None:
        ax.axhline(gamma0, ls="--", lw=1, color=GREY)
        ax.text(1.01, gamma0, "$γ_0$", transform=ax.get_yaxis_transform(), va="center", color=GREY)
    if legend:
        ax.legend(edgecolor="none", framealpha=0.7)
    return ax
