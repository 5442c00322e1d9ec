"""Each baseline against its formula in NumPy, its limits, and finite differences."""

from functools import partial

import numpy as np
import oracles
import pytest

torch = pytest.importorskip("torch")
optimize = pytest.importorskip("scipy.optimize")
sigmoid = pytest.importorskip("scipy.special").expit
from benchmarks import baselines  # noqa: E402
from benchmarks.baselines import METHODS, GammaVariant, Logps, Running, through  # noqa: E402
from gamma_loss import solve_margins  # noqa: E402

ARRAYS = np.random.default_rng(3).normal(size=(4, 24)) * 1.5 - 8
D = ARRAYS[0] - ARRAYS[1]
H = D - (ARRAYS[2] - ARRAYS[3])
G = 0.6 * H
SETTINGS = {
    "margin": 0.7, "epsilon": 0.2, "a": 0.5, "rho": 0.25, "beta_prime": 0.8, "alpha": 14.0,
    "gamma0": 1.5, "tau": 0.8, "exponent": 1.5, "eta0": 0.85, "momentum": 0.3,
    "tau_dir": 0.7, "gamma_max": 0.9, "steps": 1,
}  # fmt: skip
# Sums of a few dozen float64 terms of order one.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def logps(arrays=ARRAYS):
    return Logps(*torch.tensor(arrays))


def settings_of(name, **changes):
    names = (*METHODS[name].settings, *["steps"] * METHODS[name].scheduled)
    return {name: SETTINGS[name] for name in names} | changes


def make(name, beta=0.6, **changes):
    return METHODS[name].make(beta=beta, **settings_of(name, **changes))


def memory(name, **changes):
    """Return a loss of gaps that shows what it remembers."""
    return METHODS[name].loss(**settings_of(name, **changes))


def value(name, **changes):
    return make(name, **changes)(logps()).item()


def nll(x):
    return np.logaddexp(0, -x)


def exact(gaps, gamma0=SETTINGS["gamma0"], tau=SETTINGS["tau"]):
    return oracles.margins(gaps, gamma0, tau)[0].astype(float)


def right(h, eta):  # RE-PO's probability that a label is right
    return eta * sigmoid(h) / (eta * sigmoid(h) + (1 - eta) * sigmoid(-h))


# The first batch: PLC-DPO's statistics count a fiftieth of it, α-DPO's a tenth.
Z = (G - 0.02 * G.mean()) / np.sqrt(0.02 * np.mean((G - G.mean()) ** 2))
ROUTES = np.exp([np.log(0.8) + Z / 0.7, np.log(0.1) - Z / 0.7, np.log(0.1) - abs(Z) / 1.15])
CLEAN, FLIP, TIE = ROUTES = ROUTES / ROUTES.sum(0)
MOVED = 0.9 * ((ROUTES.max(0) - 1 / 3) / (2 / 3)) ** 0.8
CORRECTED = CLEAN * nll(G) + FLIP * nll(-G) + TIE * nll(-abs(G))
SHIFT = 0.2 * (H - 0.1 * H.mean()) / (0.1 * H.std(ddof=1) + 1e-6)
MARGIN = np.where(D.mean() > D, np.exp((D.mean() - D) / D.std(ddof=1) * D.mean()), 0)  # AMaPO's
P = sigmoid(G)
W = right(G, 0.85)
FORMULAS = {
    "dpo": nll(G).mean(),
    "margin-dpo": nll(G - 0.7).mean(),
    "cdpo": (0.8 * nll(G) + 0.2 * nll(-G)).mean(),
    "rdpo": ((0.8 * nll(G) - 0.2 * nll(-G)) / 0.6).mean(),
    "ipo": ((H - 1 / 1.2) ** 2).mean(),
    "dr-dpo": -0.8 * np.log(np.exp(-nll(G) / 0.8).mean()),
    "ropo": (56 / 225 * nll(G) + 784 / 225 * sigmoid(-G)).mean(),
    "sympo": sigmoid(-G).mean(),
    "holder-dpo": 1.5 * (sigmoid(G) ** 2.5).mean() - 2.5 * (sigmoid(G) ** 1.5).mean(),
    "re-po": (W * nll(G) + (1 - W) * nll(-G)).mean(),
    "plc-dpo": ((1 - MOVED) * nll(G) + MOVED * CORRECTED).mean(),
    "gamma-dpo": nll(G - exact(G) + 1.5).mean(),
    "simpo": nll(0.6 * D - 0.7).mean(),
    "alpha-dpo": nll(0.6 * (D - SHIFT) - 0.7).mean(),
    "amapo": nll(0.6 * (D - MARGIN)).mean(),
    "gamma-simpo": nll(0.6 * D - exact(0.6 * D)).mean(),
}
PLC = 1 - P - CLEAN * (1 - P) + FLIP * P + TIE * np.sign(G) * sigmoid(abs(G))
WEIGHTS = {  # with margins and the like held, as constants for autograd
    "re-po": W - P,
    "plc-dpo": 1 - P - MOVED * PLC,
    "gamma-dpo": sigmoid(exact(G) - 1.5 - G),
    "gamma-simpo": sigmoid(exact(0.6 * D) - 0.6 * D),
    "alpha-dpo": sigmoid(0.7 - 0.6 * (D - SHIFT)),
    "amapo": sigmoid(0.6 * (MARGIN - D)),
}


