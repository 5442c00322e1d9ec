"""Every transformation of torch gives what plain autograd does with the margins held constant."""

import numpy as np
import pytest
from strategies import HARD, MILD

from gamma_loss import gamma_dpo_loss, preference_loss, solve_margins

torch = pytest.importorskip("torch")
func = pytest.importorskip("torch.func")

# From torch, which makes its decompositions at the first forward derivative.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

BATCH = torch.tensor(np.random.default_rng(0).normal(size=(3, 6)) * 3)
AT, ALONG, OTHER = BATCH
CASES = [("auto", MILD), ("auto", HARD), ("triton", HARD)]
cases = pytest.mark.parametrize(("impl", "setting"), CASES, ids=["mild", "hard", "triton"])
slope, hessian = torch.autograd.functional.jacobian, torch.autograd.functional.hessian


@pytest.fixture(autouse=True)
def needed(request):
    if "triton" in request.node.name:
        pytest.importorskip("triton", minversion="3.5")


def the_loss(impl, setting):
    def loss(x):
        zero = torch.zeros_like(x)
        return gamma_dpo_loss(x, -0.3 * x, zero, zero, beta=0.7, impl=impl, **setting)[0]

    return loss


def held(setting, at):
    """The loss with the margins that belong to a point."""

    def gaps(x):
        return 0.7 * (x - -0.3 * x)

    shifts = solve_margins(gaps(at), impl="eager", **setting).margins - setting["gamma0"]
    return lambda x: preference_loss(gaps(x), shifts).mean()


def along(loss, order):
    """Derivatives by `create_graph`, each along the same direction."""
    x = AT.clone().requires_grad_()
    value = loss(x)
    for _ in range(order):
        (slopes,) = torch.autograd.grad(value, x, create_graph=True)
        value = (slopes * ALONG).sum()
    return value.detach()


def third(loss, at, step=1e-4):
    """The third derivative along a direction, by differences of the second."""
    ahead, behind = (hessian(loss, at + sign * step * ALONG) for sign in (1, -1))
    return ALONG @ ((ahead - behind) / (2 * step)) @ ALONG


def forward_mode(loss):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(AT, ALONG)
        return torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent


def traced(loss, mode="real"):
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(loss, tracing_mode=mode)(OTHER)(AT)


def compiled(loss):
    torch.compiler.reset()
    return torch.compile(func.grad(loss), backend="aot_eager", fullgraph=True)(AT)


def value(loss, at):
    return loss(at)


# What a transformation gives, and what it has to be: of a point, or of a batch for vmap.
TRANSFORMATIONS = {
    "vmap": (lambda loss: func.vmap(loss)(BATCH), value),
    "vmap of grad": (lambda loss: func.vmap(func.grad(loss))(BATCH), slope),
    "jvp": (lambda loss: func.jvp(loss, (AT,), (ALONG,))[1], lambda *each: slope(*each) @ ALONG),
    "jacfwd": (lambda loss: func.jacfwd(loss)(AT), slope),
    "hessian": (lambda loss: func.hessian(loss)(AT), hessian),
    "functionalize of grad": (lambda loss: func.functionalize(func.grad(loss))(AT), slope),
    "forward mode": (forward_mode, lambda *each: slope(*each) @ ALONG),
    "make_fx": (traced, value),
    "symbolic make_fx": (lambda loss: traced(loss, "symbolic"), value),
    "create_graph": (lambda loss: along(loss, 2), lambda *each: ALONG @ hessian(*each) @ ALONG),
    "create_graph twice": (lambda loss: along(loss, 3), third),
    "grad in a compiled graph": (compiled, slope),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
@cases
def test_it_is_what_plain_autograd_says(impl, setting, name):
    transform, plain = TRANSFORMATIONS[name]
    found = transform(the_loss(impl, setting))
    if name.startswith("vmap"):
        expected = torch.stack([plain(held(setting, at), at) for at in BATCH])
    else:
        expected = plain(held(setting, AT), AT)
    assert expected.abs().max() > 1e-4
    close = {"rtol": 1e-5, "atol": 1e-8} if name == "create_graph twice" else {}
    torch.testing.assert_close(found, expected, **close)


@cases
def test_vmap_over_gaps_and_masks(impl, setting):
    def solve(gaps, mask, impl=impl):
        return solve_margins(gaps, mask=mask, impl=impl, **setting).margins

    mapped = torch.vmap(solve)(BATCH, BATCH > -2)
    expected = torch.stack([solve(gaps, gaps > -2, "eager") for gaps in BATCH])
    torch.testing.assert_close(mapped, expected, rtol=1e-10, atol=1e-12)


@cases
def test_grad_and_value_with_all_that_is_known(impl, setting):
    logps = torch.cat([BATCH, ALONG[None] ** 2]).unbind()
    options = {"beta": 0.1, **setting}
    gradient, (value, aux) = func.grad_and_value(
        lambda *logps: gamma_dpo_loss(*logps, impl=impl, **options), has_aux=True
    )(*logps)
    torch.testing.assert_close(value, gamma_dpo_loss(*logps, impl="eager", **options)[0])
    torch.testing.assert_close(gradient, -0.1 * aux.pair_weights / 6)


def test_a_second_derivative_of_a_compiled_loss_is_refused():
    torch.compiler.reset()
    loss = torch.compile(the_loss("auto", MILD), backend="aot_eager")
    with pytest.raises(RuntimeError):
        along(loss, 2)
