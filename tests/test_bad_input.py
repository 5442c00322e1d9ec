"""Bad input: each check where it is written, and each public name that it is wired in."""

import functools
import inspect
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import oracles
import pytest
from strategies import HARD, MILD

import gamma_loss
from gamma_loss import _checks
from gamma_loss._settings import IMPLEMENTATIONS, LossSettings

GAPS = [1.0, -2.0, 0.5]
LOGPS = ("policy_chosen_logps", "policy_rejected_logps", "reference_chosen_logps",
         "reference_rejected_logps")  # fmt: skip
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.quantize_per_tensor", "ignore:The PyTorch API of MaskedTensors:UserWarning"
)


def complaint(error, call, *arguments, **more):
    with pytest.raises(error) as caught:
        call(*arguments, **more)
    return str(caught.value)


# --- the checks of settings ---

NUMBERS = [
    ("1", TypeError, "a Python number, got str"),
    (None, TypeError, "a Python number, got NoneType"),
    (np.array([1.0]), TypeError, "a Python number, got ndarray"),
    (True, TypeError, "a Python number, got bool"),
    (1j, TypeError, "a Python number, got complex"),
    (math.nan, ValueError, "finite and > -2 and < 0.5, got nan"),
    (math.inf, ValueError, "got inf"),
    (-2, ValueError, "got -2"),
    (0.5, ValueError, "got 0.5"),
    (10**400, ValueError, "got int beyond floats"),
]


@pytest.mark.parametrize(("value", "error", "words"), NUMBERS, ids=str)
def test_what_is_no_number(value, error, words):
    text = complaint(error, _checks.number, "it", value, above=-2, below=0.5)
    assert text.startswith("it must be ")
    assert words in text


def test_numbers_of_numpy_and_integers_are_numbers():
    for value in (np.float32(0.5), np.float64(0.5), np.int64(3), 3, 0.5):
        number = _checks.number("it", value, least=0.5)
        assert type(number) is float
        assert number == value


def test_flags_counts_and_choices():
    for value in ("False", "no", 0, 1, None, np.True_):
        text = complaint(TypeError, _checks.flag, "it", value)
        assert text == f"it must be True or False, got {value!r}"
    for value in (2.0, "2", True, None):
        text = complaint(TypeError, _checks.whole_number, "it", value, least=1)
        assert text == f"it must be an int, got {type(value).__name__}"
    text = complaint(ValueError, _checks.whole_number, "it", 0, least=1)
    assert text == "it must be >= 1, got 0"
    for value, error in (("x", ValueError), (None, TypeError), (np.array(["a", "x"]), TypeError)):
        text = complaint(error, _checks.choice, "it", value, ("a", "b"))
        assert text.startswith("it must be one of ('a', 'b'), got ")


IMPOSSIBLE = [
    (1e-50, 1.0, "gamma0 must be 0 or from 1e-14 to 1e12, got 1e-50"),
    (9.9e-15, 1.0, "gamma0 must be 0 or from 1e-14 to 1e12, got 9.9e-15"),
    (1.1e12, 1e12, "gamma0 must be 0 or from 1e-14 to 1e12, got 1100000000000.0"),
    (4.0, 1e-40, "gamma0 / tau must be from 1e-30 to 1e+09, got 4.0 / 1e-40"),
    (4.0, 5e-324, "gamma0 / tau must be from 1e-30 to 1e+09, got 4.0 / 5e-324"),
    (1.0, 1.1e30, "gamma0 / tau must be from 1e-30 to 1e+09, got 1.0 / 1.1e+30"),
]


@pytest.mark.parametrize(("gamma0", "tau", "words"), IMPOSSIBLE)
def test_settings_that_leave_the_range_of_float32(gamma0, tau, words):
    assert complaint(ValueError, _checks.problem, gamma0, tau) == words


