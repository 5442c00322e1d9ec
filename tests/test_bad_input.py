"""Bad input: each check once, and each public name that it is wired in; and odd input is taken."""

import inspect
import itertools
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from strategies import HARD, MILD

import gamma_loss
from gamma_loss import gamma_preference_loss, preference_loss, queue_init, queue_push, solve_margins

GAPS = [1.0, -2.0, 0.5]
UNITS = {"beta": 0.5, "gamma0": 1.0, "tau": 1.0}
REDUCTIONS = "one of ('mean', 'sum', 'none'), got "
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors:UserWarning")


def refused(error, words, call, *arguments, **more):
    """Hold that a call raises an error whose text starts so, and return its text."""
    with pytest.raises(error) as caught:
        call(*arguments, **more)
    assert str(caught.value).startswith(words), caught.value
    return str(caught.value)


# --- each check of a setting, by one public name ---

WRONG = [  # error, argument, what it must be, and what came
    (TypeError, "beta", "a Python number, got ", ["1", np.array([1.0]), True, 1j]),
    (TypeError, "centered", "True or False, got ", [1, np.True_, "no"]),
    (TypeError, "reduction", REDUCTIONS, [None, np.array(["mean", "x"])]),
    (TypeError, "capacity", "an int, got ", [2.0, True]),
    (ValueError, "beta", "finite and > 0, got ", [math.nan, 10**400, 0]),
    (ValueError, "gamma0", "finite and >= 0, got ", [-1]),
    (ValueError, "gamma0", "0 or from 1e-14 to 1e12, got ", [9.9e-15, 1.1e12]),
    (ValueError, "gamma0 / tau", "from 1e-30 to 1e+09, got 1.0 / ", [0.9e-9, 5e-324, 1.1e30]),
    (ValueError, "label_smoothing", "finite and >= 0 and < 0.5, got ", [-0.1, 0.5]),
    (ValueError, "reduction", REDUCTIONS, ["max"]),
    (ValueError, "impl", "one of ('auto', 'eager', 'compile', 'triton'), got ", ["cuda"]),
    (ValueError, "capacity", ">= 1, got ", [0]),
]


def test_a_setting_of_a_wrong_type_or_out_of_its_range_is_refused():
    row = np.array(GAPS)
    for error, name, words, values in WRONG:
        words = f"{name} must be {words}"
        for wrong in values:
            if name == "capacity":
                text = refused(error, words, queue_init, row, wrong)
            else:
                settings = UNITS | {name.removeprefix("gamma0 / "): wrong}
                text = refused(error, words, gamma_loss.gamma_simpo_loss, row, row, **settings)
            came = str(wrong), repr(wrong), type(wrong).__name__, "int beyond floats"
            assert text.removeprefix(words) in came


def test_numbers_of_numpy_and_integers_are_numbers():
    expected, _ = gamma_preference_loss(np.array(GAPS), gamma0=3.0, tau=1.0)
    for value in (np.float32(3), np.float64(3), np.int64(3), 3):
        assert gamma_preference_loss(np.array(GAPS), gamma0=value, tau=1)[0] == expected


# --- each check of an array ---


def odd(library):
    """Each kind of thing that this library can be given instead of an array of real numbers."""
    found = {"list": GAPS, "string": "x", "none": None} | {
        dtype: library.array(GAPS, dtype) for dtype in ("int64", "bool", "complex64")
    }
    if library.name == "numpy":
        small = pytest.importorskip("ml_dtypes")
        # A library that follows only most of the standard, as MLX does, which has no `bool`.
        most = SimpleNamespace(__name__="mlx.core", float32=None, float64=None)
        found |= {
            "masked": np.ma.array(GAPS, mask=[True, False, False]),
            "objects": np.array(GAPS, dtype=object),
            "strings": np.array(["1", "2", "3"]),
            "bfloat16": np.array(GAPS, small.bfloat16),
            "mlx": type("array", (), {"__array_namespace__": lambda self, **_: most})(),
        }
    if library.name == "torch":
        torch, gaps = library.xp, library.array(GAPS, "float32")
        found |= {
            "sparse": gaps.to_sparse(),
            "nested": torch.nested.nested_tensor([gaps], layout=torch.jagged),
            "masked tensors": torch.masked.masked_tensor(gaps, gaps > 0),
        }
    return found


