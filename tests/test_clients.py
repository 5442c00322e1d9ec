"""What holds the runs in installed trainers (`python -m tests.clients`) to first principles."""

import json

import numpy as np
import pytest
from clients import replay

torch = pytest.importorskip("torch")

from gamma_loss import GammaDPOLoss, GammaSimPOLoss  # noqa: E402

SETTING = {"beta": 2.0, "gamma0": 4.0, "tau": 1.0}


def recorded(folder, reference, batches=3, pairs=4):
    """Save a model's calls as `recorder` does, and the log-probabilities in them."""
    generator = torch.Generator().manual_seed(0)
    arrays, logps, number = {}, [], 0
    mask = np.ones((2 * pairs, 7), dtype=int)
    mask[::3, -1] = mask[1::3, 0] = 0  # padding on either side
    for _ in range(batches):
        tokens = torch.randint(3, 11, (2 * pairs, 7), generator=generator)
        tokens[pairs:, :4] = tokens[:pairs, :4]
        for rows, first in ((slice(pairs), 1), (slice(pairs, None), 2)):
            tokens[rows, 4] = first  # where responses begin
        for half in (mask[:pairs], mask[pairs:]):
            half[:, 0] = mask[:pairs, 0]
        four = []
        for policy in (True, False) if reference else (True,):
            logits = 2 * torch.randn(2 * pairs, 7, 11, generator=generator)
            call = {"tokens": tokens, "mask": mask, "logits": logits, "policy": policy}
            arrays |= {f"{number} {name}": np.asarray(value) for name, value in call.items()}
            number += 1
            each = logits.double().log_softmax(-1)[:, 3:-1].gather(-1, tokens[:, 4:, None])
            kept = torch.tensor(mask[:, 4:])
            summed = (each.squeeze(-1) * kept).sum(1)
            four += (summed if reference else summed / kept.sum(1)).chunk(2)
        logps.append(four)
    np.savez(folder / "calls-0-0.npz", **arrays)
    return logps


@pytest.mark.parametrize("loss_class", [GammaDPOLoss, GammaSimPOLoss])
def test_losses_of_the_library_pass_and_others_do_not(tmp_path, loss_class):
    reference = loss_class is GammaDPOLoss
    loss_fn = loss_class(**SETTING)
    losses = [loss_fn(*four)[0].item() for four in recorded(tmp_path, reference)]

    def compare(losses):
        state = {"log_history": [{"loss": loss} for loss in losses] + [{"eval_loss": 1.0}]}
        (tmp_path / "trainer_state.json").write_text(json.dumps(state))
        return replay.compare(tmp_path, "run", reference=reference, **SETTING)

    assert compare(losses)["largest_difference"] < 1e-7  # the queue holds float32
    with pytest.raises(AssertionError):
        compare([*losses[:-1], losses[-1] + 1e-4])
    with pytest.raises(AssertionError):
        compare(losses[:-1])
    calls = [replay.calls(tmp_path, 0)]
    plain = replay.expected(calls, reference=reference, plain=True, **SETTING)
    with pytest.raises(AssertionError):
        compare([float(loss) for loss in plain])
