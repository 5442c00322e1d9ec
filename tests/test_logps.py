"""Log-probabilities of responses against a plain loop over tokens, and what they need of memory."""

import math

import mpmath
import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from gamma_loss import sequence_logps  # noqa: E402
from gamma_loss.torch import logps as module  # noqa: E402

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def by_formula(logits, labels, counts, average, shift, slopes):
    """Sums of log-probabilities, and slope · (one-hot - softmax) at each token that counts."""
    x, gradient = logits.double().numpy().astype(oracles.Real), np.zeros(logits.shape)
    first = int(shift)
    x, labels, counts = x[:, : x.shape[1] - first], labels[:, first:], counts[:, first:].numpy()
    x = x - x.max(2, keepdims=True, initial=-np.inf)
    logps = x - np.log(np.exp(x).sum(2, keepdims=True))
    hot = np.eye(x.shape[2])[np.where(counts, labels, 0)]
    shares = np.maximum(counts.sum(1), 1) if average else np.ones(len(x))
    terms = (hot - np.exp(logps)) * counts[:, :, None] * (slopes / shares)[:, None, None]
    gradient[:, : x.shape[1]] = terms
    return (((hot * logps).sum(2) * counts).sum(1) / shares).astype(float), gradient


def token_error(logits):
    """Bound of the rounding error of a token's log-probability and of the softmax, in units u.

    The exponent x - max is off by R u with R the range of the logits, each exponential by 4 u, a
    sum of V positive ones by V u, its logarithm by 2 u log V, and two subtractions by R + log V.
    """
    vocabulary, span = logits.shape[2], float(logits.max() - logits.min())
    return vocabulary + 4 + 3 * span + 4 * math.log(vocabulary + 1)


