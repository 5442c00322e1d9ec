"""The losses: values against the papers' formulas, gradients, reductions, limits."""

import collections
import math
import sys
from pathlib import Path

import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import HARD, MILD, gamma0s, pools, taus

import gamma_loss
from gamma_loss import (
    GapQueue,
    gamma_dpo_loss,
    gamma_preference_loss,
    gamma_simpo_loss,
    label_smoothing_from_shift,
    metrics,
    preference_loss,
    queue_init,
    queue_push,
    shift_from_label_smoothing,
    solve_margins,
)

EPS = np.finfo(np.float64).eps
SETTING = {"beta": 0.5, "gamma0": 2.0, "tau": 1.5}
SMOOTHING = [(0.0, False), (0.1, False), (0.0, True), (0.2, True)]


def logps(size=7, seed=0):
    """Log-probabilities: (policy chosen, policy rejected, reference chosen, reference rejected)."""
    return np.random.default_rng(seed).normal(size=(4, size)) * 3 - 20


def gaps_of(rows, beta):
    chosen, rejected, reference_chosen, reference_rejected = rows
    return beta * (chosen - reference_chosen), beta * (rejected - reference_rejected)


@given(pools(), st.floats(-50, 50), st.floats(0, 0.49), st.booleans())
def test_preference_loss_is_the_papers_formula(gaps, margin, epsilon, robust):
    losses = preference_loss(gaps, margin, label_smoothing=epsilon, robust=robust)
    formula = oracles.rdpo if robust else oracles.cdpo
    expected = formula(gaps, epsilon, margin)
    # a few roundings of terms as large as |g - margin|, divided by 1 - 2ε when robust
    scale = (1 + np.abs(gaps) + abs(margin)) / (1 - 2 * epsilon)
    assert np.all(np.abs(losses - expected) <= 8 * EPS * scale)


def test_preference_loss_keeps_small_losses_and_takes_arrays_of_margins(library):
    losses = library.numpy(preference_loss(library.array([[40.0, -800.0], [0.0, 700.0]])))
    np.testing.assert_allclose(
        losses, oracles.dpo([[40.0, -800.0], [0.0, 700.0]]).astype(float), rtol=1e-15
    )
    gaps, margins = library.array([1.0, 2.0]), library.array([0.5, -1.0])
    np.testing.assert_allclose(
        library.numpy(preference_loss(gaps, margins)), oracles.dpo([0.5, 3.0]).astype(float), 1e-15
    )


@pytest.mark.parametrize(("epsilon", "robust"), SMOOTHING)
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("method", ["dpo", "simpo", "gaps"])
def test_values_and_aux_in_every_library(library, method, centered, epsilon, robust):
    rows = logps()
    arrays = [library.array(row) for row in rows]
    options = {"centered": centered, "label_smoothing": epsilon, "robust": robust}
    if method == "dpo":
        chosen, rejected = gaps_of(rows, 0.5)
        loss, aux = gamma_dpo_loss(*arrays, **SETTING, **options)
    elif method == "simpo":
        chosen, rejected = 0.5 * rows[0], 0.5 * rows[1]
        loss, aux = gamma_simpo_loss(*arrays[:2], **SETTING, **options)
    else:
        chosen, rejected = rows[0] - rows[1], np.zeros(7)
        loss, aux = gamma_preference_loss(library.array(chosen), gamma0=2.0, tau=1.5, **options)
    gaps = chosen - rejected
    margins = oracles.margins(gaps, 2.0, 1.5)[0]
    formula = oracles.rdpo if robust else oracles.cdpo
    used = margins - 2.0 if centered else margins
    expected = formula(gaps, epsilon, used)
    np.testing.assert_allclose(float(loss), float(expected.mean()), rtol=1e-13)
    # the derivative of the smoothed formula, written out
    s = gaps - used
    weight = (1 - epsilon) * oracles.sigmoid(-s) - epsilon * oracles.sigmoid(s)
    if robust:
        weight = ((1 - epsilon) * oracles.sigmoid(-s) + epsilon * oracles.sigmoid(s)) / (
            1 - 2 * epsilon
        )
    for name, wanted in {
        "margins": margins,
        "shifts": margins - 2.0,
        "reward_gaps": gaps,
        "chosen_rewards": chosen,
        "rejected_rewards": rejected,
        "pair_weights": weight,
        "mask": np.ones(7),
    }.items():
        np.testing.assert_allclose(
            library.numpy(getattr(aux, name)), wanted.astype(float), rtol=1e-11, atol=1e-13
        )