WRONG_SETTINGS = [
    ({"beta": 0}, ValueError, "beta must be finite and > 0, got 0"),
    ({"gamma0": -1}, ValueError, "gamma0 must be finite and >= 0, got -1"),
    ({"tau": 0}, ValueError, "tau must be finite and > 0, got 0"),
    ({"gamma0": 4.0, "tau": 1e-40}, ValueError, "gamma0 / tau must be from "),
    ({"label_smoothing": 0.5}, ValueError, "label_smoothing must be finite and >= 0 and < 0.5"),
    ({"label_smoothing": [0.1]}, TypeError, "label_smoothing must be a Python number, got list"),
    ({"centered": 1}, TypeError, "centered must be True or False, got 1"),
    ({"robust": "no"}, TypeError, "robust must be True or False, got 'no'"),
    (
        {"reduction": "max"},
        ValueError,
        "reduction must be one of ('mean', 'sum', 'none'), got 'max'",
    ),
    ({"impl": "cuda"}, ValueError, f"impl must be one of {IMPLEMENTATIONS}, got 'cuda'"),
]


@pytest.mark.parametrize(("wrong", "error", "words"), WRONG_SETTINGS)
def test_settings_of_a_loss(wrong, error, words):
    settings = {"gamma0": 1.0, "tau": 1.0, "centered": True, "beta": 0.5}
    assert complaint(error, LossSettings, **{**settings, **wrong}).startswith(words)


# --- the checks of arrays ---

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


def test_what_is_no_array_of_real_numbers(library):
    good = library.array(GAPS)
    for kind, value in odd(library).items():
        text = complaint(TypeError, _checks.floats, it=value)
        assert text.startswith("it must "), (kind, text)
        assert ", got " in text, (kind, text)
        if library.name == "torch":
            assert complaint(TypeError, _checks.floats, a=good, it=value).startswith("it must ")
        if kind != "booleans":
            xp = _checks.backend("a", good)
            text = complaint(TypeError, _checks.mask, "it", value, "a", good, xp)
            assert text.startswith("it must "), (kind, text)


def test_a_library_that_follows_only_most_of_the_standard():
    """As MLX does, which has no `bool`."""
    most = SimpleNamespace(__name__="mlx.core", float32=None, float64=None)
    names = {"__array_namespace__": lambda self, **_: most, "__module__": "mlx.core"}
    text = complaint(TypeError, _checks.floats, it=type("array", (), names)())
    assert text == "it must be an array (torch, NumPy, JAX, ...), got mlx.core.array"


def test_libraries_that_are_mixed(library):
    other = np.array(GAPS)
    if library.name == "numpy":
        other = pytest.importorskip("torch").tensor(GAPS)
    text = complaint(TypeError, _checks.floats, a=library.array(GAPS), it=other)
    assert text.startswith("it must be an array of the same library as a, "), text
    assert text.endswith(type(other).__name__)


def test_devices_that_differ(torch):
    text = complaint(ValueError, _checks.floats, a=torch.ones(3), it=torch.ones(3, device="meta"))
    assert text == "it must be on the device of a, cpu, got meta"


@pytest.mark.parametrize("shape", [(), (3, 1), (0,), (2,)], ids=str)
def test_shapes(library, shape):
    array, good = library.array(np.ones(shape)), library.array(GAPS)
    if shape != (2,):
        words = "be 1-D, one entry a pair" if len(shape) != 1 else "hold at least one pair"
        text = complaint(ValueError, _checks.pairs, it=array)
        assert text == f"it must {words}, got shape {shape}"
    if len(shape) == 1:
        text = complaint(ValueError, _checks.pairs, a=good, it=array)
        assert text == f"it must have the shape of a, (3,), got {shape}"
    flags, xp = library.array(np.ones(shape), "bool"), _checks.backend("a", good)
    for check, wrong in ((_checks.mask, flags), (_checks.number_or_array, array)):
        rest = ("a", good, xp) if check is _checks.mask else ("a", good)
        text = complaint(ValueError, check, "it", wrong, *rest)
        assert text == f"it must have the shape of a, (3,), got {shape}"