def test_what_is_no_array_of_real_numbers_is_refused(library):
    """Where an array is optional None is none; and a mask is of booleans."""
    good, state = library.array(GAPS), queue_init(library.array(GAPS), 3)
    optional = ("context", "mask", "weights")
    calls = {
        "reward_gaps": preference_loss,
        **{name: lambda value, name=name: solve_margins(good, **{name: value}, **MILD)
           for name in optional},
        "context_mask": lambda value: solve_margins(
            good, context=state._replace(mask=value), **MILD
        ),
        "gaps": lambda value: queue_push(state, value),
        "mask ": lambda value: queue_push(state, good, value),
        "state.gaps": lambda value: queue_push(state._replace(gaps=value), good),
        "state.mask": lambda value: queue_push(state._replace(mask=value), good),
    }  # fmt: skip
    for (kind, value), (name, call) in itertools.product(odd(library).items(), calls.items()):
        is_right = kind == "bool" and "mask" in name
        if not is_right and not (kind == "none" and name in (*optional, "mask ")):
            assert ", got " in refused(TypeError, f"{name.strip()} must ", call, value), kind
    assert refused(TypeError, "reward_gaps must ", preference_loss, GAPS).endswith(", got list")


def test_arrays_of_two_libraries_or_devices_are_refused(library):
    good, other = library.array(GAPS), np.array(GAPS)
    if library.name == "numpy":
        other = pytest.importorskip("torch").tensor(GAPS)
    words = "margins must be an array of the same library as reward_gaps, "
    text = refused(TypeError, words, preference_loss, good, other)
    assert text.endswith(type(other).__name__)
    if library.name == "torch":
        meta, words = good.to("meta"), "must be on the device of reward_gaps, cpu, got meta"
        refused(ValueError, f"margins {words}", preference_loss, good, meta)
        for name, wrong in (("context", meta), ("mask", meta > 0), ("weights", meta)):
            refused(ValueError, f"{name} {words}", solve_margins, good, **{name: wrong}, **MILD)


def test_wrong_shapes_are_refused(library):
    good = library.array(GAPS)
    for shape in ((), (3, 1), (0,), (2,)):
        array = library.array(np.ones(shape))
        words = f"must have the shape of reward_gaps, (3,), got {shape}"
        refused(ValueError, f"margins {words}", preference_loss, good, array)
        for name, wrong in (("mask", array > 0), ("weights", array)):
            refused(ValueError, f"{name} {words}", solve_margins, good, **{name: wrong}, **MILD)
        if shape != (2,):
            words = "be 1-D, one entry a pair" if len(shape) != 1 else "hold at least one pair"
            words = f"must {words}, got shape {shape}"
            refused(ValueError, f"reward_gaps {words}", solve_margins, array, **MILD)
            refused(ValueError, f"context {words}", solve_margins, good, context=array, **MILD)


def test_a_queue_of_wrong_shapes_is_refused(library):
    state, two = queue_init(library.array(GAPS), 3), library.array([[1.0]])
    for words, *arguments in [
        ("state.gaps must be 1-D", state._replace(gaps=two), state.gaps),
        ("state.mask must have the shape of st", state._replace(mask=two > 0), state.gaps),
        ("state.gaps must hold at least", state._replace(gaps=state.gaps[:0]), state.gaps),
        ("gaps must be 1-D", state, two),
        ("mask must have the shape of gaps", state, state.gaps, two > 0),
    ]:
        refused(ValueError, words, queue_push, *arguments)
    words = "state must be a QueueState, got tuple"
    refused(TypeError, words, queue_push, tuple(state), state.gaps)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_a_weight_that_is_none_is_refused_or_shows_in_the_loss_of_its_pair(library, bad):
    gaps, weights = library.array(GAPS), library.array([1.0, bad, 2.0])
    if library.name != "jax":  # where the values are free to read
        for call in (gamma_preference_loss, solve_margins):
            words = f"weights must be finite and >= 0, got {bad}: "
            text = refused(ValueError, words, call, gaps, weights=weights, **MILD)
            assert text.endswith("the weight 0")
        return
    losses, _ = gamma_preference_loss(gaps, weights=weights, reduction="none", **MILD)
    assert np.isnan(losses).tolist() == [False, True, False]
    assert np.isnan(gamma_preference_loss(gaps, weights=weights, **MILD)[0])


