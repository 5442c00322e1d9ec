"""Every row of the design's table of bad input that raises: the error names the argument."""

import numpy as np
import pytest

from gamma_loss import (
    gamma_dpo_loss,
    gamma_preference_loss,
    gamma_simpo_loss,
    preference_loss,
    solve_margins,
)

OK = np.array([1.0, -2.0])
SETTING = {"beta": 0.1, "gamma0": 1.0, "tau": 1.0}
LOGPS = ("policy_chosen_logps", "policy_rejected_logps", "reference_chosen_logps",
         "reference_rejected_logps")  # fmt: skip


@pytest.mark.parametrize("name", LOGPS)
@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        ([1.0, 2.0], TypeError, "must be an array"),
        (3.0, TypeError, "must be an array"),
        (None, TypeError, "must be an array"),
        (np.array([1, 2]), TypeError, "real floating dtype.*, got int64"),
        (np.array([True, False]), TypeError, "real floating dtype.*, got bool"),
        (np.array([1j, 2]), TypeError, "real floating dtype.*, got complex128"),
        (np.array(1.0), ValueError, r"1-D.*got shape \(\)"),
        (np.ones((2, 1)), ValueError, r"1-D.*got shape \(2, 1\)"),
        (np.ones(0), ValueError, r"at least one pair, got shape \(0,\)"),
        (np.ones(3), ValueError, r"shape of .*\((2|3),\), got \((2|3),\)"),
    ],
)
def test_bad_log_probabilities(name, value, error, words):
    arguments = {**dict.fromkeys(LOGPS, OK), name: value}
    # where the first array is the odd one, the second is named as differing from it
    named = "logps" if name == LOGPS[0] and "shape of" in words else name
    with pytest.raises(error, match=f"{named}.* {words}|{named} {words}"):
        gamma_dpo_loss(**arguments, **SETTING)


@pytest.mark.parametrize(
    ("name", "value", "error", "words"),
    [
        ("mask", np.array([1.0, 0.0]), TypeError, "boolean dtype, got float64"),
        ("mask", [True, False], TypeError, "must be an array"),
        ("mask", np.array([True]), ValueError, r"shape of .*\(2,\), got \(1,\)"),
        ("context", np.array([1, 2]), TypeError, "real floating dtype.*, got int64"),
        ("context", np.ones((1, 1)), ValueError, "1-D"),
        ("context", np.ones(0), ValueError, "at least one"),
        ("context_mask", np.array([True]), ValueError, "without a context"),
    ],
)
def test_bad_masks_and_context(name, value, error, words):
    with pytest.raises(error, match=f"{name} .*{words}"):
        gamma_simpo_loss(OK, OK, **SETTING, **{name: value})


def test_bad_context_mask():
    with pytest.raises(ValueError, match=r"context_mask .*shape of context, \(3,\), got \(2,\)"):
        solve_margins(
            OK, gamma0=1.0, tau=1.0, context=np.ones(3), context_mask=np.array([True, False])
        )


@pytest.mark.parametrize(
    ("name", "value", "error", "words"),
    [
        ("beta", 0.0, ValueError, "finite and > 0, got 0.0"),
        ("beta", -1.0, ValueError, "finite and > 0, got -1.0"),
        ("beta", float("nan"), ValueError, "finite and > 0, got nan"),
        ("gamma0", -0.1, ValueError, "finite and >= 0, got -0.1"),
        ("gamma0", float("inf"), ValueError, "finite and >= 0, got inf"),
        ("tau", 0, ValueError, "finite and > 0, got 0"),
        ("tau", float("inf"), ValueError, "finite and > 0, got inf"),
        ("tau", "1", TypeError, "a Python number, got str"),
        ("gamma0", np.array([1.0]), TypeError, "a Python number, got ndarray"),
        ("label_smoothing", 0.5, ValueError, "finite and >= 0 and < 0.5, got 0.5"),
        ("label_smoothing", -0.01, ValueError, "finite and >= 0 and < 0.5, got -0.01"),
        ("label_smoothing", float("nan"), ValueError, ".*, got nan"),
        ("reduction", "avg", ValueError, r"one of \('mean', 'sum', 'none'\), got 'avg'"),
        ("impl", "fast", ValueError, r"one of \('auto', 'eager', .*\), got 'fast'"),
    ],
)
def test_bad_hyperparameters(name, value, error, words):
    with pytest.raises(error, match=f"{name} must be {words}"):
        gamma_simpo_loss(OK, OK, **{**SETTING, name: value})


def test_numpy_scalars_and_integers_are_numbers():
    loss, _ = gamma_simpo_loss(OK, OK, beta=np.float32(0.5), gamma0=1, tau=np.float64(2))
    assert np.isfinite(loss)


def test_mixed_libraries(torch):
    with pytest.raises(TypeError, match=r"policy_rejected_logps .*numpy.ndarray, got torch.Tensor"):
        gamma_simpo_loss(OK, torch.tensor([1.0, 2.0]), **SETTING)
    with pytest.raises(TypeError, match=r"context .*torch.Tensor, got numpy.ndarray"):
        solve_margins(torch.tensor([1.0]), gamma0=1.0, tau=1.0, context=OK)
    with pytest.raises(TypeError, match=r"mask .*torch.Tensor, got numpy.ndarray"):
        solve_margins(torch.tensor([1.0]), gamma0=1.0, tau=1.0, mask=np.array([True]))


def test_mixed_devices(torch):
    with pytest.raises(ValueError, match=r"policy_rejected_logps must be on the device of .* meta"):
        gamma_simpo_loss(torch.zeros(2), torch.zeros(2, device="meta"), **SETTING)


def test_preference_loss_margins():
    with pytest.raises(ValueError, match=r"margins must have the shape of reward_gaps, \(2,\)"):
        preference_loss(OK, np.ones(3))
    with pytest.raises(TypeError, match="margins must be an array"):
        preference_loss(OK, None)


def test_integers_as_gaps():
    with pytest.raises(TypeError, match="reward_gaps must have a real floating dtype"):
        gamma_preference_loss(np.array([1, 2]), gamma0=1.0, tau=1.0)


def test_no_look_at_values_on_the_device(torch):
    # A meta tensor has no values: any copy to the host or branch on a value raises.
    rows = [torch.zeros(5, device="meta") for _ in range(4)]
    mask = torch.ones(5, dtype=torch.bool, device="meta")
    for setting in (SETTING, {"beta": 0.1, "gamma0": 20.0, "tau": 0.1}):
        loss, aux = gamma_dpo_loss(*rows, **setting, mask=mask, context=rows[0])
        assert loss.device.type == aux.margins.device.type == "meta"
