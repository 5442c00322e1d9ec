"""The design's table of bad input, for every public function and module in every library."""

import inspect
import math
import subprocess
import sys
from typing import Any, NamedTuple

import numpy as np
import oracles
import pytest
from strategies import CORNERS, HARD, MILD

import gamma_loss

GOOD = {"beta": 0.5, "gamma0": 1.0, "tau": 1.0}
GAPS = [1.0, -2.0, 0.5]
LOGPS = ("policy_chosen_logps", "policy_rejected_logps", "reference_chosen_logps",
         "reference_rejected_logps")  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.quantize_per_tensor")


class Entry(NamedTuple):
    """A public name that takes arrays, and which of its arguments they are."""

    arrays: tuple[str, ...]  # that have to be given, all of one shape
    masks: tuple[str, ...] = ()
    others: tuple[str, ...] = ()  # arrays of a shape of their own
    elementwise: bool = False  # so that any shape will do
    more: dict[str, Any] = {}  # noqa: RUF012


POOL = {"masks": ("mask",), "others": ("context",)}
TABLE = {
    "solve_margins": Entry(("reward_gaps",), **POOL),
    "gamma_preference_loss": Entry(("reward_gaps",), **POOL),
    "gamma_simpo_loss": Entry(LOGPS[:2], **POOL),
    "gamma_dpo_loss": Entry(LOGPS, **POOL),
    "GammaPreferenceLoss": Entry(("reward_gaps",), ("mask",)),
    "GammaSimPOLoss": Entry(LOGPS[:2], ("mask",)),
    "GammaDPOLoss": Entry(LOGPS, ("mask",)),
    "preference_loss": Entry(("reward_gaps", "margins"), elementwise=True),
    "label_smoothing_from_shift": Entry(("reward_gaps", "shift"), elementwise=True),
    "shift_from_label_smoothing": Entry(("reward_gaps", "epsilon"), elementwise=True),
    "queue_init": Entry(("like",), elementwise=True),
    "match_logistic": Entry(("reward_gaps",)),
    "choose_settings": Entry(("reward_gaps",), more={"spread": 0.1, "gamma0": 1.0}),
}


def function(name):
    """A public name as one function of all its arguments, and which these are."""
    public = getattr(gamma_loss, name)
    if not isinstance(public, type):
        return public, set(inspect.signature(public).parameters)
    forward = set(inspect.signature(public.forward).parameters) - {"self"}

    def call(**arguments):
        own = {name: arguments.pop(name) for name in forward & set(arguments)}
        return public(**arguments)(**own)

    return call, forward | set(inspect.signature(public).parameters)


def call(name, library, **wrong):
    """Call with arguments that are right but for some."""
    entry, (public, parameters) = TABLE[name], function(name)
    arguments = {each: library.array(GAPS) for each in entry.arrays}
    settings = {each: value for each, value in GOOD.items() if each in parameters}
    return public(**{**arguments, **settings, **entry.more, **wrong})


def of_library(name, library):
    if (
        name in ("GammaPreferenceLoss", "GammaSimPOLoss", "GammaDPOLoss")
        and library.name != "torch"
    ):
        pytest.skip("a module of torch")


@pytest.fixture(params=TABLE)
def name(request, library):
    of_library(request.param, library)
    return request.param


# --- what is no array of real numbers ---

ODD = {  # what is refused everywhere, by the libraries that have it
    "list": lambda library: GAPS,
    "string": lambda library: "x",
    "integers": lambda library: library.array(GAPS, "int64"),
    "booleans": lambda library: library.array(GAPS, "bool"),
    "complex": lambda library: library.array(GAPS, "complex64"),
    "masked": lambda library: np.ma.array(GAPS, mask=[True, False, False]),
    "objects": lambda library: np.array(GAPS, dtype=object),
    "strings": lambda library: np.array(["1", "2", "3"]),
    "dates": lambda library: np.array(["2020-01-01"] * 3, dtype="datetime64[D]"),
    "records": lambda library: np.zeros(3, dtype=[("a", "f8")]),
    "bfloat16": lambda library: np.array(
        GAPS, dtype=pytest.importorskip("ml_dtypes").bfloat16
    ),
    "float8": lambda library: np.array(
        GAPS, dtype=pytest.importorskip("ml_dtypes").float8_e5m2
    ),
    "sparse": lambda library: library.array(GAPS).to_sparse(),
    "mkldnn": lambda library: library.array(GAPS, "float32").to_mkldnn(),
    "nested": lambda library: library.xp.nested.nested_tensor(
        [library.array(GAPS)], layout=library.xp.jagged
    ),
    "masked tensors": lambda library: library.xp.masked.masked_tensor(
        library.array(GAPS), library.xp.tensor([True, False, False])
    ),
    "quantized": lambda library: library.xp.quantize_per_tensor(
        library.array(GAPS, "float32"), 0.1, 0, library.xp.qint8
    ),
}  # fmt: skip
NUMPYS = {"masked", "objects", "strings", "dates", "records", "bfloat16", "float8"}
TORCHS = {"sparse", "mkldnn", "nested", "masked tensors", "quantized"}


