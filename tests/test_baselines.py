"""Each baseline against its formula in NumPy, its limits, and finite differences."""

import math

import numpy as np
import oracles
import pytest

torch = pytest.importorskip("torch")
optimize = pytest.importorskip("scipy.optimize")
from benchmarks import baselines  # noqa: E402
from benchmarks.baselines import METHODS, Logps, Running  # noqa: E402
from benchmarks.noise_study.variants import GammaVariant, through  # noqa: E402
from gamma_loss import solve_margins  # noqa: E402

PAIRS = 24
ARRAYS = np.random.default_rng(3).normal(size=(4, PAIRS)) * 1.5 - 8
H = (ARRAYS[0] - ARRAYS[1]) - (ARRAYS[2] - ARRAYS[3])
D = ARRAYS[0] - ARRAYS[1]
SETTINGS = {
    "margin": 0.7, "epsilon": 0.2, "a": 0.5, "rho": 0.25, "beta_prime": 0.8, "alpha": 14.0,
    "gamma0": 1.5, "tau": 0.8, "exponent": 1.5, "eta0": 0.85, "momentum": 0.3,
    "tau_dir": 0.7, "gamma_max": 0.9, "steps": 1,
}  # fmt: skip
# Sums of a few dozen float64 terms of order one.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def logps(arrays=ARRAYS):
    return Logps(*torch.tensor(arrays))


def make(name, beta=0.6, **changes):
    method = METHODS[name]
    names = (*method.settings, *["steps"] * method.scheduled)
    return method.make(beta=beta, **({name: SETTINGS[name] for name in names} | changes))


def value(name, **changes):
    return make(name, **changes)(logps()).item()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def nll(x):
    return np.logaddexp(0, -x)


def exact(gaps, gamma0=SETTINGS["gamma0"], tau=SETTINGS["tau"]):
    return oracles.margins(gaps, gamma0, tau)[0].astype(float)


def right(h, eta):  # RE-PO's probability that a label is right
    return eta * sigmoid(h) / (eta * sigmoid(h) + (1 - eta) * sigmoid(-h))


def routing(gaps, gamma):  # PLC-DPO's w and q at the first batch, whose statistics count a fiftieth
    z = (gaps - 0.02 * gaps.mean()) / np.sqrt(0.02 * np.mean((gaps - gaps.mean()) ** 2))
    energies = np.exp([np.log(0.8) + z / 0.7, np.log(0.1) - z / 0.7, np.log(0.1) - abs(z) / 1.15])
    q = energies / energies.sum(0)
    return gamma * ((q.max(0) - 1 / 3) / (2 / 3)) ** 0.8, q


def plc(gaps, gamma):
    w, (clean, flip, tie) = routing(gaps, gamma)
    corrected = clean * nll(gaps) + flip * nll(-gaps) + tie * nll(-abs(gaps))
    return ((1 - w) * nll(gaps) + w * corrected).mean()


def amapo_margin(d):
    z = (d.mean() - d) / d.std(ddof=1)
    return np.where(d < d.mean(), np.exp(z * d.mean()), 0)


def alpha_shift(h):  # the first batch: running statistics are a tenth of the batch's
    return 0.2 * (h - 0.1 * h.mean()) / (0.1 * h.std(ddof=1) + 1e-6)


