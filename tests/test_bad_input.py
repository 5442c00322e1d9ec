"""Bad input: each check once, and each public name that it is wired in; and odd input is taken."""

import inspect
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from strategies import HARD, MILD

import gamma_loss
from gamma_loss import (
    gamma_preference_loss,
    gamma_simpo_loss,
    metrics,
    preference_loss,
    queue_init,
    queue_push,
    solve_margins,
    solve_margins_streaming,
)

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


# --- each check of a setting, by one public name ---

RANGE = "must be 0 or from 1e-14 to 1e12"
SETTINGS = [
    ("beta", "1", TypeError, "must be a Python number, got str"),
    ("beta", None, TypeError, "must be a Python number, got NoneType"),
    ("beta", np.array([1.0]), TypeError, "must be a Python number, got ndarray"),
    ("beta", True, TypeError, "must be a Python number, got bool"),
    ("beta", 1j, TypeError, "must be a Python number, got complex"),
    ("beta", math.nan, ValueError, "must be finite and > 0, got nan"),
    ("beta", math.inf, ValueError, "must be finite and > 0, got inf"),
    ("beta", 10**400, ValueError, "must be finite and > 0, got int beyond floats"),
    ("beta", 0, ValueError, "must be finite and > 0, got 0"),
    ("tau", 0, ValueError, "must be finite and > 0, got 0"),
    ("gamma0", -1, ValueError, "must be finite and >= 0, got -1"),
    ("gamma0", 9.9e-15, ValueError, f"{RANGE}, got 9.9e-15"),
    ("gamma0", 1.1e12, ValueError, f"{RANGE}, got 1100000000000.0"),
    ("tau", 0.9e-9, ValueError, "gamma0 / tau must be from 1e-30 to 1e+09, got 1.0 / 9e-10"),
    ("tau", 5e-324, ValueError, "gamma0 / tau must be from 1e-30 to 1e+09, got 1.0 / 5e-324"),
    ("tau", 1.1e30, ValueError, "gamma0 / tau must be from 1e-30 to 1e+09, got 1.0 / 1.1e+30"),
    ("label_smoothing", [0.1], TypeError, "must be a Python number, got list"),
    ("label_smoothing", -0.1, ValueError, "must be finite and >= 0 and < 0.5, got -0.1"),
    ("label_smoothing", 0.5, ValueError, "must be finite and >= 0 and < 0.5, got 0.5"),
    *(("centered", wrong, TypeError, f"must be True or False, got {wrong!r}")
      for wrong in ("False", 0, 1, None, np.True_)),
    ("robust", "no", TypeError, "must be True or False, got 'no'"),
    ("reduction", "max", ValueError, "must be one of ('mean', 'sum', 'none'), got 'max'"),
    ("reduction", None, TypeError, "must be one of ('mean', 'sum', 'none'), got NoneType"),
    ("reduction", np.array(["mean", "x"]), TypeError, "must be one of ('mean', 'sum', 'none'), go"),
    ("impl", "cuda", ValueError, "must be one of ('auto', 'eager', 'compile', 'triton'), got 'c"),
    *(("capacity", wrong, TypeError, f"must be an int, got {type(wrong).__name__}")
      for wrong in (2.0, "2", True, None)),
    ("capacity", 0, ValueError, "must be >= 1, got 0"),
]  # fmt: skip


def test_a_setting_of_a_wrong_type_or_out_of_its_range_is_refused():
    rows, settings = np.array([GAPS] * 2), {"beta": 0.5, "gamma0": 1.0, "tau": 1.0}
    for name, wrong, error, words in SETTINGS:
        if name == "capacity":
            text = complaint(error, queue_init, rows[0], wrong)
        else:
            text = complaint(error, gamma_simpo_loss, *rows, **settings | {name: wrong})
        assert text.startswith(words if words.startswith("gamma0") else f"{name} {words}"), text


def test_numbers_of_numpy_and_integers_are_numbers():
    expected, _ = gamma_preference_loss(np.array(GAPS), gamma0=3.0, tau=1.0)
    for value in (np.float32(3), np.float64(3), np.int64(3), 3):
        assert gamma_preference_loss(np.array(GAPS), gamma0=value, tau=1)[0] == expected


