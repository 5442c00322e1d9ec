"""The solve in chunks against the solve of the whole."""

import numpy as np
import oracles
import pytest
import ranks as work
from strategies import CORNERS, HARD, MILD, problems

from gamma_loss import _solver, solve_margins, solve_margins_streaming, streaming

EDGES = [
    *CORNERS,
    ([746.0, 900.0], 1.0, 1.0),  # σ(γ0 - g) is the smallest number there is, and 0
    *((gaps, gamma0, tau) for gaps in ([1e307, 1.0, 2.0], [1.7e308] * 9 + [-1.7e308, 0.0], [-1e307])
      for gamma0, tau in ((4.0, 10.0), (4.0, 0.1), (0.05, 1e-3), (100.0, 1e-3))),
    # of which few are far from their roots
    (np.random.default_rng(0).normal(0.0, 0.25, 4000), 2.3, 6.5),
    # of which few step on alone, and come closer than all others
    (np.repeat([13.143, -1e4, 149.42, 264.92, 0.0], [68, 198, 16, 1894, 1]), 10.065, 0.00106),
]  # fmt: skip


@pytest.mark.parametrize("where", ["edges", "anywhere"])
def test_accuracy_and_error_bound_over_the_domain(where):
    for gaps, gamma0, tau in EDGES if where == "edges" else problems("float64")[::2]:
        gaps = np.asarray(gaps)
        rule = solve_margins_streaming(np.array_split(gaps, 3), gamma0=gamma0, tau=tau)
        exact, nu = oracles.margins(gaps, gamma0, tau)
        margins, scale = rule.margins(gaps), 1 + gamma0 / tau
        assert oracles.error(margins, exact, nu, np.clip(gaps, -1e4, 1e4), gamma0, tau) <= 1
        assert margins.mean() == pytest.approx(gamma0, rel=1e-13 * scale)
        assert abs(rule.multiplier - nu) <= 1e-13 * scale
        assert np.mean(np.abs(margins - exact)) / gamma0 <= rule.error_bound <= 1e-12
        assert np.isfinite(rule.margins([1.7e308, -1.7e308])).all()


@pytest.mark.parametrize("setting", [MILD, {"gamma0": 3.0, "tau": 0.5}], ids=str)
def test_the_error_bound_holds_for_an_unfinished_solve(setting, monkeypatch):
    gaps, gamma0 = work.pool(50), setting["gamma0"]
    for readings in (1, 2):
        monkeypatch.setattr(streaming, "_MAX_READINGS", readings)
        rule = solve_margins_streaming([gaps], **setting)
        margins, exact = rule.margins(gaps), oracles.margins(gaps, **setting)[0]
        assert margins.mean() == pytest.approx(gamma0, rel=1e-12)
        assert 1e-9 < np.mean(np.abs(margins - exact)) / gamma0 <= rule.error_bound


@pytest.mark.parametrize(
    ("setting", "most"), [(MILD, 9.0), (HARD, 11.5), ({"gamma0": 1.0, "tau": 0.1}, 13.5)], ids=str
)
def test_pairs_start_close_to_their_roots(setting, most, monkeypatch):
    gaps, steps = np.random.default_rng(0).normal(1.0, 3.0, 100_000), []

    def counted(xp, pairs, u, *rest):
        steps.append(u.size)
        return newton_step(xp, pairs, u, *rest)

    newton_step = _solver.newton_step
    monkeypatch.setattr(_solver, "newton_step", counted)
    rule = solve_margins_streaming([gaps], **setting)
    assert sum(steps) / gaps.size <= most
    assert rule.error_bound < 1e-13


@pytest.mark.parametrize(
    "then",
    [[1, -2, 5.5], [1, -2, -50], [1, -2], [], [1, -2, np.nan],
     [0, -1, 0.5],  # of the same sum
     [1, -2, np.nextafter(0.5, 1)]],
    ids=str,
)  # fmt: skip
def test_chunks_that_change_are_refused(then):
    class Changing:
        """Chunks that hold other gaps from one of the readings on."""

        def __init__(self, reading):
            self.left = reading

        def __iter__(self):
            self.left -= 1
            return iter([np.array([1.0, -2.0, 0.5] if self.left > 0 else then, dtype=float)])

    for setting in (MILD, HARD):
        for reading in (3, 4):  # one look at the type is no reading, and counts here
            with pytest.raises(ValueError, match="chunks must give the same gaps at each reading"):
                solve_margins_streaming(Changing(reading), **setting)


def test_chunks_of_any_dtype_and_size_cut_anew_at_each_reading_are_one_pool():
    gaps = work.pool(40_000).astype(np.float32)
    gaps[3], gaps[7] = np.nan, np.inf  # which take no part

    class Cut:
        readings = 0

        def __iter__(self):
            self.readings += 1
            return iter([gaps[:0], *np.array_split(gaps, self.readings)])

    rule = solve_margins_streaming(Cut(), **HARD)
    expected = solve_margins(gaps.astype(float), **HARD).margins
    np.testing.assert_allclose(rule.margins(gaps), expected, rtol=0, atol=1e-12)
    assert rule.error_bound < 1e-13
    assert rule.pairs == 39_998
    rule = solve_margins_streaming([np.array([1.0, np.nan])], gamma0=0.0, tau=1.0)
    np.testing.assert_array_equal(rule.margins([2.0, np.inf]), [0.0, np.nan])