def odd(library):
    """Each kind of thing that this library can be given instead of an array of real numbers."""
    others = set() if library.name == "numpy" else NUMPYS
    others = others | (set() if library.name == "torch" else TORCHS)
    return {kind: make(library) for kind, make in ODD.items() if kind not in others}


def complaint(error, call, *arguments, **more):
    with pytest.raises(error) as caught:
        call(*arguments, **more)
    return str(caught.value)


PROTOTYPE = pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors:UserWarning")


@PROTOTYPE
def test_what_is_no_array_of_real_numbers(library, name):
    entry = TABLE[name]
    for kind, value in odd(library).items():
        for argument in (*entry.arrays, *entry.others, *entry.masks):
            if argument in entry.masks and kind == "booleans":
                continue
            text = complaint(TypeError, call, name, library, **{argument: value})
            assert text.startswith(f"{argument} must "), (kind, text)
            assert ", got " in text, (kind, text)


@PROTOTYPE
def test_a_queue_takes_no_such_things(library):
    state = gamma_loss.queue_init(library.array(GAPS), 3)
    push, solve = gamma_loss.queue_push, gamma_loss.solve_margins
    for kind, value in odd(library).items():
        assert complaint(TypeError, push, state, value).startswith("gaps must "), kind
        text = complaint(TypeError, push, state._replace(gaps=value), state.gaps)
        assert text.startswith("state.gaps must "), kind
        if kind == "booleans":
            continue
        assert complaint(TypeError, push, state, state.gaps, value).startswith("mask must "), kind
        for mask in (value, None):
            broken = state._replace(mask=mask)
            text = complaint(TypeError, push, broken, state.gaps)
            assert text.startswith("state.mask must "), kind
            text = complaint(TypeError, solve, state.gaps, context=broken, gamma0=1.0, tau=1.0)
            assert text.startswith("context_mask must "), kind


@PROTOTYPE
def test_streaming_takes_real_numbers(library):
    if library.name not in ("numpy", "torch"):
        pytest.skip("chunks are NumPy's, or torch's")
    stream, setting = gamma_loss.solve_margins_streaming, {"gamma0": 1.0, "tau": 1.0}
    rule = stream([np.array(GAPS)], **setting)
    for kind, value in odd(library).items():
        if kind in ("list", "integers", "bfloat16", "float8"):  # real numbers nevertheless
            whole = np.asarray(value).astype(np.float64)
            expected = gamma_loss.solve_margins(whole, **setting).margins
            found = stream([value], **setting).margins(value)
            np.testing.assert_allclose(found, expected, rtol=1e-12)
        else:
            assert complaint(TypeError, stream, [value], **setting).startswith("chunks must "), kind
            assert complaint(TypeError, rule.margins, value).startswith("reward_gaps must "), kind


def test_streaming_takes_torchs_half_precision_and_gradients(torch):
    gaps = torch.tensor(GAPS, dtype=torch.bfloat16, requires_grad=True)
    rule = gamma_loss.solve_margins_streaming([gaps], gamma0=1.0, tau=1.0)
    expected = gamma_loss.solve_margins(np.array(GAPS), gamma0=1.0, tau=1.0).margins
    np.testing.assert_allclose(rule.margins(gaps), expected, rtol=1e-12)


