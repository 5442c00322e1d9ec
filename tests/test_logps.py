"""Log-probabilities of responses against a plain loop over tokens, and what they need of memory."""

import math

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from gamma_loss import sequence_logps  # noqa: E402
from gamma_loss.torch import logps as module  # noqa: E402

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def token_logp(logits, label):
    """Logarithm of one softmax, its sum correctly rounded."""
    largest = max(logits)
    return logits[label] - largest - math.log(math.fsum(math.exp(x - largest) for x in logits))


def expected_logps(logits, labels, counts, average, shift):
    """One token after the other, in Python's floats."""
    results = []
    for row, ids, which in zip(logits.tolist(), labels.tolist(), counts.tolist(), strict=True):
        if shift:
            row, ids, which = row[:-1], ids[1:], which[1:]
        each = [token_logp(x, y) for x, y, c in zip(row, ids, which, strict=True) if c]
        results.append(math.fsum(each) / (max(len(each), 1) if average else 1))
    return np.array(results)


def expected_gradient(logits, labels, counts, average, shift, slopes):
    """Slope · (one-hot - softmax) at each token that counts."""
    x = logits.double().numpy()
    gradient = np.zeros_like(x)
    first = 1 if shift else 0
    for i in range(x.shape[0]):
        share = max(int(counts[i, first:].sum()), 1) if average else 1
        for t in range(first, x.shape[1]):
            if counts[i, t]:
                p = np.exp(x[i, t - first] - x[i, t - first].max())
                gradient[i, t - first] = -p / p.sum()
                gradient[i, t - first, labels[i, t]] += 1
                gradient[i, t - first] *= float(slopes[i]) / share
    return gradient


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


def allocations(call):
    """Bytes of each allocation of a call on the CPU, and the most that it holds at once."""
    with torch.profiler.profile(profile_memory=True) as profile:
        kept = call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    del kept
    return [n for n in changes if n > 0], max(np.cumsum(changes))


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CPU_CHUNK", 64)


@pytest.fixture
def chunks_of_128_tokens(monkeypatch):
    monkeypatch.setattr(module, "CPU_CHUNK", 64 * 128)


