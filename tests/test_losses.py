"""The losses: values against the papers' formulas, gradients, reductions, limits, weights."""

import functools
import math
import sys
from itertools import product
from pathlib import Path

import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import HARD, MILD, gamma0s, pools, taus

import gamma_loss
from gamma_loss import gamma_dpo_loss, gamma_preference_loss, preference_loss, solve_margins

EPS = np.finfo(np.float64).eps
SMOOTHING = [(0.0, False), (0.1, False), (0.0, True), (0.2, True)]
LOSSES = {1: gamma_preference_loss, 2: gamma_loss.gamma_simpo_loss, 4: gamma_dpo_loss}
MILD_AND_HARD = pytest.mark.parametrize("setting", [MILD, HARD], ids=["mild", "hard"])


def logps(size=7, seed=0):
    """Log-probabilities: (policy chosen, policy rejected, reference chosen, reference rejected)."""
    return np.random.default_rng(seed).normal(size=(4, size)) * 3 - 20


@given(pools(), st.floats(-50, 50), st.floats(0, 0.49), st.booleans())
def test_preference_loss_is_the_papers_formula(gaps, margin, epsilon, robust):
    kind = {"robust": True} if robust else {}  # and by default not
    losses = preference_loss(gaps, margin, label_smoothing=epsilon, **kind)
    formula = oracles.rdpo if robust else oracles.cdpo
    # a few roundings of terms as large as |g - margin|, divided by 1 - 2ε when robust
    scale = (1 + np.abs(gaps) + abs(margin)) / (1 - 2 * epsilon)
    assert np.all(np.abs(losses - formula(gaps, epsilon, margin)) <= 8 * EPS * scale)


def test_preference_loss_keeps_small_losses_and_takes_arrays_of_margins(library):
    gaps, margins = [[40.0, -800.0], [1.0, 700.0]], [[0.0, 0.0], [0.5, 0.0]]
    losses = library.numpy(preference_loss(library.array(gaps), library.array(margins)))
    expected = oracles.simpo(gaps, np.array(margins)).astype(float)
    np.testing.assert_allclose(losses, expected, rtol=1e-15)


@pytest.mark.parametrize("method", ["dpo", "simpo", "gaps"])
def test_values_and_aux_in_every_library(library, method):
    rows = logps()
    given = {"dpo": rows, "simpo": rows[:2], "gaps": rows[:1] - rows[1]}[method]
    beta, loss_of = 1.0 if method == "gaps" else 0.5, LOSSES[len(given)]
    chosen, rejected, *references = (*given, np.zeros(7)) if method == "gaps" else given
    if references:
        chosen, rejected = chosen - references[0], rejected - references[1]
    chosen, rejected = beta * chosen, beta * rejected
    gaps = chosen - rejected
    margins = oracles.margins(gaps, 2.0, 1.5)[0]
    for (epsilon, robust), centered in zip(SMOOTHING, (True, False, False, True), strict=True):
        options = {"centered": centered, "label_smoothing": epsilon}
        options |= {"robust": True} if robust else {}  # and by default not
        options |= {"gamma0": 2.0, "tau": 1.5} | ({"beta": beta} if method != "gaps" else {})
        loss, aux = loss_of(*map(library.array, given), **options)
        used = margins - 2.0 if centered else margins
        expected = (oracles.rdpo if robust else oracles.cdpo)(gaps, epsilon, used)
        np.testing.assert_allclose(float(loss), float(expected.mean()), rtol=1e-13)
        # the derivative of the smoothed formula, written out
        p, sign = oracles.sigmoid(used - gaps), 1 if robust else -1
        weight = ((1 - epsilon) * p + sign * epsilon * (1 - p)) / (1 - 2 * epsilon * robust)
        for name, wanted in {
            "margins": margins,
            "shifts": margins - 2.0,
            "reward_gaps": gaps,
            "chosen_rewards": chosen,
            "rejected_rewards": rejected,
            "pair_weights": weight,
            "mask": np.ones(7),
        }.items():
            found = library.numpy(getattr(aux, name))
            np.testing.assert_allclose(found, wanted.astype(float), rtol=1e-11, atol=1e-13)