# --- each check of an array ---

ODD = {  # what is refused everywhere, by the libraries that have it
    "list": lambda library: GAPS,
    "string": lambda library: "x",
    "none": lambda library: None,
    "integers": lambda library: library.array(GAPS, "int64"),
    "booleans": lambda library: library.array(GAPS, "bool"),
    "complex": lambda library: library.array(GAPS, "complex64"),
}
ODD_OF = {
    "numpy": {
        "masked": lambda library: np.ma.array(GAPS, mask=[True, False, False]),
        "objects": lambda library: np.array(GAPS, dtype=object),
        "strings": lambda library: np.array(["1", "2", "3"]),
        "dates": lambda library: np.array(["2020-01-01"] * 3, dtype="datetime64[D]"),
        "records": lambda library: np.zeros(3, dtype=[("a", "f8")]),
        "bfloat16": lambda library: np.array(GAPS, pytest.importorskip("ml_dtypes").bfloat16),
        "float8": lambda library: np.array(GAPS, pytest.importorskip("ml_dtypes").float8_e5m2),
    },
    "torch": {
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
    },
}


def odd(library):
    """Each kind of thing that this library can be given instead of an array of real numbers."""
    made = ODD | ODD_OF.get(library.name, {})
    return {kind: make(library) for kind, make in made.items()}


def test_what_is_no_array_of_real_numbers_is_refused(library):
    """Where an array is optional None is none; and a mask is of booleans."""
    good, state = library.array(GAPS), queue_init(library.array(GAPS), 3)
    calls = {
        "reward_gaps": preference_loss,
        "context": lambda value: solve_margins(good, context=value, **MILD),
        "mask": lambda value: solve_margins(good, mask=value, **MILD),
        "weights": lambda value: solve_margins(good, weights=value, **MILD),
        "context_mask": lambda value: solve_margins(
            good, context=state._replace(mask=value), **MILD
        ),
        "gaps": lambda value: queue_push(state, value),
        "mask ": lambda value: queue_push(state, good, value),
        "state.gaps": lambda value: queue_push(state._replace(gaps=value), good),
        "state.mask": lambda value: queue_push(state._replace(mask=value), good),
    }
    for kind, value in odd(library).items():
        for name, call in calls.items():
            is_right = kind == "booleans" and "mask" in name
            is_none = kind == "none" and name in ("context", "mask", "weights", "mask ")
            if not is_right and not is_none:
                text = complaint(TypeError, call, value)
                assert text.startswith(f"{name.strip()} must "), (kind, text)
                assert ", got " in text, (kind, text)


def test_a_library_that_follows_only_most_of_the_standard():
    """As MLX does, which has no `bool`."""
    most = SimpleNamespace(__name__="mlx.core", float32=None, float64=None)
    names = {"__array_namespace__": lambda self, **_: most, "__module__": "mlx.core"}
    text = complaint(TypeError, preference_loss, type("array", (), names)())
    assert text == "reward_gaps must be an array (torch, NumPy, JAX, ...), got mlx.core.array"


def test_arrays_of_two_libraries_or_devices_are_refused(library):
    other = np.array(GAPS)
    if library.name == "numpy":
        other = pytest.importorskip("torch").tensor(GAPS)
    text = complaint(TypeError, preference_loss, library.array(GAPS), other)
    words = "margins must be an array of the same library as reward_gaps, "
    assert text.startswith(words), text
    assert text.endswith(type(other).__name__)
    if library.name == "torch":
        meta, good = library.array(GAPS).to("meta"), library.array(GAPS)
        text = complaint(ValueError, preference_loss, good, meta)
        assert text == "margins must be on the device of reward_gaps, cpu, got meta"
        for name in ("context", "mask", "weights"):
            wrong = meta > 0 if name == "mask" else meta
            text = complaint(ValueError, solve_margins, good, **{name: wrong}, **MILD)
            assert text == f"{name} must be on the device of reward_gaps, cpu, got meta"