FORMULAS = {
    "dpo": lambda: nll(0.6 * H).mean(),
    "margin-dpo": lambda: nll(0.6 * H - 0.7).mean(),
    "cdpo": lambda: (0.8 * nll(0.6 * H) + 0.2 * nll(-0.6 * H)).mean(),
    "rdpo": lambda: ((0.8 * nll(0.6 * H) - 0.2 * nll(-0.6 * H)) / 0.6).mean(),
    "ipo": lambda: ((H - 1 / 1.2) ** 2).mean(),
    "dr-dpo": lambda: -0.8 * np.log(np.exp(-nll(0.6 * H) / 0.8).mean()),
    "ropo": lambda: (56 / 225 * nll(0.6 * H) + 784 / 225 * sigmoid(-0.6 * H)).mean(),
    "sympo": lambda: (1 / (1 + np.exp(0.6 * H))).mean(),
    "holder-dpo": lambda: (
        1.5 * (sigmoid(0.6 * H) ** 2.5).mean() - 2.5 * (sigmoid(0.6 * H) ** 1.5).mean()
    ),
    "re-po": lambda: (
        right(0.6 * H, 0.85) * nll(0.6 * H) + (1 - right(0.6 * H, 0.85)) * nll(-0.6 * H)
    ).mean(),
    "plc-dpo": lambda: plc(0.6 * H, 0.9),
    "gamma-dpo": lambda: nll(0.6 * H - exact(0.6 * H) + 1.5).mean(),
    "simpo": lambda: nll(0.6 * D - 0.7).mean(),
    "alpha-dpo": lambda: nll(0.6 * (D - alpha_shift(H)) - 0.7).mean(),
    "amapo": lambda: nll(0.6 * (D - amapo_margin(D))).mean(),
    "gamma-simpo": lambda: nll(0.6 * D - exact(0.6 * D)).mean(),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_formula(name):
    changes = {"alpha": 0.2} if name == "alpha-dpo" else {}  # 14 is ROPO's
    np.testing.assert_allclose(value(name, **changes), FORMULAS[name](), **CLOSE)


def test_every_method_has_a_test():
    assert METHODS.keys() - FORMULAS.keys() == {
        "beta-dpo", "gamma-dpo-averaged", "gamma-dpo-published", "gamma-simpo-published",
        "matched-dpo", "matched-dpo-once", "matched-simpo", "matched-simpo-once",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "changes", "peer", "settings"),
    [
        ("cdpo", {"epsilon": 0.0}, "dpo", {}),
        ("rdpo", {"epsilon": 0.0}, "dpo", {}),
        ("margin-dpo", {"margin": 0.0}, "dpo", {}),
        ("beta-dpo", {"a": 0.0, "rho": 0.0}, "dpo", {}),
        ("alpha-dpo", {"alpha": 0.0}, "simpo", {}),
        ("gamma-simpo", {"gamma0": 0.0}, "simpo", {"margin": 0.0}),
        ("gamma-dpo", {"gamma0": 0.0}, "dpo", {}),
    ],
)
def test_special_cases(name, changes, peer, settings):
    np.testing.assert_allclose(value(name, **changes), value(peer, **settings), **CLOSE)


def test_limits():
    # γ - γ0 and log-mean-exp's correction vanish like 1 / τ and 1 / β'.
    assert abs(value("gamma-dpo", tau=1e7) - value("dpo")) < 1e-6
    assert abs(value("gamma-simpo", tau=1e7) - value("simpo", margin=1.5)) < 1e-6
    assert abs(value("dr-dpo", beta_prime=1e7) - value("dpo")) < 1e-6


def test_rdpo_is_unbiased_over_flips():
    swapped = Logps(*torch.tensor(ARRAYS[[1, 0, 3, 2]]))
    rdpo = make("rdpo")
    expected = 0.8 * rdpo(logps()) + 0.2 * rdpo(swapped)
    np.testing.assert_allclose(expected.item(), value("dpo"), **CLOSE)


def test_ipo_is_least_at_its_target():
    arrays = np.zeros((4, 3))
    arrays[0] = 1 / (2 * 0.25)
    assert make("ipo", beta=0.25)(logps(arrays)).item() == 0