# -- gradients


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients_are_pair_weights(torch, jax, reduction):
    """Of a masked pair they are 0, whatever its gap; so are those of the references."""
    rows, settings = logps(), (MILD, HARD, MILD, HARD)
    rows[0][1], rows[0][4] = math.nan, math.inf
    mask = np.array([True, False, True, True, False, True, True])
    for i, (epsilon, robust) in enumerate(SMOOTHING):
        weighted = i in (1, 2)
        weights = np.array([2.0, 1.0, 0.5, 0.0, 1.0, 1.5, 1.0]) if weighted else np.ones(7)
        options = {"label_smoothing": epsilon, "robust": robust, "reduction": reduction}
        options |= {"beta": 0.5, **settings[i]}
        given = {"mask": mask} | ({"weights": weights} if weighted else {})

        def total(*logps, make, options=options, given=given):
            arrays = {name: make(each) for name, each in given.items()}
            loss, aux = gamma_dpo_loss(*logps, **arrays, **options)
            return loss.sum(), aux

        tensors = [torch.tensor(row, requires_grad=True) for row in rows]
        loss, aux = total(*tensors, make=torch.tensor)
        loss.backward()
        step = 0.5 * aux.pair_weights.numpy()  # d gap / d logp = ± beta
        step = step / (weights @ mask if reduction == "mean" else 1)
        for tensor, sign in zip(tensors[:2], (-1, 1), strict=True):
            np.testing.assert_allclose(tensor.grad.numpy(), sign * step, rtol=1e-13)
        assert np.all((step != 0) == mask & (weights > 0))
        assert aux.margins[1] == aux.margins[4] == 4.0
        assert tensors[2].grad is tensors[3].grad is None

        of_jax = functools.partial(total, make=jax.numpy.asarray)
        gradients, _ = jax.grad(of_jax, argnums=(0, 1, 2, 3), has_aux=True)(
            *map(jax.numpy.asarray, rows)
        )
        for gradient, sign in zip(gradients, (-1, 1, 0, 0), strict=True):
            np.testing.assert_allclose(gradient, sign * step, rtol=1e-11)


@MILD_AND_HARD
def test_a_masked_pair_leaves_no_nan_in_a_gradient_and_another_only_its_own(torch, setting):
    gaps = torch.tensor([1.0, math.nan, -1.0], dtype=torch.float64, requires_grad=True)
    kept = gaps.detach().isfinite()

    def loss(gaps, mask):
        return gamma_preference_loss(gaps, mask=mask, **setting)[0]

    (slopes,) = torch.autograd.grad(loss(gaps, kept), gaps)
    assert slopes.isfinite().all()
    assert slopes[1] == 0
    found = torch.func.grad(loss)(gaps.detach(), kept)
    np.testing.assert_allclose(found, slopes, rtol=1e-11)
    (found,) = torch.autograd.grad(loss(gaps, kept & False), gaps)
    assert found.tolist() == [0.0, 0.0, 0.0]
    unmasked, aux = gamma_preference_loss(gaps, **setting)
    assert unmasked.isnan()
    (found,) = torch.autograd.grad(unmasked, gaps)
    np.testing.assert_allclose(found[kept], -aux.pair_weights[kept] / 3, rtol=1e-12)


@MILD_AND_HARD
def test_only_the_loss_has_a_gradient(torch, jax, setting):
    """No field of aux, no reference and no context has one, and no margin."""
    arrays = [*logps(), np.array([1.0, -2.0])]

    def loss_of(*arrays, **options):
        return gamma_dpo_loss(*arrays[:4], context=arrays[4], beta=0.5, **setting, **options)

    for impl in ("auto", "eager"):
        leaves = [torch.tensor(each, requires_grad=True) for each in arrays]
        loss, aux = loss_of(*leaves, impl=impl, reduction="none")
        assert not any(field.requires_grad for field in aux)
        loss.sum().backward()
        assert all(leaf.grad is None for leaf in leaves[2:])
        solution = solve_margins(leaves[0], context=leaves[4], impl=impl, **setting)
        assert not any(field.requires_grad for field in solution)

    def sums(*arrays):
        loss, aux = loss_of(*arrays)
        return jax.numpy.stack([loss, *(field.astype(float).sum() for field in aux)])

    _, pull = jax.vjp(sums, *map(jax.numpy.asarray, arrays))
    slopes = pull((jax.numpy.arange(10) == 0) + 0.0)
    assert [bool(slope.any()) for slope in slopes] == [True, True, False, False, False]
    assert not any(slope.any() for slope in pull(jax.numpy.arange(10.0)))  # of all but the loss