@given(
    shape=st.tuples(st.integers(0, 4), st.integers(1, 6), st.integers(1, 9)),
    dtype=st.sampled_from(DTYPES),
    chunk=st.integers(1, 200),
    layout=st.sampled_from(["whole", "part", "transposed"]),
    average=st.booleans(),
    shift=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_value_and_gradient(shape, dtype, chunk, layout, average, shift, masked, seed):
    logits, labels, mask = example(shape, dtype, seed)
    values = logits.detach()
    if layout == "part":
        logits = torch.cat([values, values], 1)[:, : shape[1]].requires_grad_()
    elif layout == "transposed":
        logits = values.transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    generator = torch.Generator().manual_seed(seed)
    labels = torch.where(torch.rand(shape[:2], generator=generator) > 0.2, labels, -100)
    counts = (labels != -100) & (mask if masked else True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CPU_CHUNK", chunk)
        logps = sequence_logps(logits, labels, mask if masked else None, average, shift=shift)
        slopes = torch.linspace(-2, 2, shape[0], dtype=logps.dtype)
        (gradient,) = torch.autograd.grad(logps, logits, slopes)
    assert logps.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert logps.shape == shape[:1]
    assert (gradient.dtype, gradient.shape) == (dtype, shape)
    if shape[0] == 0:
        return
    each = token_error(values) * torch.finfo(logps.dtype).eps / 2
    most = float(values.max() - values.min()) + math.log(shape[2])  # of a token's |log-probability|
    # The tokens' errors, and those of their sum.
    tolerance = shape[1] * (each + shape[1] * most * torch.finfo(logps.dtype).eps)
    expected = expected_logps(values, labels, counts, average, shift)
    np.testing.assert_allclose(logps.detach().numpy(), expected, rtol=0, atol=tolerance)
    # The gradient is rounded once more, to the dtype of the logits (or to its smallest numbers).
    expected = expected_gradient(values, labels, counts, average, shift, slopes)
    found, info = gradient.double().numpy(), torch.finfo(dtype)
    np.testing.assert_allclose(found, expected, rtol=info.eps, atol=4 * each + info.tiny)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("average", [False, True])
def test_gradcheck(small_chunks, average, shift):
    logits, labels, mask = example()
    mask[1] = False
    assert torch.autograd.gradcheck(
        lambda x: sequence_logps(x, labels, mask, average, shift=shift), (logits,)
    )


def test_extreme_logits_against_many_digits():
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


def test_tokens_that_are_ruled_out():
    logits = torch.tensor([[[0.0, -torch.inf, 0.0]]], requires_grad=True)
    logps = sequence_logps(logits, torch.tensor([[2]]), shift=False)
    (gradient,) = torch.autograd.grad(logps.sum(), logits)
    assert logps.tolist() == pytest.approx([-math.log(2)], rel=1e-6)
    assert gradient.tolist() == [[pytest.approx([-0.5, 0.0, 0.5], rel=1e-6)]]
    assert sequence_logps(logits, torch.tensor([[1]]), shift=False).tolist() == [-math.inf]


@pytest.mark.parametrize("average", [False, True])
def test_an_empty_response_has_zero_with_a_zero_gradient(average):
    logits, labels, mask = example()
    mask[0] = False
    mask[2] = False
    mask[2, 0] = True  # the first label, which nothing predicts
    logps = sequence_logps(logits, labels, mask, average)
    (gradient,) = torch.autograd.grad(logps.sum(), logits)
    assert logps[[0, 2]].tolist() == [0, 0]
    assert not gradient[[0, 2]].any()
    assert gradient[1].any()
    one_token = sequence_logps(logits[:, :1], labels[:, :1], average=average)
    assert not torch.autograd.grad(one_token.sum(), logits)[0].any()
    assert one_token.tolist() == [0, 0, 0]


def test_what_does_not_count_leaves_no_trace(small_chunks):
    logits, labels, mask = example()
    expected = sequence_logps(logits, labels, mask)
    (gradient,) = torch.autograd.grad(expected.sum(), logits)
    unused = torch.cat([~mask[:, 1:], torch.ones(3, 1, dtype=torch.bool)], 1)  # by position
    spoilt = torch.where(unused[:, :, None], torch.nan, logits.detach()).requires_grad_()
    logps = sequence_logps(spoilt, torch.where(mask, labels, 10**6), mask)
    assert torch.equal(logps, expected)
    assert torch.equal(torch.autograd.grad(logps.sum(), spoilt)[0], gradient)


def test_nan_that_counts_is_seen():
    logits, labels, _ = example()
    spoilt = logits.detach().clone()
    spoilt[1, 2, 3] = torch.nan
    assert torch.isnan(sequence_logps(spoilt, labels)).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_any_integer_labels(dtype):
    logits, labels, _ = example((2, 3, 200))
    labels[0, 1] = 156  # -100 as uint8
    expected = sequence_logps(logits, labels)
    assert torch.equal(sequence_logps(logits, labels.to(dtype)), expected)


def test_ignore_index():
    logits, labels, mask = example()
    ignored = torch.where(mask, labels, 3)
    assert torch.equal(
        sequence_logps(logits, ignored, ignore_index=3),
        sequence_logps(logits, labels, mask & (labels != 3)),
    )


# --- memory: 4,096 tokens of 64 logits in chunks of 128 tokens ---


def sizes(dtype):
    logits, labels, _ = example((8, 512, 64), dtype)
    return logits, labels, logits.numel() * logits.element_size()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_copy_of_the_logits_forward_and_only_the_gradient_backward(chunks_of_128_tokens, dtype):
    logits, labels, size = sizes(dtype)
    tokens = 8 * 4096  # bytes of labels or of their positions, of which there are a few
    kept = []
    allocated, peak = allocations(lambda: kept.append(sequence_logps(logits, labels)))
    assert max(allocated) <= tokens < size
    assert peak < 8 * tokens
    allocated, peak = allocations(lambda: torch.autograd.grad(kept[0].sum(), logits))
    assert [n for n in allocated if n > tokens] == [size]
    assert peak < size + 8 * tokens


def test_saves_the_logits_themselves_and_nothing_without_a_gradient():
    logits, labels, _ = sizes(torch.bfloat16)
    saved = []

    def save(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        sequence_logps(logits, labels)
        assert sum(t.data_ptr() == logits.data_ptr() for t in saved) == 1
        others = [t for t in saved if t.data_ptr() != logits.data_ptr()]
        assert all(t.numel() <= labels.numel() for t in others)
        saved.clear()
        with torch.no_grad():
            sequence_logps(logits, labels)
        sequence_logps(logits.detach(), labels)
        assert not saved


# --- tracing ---


def test_torch_compile_makes_one_graph_for_all_sizes(small_chunks):
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(sequence_logps, fullgraph=True, dynamic=True, backend=backend)
    for shape in [(2, 5, 7), (3, 6, 9), (5, 9, 100)]:
        logits, labels, mask = example(shape)
        found, expected = compiled(logits, labels, mask), sequence_logps(logits, labels, mask)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(
            *(torch.autograd.grad(logps.sum(), logits)[0] for logps in (found, expected))
        )
    assert len(graphs) == 1


def test_compiled_it_copies_no_logits_either(chunks_of_128_tokens):
    torch.compiler.reset()
    logits, labels, size = sizes(torch.bfloat16)
    compiled = torch.compile(sequence_logps, fullgraph=True, backend="aot_eager")
    compiled(logits, labels).sum().backward()
    logps = compiled(logits, labels)
    assert max(allocations(lambda: compiled(logits, labels))[0]) < size
    allocated, _ = allocations(lambda: torch.autograd.grad(logps.sum(), logits))
    assert [n for n in allocated if n >= size] == [size]


def test_operators_are_registered_as_torch_wants_it():
    logits, labels, _ = example((2, 3, 5))
    logits = logits.detach()
    torch.library.opcheck(torch.ops.gamma_loss.token_logps.default, (logits, labels[:, 1:]))
    torch.library.opcheck(
        torch.ops.gamma_loss.token_logps_gradient.default,
        (torch.randn(2, 2, dtype=torch.float64), logits, labels[:, 1:]),
    )


def test_torch_func_and_export():
    logits, labels, mask = example()

    class Model(torch.nn.Module):
        def forward(self, logits, labels, mask):
            return sequence_logps(logits, labels, mask, average=True)

    expected = Model()(logits, labels, mask)
    gradient = torch.func.grad(lambda x: Model()(x, labels, mask).sum())(logits.detach())
    assert torch.equal(gradient, torch.autograd.grad(expected.sum(), logits)[0])
    exported = torch.export.export(Model(), (logits.detach(), labels, mask)).module()
    assert torch.equal(exported(logits, labels, mask), expected)


def test_autocast_changes_nothing():
    logits, labels, _ = example(dtype=torch.float32)
    expected = sequence_logps(logits, labels)
    with torch.autocast("cpu", torch.bfloat16):
        logps = sequence_logps(logits, labels)
        assert torch.equal(logps, expected)
        gradients = [torch.autograd.grad(x.sum(), logits)[0] for x in (logps, expected)]
    assert torch.equal(*gradients)


def test_a_second_derivative_is_refused():
    logits, labels, _ = example()
    logps = sequence_logps(logits, labels)
    (gradient,) = torch.autograd.grad(logps.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="sequence_logps has no second derivative"):
        (gradient.square().sum() + logits.sum()).backward()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_agrees_copies_no_logits_and_never_waits(dtype, monkeypatch):
    monkeypatch.setattr(module, "DEVICE_CHUNK", 2**16)
    logits, labels, mask = example((8, 64, 1000), dtype)
    expected = sequence_logps(logits, labels, mask)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), logits)
    there = logits.detach().cuda().requires_grad_()
    labels, mask = labels.cuda(), mask.cuda()
    sequence_logps(there, labels, mask).sum().backward()
    before, there.grad = torch.cuda.memory_allocated(), None
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        logps = sequence_logps(there, labels, mask)
        forward = torch.cuda.max_memory_allocated() - before
        (gradient,) = torch.autograd.grad(logps.sum(), there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    size = there.numel() * there.element_size()
    assert forward < size
    assert torch.cuda.max_memory_allocated() - before < 2 * size
    bound = 64 * token_error(logits.detach()) * 2**-23
    torch.testing.assert_close(logps.cpu(), expected, rtol=64 * 2**-23, atol=bound)
    torch.testing.assert_close(
        gradient.cpu(), expected_gradient, rtol=2 * torch.finfo(dtype).eps, atol=bound
    )


# --- wrong arguments ---


@pytest.mark.parametrize("label", [-1, 11])
def test_a_label_out_of_range_is_named(label):
    logits, labels, _ = example()
    labels[2, 3] = label
    with pytest.raises(IndexError, match=rf"labels must be in \[0, 11\) .* got {label}"):
        sequence_logps(logits, labels)


@pytest.mark.parametrize(
    ("changed", "error", "complaint"),
    [
        ({"logits": np.zeros((2, 3, 4))}, TypeError, "logits must be a torch.Tensor, got ndarray"),
        ({"labels": [[1]]}, TypeError, "labels must be a torch.Tensor, got list"),
        ({"ignore_index": None}, TypeError, "ignore_index must be an int, got NoneType"),
        ({"ignore_index": True}, TypeError, "ignore_index must be an int, got bool"),
        ({"ignore_index": 1.0}, TypeError, "ignore_index must be an int, got float"),
        ({"mask": [[True]]}, TypeError, "mask must be a torch.Tensor, got list"),
        ({"logits": torch.ones(2, 3, 4, dtype=torch.int64)}, TypeError, "logits must have a float"),
        ({"logits": torch.ones(2, 3)}, ValueError, r"logits must have shape .* got \(2, 3\)"),
        ({"logits": torch.ones(2, 3, 0)}, ValueError, r"logits must have shape .*\(2, 3, 0\)"),
        ({"labels": torch.ones(2, 3)}, TypeError, "labels must have an integer dtype, got .*32"),
        ({"labels": torch.ones(2, 3, dtype=torch.bool)}, TypeError, "labels must have an integer"),
        ({"labels": torch.ones(2, 2).long()}, ValueError, r"labels .* \(2, 3\), got \(2, 2\)"),
        ({"mask": torch.ones(2, 3).long()}, TypeError, "mask must have a boolean dtype"),
        ({"mask": torch.ones(3, 2).bool()}, ValueError, r"mask .* \(2, 3\), got \(3, 2\)"),
        ({"labels": torch.ones(2, 3, device="meta").long()}, ValueError, "cpu, got meta"),
    ],
)
def test_wrong_arguments(changed, error, complaint):
    arguments = {"logits": torch.ones(2, 3, 4), "labels": torch.ones(2, 3).long(), "mask": None}
    with pytest.raises(error, match=complaint):
        sequence_logps(**arguments | changed)