def test_wrong_shapes_are_refused(library):
    good = library.array(GAPS)
    for shape in ((), (3, 1), (0,), (2,)):
        array, flags = library.array(np.ones(shape)), library.array(np.ones(shape), "bool")
        words = f"must have the shape of reward_gaps, (3,), got {shape}"
        text = complaint(ValueError, preference_loss, good, array)
        assert text == f"margins {words}"
        for name, wrong in (("mask", flags), ("weights", array)):
            text = complaint(ValueError, solve_margins, good, **{name: wrong}, **MILD)
            assert text == f"{name} {words}"
        if shape != (2,):
            words = "be 1-D, one entry a pair" if len(shape) != 1 else "hold at least one pair"
            for name, arrays in (("reward_gaps", [array]), ("context", [good, array])):
                call = dict(zip(("reward_gaps", "context"), arrays, strict=False))
                text = complaint(ValueError, solve_margins, **call, **MILD)
                assert text == f"{name} must {words}, got shape {shape}"


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_a_weight_that_is_none_is_refused_or_shows_in_the_loss_of_its_pair(library, bad):
    gaps, weights = library.array([1.0, -2.0, 0.5]), library.array([1.0, bad, 2.0])
    if library.name != "jax":  # where the values are free to read
        for call in (gamma_preference_loss, solve_margins):
            text = complaint(ValueError, call, gaps, weights=weights, **MILD)
            assert text.startswith("weights must be finite and >= 0, got ")
            assert text.endswith("the weight 0")
        return
    losses, _ = gamma_preference_loss(gaps, weights=weights, reduction="none", **MILD)
    assert np.isnan(losses).tolist() == [False, True, False]
    assert np.isnan(gamma_preference_loss(gaps, weights=weights, **MILD)[0])


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
        error = TypeError if setting in ("centered", "robust") else ValueError
        text = complaint(error, call, name, **{setting: BAD_SETTINGS[setting]})
        assert text.startswith(f"{setting} must be "), text
    if is_module:
        elsewhere = pytest.importorskip("torch").ones(3, device="meta")
        text = complaint(ValueError, call, name, **{needed[0]: elsewhere})
        assert text.startswith(f"{needed[0]} must be on the device of the module, cpu"), text
    if "context" in optional:
        flags = np.ones(3, dtype=bool)
        text = complaint(ValueError, call, name, context_mask=flags)
        assert text == "context_mask was given without a context"
        text = complaint(ValueError, call, name, context=np.ones(2), context_mask=flags)
        assert text == "context_mask must have the shape of context, (2,), got (3,)"
        queue = queue_init(np.ones(1), 3)
        text = complaint(ValueError, call, name, context=queue, context_mask=flags)
        assert text.startswith("context_mask must be None for a queue as context")


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


def test_other_names_check_theirs(torch):
    result = gamma_preference_loss(np.array(GAPS), gamma0=1.0, tau=1.0)
    assert complaint(TypeError, metrics, result) == "aux must be a GammaLossAux, got tuple"
    text = complaint(TypeError, gamma_preference_loss, np.array(GAPS), beta=1.0, **MILD)
    assert "takes no beta" in text
    logits, labels = torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.int64)
    for flag in ("average", "shift"):
        text = complaint(TypeError, gamma_loss.sequence_logps, logits, labels, **{flag: 1})
        assert text == f"{flag} must be True or False, got 1"
    queue = gamma_loss.GapQueue(2)
    assert complaint(TypeError, queue.push, np.zeros(1)).startswith("gaps must be an array of the ")
    assert complaint(ValueError, queue.sample, 3) == "k must be at most the capacity, 2, got 3"
    text = complaint(ValueError, gamma_loss.GapQueue, dtype=torch.float16)
    assert text.startswith("dtype must be one of")
    with pytest.raises(AttributeError, match="has no attribute 'GammaFooLoss'"):
        gamma_loss.GammaFooLoss  # noqa: B018
    text = complaint(ValueError, gamma_loss.GammaPreferenceLoss, gamma0=1.0, tau=0.0)
    assert text.startswith("tau must be ")  # before any call
    module = gamma_loss.GammaPreferenceLoss(**MILD)
    module.settings["gamma0"] = -2.0  # as by a schedule
    assert complaint(ValueError, module, torch.tensor(GAPS)).startswith("gamma0 must be finite")


