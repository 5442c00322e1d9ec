"""What holds the runs in installed trainers (`python -m tests.clients`) to first principles."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pages
import pytest
from clients import replay, sabotages

torch = pytest.importorskip("torch")

from gamma_loss import GammaDPOLoss, GammaSimPOLoss  # noqa: E402

SETTING = {"beta": 2.0, "gamma0": 4.0, "tau": 1.0}


def train(folder, loss_fn, reference, batches=3, pairs=4, log=torch.Tensor.item):
    """Save a model's calls as `recorder` does, and the log of a trainer with this loss."""
    generator = torch.Generator().manual_seed(0)
    arrays, losses, number = {}, [], 0
    mask = np.ones((2 * pairs, 7), dtype=int)
    mask[::3, -1] = mask[1::3, 0] = 0  # padding on either side
    for step in range(2 * batches):
        training = step % 2 == 0  # an evaluation follows each step
        loss_fn.train(training)
        tokens = torch.randint(3, 11, (2 * pairs, 7), generator=generator)
        tokens[pairs:, :4] = tokens[:pairs, :4]
        for rows, first in ((slice(pairs), 1), (slice(pairs, None), 2)):
            tokens[rows, 4] = first  # where responses begin
        for half in (mask[:pairs], mask[pairs:]):
            half[:, 0] = mask[:pairs, 0]
        four, made = [], []
        for policy in (True, False) if reference else (True,):
            logits = 2 * torch.randn(2 * pairs, 7, 11, generator=generator)
            logits.requires_grad_(policy and training)
            each = logits.double().log_softmax(-1)[:, 3:-1].gather(-1, tokens[:, 4:, None])
            kept = torch.tensor(mask[:, 4:])
            summed = (each.squeeze(-1) * kept).sum(1)
            four += (summed if reference else summed / kept.sum(1)).chunk(2)
            made.append(logits)
        loss = loss_fn(*four)[0].mean()
        if training:
            loss.backward()
            losses.append(log(loss))
        for logits in made:
            call = {"tokens": tokens, "mask": mask, "logits": logits.detach(),
                    "gradient": logits.grad if logits.requires_grad else np.empty(0),
                    "policy": logits.requires_grad}  # fmt: skip
            arrays |= {f"{number} {name}": np.asarray(value) for name, value in call.items()}
            number += 1
    np.savez(folder / "calls-0-0.npz", **arrays)
    state = {"log_history": [{"loss": loss} for loss in losses] + [{"eval_loss": 1.0}]}
    (folder / "trainer_state.json").write_text(json.dumps(state))


@pytest.mark.parametrize("loss_class", [GammaDPOLoss, GammaSimPOLoss])
def test_losses_of_the_library_pass_and_no_sabotage_does(tmp_path, loss_class, monkeypatch):
    reference = loss_class is GammaDPOLoss
    compare = partial(replay.compare, tmp_path, "run", reference=reference, **SETTING)
    train(tmp_path, loss_class(**SETTING), reference)
    found = compare()
    assert found["largest_difference"] < 1e-6  # the queue holds float32
    assert found["gradients_differ_by"] < 1e-6
    train(tmp_path, loss_class(**SETTING), reference, log=lambda loss: loss.item() + 2e-5)
    with pytest.raises(AssertionError, match="largest_difference"):
        compare()
    for name in [*sabotages.RESULTS, "no queue", "tau a tenth larger"]:
        with monkeypatch.context() as patch:
            sabotages.apply(name, patch.setattr)
            train(tmp_path, loss_class(**SETTING), reference)
        with pytest.raises(AssertionError):
            compare()


RECORDED = """
import torch
from types import SimpleNamespace
from clients import recorder

class LlamaForCausalLM(torch.nn.Linear):
    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(logits=super().forward(input_ids.float()[..., None]))

recorder.start()
recorder.start()  # ms-swift imports its plugin twice
model = LlamaForCausalLM(1, 5)
tokens = torch.ones(2, 3, dtype=int)
model(tokens, attention_mask=tokens).logits.sum().backward()
with torch.no_grad():
    model(tokens, attention_mask=tokens)
"""


def test_a_call_is_recorded_once_with_the_gradient_at_its_logits(tmp_path):
    path = os.pathsep.join([replay.TESTS, str(Path(replay.TESTS).parent)])
    environment = {**os.environ, "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", RECORDED], cwd=tmp_path, env=environment, check=True)
    training, other = replay.calls(tmp_path, 0)
    assert training["policy"]
    assert not other["policy"]
    assert np.array_equal(training["gradient"], np.ones((2, 3, 5)))
    assert other["gradient"].size == 0


def test_the_code_of_each_page_has_the_tau_of_the_runs():
    for page in ("axolotl", "llama_factory", "ms_swift", "openrlhf"):
        assert pages.code(page).count("10.0") == replay.recipe(page).count("1.0")