@pytest.mark.parametrize(("epsilon", "robust"), SMOOTHING)
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_pair_weights(torch, jax, epsilon, robust, masked):
    rows = logps()
    mask = np.array([True, False, True, True, False, True, True]) if masked else np.full(7, True)
    options = {**SETTING, "label_smoothing": epsilon, "robust": robust}

    tensors = [torch.tensor(row, requires_grad=True) for row in rows]
    loss, aux = gamma_dpo_loss(*tensors, mask=torch.tensor(mask), **options)
    loss.backward()
    step = 0.5 * aux.pair_weights.numpy() / mask.sum()  # d gap / d logp = ± beta
    for tensor, sign in zip(tensors[:2], (-1, 1), strict=True):
        np.testing.assert_allclose(tensor.grad.numpy(), sign * step, rtol=1e-13)
    assert np.all(step[~mask] == 0)
    assert tensors[2].grad is tensors[3].grad is None  # references are constants

    def jax_loss(*arrays):
        return gamma_dpo_loss(*arrays, mask=jax.numpy.asarray(mask), **options)

    arrays = [jax.numpy.asarray(row) for row in rows]
    (value, _), gradients = jax.value_and_grad(jax_loss, argnums=(0, 1, 2, 3), has_aux=True)(
        *arrays
    )
    np.testing.assert_allclose(value, loss.item(), rtol=1e-13)
    for gradient, sign in zip(gradients, (-1, 1, 0, 0), strict=True):
        np.testing.assert_allclose(gradient, sign * step, rtol=1e-11)


@pytest.mark.parametrize("setting", [MILD, HARD], ids=["mild", "hard"])
def test_only_the_loss_has_a_gradient(torch, jax, setting):
    rows, others = logps(), np.array([1.0, -2.0])
    for impl in ("auto", "eager"):
        leaves = [torch.tensor(row, requires_grad=True) for row in [*rows, others]]
        loss, aux = gamma_dpo_loss(
            *leaves[:4], beta=0.5, **setting, context=leaves[4], impl=impl, reduction="none"
        )
        assert not any(field.requires_grad for field in aux)
        loss.sum().backward()
        assert all(leaf.grad is None for leaf in leaves[2:])

    def of(index):
        def value(*arrays):
            loss, aux = gamma_dpo_loss(*arrays[:4], beta=0.5, **setting, context=arrays[4])
            fields = [field.astype(float).sum() for field in aux]
            return [loss, *fields][index]

        return value

    arrays = [jax.numpy.asarray(row) for row in [*rows, others]]
    for index in range(10):
        gradients = jax.grad(of(index), argnums=range(5))(*arrays)
        has_one = [bool(gradient.any()) for gradient in gradients]
        assert has_one == ([True, True, False, False, False] if index == 0 else [False] * 5)


