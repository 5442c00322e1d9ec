"""γ-DPO and γ-SimPO as trainers for TRL, 1.8 or later.

They are TRL's `DPOTrainer` and `CPOTrainer` (its SimPO) with another loss. Data, reference model,
logging and checkpoints are TRL's; the queue of recent gaps goes into the checkpoints.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from gamma_loss import _checks
from gamma_loss.losses import GammaLossAux
from gamma_loss.metrics import metrics
from gamma_loss.torch import GammaDPOLoss, GammaSimPOLoss, sequence_logps

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that trl.experimental, TRL's home of SimPO, may change
        from trl import DPOConfig, DPOTrainer
        from trl.experimental.cpo import CPOConfig, CPOTrainer
except ImportError as error:
    raise ImportError(
        "gamma_loss.integrations.trl needs TRL 1.8 or later: "
        f"pip install 'gamma-loss[trl]' ({error})"
    ) from error

__all__ = ["GammaDPOConfig", "GammaDPOTrainer", "GammaSimPOConfig", "GammaSimPOTrainer"]

_QUEUE_FILE = "gamma_loss.pt"
_TAKES_MODEL = "model" in inspect.signature(DPOTrainer.compute_ref_log_probs).parameters  # TRL 1.10
_PAPER = {
    "title": "Robust Preference Optimization via Dynamic Target Margins",
    "id": "2506.03690",
    "citation": """\