def test_the_largest_pair_weight_of_ropo_is_one():
    gaps = torch.linspace(-8, 8, 100_001, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros_like(gaps)
    loss = make("ropo", beta=1.0)(Logps(gaps, zero, zero, zero)) * len(gaps)
    (gradient,) = torch.autograd.grad(loss, gaps)
    # A grid of step h = 1.6e-4 misses a smooth maximum by at most h² times its curvature, < 10.
    assert abs((-gradient).max().item() - 1) < 1e-6


def weights_of(loss, arrays=ARRAYS, beta=0.6):
    """Minus the derivative of each pair's loss with respect to its reward gap."""
    policy = torch.tensor(arrays[0], requires_grad=True)
    value = loss(Logps(policy, *torch.tensor(arrays[1:])))
    (gradient,) = torch.autograd.grad(value, policy)
    return -gradient.numpy() * len(policy) / beta


def test_weights_of_the_robust_peers():
    p = sigmoid(0.6 * H)
    np.testing.assert_allclose(weights_of(make("sympo")), p * (1 - p), **CLOSE)
    holder = 1.5 * 2.5 * p**1.5 * (1 - p) ** 2
    np.testing.assert_allclose(weights_of(make("holder-dpo")), holder, **CLOSE)
    # With w held: w (1 - p) - (1 - w) p.
    np.testing.assert_allclose(weights_of(make("re-po")), right(0.6 * H, 0.85) - p, **CLOSE)


def test_repo_learns_how_reliable_the_labels_are():
    repo = make("re-po")
    repo(logps())
    eta = 0.7 * 0.85 + 0.3 * right(0.6 * H, 0.85).mean()
    assert repo.eta == pytest.approx(eta, rel=1e-12)
    np.testing.assert_allclose(weights_of(repo), right(0.6 * H, eta) - sigmoid(0.6 * H), **CLOSE)
    certain = make("re-po", eta0=0.99, momentum=1.0, beta=1000.0)
    certain(logps(np.abs(ARRAYS) * np.array([[1.0], [0], [0], [0]])))
    assert 0 < certain.eta < 1


def test_plc_dpo_turns_labels_round_once_it_is_warm():
    gaps, p = 0.6 * H, sigmoid(0.6 * H)
    w, (clean, flip, tie) = routing(gaps, 0.9)
    corrected = clean * (1 - p) - flip * p - tie * np.sign(gaps) * sigmoid(abs(gaps))
    weights = weights_of(make("plc-dpo"))
    np.testing.assert_allclose(weights, (1 - w) * (1 - p) + w * corrected, **CLOSE)
    assert weights[gaps.argmin()] < 0.2 * (1 - p)[gaps.argmin()]  # hardly trained as labelled
    long = make("plc-dpo", steps=40)
    dpo, losses = value("dpo"), [long(logps()).item() for _ in range(42)]
    np.testing.assert_allclose(losses[:2], dpo, **CLOSE)  # 7 % of 40 are 2.8 steps
    assert abs(losses[2] - dpo) > 1e-3
    strengths = []
    for step in (10, 40, 42):  # on statistics that hardly move any more
        long.step, long.mean, long.variance = step - 1, torch.zeros(()), torch.ones(())
        strengths.append(dpo - long(logps()).item())
    assert strengths[1] / strengths[0] == pytest.approx((40 - 2.8) / (10 - 2.8), rel=1e-12)
    assert strengths[2] == strengths[1]


def fitted(gaps, target):
    """The closest ``c σ(d - b g)`` to the weights, by another fit."""
    found = optimize.least_squares(
        lambda at: at[0] * sigmoid(at[1] - at[2] * gaps) - target, [1.0, 0.5, 0.7],
        xtol=1e-15, ftol=1e-15, gtol=1e-15,
    )  # fmt: skip
    return found.x


@pytest.mark.parametrize(("family", "gaps", "centre"), [("dpo", H, 1.5), ("simpo", D, 0.0)])
def test_matched_losses_have_the_closest_weights(family, gaps, centre):
    gaps = 0.6 * gaps
    c, d, b = fitted(gaps, sigmoid(exact(gaps) - centre - gaps))
    for name in (f"matched-{family}", f"matched-{family}-once"):
        # What two fits to 1e-12 of a minimum may differ by.
        expected = c * sigmoid(d - b * gaps)
        np.testing.assert_allclose(weights_of(make(name)), expected, atol=1e-6)
        assert value(name) == pytest.approx(c / b * nll(b * gaps - d).mean(), rel=1e-5)


def test_matched_losses_are_fitted_to_batch_and_queue(monkeypatch):
    monkeypatch.setattr(baselines, "CONTEXT", 40)
    always, once = make("matched-dpo"), make("matched-dpo-once")
    batches = [np.random.default_rng(seed).normal(size=(4, 16)) for seed in range(6)]
    matches = []
    for i, batch in enumerate(batches):
        always(logps(batch)), once(logps(batch))
        matches.append((always.match, once.match))
        h = [0.6 * (b[0] - b[1] - b[2] + b[3]) for b in batches[: i + 1]]
        pool = np.concatenate(h)[-(40 + 16) :]
        c, d, b = fitted(pool, sigmoid(exact(pool) - 1.5 - pool))
        np.testing.assert_allclose(always.match[:3], [c, d, b], rtol=1e-4, atol=1e-4)
    assert all(a == o for a, o in matches[:3])  # 16, 32 and then 40 remembered
    assert matches[3][1] == matches[5][1]
    assert matches[3][0] != matches[5][0]


def test_matched_losses_start_as_the_plain_one():
    """At the first step of a policy that is its own reference all gaps are 0."""
    still = np.tile(ARRAYS[:2], (2, 1))
    np.testing.assert_allclose(weights_of(make("matched-dpo"), still), 0.5, **CLOSE)


def test_beta_dpo_keeps_what_is_usual():
    arrays = np.zeros((4, 8))
    arrays[0] = [0, 0.1, -0.1, 0.05, -0.05, 0.02, 40.0, -40.0]  # the last two far off
    torch.manual_seed(0)
    policy = torch.tensor(arrays[0], requires_grad=True)
    loss = make("beta-dpo", rho=0.25)(Logps(policy, *torch.tensor(arrays[1:])))
    (gradient,) = torch.autograd.grad(loss, policy)
    assert (gradient != 0).tolist() == [True] * 6 + [False] * 2


def test_beta_dpo_adapts_its_beta():
    torch.manual_seed(0)
    h, beta, a = H, 0.6, 0.5
    expected = nll(beta * (1 + a * (h.mean() - 0.1 * h.mean())) * h).mean()
    np.testing.assert_allclose(value("beta-dpo", rho=0.0), expected, **CLOSE)


def test_running_statistics():
    running = Running()
    for batch in ([1.0, 3.0], [5.0, 5.0]):
        running.update(torch.tensor(batch))
    assert running.mean == pytest.approx(0.9 * 0.2 + 0.5, rel=1e-6)
    assert running.std == pytest.approx(0.9 * 0.1 * math.sqrt(2), rel=1e-6)


@pytest.mark.parametrize("family", ["gamma-dpo", "gamma-simpo"])
def test_the_published_loop_agrees_where_it_converges(family):
    # γ0 = 0.5, τ = 10, no earlier gaps: each of 20 steps halves the error. The exact and the
    # looped margins then differ by less than 1e-4 γ0, and a loss of slope < 1 by no more.
    settings = {"gamma0": 0.5, "tau": 10.0}
    published = make(f"{family}-published", **settings)
    published.queue.clear()
    assert abs(published(logps()).item() - value(family, **settings)) < 5e-5


def test_the_published_loop_differs_where_it_does_not():
    published = make("gamma-dpo-published", gamma0=4.0, tau=0.1)
    published.queue.clear()
    gaps = np.random.default_rng(0).normal(size=64) * 4
    margins = published.margins(torch.tensor(gaps)).numpy()
    assert np.abs(margins - exact(gaps, 4.0, 0.1)).max() > 4.0


# Their constants for autograd depend on the policy.
HELD = ("alpha-dpo", "amapo", "re-po", "plc-dpo")


@pytest.mark.parametrize(
    "name", [name for name in METHODS if name not in HELD and not name.startswith("matched")]
)
def test_gradient_by_finite_differences(name):
    """Where margins are constants for autograd they are held at the undisturbed ones."""

    def loss(policy):
        torch.manual_seed(0)
        if name.startswith("gamma"):  # hold the margins, as the losses do
            relative = METHODS[name].relative
            gaps = 0.6 * torch.tensor(H if relative else D)
            rule = make(name)
            moved = Logps(policy, *torch.tensor(ARRAYS[1:]))
            moved = 0.6 * (moved.h if relative else moved.d)
            if "published" in name:
                margins = rule.margins(gaps)
            else:
                margins = solve_margins(gaps, gamma0=1.5, tau=0.8).margins
            shift = margins - 1.5 if relative else margins
            return torch.nn.functional.softplus(shift - moved).mean()
        changes = {"a": 0.0} if name == "beta-dpo" else {}
        return make(name, **changes)(Logps(policy, *torch.tensor(ARRAYS[1:])))

    policy = torch.tensor(ARRAYS[0], requires_grad=True)
    torch.manual_seed(0)
    changes = {"a": 0.0} if name == "beta-dpo" else {}
    made = make(name, **changes)(Logps(policy, *torch.tensor(ARRAYS[1:])))
    (gradient,) = torch.autograd.grad(made, policy)
    step = 1e-5
    for i in (0, 7):
        with torch.no_grad():
            high, low = (policy.clone(), policy.clone())
            high[i] += step
            low[i] -= step
            slope = (loss(high) - loss(low)).item() / (2 * step)
        # Rounding 1e-16 / step, truncation step² times a third derivative of order one.
        assert abs(slope - gradient[i].item()) < 1e-8


# --- the variants ---


@pytest.mark.parametrize(("name", "relative"), [("gamma-dpo", True), ("gamma-simpo", False)])
def test_variant_without_changes_is_the_method(name, relative):
    variant = GammaVariant(beta=0.6, gamma0=1.5, tau=0.8, relative=relative)
    method = make(name)
    for seed in range(3):  # with a filling queue
        batch = logps(np.random.default_rng(seed).normal(size=(4, 8)))
        # The module's queue is float32: gaps below 4 are rounded by less than 2.4e-7.
        np.testing.assert_allclose(variant(batch).item(), method(batch).item(), atol=2.4e-7)


def test_variants_do_what_they_say():
    plain = {"beta": 0.6, "gamma0": 1.5, "tau": 0.8}
    whole = GammaVariant(**plain, centered=False)(logps()).item()
    np.testing.assert_allclose(whole, nll(0.6 * H - exact(0.6 * H)).mean(), **CLOSE)
    smooth = GammaVariant(**plain, label_smoothing=0.1)(logps()).item()
    s = 0.6 * H - exact(0.6 * H) + 1.5
    np.testing.assert_allclose(smooth, (0.9 * nll(s) + 0.1 * nll(-s)).mean(), **CLOSE)
    alone = GammaVariant(**plain, queue_size=0)
    assert alone(logps()) == alone(logps())
    short = GammaVariant(**plain, queue_size=30)
    short(logps()), short(logps())
    assert len(short.queue) == 30
    sampled = GammaVariant(**plain, sample=0)  # nothing of the queue: the batch alone
    assert sampled(logps()) == sampled(logps())


def test_margins_differentiated_through():
    gaps = torch.tensor([-2.0, -0.3, 0.1, 1.2, 3.0], dtype=torch.float64, requires_grad=True)

    def solve(values):
        return solve_margins(values, gamma0=2.0, tau=0.5).margins

    margins = solve(gaps.detach())
    again = through(margins, gaps, 2.0, 0.5)
    np.testing.assert_allclose(again.detach(), margins, rtol=1e-12)
    jacobian = torch.stack([torch.autograd.grad(m, gaps, retain_graph=True)[0] for m in again])
    step = 1e-5
    numeric = torch.stack(
        [
            (solve(gaps.detach() + step * e) - solve(gaps.detach() - step * e)) / (2 * step)
            for e in torch.eye(5, dtype=torch.float64)
        ],
        1,
    )
    np.testing.assert_allclose(jacobian, numeric, atol=1e-8)
    # The budget is fixed, so each column sums to 0.
    np.testing.assert_allclose(jacobian.sum(0), 0, atol=1e-12)