def weights_of(loss, arrays=ARRAYS, beta=0.6):
    """Minus the derivative of each pair's loss with respect to its reward gap."""
    policy = torch.tensor(arrays[0], requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(Logps(policy, *torch.tensor(arrays[1:]))), policy)
    return -gradient.numpy() * len(policy) / beta


def test_formulas_and_weights():
    # Of the others: β-DPO, averaged γ-DPO, and two families' loops and matched losses.
    assert len(METHODS) == len(FORMULAS) + 2 + 2 * 3
    for name, expected in FORMULAS.items():
        loss = partial(make, name, **{"alpha": 0.2} if name == "alpha-dpo" else {})  # 14 is ROPO's
        np.testing.assert_allclose(loss()(logps()).item(), expected, **CLOSE, err_msg=name)
        if name in WEIGHTS:
            np.testing.assert_allclose(weights_of(loss()), WEIGHTS[name], **CLOSE, err_msg=name)
    for name, gaps, centre in (("gamma-dpo", G, 0.5), ("gamma-simpo", 0.6 * D, 0.0)):
        # γ0 = 0.5, τ = 10: each of the published loop's 20 steps halves the margins' error.
        published = memory(f"{name}-published", gamma0=0.5, tau=10.0)
        published.queue.clear()
        expected = nll(gaps - exact(gaps, 0.5, 10.0) + centre).mean()
        assert abs(published(torch.tensor(gaps)).item() - expected) < 5e-5


def test_repo_learns_how_reliable_the_labels_are():
    repo = make("re-po")
    repo(logps())
    eta = 0.7 * 0.85 + 0.3 * W.mean()
    np.testing.assert_allclose(weights_of(repo), right(G, eta) - sigmoid(G), **CLOSE)


def test_plc_dpo_turns_labels_round_once_it_is_warm():
    long, gaps, dpo = memory("plc-dpo", steps=40), torch.tensor(G), value("dpo")
    losses = [long(gaps).item() for _ in range(3)]
    np.testing.assert_allclose(losses[:2], dpo, **CLOSE)  # 7 % of 40 are 2.8 steps
    assert abs(losses[2] - dpo) > 1e-3
    strengths = []
    for step in (10, 40, 42):  # on statistics that hardly move any more
        vars(long).update(step=step - 1, mean=torch.zeros(()), variance=torch.ones(()))
        strengths.append(dpo - long(gaps).item())
    assert strengths[1] / strengths[0] == pytest.approx((40 - 2.8) / (10 - 2.8), rel=1e-12)
    assert strengths[2] == strengths[1]


def fitted(gaps, target):
    """The closest ``c σ(d - b g)`` to the weights, by another fit."""
    sharp = dict.fromkeys(("xtol", "ftol", "gtol"), 1e-15)
    error = lambda at: at[0] * sigmoid(at[1] - at[2] * gaps) - target  # noqa: E731
    return optimize.least_squares(error, [1.0, 0.5, 0.7], **sharp).x