# --- where they are wired in ---

LOGPS = ("policy_chosen_logps", "policy_rejected_logps", "reference_chosen_logps",
         "reference_rejected_logps")  # fmt: skip
LOSSES = {
    "gamma_preference_loss": ("reward_gaps",), "GammaPreferenceLoss": ("reward_gaps",),
    "gamma_simpo_loss": LOGPS[:2], "GammaSimPOLoss": LOGPS[:2],
    "gamma_dpo_loss": LOGPS, "GammaDPOLoss": LOGPS,
}  # fmt: skip
ANY_SHAPE = {  # of the first argument
    "preference_loss": ("reward_gaps", "margins"),
    "label_smoothing_from_shift": ("reward_gaps", "shift"),
    "shift_from_label_smoothing": ("reward_gaps", "epsilon"),
    "queue_init": ("like",),
}
GAPS_ALONE = dict.fromkeys(("solve_margins", "match_logistic", "choose_settings"), ("reward_gaps",))
NEEDED = LOSSES | ANY_SHAPE | GAPS_ALONE  # the arrays of each public name
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


@pytest.mark.parametrize("name", NEEDED)
def test_a_public_name_checks_its_arguments(name):
    (public, parameters), first = function(name), NEEDED[name][0]
    is_module, make = isinstance(getattr(gamma_loss, name), type), np.array
    if is_module:
        make = pytest.importorskip("torch").tensor
    good = {key: UNITS[key] for key in parameters & set(UNITS)}
    good |= {"margin_std": 0.1} if name == "choose_settings" else {}
    good |= dict.fromkeys(NEEDED[name], make(GAPS))

    def refuses(error, words, **wrong):
        refused(error, words, public, **good | wrong)

    public(**good)
    optional = parameters & {"mask", "weights", "context"}
    for argument in (*NEEDED[name], *optional):
        for wrong in ("x", np.array([1, 2, 3])):
            refuses(TypeError, f"{argument} must ", **{argument: wrong})
        if name not in ANY_SHAPE or argument != first:
            column = make([[gap] for gap in GAPS])
            column = column > 0 if argument == "mask" else column
            refuses(ValueError, f"{argument} must ", **{argument: column})
    for setting in parameters & set(BAD_SETTINGS):
        error = TypeError if setting in ("centered", "robust") else ValueError
        one_of_two = {"margin_std": None} if setting == "beta_factor" else {}
        refuses(error, f"{setting} must be ", **{setting: BAD_SETTINGS[setting]}, **one_of_two)
    if is_module:
        elsewhere = make(GAPS, device="meta")
        refuses(ValueError, f"{first} must be on the device of the module", **{first: elsewhere})
    if "context" in optional:
        for words, context in (
            ("was given without a context", None),
            ("must have the shape of context, (2,), got (3,)", np.ones(2)),
            ("must be None for a queue as context", queue_init(np.ones(1), 3)),
        ):
            mask = np.ones(3, dtype=bool)
            refuses(ValueError, f"context_mask {words}", context=context, context_mask=mask)


def test_every_argument_of_every_public_name_is_in_the_tables():
    known = {
        "group", "context", "context_mask", "state", "gaps", "chunks", "aux", "mask", "weights",
        "logits", "labels", "ignore_index", "average", "shift",  # in test_logps
    }  # fmt: skip
    for name in gamma_loss.__all__:
        public = getattr(gamma_loss, name)
        is_tuple = isinstance(public, type) and issubclass(public, tuple)
        if callable(public) and not is_tuple and name != "GapQueue":
            assert function(name)[1] <= known | set(BAD_SETTINGS) | set(NEEDED.get(name, ())), name