@pytest.mark.parametrize("chunks", [None, 3.0, iter([np.zeros(2)])])
def test_chunks_that_are_none(chunks):
    with pytest.raises(TypeError, match="chunks must be readable several times, got "):
        gamma_loss.solve_margins_streaming(chunks, gamma0=1.0, tau=1.0)


@pytest.mark.parametrize("chunk", [np.zeros((2, 1)), 3.0, np.float64(1.0)])
def test_chunks_that_are_not_1_d(chunk):
    with pytest.raises(ValueError, match=r"chunks must be 1-D, one entry a pair, got shape \("):
        gamma_loss.solve_margins_streaming([chunk], gamma0=1.0, tau=1.0)


@pytest.mark.parametrize("second", [[1.0], [1.0, 2.0], [1.0, -2.0, 0.5, 0.0]])
def test_chunks_that_change(second):
    class Changing:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter([np.array(GAPS if self.passes <= 2 else second)])

    with pytest.raises(ValueError, match="chunks must give the same gaps at each reading"):
        gamma_loss.solve_margins_streaming(Changing(), gamma0=4.0, tau=0.1)


def test_metrics_of_something_else():
    result = gamma_loss.gamma_preference_loss(np.array(GAPS), gamma0=1.0, tau=1.0)
    with pytest.raises(TypeError, match="aux must be a GammaLossAux, got tuple"):
        gamma_loss.metrics(result)


# --- shapes, libraries, devices ---


@pytest.mark.parametrize("shape", [(), (3, 1), (0,), (2,)], ids=str)
def test_shapes(library, name, shape):
    entry = TABLE[name]
    value, flags = library.array(np.ones(shape)), library.array(np.ones(shape), "bool")
    if entry.elementwise:  # so only the second has a wrong shape
        arrays = dict.fromkeys(entry.arrays[1:], "must have the shape of reward_gaps")
    else:
        words = (
            "must be 1-D, one entry a pair" if len(shape) != 1 else "must hold at least one pair"
        )
        arrays = dict.fromkeys((*entry.arrays, *entry.others), words)
    if shape == (2,) and not entry.elementwise:  # wrong beside others only: the second is named
        arrays = dict.fromkeys(entry.arrays[1:], "must have the shape of policy_chosen_logps")
    for argument, words in arrays.items():
        text = complaint(ValueError, call, name, library, **{argument: value})
        assert text.startswith(f"{argument} {words}"), text
        assert text.endswith(f"got {'shape ' * ('of' not in words)}{shape}"), text
    for argument in entry.masks:
        text = complaint(ValueError, call, name, library, **{argument: flags})
        assert text == f"mask must have the shape of {entry.arrays[0]}, (3,), got {shape}"
    if "context" in entry.others:
        context = library.array([0.5])
        text = complaint(ValueError, call, name, library, context=context, context_mask=flags)
        assert text == f"context_mask must have the shape of context, (1,), got {shape}"


def test_a_queue_of_wrong_shapes(library):
    state = gamma_loss.queue_init(library.array(GAPS), 3)
    two = library.array([[1.0]])
    for broken, gaps, mask, words in [
        (state._replace(gaps=two), state.gaps, None, "state.gaps must be 1-D"),
        (state._replace(mask=two > 0), state.gaps, None, "state.mask must have the shape of st"),
        (state._replace(gaps=state.gaps[:0]), state.gaps, None, "state.gaps must hold at least"),
        (state, two, None, "gaps must be 1-D"),
        (state, state.gaps, two > 0, "mask must have the shape of gaps"),
    ]:
        assert complaint(ValueError, gamma_loss.queue_push, broken, gaps, mask).startswith(words)
    text = complaint(TypeError, gamma_loss.queue_push, tuple(state), state.gaps)
    assert text == "state must be a QueueState, got tuple"


def test_libraries_that_are_mixed(library, name):
    entry = TABLE[name]
    other, flags = np.array(GAPS), np.array(GAPS) > 0
    if library.name == "numpy":
        torch = pytest.importorskip("torch")
        other, flags = torch.tensor(GAPS), torch.tensor(GAPS) > 0
    first = () if isinstance(getattr(gamma_loss, name), type) else entry.arrays[:1]
    for argument in {*entry.arrays, *entry.others} - {*first}:
        text = complaint(TypeError, call, name, library, **{argument: other})
        assert text.startswith(f"{argument} must be "), text
        assert type(other).__name__ in text
    for argument in entry.masks:
        text = complaint(TypeError, call, name, library, **{argument: flags})
        assert text.startswith(f"{argument} must be an array of the same library"), text


