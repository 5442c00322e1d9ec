"""What holds the runs in installed trainers (`python -m tests.clients`) to first principles."""

import json

import numpy as np
import pages
import pytest
from clients import replay

torch = pytest.importorskip("torch")

from gamma_loss import GammaDPOLoss, GammaSimPOLoss, sequence_logps  # noqa: E402

SETTING = {**replay.SETTING, "beta": 2.0}
MASK = np.ones((8, 7), dtype=int)  # of four prompts with chosen responses, then with rejected ones
MASK[::3, -1] = MASK[[1, 5], 0] = 0  # padding on either side
RESPONSE = torch.tensor(MASK * (np.arange(7) >= 4), dtype=bool)


def train(folder, kind, *, alone=False, writes=False, change=lambda right, _: right, **other):
    """Train in two processes, as a trainer and `recorder` record it, and compare that.

    One loss has the pairs of both, as with a group. Alone, each process has a loss of its own.
    """
    reference = kind is GammaDPOLoss
    loss_fns = [kind(**SETTING | other) for _ in range(1 + alone)]
    plain = kind(**SETTING | {"tau": 1e9, "queue_size": 0})  # which has no margins
    generator = torch.Generator().manual_seed(0)
    history = []
    for step in range(6):
        training = step % 2 == 0  # an evaluation follows each step
        calls, logps = {}, ([], [])
        for rank in range(2):
            tokens = torch.randint(3, 11, (8, 7), generator=generator)
            tokens[4:, :4] = tokens[:4, :4]
            tokens[:4, 4], tokens[4:, 4] = 1, 2  # where responses begin
            for model in ("policy", "reference") if reference else ("policy",):
                logits = 2 * torch.randn(8, 7, 11, generator=generator)
                logits.requires_grad_(training and model == "policy")
                each = sequence_logps(logits.double(), tokens, RESPONSE, average=not reference)
                logps[rank].extend(each.chunk(2))
                calls[f"calls-{rank}-{step}-{model}.npz"] = tokens, logits
        pools = logps if alone else [[torch.cat(ranks) for ranks in zip(*logps, strict=True)]]
        losses = []
        for loss_fn, pool in zip(loss_fns, pools, strict=True):
            loss_fn.train(training or writes)
            losses.append(change(loss_fn(*pool)[0], plain(*pool)[0]))
        if training:
            loss = sum(losses) / len(losses)
            (2 * loss).backward()  # which gives each process the mean of its own pairs
            history.append({"loss": loss.item()})
        for name, (tokens, logits) in calls.items():
            gradient = np.empty(0) if logits.grad is None else logits.grad
            call = {"tokens": tokens, "mask": MASK, "logits": logits.detach(), "gradient": gradient}
            np.savez(folder / name, **call, policy=logits.requires_grad)
    state = {"log_history": [*history, {"eval_loss": 1.0}]}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return replay.compare(folder, "run", ranks=2, reference=reference, **SETTING)


MISTAKES = {
    "no queue": {"queue_size": 0},
    "each process by itself": {"alone": True},
    "tau a tenth larger": {"tau": 1.1},
    "a queue that evaluation writes": {"writes": True},
    "another value": {"change": lambda right, _: right + 2e-5},
    "no margins": {"change": lambda right, plain: plain},
    "the gradient of no margins": {"change": lambda right, plain: (right - plain).detach() + plain},
    "the gradient reversed": {"change": lambda right, _: 2 * right.detach() - right},
    "half the gradient": {"change": lambda right, _: (right.detach() + right) / 2},
}


@pytest.mark.parametrize("kind", [GammaDPOLoss, GammaSimPOLoss])
def test_losses_of_the_library_pass_and_no_mistake_does(tmp_path, kind):
    found = train(tmp_path, kind)
    assert found["largest_difference"] < 1e-6  # the queue holds float32
    assert found["gradients_differ_by"] < 1e-6
    for name, mistake in MISTAKES.items():
        with pytest.raises(AssertionError, match="largest_difference"):
            pytest.fail(f"{name}: {train(tmp_path, kind, **mistake)}")


RECORDED = """
import torch
from types import SimpleNamespace
import recorder

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
    (tmp_path / "recorded.py").write_text(RECORDED)
    replay.start(tmp_path, ["python", "recorded.py"], ranks=1)
    training, other = replay.calls(tmp_path, 0)
    assert training["policy"]
    assert not other["policy"]
    assert np.array_equal(training["gradient"], np.ones((2, 3, 5)))
    assert other["gradient"].size == 0


def test_the_code_of_each_page_has_the_tau_of_the_runs():
    for page in ("axolotl", "llama_factory", "ms_swift", "openrlhf"):
        assert pages.code(page).count("10.0") == replay.recipe(page).count("1.0")