def test_other_names_check_theirs(torch):
    result, queue = gamma_preference_loss(np.array(GAPS), **MILD), gamma_loss.GapQueue(2)
    refused(TypeError, "aux must be a GammaLossAux, got tuple", gamma_loss.metrics, result)
    with pytest.raises(TypeError, match="takes no beta"):
        gamma_preference_loss(np.array(GAPS), beta=1.0, **MILD)
    refused(TypeError, "gaps must be an array of the ", queue.push, np.zeros(1))
    refused(ValueError, "k must be >= 1, got 0", queue.sample, 0)
    refused(ValueError, "k must be at most the capacity, 2, got 3", queue.sample, 3)
    refused(ValueError, "dtype must be one of", gamma_loss.GapQueue, dtype=torch.float16)
    with pytest.raises(AttributeError, match="has no attribute 'GammaFooLoss'"):
        gamma_loss.GammaFooLoss  # noqa: B018
    # Before any call; and at a call, for a schedule may change a setting.
    refused(ValueError, "tau must be ", gamma_loss.GammaPreferenceLoss, gamma0=1.0, tau=0.0)
    module = gamma_loss.GammaPreferenceLoss(**MILD)
    module.settings["gamma0"] = -2.0
    refused(ValueError, "gamma0 must be finite", module, torch.tensor(GAPS))


@pytest.mark.parametrize("library", ["numpy", "torch"], indirect=True)
def test_streaming_takes_real_numbers_only(library):
    call, setting = gamma_loss.solve_margins_streaming, {"gamma0": 1.0, "tau": 1.0}

    def solve(chunk):
        return call([chunk], **setting)

    rule, errors = solve(np.array(GAPS)), (TypeError, ValueError)
    for kind, value in odd(library).items():
        if kind in ("list", "int64", "bfloat16"):  # real numbers nevertheless
            expected = solve_margins(np.asarray(value).astype(np.float64), **setting).margins
            np.testing.assert_allclose(solve(value).margins(value), expected, rtol=1e-12)
        else:
            refused(errors, "chunks must ", solve, value)
            refused(errors, "reward_gaps must ", rule.margins, value)
    for name, wrong in (("gamma0", -1.0), ("tau", 0.0)):
        refused(ValueError, f"{name} must be", call, [np.array(GAPS)], **setting | {name: wrong})
    for chunks, words in (
        (iter([np.zeros(2)]), "be readable several times, got list_iterator"),
        ([np.zeros((2, 1))], "be 1-D, one entry a pair, got shape (2, 1)"),
        ([np.array([np.nan])], "hold at least one finite gap, got none"),
    ):
        refused(errors, f"chunks must {words}", call, chunks, **setting)


# --- what is taken ---


@pytest.fixture
def losses(library):
    """Each loss as a function of gaps, whatever it takes; beta is 1."""

    def made(name):
        public, parameters = function(name)
        own = {"beta": 1.0} if "beta" in parameters else {}

        def call(gaps, **more):
            rows = dict.fromkeys(LOSSES[name], library.array([0.0] * len(gaps)))
            rows[LOSSES[name][0]] = library.array(gaps)
            return public(**rows, **MILD | own | more)

        return call

    return [made(name) for name in LOSSES if name[0] == "g" or library.name == "torch"]


def test_a_gap_that_is_not_finite_takes_no_part_and_shows_in_its_own_loss(library, losses):
    cases = (MILD, math.nan), (HARD, math.inf), (MILD, -math.inf)
    for lose, (setting, bad) in zip(losses, itertools.cycle(cases), strict=False):
        options = {"centered": False, "label_smoothing": 0.1, "reduction": "none", **setting}
        kept, gaps = [0, 2], np.array([1.0, bad, -2.0])
        expected, known = gamma_preference_loss(gaps[kept], **options)
        single, aux = lose(gaps, **options)
        single, margins = library.numpy(single), library.numpy(aux.margins)
        np.testing.assert_allclose(single[kept], expected, rtol=1e-12)
        np.testing.assert_allclose(margins[kept], known.margins, rtol=1e-12)
        assert not np.isfinite(single[1])
        assert np.isnan(margins[1])
        assert not np.isfinite(float(lose(gaps, **options | {"reduction": "mean"})[0]))
        logs = gamma_loss.metrics(aux)
        assert not np.isfinite(float(logs["rewards/margins"]))
        assert float(logs["gamma/error_bound"]) < 1e-12