@MILD_AND_HARD
def test_references_of_inference_mode(torch, setting):
    rows, context = [torch.tensor(row) for row in logps()], torch.tensor([1.0, 2.0]).double()
    rows[0].requires_grad_()
    with torch.inference_mode():
        inferred = [each.clone() for each in (*rows[2:], context)]
    slopes = []
    for *references, others in (inferred, (*rows[2:], context)):
        loss, _ = gamma_dpo_loss(*rows[:2], *references, beta=0.5, context=others, **setting)
        slopes += torch.autograd.grad(loss, rows[0])
    torch.testing.assert_close(*slopes, rtol=0, atol=0)


def test_the_uncentred_gradient_is_that_of_the_minimised_objective():
    # dF*/dg = -σ(γ - g) / N at the minimiser (the envelope theorem). F* comes from the oracle, by
    # central differences.
    for seed, (gamma0, tau) in enumerate([(4.0, 10.0), (3.0, 0.5), (0.5, 0.02)]):
        gaps = np.random.default_rng(seed).normal(size=5).astype(np.longdouble) * 2
        _, aux = gamma_preference_loss(gaps.astype(float), gamma0=gamma0, tau=tau)
        h = np.longdouble(1e-4)

        def minimum(g, gamma0=gamma0, tau=tau):
            return oracles.objective(oracles.margins(g, gamma0, tau)[0] / gamma0, g, gamma0, tau)

        for i in range(5):
            move = np.eye(5, dtype=np.longdouble)[i] * h
            slope = (minimum(gaps + move) - minimum(gaps - move)) / (2 * h)
            # h² times a third derivative of order (1 + κ)², and the oracle's 1e-17 over h
            tolerance = h**2 * (1 + gamma0**2 / tau) ** 2
            assert abs(float(slope) + aux.pair_weights[i] / 5) <= tolerance


# -- what surrounds a call


@pytest.mark.parametrize("name", ["numpy", "auto", "eager"])
def test_no_output_shares_memory_with_another_array(torch, name):
    is_numpy = name == "numpy"
    array = np.array if is_numpy else torch.tensor
    options = {**MILD, **({} if is_numpy else {"impl": name})}
    for (count, loss_of), masked in product(LOSSES.items(), (False, True)):
        rows, beta = [array(row) for row in logps()[:count]], {"beta": 1.0} if count > 1 else {}
        if not is_numpy:
            rows[0].requires_grad_()
        inputs = {"mask": array(np.arange(7) != 2), "weights": array(np.ones(7))} if masked else {}
        loss, aux = loss_of(*rows, **inputs, reduction="none", **options, **beta)
        plain = np.asarray if is_numpy else lambda each: each.detach().numpy()
        others = [plain(each) for each in (*rows, *inputs.values())]
        for output in map(plain, (loss, *aux)):
            assert not any(np.shares_memory(output, other) for other in others)
            others.append(output)
        if not is_numpy:  # nor does autograd keep what a caller may overwrite
            expected = -aux.pair_weights.clone()
            for field in aux:
                field.zero_()
            (gradient,) = torch.autograd.grad(loss.sum(), rows[0])
            torch.testing.assert_close(gradient, expected, rtol=1e-14, atol=0)


def test_good_input_makes_no_nan_in_jax(jax):
    """Which jax_debug_nans would raise for, outside of jit."""
    rows, mask = [jax.numpy.asarray(row) for row in logps()], jax.numpy.arange(7) != 2
    slopes_of = jax.value_and_grad(gamma_preference_loss, has_aux=True)
    with jax.debug_nans(True):
        for flags in (mask, mask & False):
            options = {"mask": flags, "weights": jax.numpy.ones(7), "context": rows[0], **MILD}
            (loss, aux), _ = slopes_of(rows[0], **options)
            gamma_loss.metrics(aux)
            assert np.isfinite(loss)
        for kind, match in product(("robust", "conservative"), ("value", "slope")):
            epsilon = gamma_loss.label_smoothing_from_shift(*rows[:2], kind=kind, match=match)
            gamma_loss.shift_from_label_smoothing(rows[0], epsilon, kind=kind, match=match)
        gamma_loss.queue_push(gamma_loss.queue_init(rows[0], 3), rows[0])


