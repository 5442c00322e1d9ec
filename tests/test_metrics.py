"""Scalars for a training log."""

import numpy as np
import pytest

from gamma_loss import gamma_dpo_loss, gamma_preference_loss, label_smoothing_from_shift, metrics


def test_values_over_unmasked_pairs(library):
    rows = np.random.default_rng(0).normal(size=(4, 6)) * 2
    keep = np.array([True, True, False, True, True, False])
    rows[0, 2] = np.nan  # masked: leaves no trace
    rows[:, 3] = 0.0  # a tie, which is no accurate pair
    loss, aux = gamma_dpo_loss(
        *[library.array(row) for row in rows],
        beta=0.7, gamma0=3.0, tau=2.0, mask=library.array(keep, "bool"),
    )  # fmt: skip
    logs = metrics(aux)
    kind = type(loss).__module__  # NumPy has two types for a number
    assert all(v.shape == () and type(v).__module__ == kind for v in logs.values())
    logs = {name: float(value) for name, value in logs.items()}
    chosen, rejected = (0.7 * (rows[i] - rows[i + 2])[keep] for i in (0, 1))
    gaps = chosen - rejected
    margins, weights = (library.numpy(v)[keep] for v in (aux.margins, aux.pair_weights))
    p = margins / margins.sum()
    smoothing = label_smoothing_from_shift(gaps, margins - 3, kind="conservative", match="slope")
    expected = {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/margins": gaps.mean(),
        "rewards/accuracies": (gaps > 0).mean(),
        "gamma/mean": 3.0,
        "gamma/min": margins.min(),
        "gamma/max": margins.max(),
        "gamma/kl": (p * np.log(p * 4)).sum(),
        "gamma/effective_pairs": weights.sum() ** 2 / (weights**2).sum(),
        "gamma/implied_smoothing": smoothing.mean(),
        "gamma/error_bound": float(aux.error_bound),
        "gamma/pairs": 4 / 6,
    }
    assert logs == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert logs["gamma/kl"] > 0
    assert 1 <= logs["gamma/effective_pairs"] <= 4


def test_without_margins_or_pairs_they_are_0(library):
    gaps, nobody = library.array(np.arange(6.0)), library.array(np.zeros(6), "bool")
    logs = metrics(gamma_preference_loss(gaps, gamma0=0.0, tau=2.0)[1])
    assert float(logs["gamma/mean"]) == float(logs["gamma/max"]) == float(logs["gamma/kl"]) == 0
    logs = metrics(gamma_preference_loss(gaps, gamma0=3.0, tau=2.0, mask=nobody)[1])
    values = {name: float(value) for name, value in logs.items()}
    assert values.pop("gamma/min") == values.pop("gamma/max") == 3.0
    assert values.pop("gamma/error_bound") < 1e-14  # which contains rounding error
    assert all(abs(value) < 1e-15 for value in values.values())