def test_references_of_inference_mode(torch):
    rows = [torch.tensor(row) for row in logps()]
    rows[0].requires_grad_()
    with torch.inference_mode():
        references = [row.clone() for row in rows[2:]]
        context = torch.tensor([1.0, 2.0], dtype=torch.float64)
    for setting in (MILD, HARD):
        settings = {"beta": 0.5, **setting}
        found, expected = (
            torch.autograd.grad(gamma_dpo_loss(*args, **settings, context=others)[0], rows[0])
            for args, others in (
                ([*rows[:2], *references], context),
                (rows, torch.tensor([1.0, 2.0], dtype=torch.float64)),
            )
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["dpo", "simpo", "gaps"])
@pytest.mark.parametrize("name", ["numpy", "auto", "eager"])
def test_no_output_shares_memory_with_another_array(torch, name, method):
    def array(values):
        return np.array(values) if name == "numpy" else torch.tensor(values)

    def plain(values):
        return values if name == "numpy" else values.detach().numpy()

    options = {**MILD, **({} if name == "numpy" else {"impl": name})}
    if method != "gaps":
        options["beta"] = 1.0
    count = {"dpo": 4, "simpo": 2, "gaps": 1}[method]
    loss_of = {"dpo": gamma_dpo_loss, "simpo": gamma_simpo_loss, "gaps": gamma_preference_loss}
    for masked in (False, True):
        rows = [array(row) for row in logps()[:count]]
        if name != "numpy":
            rows[0].requires_grad_()
        mask = array(np.arange(7) != 2) if masked else None
        weights = array(np.ones(7)) if masked else None
        loss, aux = loss_of[method](*rows, mask=mask, weights=weights, reduction="none", **options)
        inputs = [plain(each) for each in (*rows, mask, weights) if each is not None]
        outputs = [plain(each) for each in (loss, *aux)]
        for i, output in enumerate(outputs):
            assert not any(np.shares_memory(output, other) for other in inputs)
            assert not any(np.shares_memory(output, other) for other in outputs[:i])
        if name != "numpy":  # nor does autograd keep what a caller may overwrite
            expected = -aux.pair_weights.clone()
            for field in aux:
                field.zero_()
            (gradient,) = torch.autograd.grad(loss.sum(), rows[0])
            torch.testing.assert_close(gradient, expected, rtol=1e-14, atol=0)


def test_good_input_makes_no_nan_in_jax(jax):
    """Which jax_debug_nans would raise for, outside of jit."""
    rows = [jax.numpy.asarray(row) for row in logps()]
    mask, weights = jax.numpy.arange(7) != 2, jax.numpy.ones(7)
    jax.config.update("jax_debug_nans", True)
    try:
        for setting in (MILD, HARD):
            for given in (None, mask, jax.numpy.zeros(7, bool)):
                loss, aux = gamma_dpo_loss(
                    *rows, beta=0.5, **setting, mask=given, weights=weights, context=rows[0]
                )
                jax.grad(lambda x, s=setting: gamma_preference_loss(x, **s)[0])(rows[0])
                metrics(aux)
        for kind in ("robust", "conservative"):
            for match in ("value", "slope"):
                epsilon = label_smoothing_from_shift(rows[0], rows[1], kind=kind, match=match)
                shift_from_label_smoothing(rows[0], 0.01, kind=kind, match=match)
                assert epsilon.shape == (7,)
        queue_push(queue_init(rows[0], 3), rows[0])
        assert np.isfinite(loss)
    finally:
        jax.config.update("jax_debug_nans", False)