def test_weights(library):
    good = library.array(GAPS)
    check = functools.partial(_checks.weights, of_name="a", of=good, xp=_checks.backend("a", good))
    for dtype in ("int64", "bool"):
        text = complaint(TypeError, check, library.array([1, 1, 1], dtype))
        assert text.startswith("weights must have a real floating dtype such as float32, got ")
    text = complaint(ValueError, check, library.array([1.0]))
    assert text == "weights must have the shape of a, (3,), got (1,)"
    assert complaint(TypeError, check, GAPS).startswith("weights must be an array")
    assert check(library.array([0.0, 1.0, 2.0], "float32")).dtype == good.dtype
    if library.name == "torch":
        meta = library.xp.ones(3, device="meta")
        assert complaint(ValueError, check, meta).startswith("weights must be on the device of a")


# --- where they are wired in ---

ARRAYS = {  # of each public name; those that are optional; any shape will do for the last ones
    "solve_margins": (("reward_gaps",), ("mask", "weights", "context")),
    "gamma_preference_loss": (("reward_gaps",), ("mask", "weights", "context")),
    "gamma_simpo_loss": (LOGPS[:2], ("mask", "weights", "context")),
    "gamma_dpo_loss": (LOGPS, ("mask", "weights", "context")),
    "GammaPreferenceLoss": (("reward_gaps",), ("mask", "weights")),
    "GammaSimPOLoss": (LOGPS[:2], ("mask", "weights")),
    "GammaDPOLoss": (LOGPS, ("mask", "weights")),
    "match_logistic": (("reward_gaps",), ()),
    "choose_settings": (("reward_gaps",), ()),
    "preference_loss": (("reward_gaps", "margins"), ()),
    "label_smoothing_from_shift": (("reward_gaps", "shift"), ()),
    "shift_from_label_smoothing": (("reward_gaps", "epsilon"), ()),
    "queue_init": (("like",), ()),
}
ANY_SHAPE = list(ARRAYS)[-4:]
BAD_SETTINGS = {
    "beta": 0, "tau": 0, "gamma0": -1, "label_smoothing": 0.5, "centered": 1, "robust": 1,
    "reduction": "x", "impl": "x", "kind": "x", "match": "x", "order": "x", "capacity": 0,
    "queue_size": -1, "margin_std": 0, "beta_factor": 1,
}  # fmt: skip


def function(name):
    """A public name as one function of all its arguments, and which these are."""
    public = getattr(gamma_loss, name)
    parameters = set(inspect.signature(public).parameters)
    if not isinstance(public, type):
        return public, parameters
    forward = set(inspect.signature(public.forward).parameters) - {"self"}

    def call(**arguments):
        own = {name: arguments.pop(name) for name in forward & set(arguments)}
        return public(**arguments)(**own)

    return call, forward | parameters


def call(name, **wrong):
    """Call with arguments that are right but for some."""
    public, parameters = function(name)
    array = np.array(GAPS)
    if isinstance(getattr(gamma_loss, name), type):
        array = pytest.importorskip("torch").tensor(GAPS)
    settings = {"beta": 0.5, "gamma0": 1.0, "tau": 1.0}
    arguments = {key: settings[key] for key in settings if key in parameters}
    if name == "choose_settings":
        arguments = {"gamma0": 1.0, **({} if "beta_factor" in wrong else {"margin_std": 0.1})}
    return public(**{**dict.fromkeys(ARRAYS[name][0], array), **arguments, **wrong})


@pytest.mark.parametrize("name", ARRAYS)
def test_a_public_name_checks_its_arguments(name):
    needed, optional = ARRAYS[name]
    is_module = isinstance(getattr(gamma_loss, name), type)
    call(name)
    for argument in (*needed, *optional):
        for wrong in ("x", np.array([1, 2, 3]), GAPS):
            text = complaint(TypeError, call, name, **{argument: wrong})
            assert text.startswith(f"{argument} must "), text
        shape = np.ones((3, 1), dtype=bool if argument == "mask" else float)
        if is_module:
            shape = pytest.importorskip("torch").tensor(shape)
        if name not in ANY_SHAPE or argument not in needed[:1]:
            text = complaint(ValueError, call, name, **{argument: shape})
            assert text.startswith(f"{argument} must "), text
    settings = set(BAD_SETTINGS) & function(name)[1]
    assert settings or name == "preference_loss"
    for setting in settings:
        text = complaint(ValueError if setting not in ("centered", "robust") else TypeError,
                         call, name, **{setting: BAD_SETTINGS[setting]})  # fmt: skip
        assert text.startswith(f"{setting} must be "), text
    if "context" in optional:
        flags = np.ones(3, dtype=bool)
        text = complaint(ValueError, call, name, context_mask=flags)
        assert text == "context_mask was given without a context"
        text = complaint(ValueError, call, name, context=np.ones(2), context_mask=flags)
        assert text == "context_mask must have the shape of context, (2,), got (3,)"