@pytest.mark.parametrize(("family", "gaps", "centre"), [("dpo", G, 1.5), ("simpo", 0.6 * D, 0.0)])
def test_matched_losses_have_the_closest_weights(family, gaps, centre):
    c, d, b = fitted(gaps, sigmoid(exact(gaps) - centre - gaps))
    for name in (f"matched-{family}", f"matched-{family}-once"):
        # What two fits to 1e-12 of a minimum may differ by.
        np.testing.assert_allclose(weights_of(make(name)), c * sigmoid(d - b * gaps), atol=1e-6)
        assert value(name) == pytest.approx(c / b * nll(b * gaps - d).mean(), rel=1e-5)
    # At the first step of a policy that is its own reference all gaps are 0.
    still = np.tile(ARRAYS[:2], (2, 1))
    np.testing.assert_allclose(weights_of(make("matched-dpo"), still), 0.5, **CLOSE)


def test_matched_losses_are_fitted_to_batch_and_queue(monkeypatch):
    monkeypatch.setattr(baselines, "CONTEXT", 40)
    always, once = memory("matched-dpo"), memory("matched-dpo-once")
    matches, pool = [], np.empty(0)
    for seed in range(6):
        batch = np.random.default_rng(seed).normal(size=16)
        always(torch.tensor(batch)), once(torch.tensor(batch))
        matches.append((always.match, once.match))
        pool = np.concatenate([pool, batch])[-(40 + 16) :]
        expected = fitted(pool, sigmoid(exact(pool) - 1.5 - pool))
        np.testing.assert_allclose(always.match[:3], expected, rtol=1e-4, atol=1e-4)
    assert all(a == o for a, o in matches[:3])  # 16, 32 and then 40 remembered
    assert [matches[3][i] == matches[5][i] for i in (0, 1)] == [False, True]


def test_beta_dpo_keeps_what_is_usual_and_adapts_its_beta():
    arrays = np.zeros((4, 8))
    arrays[0] = [0, 0.1, -0.1, 0.05, -0.05, 0.02, 40.0, -40.0]  # the last two far off
    torch.manual_seed(0)
    kept = weights_of(make("beta-dpo", rho=0.25), arrays) != 0
    assert kept.tolist() == [True] * 6 + [False] * 2
    expected = nll(0.6 * (1 + 0.5 * (H.mean() - 0.1 * H.mean())) * H).mean()
    np.testing.assert_allclose(value("beta-dpo", rho=0.0), expected, **CLOSE)
    running = Running()
    running.update(torch.tensor([1.0, 3.0])), running.update(torch.tensor([5.0, 5.0]))
    found = running.mean.item(), running.std.item()
    assert found == pytest.approx((0.9 * 0.2 + 0.5, 0.9 * 0.1 * 2**0.5), rel=1e-6)


def test_variants_do_what_they_say():
    make, gaps = partial(GammaVariant, gamma0=1.5, tau=0.8, relative=True), torch.tensor(G)
    s = G - exact(G)
    for changes, expected in (
        ({}, nll(s + 1.5)), ({"relative": False}, nll(s)), ({"centered": False}, nll(s)),
        ({"label_smoothing": 0.1}, 0.9 * nll(s + 1.5) + 0.1 * nll(-s - 1.5)),
    ):  # fmt: skip
        np.testing.assert_allclose(make(**changes)(gaps).item(), expected.mean(), **CLOSE)
    for alone in (make(queue_size=0), make(sample=0)):
        assert alone(gaps) == alone(gaps)
    short = make(queue_size=30)
    assert [short(gaps) and len(short.queue) for _ in range(3)] == [24, 30, 30]


def test_margins_differentiated_through():
    def solve(gaps):
        return solve_margins(gaps, gamma0=2.0, tau=0.5).margins

    gaps = torch.tensor([-2.0, -0.3, 0.1, 1.2, 3.0], dtype=torch.float64)
    margins = solve(gaps)
    again = partial(through, margins, gamma0=2.0, tau=0.5)
    np.testing.assert_allclose(again(gaps), margins, rtol=1e-12)
    jacobian = torch.autograd.functional.jacobian(again, gaps)
    steps = 1e-5 * torch.eye(5, dtype=torch.float64)
    numeric = torch.stack([solve(gaps + e) - solve(gaps - e) for e in steps], 1) / 2e-5
    np.testing.assert_allclose(jacobian, numeric, atol=1e-8)