def test_an_eager_loss_takes_few_calls(torch):
    rows = [torch.tensor(row) for row in logps(256)]
    rows = [row.float().requires_grad_(i < 2) for i, row in enumerate(rows)]
    package, calls = str(Path(gamma_loss.__file__).parent), collections.Counter()

    def count(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(package):
            calls[f"{Path(code.co_filename).name}:{code.co_name}"] += 1

    for watch in (None, None, count):
        sys.setprofile(watch)
        try:
            gamma_dpo_loss(*rows, beta=0.1, **MILD)[0].backward()
        finally:
            sys.setprofile(None)
    assert 0 < sum(calls.values()) <= 90, calls.most_common()


@pytest.mark.parametrize(("epsilon", "robust"), SMOOTHING)
def test_gradcheck_with_the_margins_held(torch, epsilon, robust):
    # gradcheck differentiates numerically: the margins must not move, so they are given.
    gaps = torch.tensor(logps()[0] - logps()[1], requires_grad=True)
    margins = solve_margins(gaps.detach(), gamma0=2.0, tau=1.5).margins
    assert torch.autograd.gradcheck(
        lambda g: preference_loss(g, margins, label_smoothing=epsilon, robust=robust), gaps
    )
    ours = torch.autograd.grad(
        gamma_preference_loss(gaps, gamma0=2.0, tau=1.5, label_smoothing=epsilon, robust=robust)[0],
        gaps,
    )[0]
    held = torch.autograd.grad(
        preference_loss(gaps, margins, label_smoothing=epsilon, robust=robust).mean(), gaps
    )[0]
    torch.testing.assert_close(ours, held, rtol=1e-14, atol=0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("gamma0", "tau"), [(4.0, 10.0), (3.0, 0.5), (0.5, 0.02)])
def test_envelope_theorem(gamma0, tau, seed):
    # dF*/dg = -σ(γ - g) / N at the minimiser: so the uncentred loss's gradient, margins held, is
    # that of the minimised objective. F* comes from the oracle, by central differences.
    gaps = np.random.default_rng(seed).normal(size=5).astype(np.longdouble) * 2
    _, aux = gamma_preference_loss(gaps.astype(float), gamma0=gamma0, tau=tau)
    h = np.longdouble(1e-4)

    def minimum(g):
        return oracles.objective(oracles.margins(g, gamma0, tau)[0] / gamma0, g, gamma0, tau)

    for i in range(5):
        move = np.eye(5, dtype=np.longdouble)[i] * h
        slope = (minimum(gaps + move) - minimum(gaps - move)) / (2 * h)
        # h² times a third derivative of order (1 + κ)², and the oracle's 1e-17 over h
        tolerance = h**2 * (1 + gamma0**2 / tau) ** 2
        assert abs(float(slope) + aux.pair_weights[i] / 5) <= tolerance


@given(pools(), gamma0s)
def test_large_tau_gives_dpo_and_simpo(gaps, gamma0):
    centred, _ = gamma_preference_loss(gaps, gamma0=gamma0, tau=1e12, centered=True)
    plain, _ = gamma_preference_loss(gaps, gamma0=gamma0, tau=1e12)
    # the margin is off by at most γ0 (e^a - 1), and the loss has a slope of at most 1
    slack = gamma0 * math.expm1(gamma0 / 1e12) + 8 * EPS * (1 + gamma0 + np.abs(gaps).max())
    assert abs(centred - oracles.dpo(gaps).mean()) <= slack
    assert abs(plain - oracles.simpo(gaps, gamma0).mean()) <= slack


def test_reductions_over_unmasked_pairs(library):
    rows = [library.array(row) for row in logps()]
    keep = np.array([True, True, False, True, False, True, True])
    mask = library.array(keep, "bool")
    single, aux = gamma_dpo_loss(*rows, **SETTING, mask=mask, reduction="none")
    total, _ = gamma_dpo_loss(*rows, **SETTING, mask=mask, reduction="sum")
    mean, _ = gamma_dpo_loss(*rows, **SETTING, mask=mask)
    kept = [library.array(row[keep]) for row in logps()]
    alone, alone_aux = gamma_dpo_loss(*kept, **SETTING, reduction="none")
    np.testing.assert_allclose(library.numpy(single)[keep], library.numpy(alone), rtol=1e-13)
    assert np.all(library.numpy(single)[~keep] == 0)
    np.testing.assert_allclose(float(total), library.numpy(alone).sum(), rtol=1e-13)
    np.testing.assert_allclose(float(mean), library.numpy(alone).mean(), rtol=1e-13)
    np.testing.assert_allclose(
        library.numpy(aux.pair_weights)[keep], library.numpy(alone_aux.pair_weights), rtol=1e-13
    )


@given(pools(), pools(), gamma0s, taus)
def test_context_carries_no_loss(gaps, context, gamma0, tau):
    loss, aux = gamma_preference_loss(gaps, gamma0=gamma0, tau=tau, context=context)
    margins = solve_margins(gaps, gamma0=gamma0, tau=tau, context=context).margins
    np.testing.assert_array_equal(aux.margins, margins)
    assert loss == pytest.approx(preference_loss(gaps, margins).mean(), rel=1e-15)


def test_every_pair_masked_gives_zero_loss_and_gradient(torch):
    rows = [torch.tensor(row, requires_grad=True) for row in logps(3)]
    loss, aux = gamma_dpo_loss(*rows, **SETTING, mask=torch.zeros(3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert all(torch.equal(row.grad, torch.zeros(3, dtype=row.dtype)) for row in rows[:2])
    assert aux.margins.tolist() == [2.0, 2.0, 2.0]
    assert all(bool(torch.isfinite(field).all()) for field in aux)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_pair_that_is_not_finite_spoils_only_itself(torch, bad):
    rows = [torch.tensor(row) for row in logps(4)]
    rows[0][1] = bad
    rows = [row.requires_grad_() for row in rows]
    losses, aux = gamma_dpo_loss(*rows, **SETTING, reduction="none")
    mean, _ = gamma_dpo_loss(*rows, **SETTING)
    others = [0, 2, 3]
    alone, alone_aux = gamma_dpo_loss(*[row[others] for row in rows], **SETTING, reduction="none")
    assert not math.isfinite(losses[1].item())
    assert not math.isfinite(mean.item())
    torch.testing.assert_close(losses[others], alone, rtol=1e-13, atol=0)
    torch.testing.assert_close(aux.margins[others], alone_aux.margins, rtol=1e-13, atol=0)
    gradient = torch.autograd.grad(mean, rows[1])[0]
    torch.testing.assert_close(gradient[others], 0.5 * alone_aux.pair_weights / 4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_masked_pair_that_is_not_finite_leaves_no_trace(torch, jax, bad):
    rows = [torch.tensor(row) for row in logps(4)]
    rows[0][1] = bad
    rows = [row.requires_grad_() for row in rows]
    loss, aux = gamma_dpo_loss(*rows, **SETTING, mask=torch.tensor([True, False, True, True]))
    loss.backward()
    assert math.isfinite(loss.item())
    assert all(bool(torch.isfinite(row.grad).all()) for row in rows[:2])
    assert aux.pair_weights[1] == 0
    assert aux.margins[1] == 2.0
    gaps, mask = jax.numpy.asarray([1.0, bad, -1.0]), jax.numpy.asarray([True, False, True])
    for setting in (MILD, HARD):
        slopes = jax.grad(lambda g, s=setting: gamma_preference_loss(g, mask=mask, **s)[0])(gaps)
        assert np.isfinite(slopes).all()
        assert slopes[1] == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_upcast_before_the_first_subtraction(torch, dtype):
    dtype = getattr(torch, dtype)
    # Both are exact in half precision; their difference's product with beta is not.
    chosen, rejected = torch.tensor([-256.0], dtype=dtype), torch.tensor([-258.0], dtype=dtype)
    loss, aux = gamma_simpo_loss(chosen, rejected, beta=0.1001, gamma0=1.0, tau=1.0)
    assert loss.dtype == aux.margins.dtype == torch.float32
    torch.testing.assert_close(aux.reward_gaps, torch.tensor([0.2002]), rtol=1e-4, atol=0)


# -- weights


@pytest.mark.parametrize("setting", [MILD, HARD], ids=["mild", "hard"])
def test_whole_weights_are_repeated_pairs(library, setting):
    gaps, counts = np.array([1.0, -2.0, 0.5, 9.0, 3.0]), np.array([2, 1, 0, 3, 1])
    mask, whole = np.array([True] * 4 + [False]), np.repeat([1.0, -2.0, 9.0], [2, 1, 3])
    options = {"label_smoothing": 0.1, "centered": True, **setting}

    def losses(reduction, factor=1.0):
        return gamma_preference_loss(
            library.array(gaps),
            weights=library.array(factor * counts),
            mask=library.array(mask, "bool"),
            reduction=reduction,
            **options,
        )

    mean, _ = gamma_preference_loss(whole, **options)
    single, aux = gamma_preference_loss(whole, reduction="none", **options)
    kept = counts * mask
    assert float(losses("mean")[0]) == pytest.approx(float(mean), rel=1e-13)
    assert float(losses("mean", 1 / 3)[0]) == pytest.approx(float(mean), rel=1e-13)
    assert float(losses("sum")[0]) == pytest.approx(float(single.sum()), rel=1e-13)
    assert float(losses("sum", 1 / 3)[0]) == pytest.approx(float(single.sum()) / 3, rel=1e-13)
    found, of_weights = losses("none")
    for name, ours, theirs in (
        ("loss", found, single),
        ("pair_weights", of_weights.pair_weights, aux.pair_weights),
    ):
        first = np.array([0, 2, 3])
        ours = library.numpy(ours)
        np.testing.assert_allclose(ours[[0, 1, 3]], kept[[0, 1, 3]] * theirs[first], 1e-12, 0, name)
        assert ours[2] == ours[4] == 0
    assert library.numpy(of_weights.mask).tolist() == [True, True, False, True, False]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients_are_of_the_weighted_loss(torch, jax, reduction):
    gaps, weights = np.array([1.0, -2.0, np.nan, 9.0]), np.array([2.0, 0.5, 0.0, 1.5])
    leaf = torch.tensor(gaps, requires_grad=True)
    options = {"reduction": reduction, **MILD}
    loss, aux = gamma_preference_loss(leaf, weights=torch.tensor(weights), **options)
    loss.sum().backward()
    expected = -aux.pair_weights / (4 if reduction == "mean" else 1)
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-14, atol=0)
    assert leaf.grad[2] == 0

    def value(gaps):
        return gamma_preference_loss(gaps, weights=jax.numpy.asarray(weights), **options)[0].sum()

    np.testing.assert_allclose(jax.grad(value)(jax.numpy.asarray(gaps)), expected, rtol=1e-12)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_a_weight_that_is_no_weight(library, bad):
    gaps, weights = library.array([1.0, -2.0, 0.5]), library.array([1.0, bad, 2.0])
    if library.name != "jax":  # where the values are free to read
        with pytest.raises(
            ValueError, match=r"weights must be finite and >= 0, got .* the weight 0"
        ):
            gamma_preference_loss(gaps, weights=weights, **MILD)
        with pytest.raises(ValueError, match="weights must be finite and >= 0"):
            solve_margins(gaps, weights=weights, **MILD)
        return
    losses, _ = gamma_preference_loss(gaps, weights=weights, reduction="none", **MILD)
    assert np.isnan(losses).tolist() == [False, True, False]
    assert np.isnan(gamma_preference_loss(gaps, weights=weights, **MILD)[0])


def test_modules_take_weights_and_queues_hold_gaps_of_weight_1(torch):
    gaps, weights = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([2.0, 0.0, 1.0])
    module = gamma_loss.GammaPreferenceLoss(queue_size=4, **MILD)
    first, _ = module(gaps, weights=weights)
    torch.testing.assert_close(first, gamma_preference_loss(gaps, weights=weights, **MILD)[0])
    queue = GapQueue(4)
    queue.push(gaps, torch.tensor([True, False, True]))
    again, _ = module(gaps, weights=weights)
    expected, _ = gamma_preference_loss(gaps, weights=weights, context=queue.context(), **MILD)
    torch.testing.assert_close(again, expected)