def test_a_queue_of_wrong_shapes_is_refused(library):
    state, two = queue_init(library.array(GAPS), 3), library.array([[1.0]])
    for broken, gaps, mask, words in [
        (state._replace(gaps=two), state.gaps, None, "state.gaps must be 1-D"),
        (state._replace(mask=two > 0), state.gaps, None, "state.mask must have the shape of st"),
        (state._replace(gaps=state.gaps[:0]), state.gaps, None, "state.gaps must hold at least"),
        (state, two, None, "gaps must be 1-D"),
        (state, state.gaps, two > 0, "mask must have the shape of gaps"),
    ]:
        assert complaint(ValueError, queue_push, broken, gaps, mask).startswith(words)
    text = complaint(TypeError, queue_push, tuple(state), state.gaps)
    assert text == "state must be a QueueState, got tuple"


@pytest.mark.parametrize("library", ["numpy", "torch"], indirect=True)
def test_streaming_takes_real_numbers_only(library):
    setting = {"gamma0": 1.0, "tau": 1.0}
    rule = solve_margins_streaming([np.array(GAPS)], **setting)
    for kind, value in odd(library).items():
        if kind in ("list", "integers", "bfloat16", "float8"):  # real numbers nevertheless
            expected = solve_margins(np.asarray(value).astype(np.float64), **setting).margins
            found = solve_margins_streaming([value], **setting).margins(value)
            np.testing.assert_allclose(found, expected, rtol=1e-12)
            continue
        for call, name in ((lambda chunk: solve_margins_streaming([chunk], **setting), "chunks"),
                           (rule.margins, "reward_gaps")):  # fmt: skip
            text = complaint((TypeError, ValueError), call, value)
            assert text.startswith(f"{name} must "), kind
    for wrong in ({"gamma0": -1.0}, {"tau": 0.0}, {"gamma0": 4.0, "tau": 1e-40}):
        text = complaint(ValueError, solve_margins_streaming, [np.array(GAPS)], **setting | wrong)
        assert text.startswith(tuple(wrong))
    for chunks, words in (
        (iter([np.zeros(2)]), "be readable several times, got list_iterator"),
        (None, "be readable several times, got NoneType"),
        ([np.zeros((2, 1))], "be 1-D, one entry a pair, got shape (2, 1)"),
        ([3.0], "be 1-D, one entry a pair, got shape ()"),
        ([np.array([np.nan])], "hold at least one finite gap, got none"),
    ):
        text = complaint((TypeError, ValueError), solve_margins_streaming, chunks, **setting)
        assert text == f"chunks must {words}"


# --- what is taken ---

LOSSES = {name: arrays[0] for name, arrays in ARRAYS.items() if "Loss" in name or "_loss" in name}
del LOSSES["preference_loss"]


@pytest.fixture
def losses(library):
    """Each loss of these gaps, whatever it takes; without beta, which is 1 then."""

    def made(name):
        is_module = isinstance(getattr(gamma_loss, name), type)
        public, parameters = function(name)

        def call(gaps, dtype="float64", **more):
            rows = {each: library.array(np.zeros(len(gaps)), dtype) for each in LOSSES[name]}
            rows[LOSSES[name][0]] = library.array(gaps, dtype)
            settings = {**MILD, **({"beta": 1.0} if "beta" in parameters else {}), **more}
            if is_module:
                settings.setdefault("queue_size", 4)
            return public(**rows, **settings)

        return call

    return [made(name) for name in LOSSES if name[0] == "g" or library.name == "torch"]