def test_devices_that_differ(torch, name, library):
    if library.name != "torch":
        pytest.skip("a meta tensor is torch's")
    entry = TABLE[name]
    is_module = isinstance(getattr(gamma_loss, name), type)
    for argument in {*entry.arrays[0 if is_module else 1 :], *entry.others, *entry.masks}:
        value = torch.ones(3, device="meta", dtype=torch.bool if argument == "mask" else None)
        text = complaint(ValueError, call, name, library, **{argument: value})
        assert text.startswith(f"{argument} must be on the device of "), text
        assert text.endswith("got meta")
    if is_module:  # all of it elsewhere than the module
        elsewhere = dict.fromkeys(entry.arrays, torch.ones(3, device="meta"))
        text = complaint(ValueError, call, name, library, **elsewhere)
        assert text.startswith(f"{entry.arrays[0]} must be on the device of the module, cpu")


# --- settings ---

NUMBERS = [
    ("1", TypeError, "a Python number, got str"),
    (None, TypeError, "a Python number, got NoneType"),
    (np.array([1.0]), TypeError, "a Python number, got ndarray"),
    (True, TypeError, "a Python number, got bool"),
    (1j, TypeError, "a Python number, got complex"),
    (math.nan, ValueError, "got nan"),
    (math.inf, ValueError, "got inf"),
    (-1, ValueError, "got -1"),
    (10**400, ValueError, "got int beyond floats"),
]
POSITIVE = [*NUMBERS, (0, ValueError, "finite and > 0, got 0")]
FLAG = [
    (value, TypeError, f"True or False, got {value!r}")
    for value in ("False", "no", 0, 1, None, np.True_)
]
WHOLE = [
    (value, TypeError, f"an int, got {type(value).__name__}") for value in (2.0, "2", True, None)
]
CHOICE = [
    ("x", ValueError, "one of ("),
    (None, TypeError, "one of ("),
    (np.array(["x", "y"]), TypeError, "one of ("),
]
SETTINGS = {
    "beta": POSITIVE,
    "tau": POSITIVE,
    "gamma0": NUMBERS,
    "label_smoothing": [*NUMBERS, (0.5, ValueError, "finite and >= 0 and < 0.5, got 0.5")],
    "margins": [row for row in NUMBERS if row[0] != -1 and row[1] is ValueError],
    "shift": [row for row in NUMBERS if row[0] != -1 and row[1] is ValueError],
    "epsilon": [row for row in NUMBERS if row[0] != -1 and row[1] is ValueError],
    "spread": [row for row in POSITIVE if row[0] is not None],
    "beta_factor": [*POSITIVE[:-1], (1, ValueError, "got 1")][2:],
    "centered": FLAG,
    "robust": FLAG,
    "average": FLAG,
    "reduction": CHOICE,
    "impl": CHOICE,
    "kind": CHOICE,
    "match": CHOICE,
    "order": CHOICE,
    "capacity": [*WHOLE, (0, ValueError, ">= 1, got 0")],
    "queue_size": [*WHOLE, (-1, ValueError, ">= 0, got -1")],
}


def test_every_argument_of_every_public_name_is_in_the_tables():
    known = {"group", "context_mask", "state", "gaps", "chunks", "aux", "mask"} | set(SETTINGS)
    known |= {"logits", "labels", "ignore_index"}  # in test_logps
    for name in gamma_loss.__all__:
        public = getattr(gamma_loss, name)
        if not callable(public) or (isinstance(public, type) and issubclass(public, tuple)):
            continue
        entry = TABLE.get(name, Entry(()))
        parameters = function(name)[1] if name != "GapQueue" else set()
        assert parameters <= known | {*entry.arrays, *entry.masks, *entry.others}, name


def test_settings(library, name):
    for setting in function(name)[1] & set(SETTINGS):
        for value, error, words in SETTINGS[setting]:
            if name == "choose_settings" and (setting == "beta_factor" or value is None):
                continue  # tested below, and its default
            text = complaint(error, call, name, library, **{setting: value})
            assert text.startswith(f"{setting} must be "), text
            assert words in text


