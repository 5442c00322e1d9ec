"""γ-DPO and γ-SimPO as trainers for TRL, 1.8 or later.

They are TRL's `DPOTrainer` and `CPOTrainer` (its SimPO) with another loss. Data, reference model,
logging and checkpoints are TRL's. The queue of recent gaps is saved with the model.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from gamma_loss import _checks
from gamma_loss._settings import DOCS, documented, loss_settings
from gamma_loss.metrics import metrics
from gamma_loss.torch import GammaDPOLoss, GammaSimPOLoss, sequence_logps

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that trl.experimental, TRL's home of SimPO, may change
        from datasets import Dataset, IterableDataset
        from trl import DPOConfig, DPOTrainer
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        from gamma_loss.integrations import _pair_columns
except ImportError as error:
    raise ImportError(
        "gamma_loss.integrations.trl needs TRL 1.8 or later: "
        f"pip install 'gamma-loss[trl]' ({error})"
    ) from error

__all__ = ["GammaDPOConfig", "GammaDPOTrainer", "GammaSimPOConfig", "GammaSimPOTrainer"]

_QUEUE_FILE = "gamma_loss.pt"
_TAKES_MODEL = "model" in inspect.signature(DPOTrainer.compute_ref_log_probs).parameters  # TRL 1.9
_LABELS = ("chosen_labels", "rejected_labels")


def _option(default: Any, doc: str) -> Any:
    """Return a field of a config, with its text, or that of the losses, as the help."""
    return field(default=default, metadata={"help": " ".join(doc.split("\n", 1)[-1].split())})


@dataclass
class _GammaOptions:
    gamma0: float = _option(4.0, DOCS["gamma0"])
    gamma_beta_ratio: float | None = _option(
        None, "Another way to give gamma0, SimPO's: gamma0 = beta * gamma_beta_ratio."
    )
    tau: float = _option(10.0, DOCS["tau"])
    centered: bool = _option(True, DOCS["centered"])
    queue_size: int = _option(2048, DOCS["queue_size"])

    def __post_init__(self: Any) -> None:
        super().__post_init__()  # type: ignore[misc]
        beta = _checks.number("beta", self.beta, above=0)
        if self.gamma_beta_ratio is not None:
            gamma0 = beta * _checks.number("gamma_beta_ratio", self.gamma_beta_ratio, least=0)
            if self.gamma0 not in (type(self).gamma0, gamma0):
                raise ValueError(
                    f"gamma0 must be beta * gamma_beta_ratio = {gamma0} or left out where "
                    f"gamma_beta_ratio is given, got {self.gamma0}"
                )
            self.gamma0 = gamma0
        # A bad setting is refused now.
        loss_settings(beta=beta, gamma0=self.gamma0, tau=self.tau, centered=self.centered)
        _checks.whole_number("queue_size", self.queue_size, least=0)


@documented("gamma0", "tau", "centered", "queue_size")
@dataclass
class GammaDPOConfig(_GammaOptions, DPOConfig):
    """TRL's `DPOConfig` with the hyperparameters of γ-PO.

    Of DPOConfig's own, ``label_smoothing`` smooths the γ-loss conservatively, or as rDPO does with
    ``loss_type="robust"``. TRL computes further losses of ``loss_type``, with their
    ``loss_weights``: ``["sigmoid", "sft"]`` is γ-DPO with an SFT term.

    Parameters
    ----------
    {parameters}
    gamma_beta_ratio : float, optional
        Another way to give gamma0, as ``beta * gamma_beta_ratio``.
    length_normalize : bool
        True averages log-probabilities, the reference's too, over the tokens of a response, as the
        published code does; False sums them. ``loss_type="sigmoid_norm"`` averages too.

    Raises
    ------
    TypeError, ValueError
        For an option of a wrong type or out of its range, or a gamma0 that contradicts
        gamma_beta_ratio.

    Examples
    --------
    >>> GammaDPOConfig("out", beta=0.1, gamma_beta_ratio=20.0, tau=5.0, use_cpu=True).gamma0
    2.0
    """

    length_normalize: bool = _option(False, "Whether log-probabilities are averaged over tokens.")


@dataclass
class GammaSimPOConfig(_GammaOptions, CPOConfig):
    """TRL's `CPOConfig` for SimPO, with the hyperparameters of γ-PO.

    The defaults are the published ones of llama-3-8b-instruct, see `PUBLISHED_SETTINGS`.

    Parameters
    ----------
    beta : float
        Reward units per nat of mean log-probability.
    gamma0, gamma_beta_ratio, tau, queue_size, centered
        As for `GammaDPOConfig`. TRL's ``simpo_gamma`` is set to gamma0.
    loss_type : str
        "simpo", and no other.
    cpo_alpha : float
        Weight of an added SFT term on the chosen responses, as TRL has it for CPO.

    Examples
    --------
    >>> GammaSimPOConfig("out", beta=2.5, gamma_beta_ratio=0.15, use_cpu=True).gamma0
    0.375
    """

    beta: float = _option(10.0, "Reward units per nat of mean log-probability.")
    loss_type: str = _option("simpo", "simpo, and no other.")
    cpo_alpha: float = _option(0.0, "Weight of an added SFT term on the chosen responses.")
    centered: bool = _option(False, DOCS["centered"])

    def __post_init__(self) -> None:
        super().__post_init__()
        self.simpo_gamma = self.gamma0


class _GammaTrainer:
    """The addition of both trainers to TRL's: columns of the data, metrics and the queue."""

    gamma_loss: GammaDPOLoss | GammaSimPOLoss
    _only: ClassVar[dict[str, Any]]  # TRL's options that have to keep their value
    _step_weight: torch.Tensor | None = None
    _paper: ClassVar = {
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

    def __init__(self: Any, *arguments: Any, args: Any, **options: Any) -> None:
        for name, only in self._only.items():
            if args is not None and (value := getattr(args, name)) != only:
                raise ValueError(f"{name} must be {only!r} for {self._name}, got {value!r}")
        self._sizes = {}
        for name in ("train_dataset", "eval_dataset"):
            data = options[name] = _pair_columns.check(options.get(name), name)
            if isinstance(data, Dataset):
                self._sizes[name] = len(data)
        super().__init__(*arguments, args=args, **options)  # type: ignore[call-arg]

    def _make_loss(
        self: Any, loss: Any, defaults: Any, model: Any, units: Any = None, **settings: Any
    ) -> None:
        """Make the loss from the arguments. A config of TRL's own gets our defaults."""
        for name in ("gamma0", "tau", "centered", "queue_size"):
            settings.setdefault(name, getattr(self.args, name, getattr(defaults, name)))
        self.gamma_loss = loss(
            beta=self.args.beta,
            label_smoothing=self.args.label_smoothing,
            group=dist.group.WORLD if self.accelerator.num_processes > 1 else None,
            **settings,
        ).to(self.accelerator.device)
        self.gamma_loss._units |= units or {}
        self.gamma_loss._warmup *= self.args.gradient_accumulation_steps
        self.data_collator = functools.partial(_pair_columns.collate, self.data_collator)
        for name, size in self._sizes.items():
            if (left := len(getattr(self, name))) < size:
                words = (
                    f"{size - left} of the {size} pairs of {name} are left out: truncation to "
                    f"max_length = {self.args.max_length} leaves no token of a response"
                )
                if not left:
                    words += ". Increase max_length"
                    if name == "train_dataset":
                        raise ValueError(words)
                    words += ": as it is, evaluation reports no loss"
                warnings.warn(words, stacklevel=3)
        folder = model if isinstance(model, str) else getattr(model, "name_or_path", "")
        if folder:
            self._load_queue(folder, is_checkpoint=False)

    def _set_signature_columns_if_needed(self: Any) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        self._signature_columns += _pair_columns.COLUMNS.keys() - set(self._signature_columns)

    def _weights(self: Any, batch: Any) -> Any:
        """Return the weights of the pairs, 0 for those with a response truncated to nothing."""
        chosen, rejected = self._lengths(batch)
        return ((chosen > 0) & (rejected > 0)) * batch.get("weight", 1.0)

    def get_batch_samples(self: Any, *arguments: Any) -> Any:
        """Return TRL's, and remember the mean weight of the step's micro-batches."""
        batches, items = super().get_batch_samples(*arguments)  # type: ignore[misc]
        total = torch.zeros((), device=self.accelerator.device)
        for batch in batches:
            total += self._weights(batch).sum()
        self._step_weight = self.accelerator.reduce(total) / max(len(batches), 1)
        return batches, items

    def _gamma_loss(
        self: Any, batch: Any, chosen: torch.Tensor, *logps: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Return the loss of a micro-batch, and the ``gamma/*`` over all ranks."""
        training, weights = self.model.training, self._weights(batch)
        chosen = chosen - batch.get("margin", 0.0) / self.beta  # a gap smaller by the margin
        loss, aux = self.gamma_loss.train(training)(chosen, *logps, weights=weights)
        local = {name: values for name, values in aux._asdict().items() if values.ndim}
        rows = [values.to(aux.margins.dtype) for values in (*local.values(), weights)]
        *columns, weights = self.accelerator.gather(torch.stack(rows, 1)).unbind(1)
        if training and self._step_weight is not None:
            # The mean over the step's pairs: micro-batches, which TRL averages, may differ in size.
            loss = loss * (weights.sum() / self._step_weight).nan_to_num()
        gathered = dict(zip(local, columns, strict=True))
        summary = metrics(aux._replace(**gathered | {"mask": gathered["mask"] > 0}))
        logs = {name: value for name, value in summary.items() if name.startswith("gamma/")}
        return loss, dict(zip(logs, torch.stack(list(logs.values())).tolist(), strict=True))

    def save_model(self: Any, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save what TRL does, and the queue beside it."""
        if self.args.should_save:  # every rank holds the same queue
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(self.gamma_loss.state_dict(), folder / _QUEUE_FILE)
        super().save_model(output_dir, _internal_call)  # type: ignore[misc]

    def _load_queue(self, folder: str, is_checkpoint: bool = True) -> None:
        if (path := Path(folder, _QUEUE_FILE)).is_file():
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.gamma_loss.load_state_dict(state, strict=False)  # it may have been without a queue
        elif is_checkpoint:
            warnings.warn(f"no {_QUEUE_FILE} in {folder}: the queue starts empty", stacklevel=2)

    def _load_optimizer_and_scheduler(self: Any, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is not None:
            self._load_queue(checkpoint)

    def _load_best_model(self: Any) -> None:
        super()._load_best_model()  # type: ignore[misc]
        self._load_queue(self.state.best_model_checkpoint)


class GammaDPOTrainer(_GammaTrainer, DPOTrainer):
    """TRL's `DPOTrainer`, training with γ-DPO.

    The margins are solved over the queue and the batch of all ranks. The loss of a step is the mean
    over all its pairs, however they are split into micro-batches; a pair with a response truncated
    to nothing takes no part. Beside TRL's metrics it logs the ``gamma/*`` of `metrics`, over all
    ranks, averaged over micro-batches as TRL's are.

    Evaluation only reads the queue. The queue is saved with the model: a resumed run and
    ``load_best_model_at_end`` go on with it, and so does a new trainer of a saved model that gets a
    ``ref_model``. Without one the reference is another, and the queue starts empty.

    A column ``margin`` of the data gives each pair a target m_i in reward units: g_i - m_i replaces
    the gap g_i in the loss, the pool and the queue; TRL's ``rewards/*`` stay those of g. A column
    ``weight`` gives each pair its weight in the pool and in the mean.

    Parameters
    ----------
    model, ref_model, args, **kwargs
        As `DPOTrainer`. A plain `DPOConfig` also works; the other settings then take the defaults
        of `GammaDPOConfig`.

    Attributes
    ----------
    gamma_loss : GammaDPOLoss
        Its ``queue`` may be read, and its ``settings`` changed during training.

    Raises
    ------
    ValueError
        For options that would change what the γ-loss means: f_divergence_type, ld_alpha,
        use_weighting, and a loss_type that does not hold one of "sigmoid", "sigmoid_norm" and
        "robust". For a margin or weight that is no such number, and for training data without a
        pair left.

    Examples
    --------
    >>> args = GammaDPOConfig("out", beta=0.1, gamma0=2.0, tau=2.3)  # doctest: +SKIP
    >>> GammaDPOTrainer(model, args=args, train_dataset=pairs).train()  # doctest: +SKIP
    """

    precompute_ref_logps: bool
    _tag_names = ("trl", "dpo", "gamma-po")
    _name = "γ-DPO"
    _only: ClassVar = {"f_divergence_type": "reverse_kl", "ld_alpha": None, "use_weighting": False}

    def __init__(
        self: Any, model: Any, ref_model: Any = None, args: DPOConfig | None = None, **kwargs: Any
    ) -> None:
        if getattr(args, "use_liger_kernel", False) and hasattr(DPOTrainer, "_compute_loss_liger"):
            raise ValueError(
                "use_liger_kernel must be False for γ-DPO before TRL 1.15: Liger's loss sees one "
                "pair at a time, margins need all. Call Liger's "
                "apply_liger_kernel_to_llama(fused_linear_cross_entropy=False), or that of your "
                "model, before the model is made, or use TRL 1.15"
            )
        super().__init__(model, ref_model, args=args, **kwargs)
        own = ("sigmoid", "sigmoid_norm", "robust")
        places = [i for i, name in enumerate(self.loss_types) if name in own]
        if len(places) != 1:
            raise ValueError(
                f"loss_type must hold exactly one of {own}, whose place γ-DPO takes, "
                f"got {self.loss_types!r}"
            )
        # TRL computes the other losses of the list.
        self.loss_types, self.loss_weights = list(self.loss_types), list(self.loss_weights)
        replaced = self.loss_types.pop(places[0])
        self._gamma_weight = self.loss_weights.pop(places[0])
        self._normalize = replaced == "sigmoid_norm" or getattr(args, "length_normalize", False)
        units = {"length_normalize": float(self._normalize)}
        saved = None if ref_model is None else model
        self._make_loss(GammaDPOLoss, GammaDPOConfig, saved, units, robust=replaced == "robust")

    def compute_ref_log_probs(self, *arguments: Any) -> Any:
        """Return TRL's, as constants, of a batch that may have margins and weights."""
        *model, batch = arguments
        logps = super().compute_ref_log_probs(*model, _pair_columns.without(batch))
        return [each.detach() for each in logps]

    @staticmethod
    def _lengths(batch: Any) -> list[torch.Tensor]:
        return list(batch["completion_mask"][:, 1:].sum(1).chunk(2))

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return TRL's loss with γ-DPO in the place of DPO, and log the metrics of both."""
        batch, inputs = inputs, _pair_columns.without(inputs)
        if not self.precompute_ref_logps:
            reference = self.model if self.ref_model is None else self.ref_model
            arguments = (reference, inputs) if _TAKES_MODEL else (inputs,)
            # As in TRL's loss: under FSDP2 autocast would round only the reference.
            self.accelerator.autocast = contextlib.nullcontext
            try:
                chosen, rejected = self.compute_ref_log_probs(*arguments)
            finally:
                del self.accelerator.autocast
            inputs |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        logps: list[torch.Tensor] = []

        def capture_logps(**kwargs: Any) -> Any:
            outputs = model(**kwargs)
            if logps:  # a second call, for the logits of compute_metrics
                return outputs
            if "log_probs" in outputs:  # of tokens, from TRL 1.15 on
                summed = outputs["log_probs"].sum(1)
            else:
                responses = inputs["completion_mask"] > 0
                summed = sequence_logps(outputs.logits, inputs["input_ids"], responses)
            logps.extend(summed.chunk(2))
            return outputs

        precomputed, self.precompute_ref_logps = self.precompute_ref_logps, True
        try:
            result = super().compute_loss(capture_logps, inputs, return_outputs, num_items_in_batch)
        finally:
            self.precompute_ref_logps = precomputed

        logps += [inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]]
        if self._normalize:
            lengths = 2 * self._lengths(inputs)
            logps = [x / n.clamp(min=1) for x, n in zip(logps, lengths, strict=True)]
        loss, logs = self._gamma_loss(batch, *logps)
        for name, value in logs.items():
            self._metrics["train" if self.model.training else "eval"][name].append(value)
        loss = self._gamma_weight * loss
        return (result[0] + loss, result[1]) if return_outputs else result + loss


class GammaSimPOTrainer(_GammaTrainer, CPOTrainer):
    """TRL's `CPOTrainer`, training with γ-SimPO.

    As `GammaDPOTrainer`, the columns ``margin`` and ``weight`` included, without a reference model
    and with log-probabilities averaged over tokens. Pairs with a response truncated to nothing are
    left out of the data, and a warning gives their number. Unlike `CPOTrainer` it takes streams.

    Parameters
    ----------
    model, args, **kwargs
        As `CPOTrainer`. A plain `CPOConfig` with ``loss_type="simpo"`` also works: its simpo_gamma
        is gamma0, and the other settings take the defaults of `GammaSimPOConfig`.

    Attributes
    ----------
    gamma_loss : GammaSimPOLoss
        See `GammaDPOTrainer`.

    Raises
    ------
    ValueError
        For a loss_type that is not "simpo", for alpha (AlphaPO's transformed rewards), for a margin
        or weight that is no such number, and for training data without a pair left.

    Examples
    --------
    >>> args = GammaSimPOConfig("out", beta=10.0, gamma_beta_ratio=0.3)  # doctest: +SKIP
    >>> data = {"train_dataset": pairs, "processing_class": tokenizer}  # doctest: +SKIP
    >>> GammaSimPOTrainer(model, args=args, **data).train()  # doctest: +SKIP
    """

    _tag_names = ("trl", "simpo", "gamma-po")
    _name = "γ-SimPO"
    _only: ClassVar = {"loss_type": "simpo", "alpha": 0.0}

    def __init__(self, model: Any, args: CPOConfig, **kwargs: Any) -> None:
        if isinstance(kwargs.get("train_dataset"), IterableDataset):  # as DPOTrainer does
            args.accelerator_config.dispatch_batches = False
        super().__init__(model, args=args, **kwargs)
        first = self._first = 0 if self.is_encoder_decoder else 1  # that has a log-probability
        for name in ("train_dataset", "eval_dataset"):
            if (data := getattr(self, name)) is not None:
                with self.args.main_process_first():
                    data = data.filter(
                        lambda row: all({*row[label][first:]} - {-100} for label in _LABELS)
                    )
                setattr(self, name, data)
        self._make_loss(GammaSimPOLoss, GammaSimPOConfig, model, gamma0=self.args.simpo_gamma)

    def _lengths(self, batch: Any) -> list[torch.Tensor]:
        return [(batch[name][:, self._first :] != -100).sum(1) for name in _LABELS]

    @staticmethod
    def get_batch_logps(
        logits: Any, labels: Any, average_log_prob: bool = False, is_encoder_decoder: bool = False
    ) -> torch.Tensor:
        """Return `sequence_logps`, which is 0 where TRL's mean over no token is NaN."""
        shift = not is_encoder_decoder
        return sequence_logps(logits, labels, average=average_log_prob, shift=shift)

    def get_batch_loss_metrics(self, model: Any, batch: Any, train_eval: str = "train") -> Any:
        """Return TRL's loss and metrics of a batch, those of γ-SimPO among them."""
        self._batch = batch
        loss, logs = super().get_batch_loss_metrics(model, batch, train_eval)
        prefix = "eval_" if train_eval == "eval" else ""
        return loss, logs | {prefix + name: value for name, value in self._logs.items()}

    def cpo_loss(self, policy_chosen_logps: Any, policy_rejected_logps: Any) -> Any:
        """Return γ-SimPO in the place of TRL's losses and rewards."""
        loss, self._logs = self._gamma_loss(self._batch, policy_chosen_logps, policy_rejected_logps)
        # TRL takes the mean; this is one already, over the pairs that take part on any rank.
        losses = loss.expand(policy_chosen_logps.shape)
        chosen, rejected = self.beta * policy_chosen_logps, self.beta * policy_rejected_logps
        return losses, chosen.detach(), rejected.detach()