def test_every_argument_of_every_public_name_is_in_the_tables():
    known = {"group", "context_mask", "state", "gaps", "chunks", "aux", "mask"} | set(BAD_SETTINGS)
    known |= {"logits", "labels", "ignore_index", "average", "shift"}  # in test_logps
    for name in gamma_loss.__all__:
        public = getattr(gamma_loss, name)
        if not callable(public) or (isinstance(public, type) and issubclass(public, tuple)):
            continue
        needed, optional = ARRAYS.get(name, ((), ()))
        parameters = function(name)[1] if name != "GapQueue" else set()
        assert parameters <= known | {*needed, *optional}, name


def test_a_module_tells_where_it_is(torch):
    elsewhere = torch.ones(3, device="meta")
    text = complaint(ValueError, call, "GammaPreferenceLoss", reward_gaps=elsewhere)
    assert text.startswith("reward_gaps must be on the device of the module, cpu")


def test_flags_of_sequence_logps(torch):
    logits, labels = torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.int64)
    for flag in ("average", "shift"):
        text = complaint(TypeError, gamma_loss.sequence_logps, logits, labels, **{flag: 1})
        assert text == f"{flag} must be True or False, got 1"


def test_metrics_of_something_else():
    result = gamma_loss.gamma_preference_loss(np.array(GAPS), gamma0=1.0, tau=1.0)
    with pytest.raises(TypeError, match="aux must be a GammaLossAux, got tuple"):
        gamma_loss.metrics(result)


# --- queues and chunks ---


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


@pytest.mark.parametrize("chunks", [None, 3.0, iter([np.zeros(2)])])
def test_chunks_that_are_none(chunks):
    with pytest.raises(TypeError, match="chunks must be readable several times, got "):
        gamma_loss.solve_margins_streaming(chunks, gamma0=1.0, tau=1.0)


@pytest.mark.parametrize("chunk", [np.zeros((2, 1)), 3.0, np.float64(1.0)])
def test_chunks_that_are_not_1_d(chunk):
    with pytest.raises(ValueError, match=r"chunks must be 1-D, one entry a pair, got shape \("):
        gamma_loss.solve_margins_streaming([chunk], gamma0=1.0, tau=1.0)


@pytest.mark.parametrize("wrong", [{"gamma0": -1.0}, {"tau": 0.0}, {"gamma0": 4.0, "tau": 1e-40}])
def test_settings_of_streaming(wrong):
    settings = {"gamma0": 1.0, "tau": 1.0, **wrong}
    text = complaint(ValueError, gamma_loss.solve_margins_streaming, [np.array(GAPS)], **settings)
    assert text.startswith(tuple(wrong))


# --- what is taken ---

LOSSES = {name: arrays[0] for name, arrays in ARRAYS.items() if "Loss" in name or "_loss" in name}
del LOSSES["preference_loss"]


@pytest.fixture(params=LOSSES)
def lose(request, library):
    """A loss of these gaps, whatever it takes; without beta, which is 1 then."""
    name, is_module = request.param, isinstance(getattr(gamma_loss, request.param), type)
    if is_module and library.name != "torch":
        pytest.skip("a module of torch")
    public, parameters = function(name)

    def call(gaps, dtype="float64", **more):
        rows = {each: library.array(np.zeros(len(gaps)), dtype) for each in LOSSES[name]}
        rows[LOSSES[name][0]] = library.array(gaps, dtype)
        settings = {**MILD, **({"beta": 1.0} if "beta" in parameters else {}), **more}
        if is_module:
            settings.setdefault("queue_size", 4)
        return public(**rows, **settings)

    return call