@pytest.mark.parametrize(("setting", "value", "error", "words"), [
    (setting, *row) for setting in ("gamma0", "tau") for row in SETTINGS[setting]
])  # fmt: skip
def test_settings_of_streaming(setting, value, error, words):
    settings = {"gamma0": 1.0, "tau": 1.0, setting: value}
    text = complaint(error, gamma_loss.solve_margins_streaming, [np.array(GAPS)], **settings)
    assert text.startswith(f"{setting} must be ")
    assert words in text


@pytest.mark.parametrize(("value", "error", "words"), SETTINGS["beta_factor"])
def test_settings_of_a_wanted_beta_factor(value, error, words):
    text = complaint(
        error, gamma_loss.choose_settings, np.array(GAPS), beta_factor=value, gamma0=1.0
    )
    assert text.startswith("beta_factor must be ")
    assert words in text


@pytest.mark.parametrize("flag", ["average", "shift"])
def test_flags_of_sequence_logps(torch, flag):
    logits, labels = torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.int64)
    for value, error, words in FLAG:
        text = complaint(error, gamma_loss.sequence_logps, logits, labels, **{flag: value})
        assert text == f"{flag} must be {words}"


IMPOSSIBLE = [
    (1e-50, 1.0, "gamma0 must be 0 or from 1e-14 to 1e12, got 1e-50"),
    (9.9e-15, 1.0, "gamma0 must be 0 or from 1e-14 to 1e12, got 9.9e-15"),
    (1.1e12, 1e12, "gamma0 must be 0 or from 1e-14 to 1e12, got 1100000000000.0"),
    (4.0, 1e-40, "gamma0 / tau must be from 1e-30 to 1e+09, got 4.0 / 1e-40"),
    (4.0, 5e-324, "gamma0 / tau must be from 1e-30 to 1e+09, got 4.0 / 5e-324"),
    (1.0, 1.1e30, "gamma0 / tau must be from 1e-30 to 1e+09, got 1.0 / 1.1e+30"),
]


@pytest.mark.parametrize(("gamma0", "tau", "words"), IMPOSSIBLE)
def test_settings_that_leave_the_range_of_float32(library, name, gamma0, tau, words):
    if "tau" in function(name)[1]:
        assert complaint(ValueError, call, name, library, gamma0=gamma0, tau=tau) == words
    stream = gamma_loss.solve_margins_streaming
    assert complaint(ValueError, stream, [np.array(GAPS)], gamma0=gamma0, tau=tau) == words


EDGES = [(gamma0, a) for gamma0 in (1e-14, 1.0, 1e12) for a in (1e-30, 0.5, 1.4, 2.0, 1e9)]


@pytest.mark.filterwarnings("ignore:overflow encountered")  # of what Triton's interpreter drops
@pytest.mark.parametrize(("gamma0", "a"), EDGES)
def test_the_edges_of_that_range(solver, gamma0, a):
    """Exact to rounding, of the oracle as well, and the certificate holds."""
    tau = gamma0 / a
    for dtype, close in ((np.float32, 3e-6), (np.float64, 1e-13)):
        for gaps in (np.array([1.0, -2.0, 0.5, 9.0]), np.array([1e4, -1e4, 3.0])):
            expected, _ = oracles.margins(gaps, gamma0, tau)
            solutions = [solver(gaps.astype(dtype), gamma0=gamma0, tau=tau)[::2]]
            if solver.name == "numpy":
                rule = gamma_loss.solve_margins_streaming([gaps], gamma0=gamma0, tau=tau)
                solutions.append((rule.margins(gaps), rule.residual))
            for margins, residual in solutions:
                off = np.abs(margins - expected)
                slack = a * float(np.finfo(np.longdouble).eps)
                assert np.max(off / (gamma0 + expected)) <= close + slack
                assert np.mean(off / gamma0) <= 2 * np.expm1(float(residual)) + slack


def test_a_context_mask_without_a_context(library, name):
    if "context" not in TABLE[name].others:
        pytest.skip("takes none")
    text = complaint(ValueError, call, name, library, context_mask=library.array(GAPS, "bool"))
    assert text == "context_mask was given without a context"