def example(shape=(3, 7, 11), dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    labels = torch.randint(shape[2], shape[:2], generator=generator)
    mask = torch.rand(shape[:2], generator=generator) > 0.4
    return logits.requires_grad_(), labels, mask


def gradient(logps, logits, slopes=None):
    slopes = torch.ones_like(logps) if slopes is None else slopes
    return torch.autograd.grad(logps, logits, slopes)[0]


def allocations(call):
    """Bytes of each allocation of a call on the CPU, and the most that it holds at once."""
    with torch.profiler.profile(profile_memory=True) as profile:
        kept = call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    del kept
    return [n for n in changes if n > 0], max(np.cumsum(changes))


@given(
    shape=st.tuples(st.integers(0, 4), st.integers(1, 6), st.integers(1, 9)),
    dtype=st.sampled_from(DTYPES),
    chunk=st.integers(1, 200),
    layout=st.sampled_from(["whole", "part", "transposed"]),
    ignore=st.sampled_from([-100, 3]),
    average=st.booleans(),
    shift=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_value_and_gradient(shape, dtype, chunk, layout, ignore, average, shift, masked, seed):
    """Also where nothing counts: masks that leave a response empty, or one label and a shift."""
    logits, labels, mask = example(shape, dtype, seed)
    values = logits.detach()
    if layout == "part":
        logits = torch.cat([values, values], 1)[:, : shape[1]].requires_grad_()
    elif layout == "transposed":
        logits = values.transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    generator = torch.Generator().manual_seed(seed)
    labels = torch.where(torch.rand(shape[:2], generator=generator) > 0.2, labels, ignore)
    counts = (labels != ignore) & (mask if masked else True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CPU_CHUNK", chunk)
        logps = sequence_logps(
            logits, labels, mask if masked else None, average, shift=shift, ignore_index=ignore
        )
        slopes = torch.linspace(-2, 2, shape[0], dtype=logps.dtype)
        found = gradient(logps, logits, slopes)
    assert logps.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert logps.shape == shape[:1]
    assert (found.dtype, found.shape) == (dtype, shape)
    if shape[0] == 0:
        return
    each = token_error(values) * torch.finfo(logps.dtype).eps / 2
    most = float(values.max() - values.min()) + math.log(shape[2])  # of a token's |log-probability|
    # The tokens' errors, and those of their sum.
    tolerance = shape[1] * (each + shape[1] * most * torch.finfo(logps.dtype).eps)
    expected, slope = by_formula(values, labels, counts, average, shift, slopes.numpy())
    np.testing.assert_allclose(logps.detach().numpy(), expected, rtol=0, atol=tolerance)
    # The gradient is rounded once more, to the dtype of the logits (or to its smallest numbers).
    info, atol = torch.finfo(dtype), 4 * each + torch.finfo(dtype).tiny
    np.testing.assert_allclose(found.double().numpy(), slope, rtol=info.eps, atol=atol)


def test_extreme_logits_against_many_digits_and_tokens_that_are_ruled_out():
    logits = torch.tensor([[[1e4, -1e4, 9990.0, -torch.inf], [-3e38, -3e38, 0.0, 1.0]]])
    for labels in ([2, 3], [1, 2]):
        with mpmath.workdps(60):
            each = [
                mpmath.mpf(row[y]) - mpmath.log(sum(mpmath.exp(x) for x in row if x > -math.inf))
                for row, y in zip(logits[0].tolist(), labels, strict=True)
            ]
            expected = float(sum(each))
        found = sequence_logps(logits, torch.tensor([labels]), shift=False)
        assert float(found) == pytest.approx(expected, rel=4 * 2**-23)
    logits = torch.tensor([[[0.0, -torch.inf, 0.0]]], requires_grad=True)
    logps = sequence_logps(logits, torch.tensor([[2]]), shift=False)
    assert logps.tolist() == pytest.approx([-math.log(2)], rel=1e-6)
    assert gradient(logps, logits).tolist() == [[pytest.approx([-0.5, 0.0, 0.5], rel=1e-6)]]
    assert sequence_logps(logits, torch.tensor([[1]]), shift=False).tolist() == [-math.inf]


def test_what_does_not_count_leaves_no_trace_and_nan_that_counts_is_seen(monkeypatch):
    monkeypatch.setattr(module, "CPU_CHUNK", 64)
    logits, labels, mask = example()
    expected = sequence_logps(logits, labels, mask)
    unused = torch.cat([~mask[:, 1:], torch.ones(3, 1, dtype=torch.bool)], 1)  # by position
    spoilt = torch.where(unused[:, :, None], torch.nan, logits.detach()).requires_grad_()
    logps = sequence_logps(spoilt, torch.where(mask, labels, 10**6), mask)
    assert torch.equal(logps, expected)
    assert torch.equal(gradient(logps, spoilt), gradient(expected, logits))
    spoilt = logits.detach().clone()
    spoilt[1, 2, 3] = torch.nan
    assert torch.isnan(sequence_logps(spoilt, labels)).tolist() == [False, True, False]


def test_integer_labels_of_any_dtype():
    logits, labels, _ = example((2, 3, 200))
    labels[0, 1] = 156  # -100 as uint8
    for dtype in (torch.int32, torch.int16, torch.uint8):
        found = sequence_logps(logits, labels.to(dtype))
        assert torch.equal(found, sequence_logps(logits, labels))


# --- time and memory ---


@pytest.mark.parametrize(("device", "logits_at_once"), [("cpu", 2**19), ("meta", 2**24)])
def test_the_softmax_of_so_many_logits_is_formed_at_once(device, logits_at_once):
    class Softmaxes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "softmax" in str(func):
                sizes.append(args[0].numel())
            return func(*args, **kwargs or {})

    sizes = []
    logits = torch.zeros(2, logits_at_once // 512, 1024, device=device, requires_grad=True)
    labels = torch.zeros(logits.shape[:2], device=device, dtype=torch.long)
    with Softmaxes():
        logps = sequence_logps(logits, labels, shift=False)
        assert sizes == 4 * [logits_at_once]
        gradient(logps, logits)
    assert sizes == 8 * [logits_at_once]


def test_no_copy_of_the_logits_forward_and_only_the_gradient_backward(monkeypatch):
    monkeypatch.setattr(module, "CPU_CHUNK", 64 * 128)
    logits, labels, _ = example((8, 512, 64), torch.bfloat16)
    tokens = 8 * 4096  # bytes of labels or of their positions, of which there are a few
    kept, saved = [], []
    save = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x)
    with save:
        allocated, peak = allocations(lambda: kept.append(sequence_logps(logits, labels)))
    assert max(allocated) <= tokens < logits.nbytes
    assert peak < 8 * tokens
    others = [t for t in saved if t.data_ptr() != logits.data_ptr()]
    assert len(others) == len(saved) - 1
    assert all(t.numel() <= labels.numel() for t in others)
    allocated, peak = allocations(lambda: gradient(kept[0], logits))
    assert [n for n in allocated if n > tokens] == [logits.nbytes]
    assert peak < logits.nbytes + 8 * tokens
    saved.clear()
    with save:
        with torch.no_grad():
            sequence_logps(logits, labels)
        sequence_logps(logits.detach(), labels)
    assert not saved


# --- tracing ---


def test_torch_compile_makes_one_graph_for_all_sizes_and_copies_no_logits(monkeypatch):
    monkeypatch.setattr(module, "CPU_CHUNK", 64 * 128)
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(sequence_logps, fullgraph=True, dynamic=True, backend=backend)
    for shape in [(2, 5, 7), (8, 512, 64)]:
        logits, labels, mask = example(shape)
        found, expected = compiled(logits, labels, mask), sequence_logps(logits, labels, mask)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradient(found, logits), gradient(expected, logits))
    kept = []
    assert max(allocations(lambda: kept.append(compiled(logits, labels, mask)))[0]) < logits.nbytes
    allocated, _ = allocations(lambda: gradient(kept[0], logits))
    assert [n for n in allocated if n >= logits.nbytes] == [logits.nbytes]
    assert len(graphs) == 1


def test_operators_are_registered_as_torch_wants_it():
    logits, labels, _ = example((2, 3, 5))
    arguments, operators = (logits.detach(), labels[:, 1:]), torch.ops.gamma_loss
    torch.library.opcheck(operators.token_logps.default, arguments)
    slopes = torch.randn(2, 2, dtype=torch.float64)
    torch.library.opcheck(operators.token_logps_gradient.default, (slopes, *arguments))


def test_torch_func_and_export():
    logits, labels, mask = example()

    class Model(torch.nn.Module):
        def forward(self, logits, labels, mask):
            return sequence_logps(logits, labels, mask, average=True)

    expected = Model()(logits, labels, mask)
    found = torch.func.grad(lambda x: Model()(x, labels, mask).sum())(logits.detach())
    assert torch.equal(found, gradient(expected, logits))
    exported = torch.export.export(Model(), (logits.detach(), labels, mask)).module()
    assert torch.equal(exported(logits, labels, mask), expected)


def test_autocast_changes_nothing_and_a_second_derivative_is_refused():
    logits, labels, _ = example(dtype=torch.float32)
    expected = sequence_logps(logits, labels)
    with torch.autocast("cpu", torch.bfloat16):
        logps = sequence_logps(logits, labels)
        assert torch.equal(logps, expected)
        assert torch.equal(gradient(logps, logits), gradient(expected, logits))
    logps = sequence_logps(logits, labels)
    (first,) = torch.autograd.grad(logps.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="sequence_logps has no second derivative"):
        (first.square().sum() + logits.sum()).backward()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_agrees_copies_no_logits_and_never_waits(dtype, monkeypatch):
    monkeypatch.setattr(module, "DEVICE_CHUNK", 2**16)
    logits, labels, mask = example((8, 64, 1000), dtype)
    expected = sequence_logps(logits, labels, mask)
    there = logits.detach().cuda().requires_grad_()
    labels, mask = labels.cuda(), mask.cuda()
    gradient(sequence_logps(there, labels, mask), there)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        logps = sequence_logps(there, labels, mask)
        forward = torch.cuda.max_memory_allocated() - before
        found = gradient(logps, there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert forward < there.nbytes
    assert torch.cuda.max_memory_allocated() - before < 2 * there.nbytes
    bound = 64 * token_error(logits.detach()) * 2**-23
    torch.testing.assert_close(logps.cpu(), expected, rtol=64 * 2**-23, atol=bound)
    torch.testing.assert_close(
        found.cpu(), gradient(expected, logits), rtol=2 * torch.finfo(dtype).eps, atol=bound
    )


# --- wrong arguments ---


def test_wrong_arguments_are_named():
    logits, labels, _ = example()
    for label in (-1, 11):
        labels[2, 3] = label
        with pytest.raises(IndexError, match=rf"labels must be in \[0, 11\) .* got {label}"):
            sequence_logps(logits, labels)
    right = {"logits": torch.ones(2, 3, 4), "labels": torch.ones(2, 3).long()}
    for name, value, error, complaint in [
        ("logits", np.zeros((2, 3, 4)), TypeError, "must be a torch.Tensor, got ndarray"),
        ("labels", [[1]], TypeError, "must be a torch.Tensor, got list"),
        ("mask", [[True]], TypeError, "must be a torch.Tensor, got list"),
        ("ignore_index", True, TypeError, "must be an int, got bool"),
        ("average", 1, TypeError, "must be"),
        ("shift", 1, TypeError, "must be"),
        ("logits", torch.ones(2, 3, 4).long(), TypeError, "must have a float"),
        ("logits", torch.ones(2, 3), ValueError, r"must have shape .* got \(2, 3\)"),
        ("logits", torch.ones(2, 3, 0), ValueError, r"must have shape .*\(2, 3, 0\)"),
        ("labels", torch.ones(2, 3), TypeError, "must have an integer dtype, got .*32"),
        ("labels", torch.ones(2, 3).bool(), TypeError, "must have an integer dtype"),
        ("labels", torch.ones(2, 2).long(), ValueError, r".* \(2, 3\), got \(2, 2\)"),
        ("mask", torch.ones(2, 3).long(), TypeError, "must have a boolean dtype"),
        ("mask", torch.ones(3, 2).bool(), ValueError, r".* \(2, 3\), got \(3, 2\)"),
        ("labels", torch.ones(2, 3, device="meta").long(), ValueError, ".* cpu, got meta"),
    ]:
        with pytest.raises(error, match=f"{name} {complaint}"):
            sequence_logps(**right | {name: value})