def test_an_eager_loss_takes_few_calls(torch):
    rows = [torch.tensor(row) for row in logps(256)]
    rows = [row.float().requires_grad_(i < 2) for i, row in enumerate(rows)]
    package, calls = str(Path(gamma_loss.__file__).parent), []

    def count(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(package):
            calls.append(frame.f_code)

    for watch in (None, None, count):
        sys.setprofile(watch)
        try:
            gamma_dpo_loss(*rows, beta=0.1, **MILD)[0].backward()
        finally:
            sys.setprofile(None)
    assert 0 < len(calls) <= 90, calls


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_upcast_before_the_first_subtraction(torch, jax, dtype):
    # All are exact in half precision; their differences' products with beta are not.
    rows = np.array([[-256.0, -256.0], [-258.0, -260.0]])
    gaps = 0.1001 * (rows[0] - rows[1])
    expected = oracles.margins(gaps, 1.0, 1.0)[0].astype(float)
    for library, make in ((torch, torch.tensor), (jax.numpy, jax.numpy.asarray)):
        chosen, rejected = (make(row, dtype=getattr(library, dtype)) for row in rows)
        loss, aux = LOSSES[2](chosen, rejected, beta=0.1001, gamma0=1.0, tau=1.0)
        assert loss.dtype == aux.margins.dtype == library.float32
        np.testing.assert_allclose(np.asarray(aux.reward_gaps), gaps, rtol=1e-6)
        np.testing.assert_allclose(np.asarray(aux.margins), expected, rtol=1e-5)


# -- limits, reductions, contexts and weights


@given(pools(), gamma0s)
def test_large_tau_gives_dpo_and_simpo(gaps, gamma0):
    centred, _ = gamma_preference_loss(gaps, gamma0=gamma0, tau=1e12, centered=True)
    plain, _ = gamma_preference_loss(gaps, gamma0=gamma0, tau=1e12)
    # the margin is off by at most γ0 (e^a - 1), and the loss has a slope of at most 1
    slack = gamma0 * math.expm1(gamma0 / 1e12) + 8 * EPS * (1 + gamma0 + np.abs(gaps).max())
    assert abs(centred - oracles.dpo(gaps).mean()) <= slack
    assert abs(plain - oracles.simpo(gaps, gamma0).mean()) <= slack


@given(pools(), pools(), gamma0s, taus)
def test_context_carries_no_loss(gaps, context, gamma0, tau):
    loss, aux = gamma_preference_loss(gaps, gamma0=gamma0, tau=tau, context=context)
    margins = solve_margins(gaps, gamma0=gamma0, tau=tau, context=context).margins
    np.testing.assert_array_equal(aux.margins, margins)
    assert loss == pytest.approx(preference_loss(gaps, margins).mean(), rel=1e-15)


def test_reductions_are_over_pairs_that_take_part_and_a_weight_is_a_repetition(library):
    gaps, counts = np.array([1.0, -2.0, 0.5, 9.0, 4.0, 2.0, 3.0]), np.array([2, 1, 0, 3, 1, 1, 0])
    whole, kept, mask = np.repeat(gaps, counts), counts > 0, np.arange(7) < 6
    for setting, factor in ((MILD, 1.0), (HARD, 1 / 3)):
        options = {"label_smoothing": 0.1, "centered": True, **setting}
        lose = functools.partial(gamma_preference_loss, library.array(gaps), **options)
        weights = library.array(factor * np.where(mask, counts, 5))
        weighted = functools.partial(lose, mask=library.array(mask, "bool"), weights=weights)
        single, known = gamma_preference_loss(whole, reduction="none", **options)
        for reduction, expected in (("mean", single.mean()), ("sum", factor * single.sum())):
            found = float(weighted(reduction=reduction)[0])
            assert found == pytest.approx(float(expected), rel=1e-13)
        losses, aux = weighted(reduction="none")
        for ours, theirs in ((losses, single), (aux.pair_weights, known.pair_weights)):
            ours = library.numpy(ours)
            each = np.repeat(ours[kept] / counts[kept], counts[kept])
            np.testing.assert_allclose(each, factor * theirs, rtol=1e-12)
            assert not ours[~kept].any()
        assert library.numpy(aux.mask).tolist() == kept.tolist()
        masked, aux = lose(mask=library.array(kept, "bool"))
        alone, _ = gamma_preference_loss(gaps[kept], **options)
        assert float(masked) == pytest.approx(float(alone), rel=1e-13)
        assert not library.numpy(aux.pair_weights)[~kept].any()