def test_numbers_of_numpy_and_integers_are_numbers(library, name):
    numbers = {"beta": np.float32(0.5), "gamma0": 1, "tau": np.float64(2)}
    call(name, library, **{key: numbers[key] for key in numbers if key in function(name)[1]})


# --- what is taken ---

LOSSES = ("gamma_preference_loss", "gamma_simpo_loss", "gamma_dpo_loss",
          "GammaPreferenceLoss", "GammaSimPOLoss", "GammaDPOLoss")  # fmt: skip


@pytest.fixture(params=LOSSES)
def loss_name(request, library):
    of_library(request.param, library)
    return request.param


def lose(name, library, gaps, dtype="float64", **more):
    """A loss of these gaps, whatever it takes; without beta, which is 1 then."""
    entry, parameters = TABLE[name], function(name)[1]
    rows = {each: library.array(np.zeros(len(gaps)), dtype) for each in entry.arrays}
    rows[entry.arrays[0]] = library.array(gaps, dtype)
    settings = {**MILD, **({"beta": 1.0} if "beta" in parameters else {}), **more}
    if "queue_size" in parameters:
        settings.setdefault("queue_size", 4)
    return function(name)[0](**rows, **settings)


@pytest.mark.parametrize("setting", [MILD, HARD], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_gap_that_is_not_finite(library, loss_name, setting, dtype):
    """Takes no part, changes nothing else, and shows in its own loss; without a warning."""
    options = {"centered": False, "label_smoothing": 0.1, **setting}
    kept, close = [0, 2, 3], {"rtol": 1e-5 if dtype == "float32" else 1e-12}
    for bad in (math.nan, math.inf, -math.inf):
        gaps = np.array([1.0, bad, -2.0, 0.5])
        losses, aux = lose(loss_name, library, gaps, dtype, reduction="none", **options)
        expected, known = gamma_loss.gamma_preference_loss(gaps[kept], reduction="none", **options)
        losses, margins = library.numpy(losses), library.numpy(aux.margins)
        np.testing.assert_allclose(losses[kept], expected, **close)
        np.testing.assert_allclose(margins[kept], known.margins, **close)
        assert not np.isfinite(losses[1])
        assert np.isnan(margins[1])
        assert not np.isfinite(library.numpy(lose(loss_name, library, gaps, dtype, **options)[0]))
        logs = gamma_loss.metrics(aux)
        assert not np.isfinite(library.numpy(logs["rewards/margins"]))
        assert float(logs["gamma/residual"]) < 1e-4
        batch, context = (library.array(each, dtype) for each in (gaps[kept], [bad]))
        found = gamma_loss.solve_margins(batch, context=context, **setting).margins
        np.testing.assert_allclose(library.numpy(found), known.margins, **close)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_queue_stores_no_gap_that_is_not_finite(library, bad):
    state = gamma_loss.queue_init(library.array(GAPS), 3)
    state = gamma_loss.queue_push(state, library.array([1.0, bad]))
    assert library.numpy(state.gaps).tolist() == [0.0, 0.0, 1.0]
    assert library.numpy(state.mask).tolist() == [False, False, True]


def test_every_pair_masked(library, loss_name):
    nobody = library.array([False] * 3, "bool")
    for gaps in (GAPS, [math.nan, math.inf, 1.0]):
        loss, aux = lose(loss_name, library, gaps, mask=nobody)
        assert float(loss) == 0
        np.testing.assert_array_equal(library.numpy(aux.pair_weights), 0.0)
        np.testing.assert_array_equal(library.numpy(aux.margins), MILD["gamma0"])
        assert all(
            np.isfinite(library.numpy(each)).all() for each in gamma_loss.metrics(aux).values()
        )


def test_gamma0_of_zero(library, loss_name):
    loss, aux = lose(loss_name, library, GAPS, gamma0=0, tau=1)
    np.testing.assert_array_equal(library.numpy(aux.margins), 0.0)
    expected = gamma_loss.preference_loss(np.array(GAPS)).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-12)
    assert float(aux.residual) == 0
    rule = gamma_loss.solve_margins_streaming([np.array(GAPS)], gamma0=0, tau=1)
    np.testing.assert_array_equal(rule.margins([2.0, math.inf]), [0.0, math.nan])