@pytest.mark.filterwarnings("ignore:no pair of the first batch takes part")
def test_with_every_pair_masked_the_loss_is_0_and_the_margins_gamma0(library, losses):
    nobody = library.array([False] * 3, "bool")
    cases = (GAPS, MILD), ([math.nan, math.inf, 1.0], HARD)
    for lose, (gaps, setting) in zip(losses, itertools.cycle(cases), strict=False):
        loss, aux = lose(gaps, mask=nobody, **setting)
        assert float(loss) == 0
        np.testing.assert_array_equal(library.numpy(aux.pair_weights), 0.0)
        np.testing.assert_array_equal(library.numpy(aux.margins), setting["gamma0"])
        assert all(np.isfinite(library.numpy(each)) for each in gamma_loss.metrics(aux).values())


def test_gamma0_of_zero_gives_no_margins(library, losses):
    for lose in losses:
        loss, aux = lose(GAPS, gamma0=0, tau=1)
        np.testing.assert_array_equal(library.numpy(aux.margins), 0.0)
        assert float(loss) == pytest.approx(preference_loss(np.array(GAPS)).mean(), rel=1e-12)
        assert float(aux.error_bound) == float(aux.multiplier) == 0


def test_dtypes_of_results(library):
    gaps, wide = library.array(GAPS, "float32"), library.array(GAPS)
    for margins in (0.5, np.float64(0.5), gaps):
        assert preference_loss(gaps, margins).dtype == library.xp.float32
    assert preference_loss(gaps, wide).dtype == library.xp.float64
    assert preference_loss(wide, gaps).dtype == library.xp.float64
    weights = library.array([1.0, 2.0, 1.0])
    assert solve_margins(gaps, weights=weights, **MILD).margins.dtype == library.xp.float32
    if library.name != "array_api_strict":  # which has no half precision
        expected = solve_margins(gaps, context=gaps[:1], **MILD).margins
        for dtype in ["float16"] if library.name == "numpy" else ["float16", "bfloat16"]:
            found = solve_margins(gaps, context=library.array(GAPS[:1], dtype), **MILD).margins
            np.testing.assert_array_equal(library.numpy(found), library.numpy(expected))


def test_no_look_at_values_on_the_device(torch):
    # A meta tensor has no values: any copy to the host or branch on a value raises.
    rows = [torch.zeros(5, device="meta") for _ in range(4)]
    for setting in (MILD, HARD):
        options = {"mask": rows[0] > 0, "context": rows[0], **setting}
        loss, aux = gamma_loss.gamma_dpo_loss(*rows, beta=0.5, **options)
        state = queue_push(queue_init(rows[0], 3), rows[0], rows[0] > 0)
        for each in (loss, *aux, *state, *gamma_loss.metrics(aux).values()):
            assert each.device.type == "meta"


def test_a_default_device_at_the_first_call_leaves_no_trace(torch):
    """In a process of its own, where nothing has been called before."""
    code = f"""
import torch, gamma_loss as g
def everything():
    gaps = torch.tensor({GAPS}, device="cpu")
    loss, aux = g.gamma_preference_loss(gaps, **{HARD})
    rule = g.solve_margins_streaming([gaps], **{HARD})
    return [loss, *aux, *g.metrics(aux).values(), g.label_smoothing_from_shift(gaps, aux.shifts),
            g.shift_from_label_smoothing(gaps, 0.1), *g.queue_push(g.queue_init(gaps, 4), gaps),
            torch.from_numpy(rule.margins(gaps))]
with torch.device("meta"):
    first = everything()
torch.testing.assert_close(first, everything(), rtol=0, atol=0)  # and so on the same device
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