def test_a_gap_that_is_not_finite(library, lose):
    """Takes no part, changes nothing else, and shows in its own loss; without a warning."""
    kept, cases = [0, 2, 3], [("float32", MILD), ("float64", HARD), ("float64", MILD)]
    for (dtype, setting), bad in zip(cases, (math.nan, math.inf, -math.inf), strict=True):
        options = {"centered": False, "label_smoothing": 0.1, **setting}
        close = {"rtol": 1e-5 if dtype == "float32" else 1e-12}
        gaps = np.array([1.0, bad, -2.0, 0.5])
        losses, aux = lose(gaps, dtype, reduction="none", **options)
        expected, known = gamma_loss.gamma_preference_loss(gaps[kept], reduction="none", **options)
        losses, margins = library.numpy(losses), library.numpy(aux.margins)
        np.testing.assert_allclose(losses[kept], expected, **close)
        np.testing.assert_allclose(margins[kept], known.margins, **close)
        assert not np.isfinite(losses[1])
        assert np.isnan(margins[1])
        assert not np.isfinite(library.numpy(lose(gaps, dtype, **options)[0]))
        logs = gamma_loss.metrics(aux)
        assert not np.isfinite(library.numpy(logs["rewards/margins"]))
        assert float(logs["gamma/error_bound"]) < 1e-4
        batch, context = (library.array(each, dtype) for each in (gaps[kept], [bad]))
        found = gamma_loss.solve_margins(batch, context=context, **setting).margins
        np.testing.assert_allclose(library.numpy(found), known.margins, **close)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_queue_stores_no_gap_that_is_not_finite(library, bad):
    state = gamma_loss.queue_init(library.array(GAPS), 3)
    state = gamma_loss.queue_push(state, library.array([1.0, bad]))
    assert library.numpy(state.gaps).tolist() == [0.0, 0.0, 1.0]
    assert library.numpy(state.mask).tolist() == [False, False, True]


@pytest.mark.filterwarnings("ignore:no pair of the first batch takes part")
def test_every_pair_masked(library, lose):
    nobody = library.array([False] * 3, "bool")
    for gaps, setting in ((GAPS, MILD), ([math.nan, math.inf, 1.0], HARD)):
        loss, aux = lose(gaps, mask=nobody, **setting)
        assert float(loss) == 0
        np.testing.assert_array_equal(library.numpy(aux.pair_weights), 0.0)
        np.testing.assert_array_equal(library.numpy(aux.margins), setting["gamma0"])
        assert all(
            np.isfinite(library.numpy(each)).all() for each in gamma_loss.metrics(aux).values()
        )


def test_gamma0_of_zero(library, lose):
    loss, aux = lose(GAPS, gamma0=0, tau=1)
    np.testing.assert_array_equal(library.numpy(aux.margins), 0.0)
    expected = gamma_loss.preference_loss(np.array(GAPS)).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-12)
    assert float(aux.error_bound) == 0


@pytest.mark.filterwarnings("ignore:overflow encountered")  # of what Triton's interpreter drops
@pytest.mark.parametrize("gamma0", [1e-14, 1.0, 1e12])
def test_the_edges_of_the_range_of_settings(solver, gamma0):
    """Exact to rounding, of the oracle as well, and the error bound holds."""
    for a in (1e-30, 0.5, 1.4, 2.0, 1e9):
        tau = gamma0 / a
        slack = a * float(np.finfo(np.longdouble).eps)
        for gaps in (np.array([1.0, -2.0, 0.5, 9.0]), np.array([1e4, -1e4, 3.0])):
            expected, _ = oracles.margins(gaps, gamma0, tau)
            for dtype, close in ((np.float32, 3e-6), (np.float64, 1e-13)):
                margins, _, bound = solver(gaps.astype(dtype), gamma0=gamma0, tau=tau)
                off = np.abs(margins - expected)
                assert np.max(off / (gamma0 + expected)) <= close + slack
                assert np.mean(off / gamma0) <= float(bound) + slack


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
    for setting in ({"beta": 0.5, **MILD}, {"beta": 0.1, **HARD}):
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