@pytest.mark.parametrize(("gaps", "gamma0", "tau"), CORNERS)
def test_extreme_but_valid(library, loss_name, gaps, gamma0, tau):
    """The right answer, which `solve_margins` has by other tests."""
    padded = np.zeros(16)  # as JAX compiles for each size
    padded[: len(gaps)] = gaps
    mask = library.array(np.arange(16) < len(gaps), "bool")
    _, aux = lose(loss_name, library, padded, gamma0=gamma0, tau=tau, mask=mask)
    expected = gamma_loss.solve_margins(np.array(gaps), gamma0=gamma0, tau=tau).margins
    found = library.numpy(aux.margins)[: len(gaps)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11 * gamma0)
    assert float(aux.residual) < 1e-10


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("setting", [MILD, HARD], ids=str)
def test_finite_gaps_far_beyond_what_is_promised_make_no_warning(setting, dtype):
    limit = float(np.finfo(dtype).max) ** 0.8
    solution = gamma_loss.solve_margins(np.array([limit, -limit, 1.0], dtype), **setting)
    assert all(np.isfinite(each).all() for each in solution)


def test_the_dtype_of_a_preference_loss(library):
    lose, gaps = gamma_loss.preference_loss, library.array(GAPS, "float32")
    for margins in (0.5, np.float64(0.5), library.array(GAPS, "float32")):
        assert lose(gaps, margins).dtype == library.xp.float32
    assert lose(gaps, library.array(GAPS)).dtype == library.xp.float64
    assert lose(library.array(GAPS), gaps).dtype == library.xp.float64


def test_half_precision_of_a_context(library):
    if library.name == "array_api_strict":
        pytest.skip("has none")
    dtypes = ["float16"] if library.name == "numpy" else ["float16", "bfloat16"]
    gaps, context = library.array(GAPS, "float32"), library.array([2.0], "float32")
    expected = gamma_loss.solve_margins(gaps, context=context, **MILD).margins
    for dtype in dtypes:
        half = library.array([2.0], dtype)
        found = gamma_loss.solve_margins(gaps, context=half, **MILD).margins
        np.testing.assert_array_equal(library.numpy(found), library.numpy(expected))


def test_no_look_at_values_on_the_device(torch):
    # A meta tensor has no values: any copy to the host or branch on a value raises.
    rows = [torch.zeros(5, device="meta") for _ in range(4)]
    mask = torch.ones(5, dtype=torch.bool, device="meta")
    for setting in (GOOD, {"beta": 0.1, "gamma0": 20.0, "tau": 0.1}):
        loss, aux = gamma_loss.gamma_dpo_loss(*rows, **setting, mask=mask, context=rows[0])
        assert loss.device.type == aux.margins.device.type == "meta"
        state = gamma_loss.queue_push(gamma_loss.queue_init(rows[0], 3), rows[0], mask)
        assert state.gaps.device.type == gamma_loss.metrics(aux)["gamma/kl"].device.type == "meta"


def test_a_default_device_at_the_first_call_leaves_no_trace(torch):
    """In a process of its own, where nothing has been called before."""
    code = f"""
import torch, gamma_loss
def everything():
    gaps = torch.tensor({GAPS}, device="cpu")
    settings = dict(gamma0=4.0, tau=0.1)
    loss, aux = gamma_loss.gamma_preference_loss(gaps, **settings)
    logs = gamma_loss.metrics(aux)
    epsilon = gamma_loss.label_smoothing_from_shift(gaps, aux.shifts)
    shift = gamma_loss.shift_from_label_smoothing(gaps, 0.1)
    state = gamma_loss.queue_push(gamma_loss.queue_init(gaps, 4), gaps)
    rule = gamma_loss.solve_margins_streaming([gaps], **settings)
    margins = torch.from_numpy(rule.margins(gaps))
    return [loss, *aux, *logs.values(), epsilon, shift, *state, margins]
with torch.device("meta"):
    first = everything()
assert all(each.device.type == "cpu" for each in first)
for one, other in zip(first, everything(), strict=True):
    torch.testing.assert_close(one, other, rtol=0, atol=0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
