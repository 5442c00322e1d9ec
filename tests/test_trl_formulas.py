"""TRL's own code as the peer: its DPO, rDPO, cDPO and SimPO losses on the same numbers."""

from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("trl", reason="trl is not installed (the extra 'trl')")
torch = pytest.importorskip("torch")

from gamma_loss import gamma_dpo_loss, gamma_simpo_loss, preference_loss  # noqa: E402

BETA = 0.7
LOGPS = torch.tensor(np.random.default_rng(0).normal(size=(4, 9)) * 3 - 20)
CHOSEN, REJECTED, REFERENCE_CHOSEN, REFERENCE_REJECTED = LOGPS
GAPS = BETA * ((CHOSEN - REFERENCE_CHOSEN) - (REJECTED - REFERENCE_REJECTED))


def trl_dpo(i, loss_type, label_smoothing=0.0):
    """Loss of pair i from DPOTrainer's own compute function, on a model that returns its logps."""
    from trl import DPOTrainer

    logps = torch.stack([CHOSEN[i], REJECTED[i]])[:, None]  # one token a response
    zeros = torch.zeros_like(logps)

    def model(**_):
        return SimpleNamespace(
            log_probs=logps,
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
            aux_loss=None,
        )

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            device=logps.device, gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        label_smoothing=label_smoothing,
        beta=BETA,
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.ones((2, 2), dtype=torch.long),
        "attention_mask": torch.ones((2, 2), dtype=torch.long),
        "completion_mask": torch.tensor([[0, 1], [0, 1]]),
        "ref_chosen_logps": REFERENCE_CHOSEN[i : i + 1],
        "ref_rejected_logps": REFERENCE_REJECTED[i : i + 1],
    }
    return DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)


def trl_cpo(loss_type, simpo_gamma=0.0, label_smoothing=0.0):
    """Losses from CPOTrainer's own formula, where TRL keeps SimPO and conservative smoothing."""
    cpo = pytest.importorskip("trl.experimental.cpo")
    trainer = SimpleNamespace(
        alpha=0.0,
        accelerator=SimpleNamespace(device=CHOSEN.device),
        loss_type=loss_type,
        simpo_gamma=simpo_gamma,
        beta=BETA,
        label_smoothing=label_smoothing,
    )
    return cpo.CPOTrainer.cpo_loss(trainer, CHOSEN, REJECTED)[0]


def test_dpo():
    theirs = torch.stack([trl_dpo(i, "sigmoid") for i in range(9)])
    torch.testing.assert_close(preference_loss(GAPS), theirs)
    ours, _ = gamma_dpo_loss(*LOGPS, beta=BETA, gamma0=1.0, tau=1e12, reduction="none")
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("epsilon", [0.1, 0.4])
def test_rdpo(epsilon):
    theirs = torch.stack([trl_dpo(i, "robust", epsilon) for i in range(9)])
    ours = preference_loss(GAPS, label_smoothing=epsilon, robust=True)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.4])
def test_simpo_and_cdpo(epsilon):
    theirs = trl_cpo("simpo", simpo_gamma=1.5, label_smoothing=epsilon)
    ours, _ = gamma_simpo_loss(
        CHOSEN,
        REJECTED,
        beta=BETA,
        gamma0=1.5,
        tau=1e12,
        label_smoothing=epsilon,
        reduction="none",
    )
    torch.testing.assert_close(ours, theirs)
    conservative = preference_loss(BETA * (CHOSEN - REJECTED), label_smoothing=epsilon)
    torch.testing.assert_close(conservative, trl_cpo("sigmoid", label_smoothing=epsilon))