def test_a_gap_that_is_not_finite_takes_no_part_and_shows_in_its_own_loss(library, losses):
    kept, cases = [0, 2, 3], [("float32", MILD), ("float64", HARD), ("float64", MILD)]
    for (dtype, setting), bad in zip(cases, (math.nan, math.inf, -math.inf), strict=True):
        options = {"centered": False, "label_smoothing": 0.1, **setting}
        close = {"rtol": 1e-5 if dtype == "float32" else 1e-12}
        gaps = np.array([1.0, bad, -2.0, 0.5])
        expected, known = gamma_preference_loss(gaps[kept], reduction="none", **options)
        for lose in losses:
            single, aux = lose(gaps, dtype, reduction="none", **options)
            single, margins = library.numpy(single), library.numpy(aux.margins)
            np.testing.assert_allclose(single[kept], expected, **close)
            np.testing.assert_allclose(margins[kept], known.margins, **close)
            assert not np.isfinite(single[1])
            assert np.isnan(margins[1])
            assert not np.isfinite(library.numpy(lose(gaps, dtype, **options)[0]))
            logs = metrics(aux)
            assert not np.isfinite(library.numpy(logs["rewards/margins"]))
            assert float(logs["gamma/error_bound"]) < 1e-4
        state = queue_push(queue_init(library.array(GAPS), 3), library.array([1.0, bad]))
        assert library.numpy(state.gaps).tolist() == [0.0, 0.0, 1.0]
        assert library.numpy(state.mask).tolist() == [False, False, True]


@pytest.mark.filterwarnings("ignore:no pair of the first batch takes part")
def test_with_every_pair_masked_the_loss_is_0_and_the_margins_gamma0(library, losses):
    nobody = library.array([False] * 3, "bool")
    for gaps, setting in ((GAPS, MILD), ([math.nan, math.inf, 1.0], HARD)):
        for lose in losses:
            loss, aux = lose(gaps, mask=nobody, **setting)
            assert float(loss) == 0
            np.testing.assert_array_equal(library.numpy(aux.pair_weights), 0.0)
            np.testing.assert_array_equal(library.numpy(aux.margins), setting["gamma0"])
            logs = metrics(aux)
            assert all(np.isfinite(library.numpy(each)) for each in logs.values())


def test_gamma0_of_zero_gives_no_margins(library, losses):
    for lose in losses:
        loss, aux = lose(GAPS, gamma0=0, tau=1)
        np.testing.assert_array_equal(library.numpy(aux.margins), 0.0)
        expected = preference_loss(np.array(GAPS)).mean()
        assert float(loss) == pytest.approx(float(expected), rel=1e-12)
        assert float(aux.error_bound) == float(aux.multiplier) == 0


def test_dtypes_of_results(library):
    gaps = library.array(GAPS, "float32")
    for margins in (0.5, np.float64(0.5), gaps):
        assert preference_loss(gaps, margins).dtype == library.xp.float32
    assert preference_loss(gaps, library.array(GAPS)).dtype == library.xp.float64
    assert preference_loss(library.array(GAPS), gaps).dtype == library.xp.float64
    weights = library.array([1.0, 2.0, 1.0])
    assert solve_margins(gaps, weights=weights, **MILD).margins.dtype == library.xp.float32
    if library.name == "array_api_strict":  # which has no half precision
        return
    expected = solve_margins(gaps, context=gaps[:1], **MILD).margins
    for dtype in ["float16"] if library.name == "numpy" else ["float16", "bfloat16"]:
        found = solve_margins(gaps, context=library.array(GAPS[:1], dtype), **MILD).margins
        np.testing.assert_array_equal(library.numpy(found), library.numpy(expected))


def test_no_look_at_values_on_the_device(torch):
    # A meta tensor has no values: any copy to the host or branch on a value raises.
    rows = [torch.zeros(5, device="meta") for _ in range(4)]
    mask = torch.ones(5, dtype=torch.bool, device="meta")
    for setting in ({"beta": 0.5, **MILD}, {"beta": 0.1, **HARD}):
        loss, aux = gamma_loss.gamma_dpo_loss(*rows, **setting, mask=mask, context=rows[0])
        assert loss.device.type == aux.margins.device.type == "meta"
        state = queue_push(queue_init(rows[0], 3), rows[0], mask)
        assert state.gaps.device.type == metrics(aux)["gamma/kl"].device.type == "meta"


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