@inproceedings{sun2025robust,
    title     = {Robust Preference Optimization via Dynamic Target Margins},
    author    = {Sun, Jie and Wu, Junkang and Wu, Jiancan and Zhu, Zhibo and Lu, Xingyu and
                 Zhou, Jun and Ma, Lintao and Wang, Xiang},
    booktitle = {Findings of the Association for Computational Linguistics: ACL 2025},
    year      = 2025,
}""",
}


def _option(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"help": meaning})


_GAMMA0 = "Mean target margin γ0, in reward units."
_RATIO = "Another way to give gamma0, SimPO's: gamma0 = beta * gamma_beta_ratio."
_TAU = "Weight of the margins' KL term, in nats. A large one keeps every margin at gamma0."
_CENTERED = "Whether the loss subtracts γ_i - γ0 rather than γ_i."
_QUEUE_SIZE = "How many recent reward gaps the margins are solved over as well; 0 for none."


def _set_gamma0(config: GammaDPOConfig | GammaSimPOConfig) -> None:
    if config.gamma_beta_ratio is not None:
        gamma0 = config.beta * config.gamma_beta_ratio
        if config.gamma0 not in (type(config).gamma0, gamma0):
            raise ValueError(
                f"gamma0 must be beta * gamma_beta_ratio = {gamma0} or left out where "
                f"gamma_beta_ratio is given, got {config.gamma0}"
            )
        config.gamma0 = gamma0
    _checks.number("beta", config.beta, above=0)
    _checks.number("gamma0", config.gamma0, least=0)
    _checks.number("tau", config.tau, above=0)


@dataclass
class GammaDPOConfig(DPOConfig):
    """TRL's `DPOConfig` with the hyperparameters of γ-PO.

    Parameters
    ----------
    gamma0 : float, default 4
        Mean target margin in reward units, see `solve_margins`.
    gamma_beta_ratio : float, optional
        Another way to give gamma0, as ``beta * gamma_beta_ratio``.
    tau : float, default 10
        Weight of the margins' KL term in nats, see `solve_margins`.
    centered : bool, default True
        Whether the loss subtracts γ_i - γ0 or γ_i, see `gamma_dpo_loss`.
    queue_size : int, default 2048
        How many recent gaps the margins are solved over, see `GammaDPOLoss`.
    length_normalize : bool, default False
        Whether log-probabilities, the reference's too, are averaged over the tokens of a response
        in the place of summed. As in the published code, and as ``loss_type="sigmoid_norm"`` says.

    Raises
    ------
    ValueError
        If gamma0 and gamma_beta_ratio contradict each other, or one is out of its range.

    Notes
    -----
    Of DPOConfig's own: ``label_smoothing`` smooths the γ-loss conservatively, or as rDPO does with
    ``loss_type="robust"``. Further losses in ``loss_type``, with their ``loss_weights``, are added
    as TRL adds them: ``["sigmoid", "sft"]`` is γ-DPO with an SFT term.

    Examples
    --------
    >>> GammaDPOConfig("out", beta=0.1, gamma_beta_ratio=20.0, tau=5.0, use_cpu=True).gamma0
    2.0
    """

    gamma0: float = _option(4.0, _GAMMA0)
    gamma_beta_ratio: float | None = _option(None, _RATIO)
    tau: float = _option(10.0, _TAU)
    centered: bool = _option(True, _CENTERED)
    queue_size: int = _option(2048, _QUEUE_SIZE)
    length_normalize: bool = _option(False, "Whether log-probabilities are averaged over tokens.")

    def __post_init__(self) -> None:
        super().__post_init__()
        _set_gamma0(self)


@dataclass
class GammaSimPOConfig(CPOConfig):
    """TRL's `CPOConfig` for SimPO, with the hyperparameters of γ-PO.

    The defaults are the published ones of llama-3-8b-instruct, see `PUBLISHED_SETTINGS`.

    Parameters
    ----------
    beta : float, default 10
        Reward units per nat of mean log-probability.
    gamma0 : float, default 4
        Mean target margin in reward units, see `solve_margins`.
    gamma_beta_ratio : float, optional
        Another way to give gamma0, as ``beta * gamma_beta_ratio``.
    tau : float, default 10
        Weight of the margins' KL term in nats, see `solve_margins`.
    centered : bool, default False
        Whether the loss subtracts γ_i - γ0 or γ_i, see `gamma_simpo_loss`.
    queue_size : int, default 2048
        How many recent gaps the margins are solved over, see `GammaSimPOLoss`.
    loss_type : str, default "simpo"
        And no other.
    cpo_alpha : float, default 0
        Weight of an added SFT term on the chosen responses, as TRL has it for CPO.

    Raises
    ------
    ValueError
        If gamma0 and gamma_beta_ratio contradict each other, or one is out of its range.

    Notes
    -----
    gamma0 is TRL's ``simpo_gamma``, which is set to it.

    Examples
    --------
    >>> GammaSimPOConfig("out", beta=2.5, gamma_beta_ratio=0.15, use_cpu=True).gamma0
    0.375
    """

    beta: float = _option(10.0, "Reward units per nat of mean log-probability.")
    loss_type: str = _option("simpo", "simpo, and no other.")
    cpo_alpha: float = _option(0.0, "Weight of an added SFT term on the chosen responses.")
    gamma0: float = _option(4.0, _GAMMA0)
    gamma_beta_ratio: float | None = _option(None, _RATIO)
    tau: float = _option(10.0, _TAU)
    centered: bool = _option(False, _CENTERED)
    queue_size: int = _option(2048, _QUEUE_SIZE)

    def __post_init__(self) -> None:
        super().__post_init__()
        _set_gamma0(self)
        self.simpo_gamma = self.gamma0


@dataclass
class _WithMargins:
    """A collator that also collates the margins of the pairs, where the data has some."""

    collate: Any

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        batch = self.collate(examples)
        if "margin" in examples[0]:
            margins = [example["margin"] for example in examples]
            try:
                batch["margin"] = torch.tensor(list(map(float, margins)))
            except (TypeError, ValueError):
                raise TypeError(
                    f"the column 'margin' must hold numbers, in reward units, got {margins!r}"
                ) from None
        return batch


class _GammaTrainer:
    """What both trainers add to TRL's: margins of the data, metrics over all ranks, the queue."""

    gamma_loss: GammaDPOLoss | GammaSimPOLoss

    def _make_loss(self: Any, loss: Any, defaults: Any, **settings: Any) -> None:
        """Make the loss of the arguments, with our defaults for what a config of TRL's lacks."""
        for name in ("tau", "centered", "queue_size"):
            settings[name] = getattr(self.args, name, getattr(defaults, name))
        self.gamma_loss = loss(
            beta=self.args.beta,
            label_smoothing=self.args.label_smoothing,
            group=dist.group.WORLD if self.accelerator.num_processes > 1 else None,
            **settings,
        ).to(self.accelerator.device)
        self.gamma_loss._unwatched *= self.args.gradient_accumulation_steps
        self.data_collator = _WithMargins(self.data_collator)

    def _set_signature_columns_if_needed(self: Any) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        if "margin" not in self._signature_columns:
            self._signature_columns.append("margin")

    def _gamma_metrics(self: Any, aux: GammaLossAux) -> dict[str, float]:
        """Return the ``gamma/*`` of `metrics` over the pairs of all ranks."""
        columns = [aux.margins, aux.shifts, aux.reward_gaps, aux.pair_weights]
        rows = torch.stack([*columns, aux.mask.to(aux.margins.dtype)], 1)
        margins, shifts, gaps, weights, mask = self.accelerator.gather(rows).unbind(1)
        whole = aux._replace(
            margins=margins, shifts=shifts, reward_gaps=gaps, pair_weights=weights, mask=mask > 0,
            chosen_rewards=gaps, rejected_rewards=gaps,  # TRL reports the rewards
        )  # fmt: skip
        logs = {name: value for name, value in metrics(whole).items() if name.startswith("gamma/")}
        return dict(zip(logs, torch.stack(list(logs.values())).tolist(), strict=True))

    def _save_optimizer_and_scheduler(self: Any, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if self.args.should_save:  # every rank holds the same queue
            torch.save(self.gamma_loss.state_dict(), os.path.join(output_dir, _QUEUE_FILE))

    def _load_optimizer_and_scheduler(self: Any, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is None:
            return
        path = os.path.join(checkpoint, _QUEUE_FILE)
        if not os.path.isfile(path):
            warnings.warn(f"no {_QUEUE_FILE} in {checkpoint}: the queue starts empty", stacklevel=2)
            return
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.gamma_loss.load_state_dict(state)


class GammaDPOTrainer(_GammaTrainer, DPOTrainer):
    """TRL's `DPOTrainer`, training with γ-DPO.

    The margins are solved over the queue and the batch of all ranks. Besides TRL's metrics it logs
    the ``gamma/*`` of `metrics`, over the pairs of all ranks and averaged over micro-batches as TRL
    averages its own. Evaluation reads the queue and never writes it; a resumed run goes on with
    the queue of its checkpoint. A pair with a response truncated to nothing takes no part.

    A column ``margin`` of the data gives each pair a target m_i of its own, in reward units. Then
    γ-PO works on ``g_i - m_i``: the loss is ``-log σ(g_i - m_i - (γ_i - γ0))``, with γ solved over
    a pool of ``g - m``, which is what the queue holds. TRL's ``rewards/*`` stay those of g.

    Parameters
    ----------
    model, ref_model, args, **kwargs
        As `DPOTrainer`. A plain `DPOConfig` does, with the defaults of `GammaDPOConfig` for what it
        lacks.

    Attributes
    ----------
    gamma_loss : GammaDPOLoss
        Its ``queue`` may be read, and its ``settings`` changed during training.

    Raises
    ------
    ValueError
        For options that would change what the γ-loss means: f_divergence_type, ld_alpha,
        use_weighting, and a loss_type that does not hold one of "sigmoid", "sigmoid_norm" and
        "robust".

    Examples
    --------
    >>> trainer = GammaDPOTrainer(  # doctest: +SKIP
    ...     model="Qwen/Qwen3-0.6B",
    ...     args=GammaDPOConfig("out", beta=0.1, gamma0=4.0, tau=10.0),
    ...     train_dataset=dataset,
    ... )
    >>> trainer.train()  # doctest: +SKIP
    """

    loss_types: list[str]
    loss_weights: list[float]
    precompute_ref_logps: bool
    _tag_names = ("trl", "dpo", "gamma-po")
    _name = "γ-DPO"
    _paper = _PAPER

    def __init__(
        self, model: Any, ref_model: Any = None, args: DPOConfig | None = None, **kwargs: Any
    ) -> None:
        if getattr(args, "use_liger_kernel", False) and hasattr(DPOTrainer, "_compute_loss_liger"):
            raise ValueError(
                "use_liger_kernel must be False for γ-DPO before TRL 1.15: Liger's loss sees one "
                "pair at a time, margins need all. Liger's other kernels remain: call its "
                "apply_liger_kernel_to_llama(fused_linear_cross_entropy=False), or that of your "
                "model, before the model is made, or use TRL 1.15, which takes no loss from Liger"
            )
        super().__init__(model, ref_model, args, **kwargs)
        args = self.args
        for name, only in (
            ("f_divergence_type", "reverse_kl"), ("ld_alpha", None), ("use_weighting", False),
        ):  # fmt: skip
            if getattr(args, name) != only:
                raise ValueError(f"{name} must be {only!r} for γ-DPO, got {getattr(args, name)!r}")
        own = ("sigmoid", "sigmoid_norm", "robust")
        places = [i for i, name in enumerate(args.loss_type) if name in own]
        if len(places) != 1:
            raise ValueError(
                f"loss_type must hold exactly one of {own}, whose place γ-DPO takes, "
                f"got {args.loss_type!r}"
            )
        # TRL goes on to compute the losses beside it.
        self.loss_types, self.loss_weights = list(self.loss_types), list(self.loss_weights)
        place = self.loss_types.pop(places[0])
        robust = place == "robust"
        self._normalize = place == "sigmoid_norm" or getattr(args, "length_normalize", False)
        self._gamma_weight = self.loss_weights.pop(places[0])
        gamma0 = getattr(args, "gamma0", GammaDPOConfig.gamma0)
        self._make_loss(GammaDPOLoss, GammaDPOConfig, gamma0=gamma0, robust=robust)

    def compute_ref_log_probs(self, *arguments: Any) -> Any:
        """Return TRL's, without the margins that a batch has for the loss."""
        *model, inputs = arguments
        inputs = {name: value for name, value in inputs.items() if name != "margin"}
        return super().compute_ref_log_probs(*model, inputs)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return TRL's loss with γ-DPO in the place of DPO, and log the metrics of both."""
        inputs = dict(inputs)
        margins = inputs.pop("margin", 0.0)
        if not self.precompute_ref_logps:
            reference = (self.ref_model or self.model,) if _TAKES_MODEL else ()
            # As when TRL computes a loss: under FSDP2 autocast would round the reference otherwise
            # than the policy.
            self.accelerator.autocast = contextlib.nullcontext
            try:
                chosen, rejected = self.compute_ref_log_probs(*reference, inputs)
            finally:
                del self.accelerator.autocast
            inputs |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        logps: list[torch.Tensor] = []

        def listened_to(**kwargs: Any) -> Any:
            outputs = model(**kwargs)
            if logps:  # a second call, for the logits of compute_metrics
                return outputs
            each = getattr(outputs, "log_probs", None)  # of tokens, from TRL 1.15 on
            if each is None:
                responses = inputs["completion_mask"] > 0
                summed = sequence_logps(outputs.logits, inputs["input_ids"], responses)
            else:
                summed = each.sum(1)
            logps.extend(summed.chunk(2))
            return outputs

        precomputed, self.precompute_ref_logps = self.precompute_ref_logps, True
        try:
            result = super().compute_loss(listened_to, inputs, return_outputs, num_items_in_batch)
        finally:
            self.precompute_ref_logps = precomputed

        lengths = inputs["completion_mask"][:, 1:].sum(1).chunk(2)
        logps += [inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]]
        if self._normalize:
            logps = [x / n.clamp(min=1) for x, n in zip(logps, 2 * lengths, strict=True)]
        logps[2] = logps[2] + margins / self.beta  # a gap smaller by the margin
        training = self.model.training
        mask = (lengths[0] > 0) & (lengths[1] > 0)
        loss, aux = self.gamma_loss.train(training)(*logps, mask=mask)
        for name, value in self._gamma_metrics(aux).items():
            self._metrics["train" if training else "eval"][name].append(value)
        if return_outputs:
            return result[0] + self._gamma_weight * loss, result[1]
        return result + self._gamma_weight * loss


class GammaSimPOTrainer(_GammaTrainer, CPOTrainer):
    """TRL's `CPOTrainer`, training with γ-SimPO.

    As `GammaDPOTrainer`, a column ``margin`` included, without a reference model and with
    log-probabilities averaged over tokens.

    Parameters
    ----------
    model, args, **kwargs
        As `CPOTrainer`. A plain `CPOConfig` with ``loss_type="simpo"`` does: its simpo_gamma is
        gamma0, and the rest are the defaults of `GammaSimPOConfig`.

    Attributes
    ----------
    gamma_loss : GammaSimPOLoss
        See `GammaDPOTrainer`.

    Raises
    ------
    ValueError
        For a loss_type that is not "simpo", and for alpha (AlphaPO's transformed rewards).

    Examples
    --------
    >>> trainer = GammaSimPOTrainer(  # doctest: +SKIP
    ...     model="Qwen/Qwen3-0.6B",
    ...     args=GammaSimPOConfig("out", beta=10.0, gamma_beta_ratio=0.3, tau=3.0),
    ...     train_dataset=dataset,
    ...     processing_class=tokenizer,
    ... )
    >>> trainer.train()  # doctest: +SKIP
    """

    _tag_names = ("trl", "simpo", "gamma-po")
    _name = "γ-SimPO"
    _paper = _PAPER

    def __init__(self, model: Any = None, args: CPOConfig | None = None, **kwargs: Any) -> None:
        for name, only in (("loss_type", "simpo"), ("alpha", 0.0)):
            if args is not None and getattr(args, name) != only:
                raise ValueError(
                    f"{name} must be {only!r} for γ-SimPO, got {getattr(args, name)!r}"
                )
        super().__init__(model, args, **kwargs)
        self._make_loss(GammaSimPOLoss, GammaSimPOConfig, gamma0=self.args.simpo_gamma)

    @staticmethod
    def get_batch_logps(
        logits: torch.Tensor,
        labels: torch.Tensor,
        average_log_prob: bool = False,
        is_encoder_decoder: bool = False,
    ) -> torch.Tensor:
        """Return `sequence_logps`, which is 0 where TRL's mean over no token is NaN."""
        return sequence_logps(
            logits, labels, average=average_log_prob, shift=not is_encoder_decoder
        )

    def get_batch_loss_metrics(
        self, model: Any, batch: dict[str, Any], train_eval: str = "train"
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Return TRL's loss and metrics of a batch, those of γ-SimPO among them."""
        first = 0 if self.is_encoder_decoder else 1
        has_chosen, has_rejected = (
            (batch[labels][:, first:] != -100).any(1)
            for labels in ("chosen_labels", "rejected_labels")
        )
        self._has_both = has_chosen & has_rejected
        self._margins = batch.get("margin", 0.0)
        loss, logs = super().get_batch_loss_metrics(model, batch, train_eval)
        prefix = "eval_" if train_eval == "eval" else ""
        return loss, logs | {prefix + k: v for k, v in self._gamma_metrics(self._aux).items()}

    def cpo_loss(
        self, policy_chosen_logps: torch.Tensor, policy_rejected_logps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return γ-SimPO in the place of TRL's losses and rewards."""
        loss, self._aux = self.gamma_loss.train(self.model.training)(
            policy_chosen_logps - self._margins / self.beta,  # a gap smaller by the margin
            policy_rejected_logps, mask=self._has_both,
        )  # fmt: skip
        # TRL takes the mean; this is one already, over the pairs that take part on any rank.
        losses = loss.expand(policy_chosen_logps.shape)
        return losses, self._aux.chosen_rewards + self._margins, self._aux.rejected_rewards
