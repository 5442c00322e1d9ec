"""The losses as modules that keep a queue of recent gaps."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gamma_loss import _checks
from gamma_loss._comm import broadcast_error
from gamma_loss._ranks import ProcessGroupComm
from gamma_loss._settings import documented, loss_settings
from gamma_loss.losses import GammaLossAux, gamma_dpo_loss, gamma_preference_loss, gamma_simpo_loss
from gamma_loss.matching import choose_settings
from gamma_loss.metrics import metrics
from gamma_loss.queue import QueueState
from gamma_loss.torch.queue import GapQueue

_WARMUP = 100  # training forwards, after which a loss tells whether it has any effect
_MIN_KL = 1e-4  # nats: below this KL, margins are within about 1.4 % of gamma0
_SHARED = ("gamma0", "tau", "centered", "label_smoothing", "robust", "reduction", "impl", "group",
           "queue_size")  # fmt: skip
_Result = tuple[Tensor, GammaLossAux]


class _Group:
    """The ranks of a module: deepcopy shares the group; only WORLD can be pickled."""

    def __init__(self, ranks: Any = None) -> None:
        if ranks is None and not dist.is_initialized():  # a module is unpickled
            raise RuntimeError(
                "this module shares its pool with all ranks: call "
                "torch.distributed.init_process_group before it is unpickled, or load a state_dict"
            )
        self.ranks = dist.group.WORLD if ranks is None else ranks

    def __deepcopy__(self, _: dict[int, Any]) -> _Group:
        return self

    def __reduce__(self) -> tuple[type[_Group], tuple[()]]:
        if self.ranks is not dist.group.WORLD:
            raise TypeError(
                "a module can be pickled with group=torch.distributed.group.WORLD or none, "
                "got another group: save its state_dict"
            )
        return _Group, ()


class _QueuedLoss(torch.nn.Module):
    """A loss function, its settings, and the queue that it solves over and pushes to."""

    queue: GapQueue | None

    def __init__(self, function: Any, queue_size: int, group: Any = None, **settings: Any) -> None:
        super().__init__()
        try:  # a setting that a call would refuse is refused now
            loss_settings(**settings)
            queue_size = _checks.whole_number("queue_size", queue_size, least=0)
        except Exception as error:
            broadcast_error(group, error)
            raise
        self._function, self._names = function, list(inspect.signature(function).parameters)
        self._group = None if group is None else _Group(group)
        self.settings = settings
        self.queue = GapQueue(queue_size) if queue_size else None
        # The units of the queue's gaps, which are saved with them: settings may change later.
        self._units = {name: settings[name] for name in ("beta", "gamma0") if name in settings}
        self._forwards, self._warmup = 0, _WARMUP
        self._context: QueueState | None = None  # what the last training forward solved over

    @property
    def group(self) -> Any:
        """The ranks that share one pool, or None."""
        return None if self._group is None else self._group.ranks

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())

    def _loss(self, mask: Tensor | None, weights: Tensor | None, *arrays: Tensor) -> _Result:
        ranks, queue, context = None, self.queue, None
        if self._group is not None:  # every rank holds the whole queue, and contributes a part
            size = 0 if queue is None else queue.capacity
            ranks = ProcessGroupComm(self.group, queue_size=size, training=self.training)
        try:
            _checks.tensors(**dict(zip(self._names[: len(arrays)], arrays, strict=True)))
            if queue is not None and arrays[0].device != queue.gaps.device:
                raise ValueError(
                    f"{self._names[0]} must be on the device of the module, {queue.gaps.device}, "
                    f"which .to() changes, got {arrays[0].device}"
                )
        except Exception as error:
            broadcast_error(ranks, error)
            raise
        # A forward inside a backward pass is a recomputation. A compiler runs no Python twice.
        again = self.training and not torch.compiler.is_compiling()
        again = again and torch._C._current_graph_task_id() != -1
        options = {"mask": mask, "weights": weights, "group": ranks, **self.settings}
        if queue is not None:
            context = (self._context if again else None) or queue.context()
            gaps, filled = context if ranks is None else map(ranks.chunk, context)
            options.update(context=gaps, context_mask=filled)
        loss, aux = self._function(*arrays, **options)
        if self.training and not again:
            self._remember(aux, context, ranks)
        return loss, aux

    def _remember(self, aux: GammaLossAux, context: QueueState | None, ranks: Any) -> None:
        """Push the gaps of a training forward, and look at the first and the hundredth."""
        first = watched = False
        if not torch.compiler.is_compiling():
            self._context = context
            self._forwards += 1
            first, watched = self._forwards == 1, self._forwards == self._warmup
        if self.queue is None and not (first or watched):
            return
        gaps = torch.where(aux.mask, aux.reward_gaps, torch.nan)
        if ranks is not None:
            ranks.pool_size(gaps)
            gaps = ranks.all_gather(gaps)
        if self.queue is not None:
            self.queue.push(gaps)
        if first and not gaps.isfinite().any():
            warnings.warn(
                "no pair of the first batch takes part: each is masked or has a gap that is not "
                "finite, as where a prompt fills max_length and no token of a response is left",
                stacklevel=6,
            )
        if not watched:
            return
        if self.queue is not None:
            gaps = self.queue.gaps[self.queue.mask]
            if not gaps.numel():
                raise RuntimeError(
                    "no pair took part in a hundred steps of training: each was masked or had a "
                    "gap that is not finite. Increase max_length, or look at the mask and the gaps"
                )
        gaps = gaps[gaps.isfinite()]
        if gaps.numel() and (ranks is None or ranks.rank == 0):
            self._warn_if_idle(gaps.double().cpu().numpy())

    def _warn_if_idle(self, gaps: Any) -> None:
        gamma0, tau = self.settings["gamma0"], self.settings["tau"]
        _, aux = gamma_preference_loss(gaps, gamma0=gamma0, tau=tau)
        if (kl := float(metrics(aux)["gamma/kl"])) >= _MIN_KL:
            return
        try:
            better = choose_settings(gaps, gamma0=gamma0, margin_std=gamma0 / 10)["tau"]
            cure = f"tau = {better:.2g} would spread their margins by a tenth of gamma0"
        except ValueError as error:
            cure = f"no tau would spread their margins by a tenth of gamma0: {error}"
        names = {gamma_dpo_loss: "DPO", gamma_simpo_loss: "SimPO"}
        base = names.get(self._function, "a plain logistic loss")
        warnings.warn(
            f"gamma/kl is {kl:.1e} after a hundred steps of training: with gamma0 = {gamma0:g} and "
            f"tau = {tau:g} this run is {base} to rounding. For the last {gaps.size} gaps, of mean "
            f"{gaps.mean():.3g} and standard deviation {gaps.std():.3g}, {cure}",
            stacklevel=7,
        )

    @property
    def units(self) -> Tensor:
        """The settings in whose units the queue's gaps are; tools look up each key of a state."""
        return torch.tensor(list(self._units.values()), dtype=torch.float64)

    def _save_to_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._save_to_state_dict(state, prefix, *rest)
        if self.queue is not None:
            state[prefix + "units"] = self.units

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        saved, mask = state_dict.pop(prefix + "units", self.units), prefix + "queue.mask"
        rows = saved.tolist(), self.units.tolist()
        if self.queue is None:
            for name in (prefix + "queue.gaps", mask):
                state_dict.pop(name, None)
        elif rows[0] != rows[1]:
            then, now = (", ".join(map("{} = {:g}".format, self._units, row)) for row in rows)
            warnings.warn(
                f"the saved queue was filled with {then}, this loss has {now}: the saved gaps are "
                "in other units, so the queue starts empty",
                stacklevel=2,
            )
            if mask in state_dict:
                state_dict[mask] = torch.zeros_like(state_dict[mask])
        super()._load_from_state_dict(state_dict, prefix, *rest)


@documented("beta", *_SHARED)
class GammaDPOLoss(_QueuedLoss):
    """`gamma_dpo_loss` with a queue of recent gaps, as a module.

    In training mode a call solves over the queue and the batch, then pushes the batch's gaps. In
    evaluation mode it only reads the queue. The queue is the only state: save the module's
    ``state_dict`` with the model's.

    Parameters
    ----------
    {parameters}

    Attributes
    ----------
    queue : GapQueue or None
    settings : dict
        The settings of the loss, which a schedule may change between calls.

    Raises
    ------
    TypeError, ValueError
        As `gamma_dpo_loss` does, for settings when the module is made; for a queue_size that is no
        integer >= 0. With a group all ranks raise.
    RuntimeError
        After 100 training forwards (in TRL's trainers, steps) in which no pair took part.

    Warns
    -----
    UserWarning
        If no pair of the first batch takes part. After 100 training forwards, if ``gamma/kl`` of
        the pool is below 1e-4, so that γ-PO does nothing; the warning names a tau that helps. A
        compiled module does not look. On loading a queue that was filled with another ``beta`` or
        ``gamma0``: it starts empty.

    Notes
    -----
    - Each micro-batch's forward pushes once, and later ones of the same step see its gaps.
    - A forward inside a backward pass is a recomputation (activation checkpointing). It pushes
      nothing, and solves over what the last forward solved over: with several forwards before the
      first backward (pipeline schedules) perhaps a later queue than at first.
    - To retry a step, load a ``copy.deepcopy(loss.state_dict())`` from before it, as for the
      optimizer. If a loss scaler skips a step, its gaps stay in the queue, and are right.
    - From a queue of another size the newest gaps that fit are loaded.

    Examples
    --------
    >>> loss_module = GammaDPOLoss(beta=1.0, gamma0=1.0, tau=0.5, queue_size=8)
    >>> logps = torch.tensor([[-10.0, -12.0], [-14.0, -12.5], [-12.0, -12.0], [-12.0, -12.0]])
    >>> loss, aux = loss_module(*logps)
    >>> loss_module.queue.context().gaps
    tensor([0.0000, 0.0000, 0.0000, 0.0000, 0.0000, 0.0000, 4.0000, 0.5000])
    """

    def __init__(
        self, *, beta: float, centered: bool = True, queue_size: int = 2048, **options: Any
    ) -> None:
        super().__init__(gamma_dpo_loss, queue_size, beta=beta, centered=centered, **options)

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
        *,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, GammaLossAux]:
        """Return the ``(loss, aux)`` of `gamma_dpo_loss`."""
        policy = policy_chosen_logps, policy_rejected_logps
        reference = reference_chosen_logps, reference_rejected_logps
        return self._loss(mask, weights, *policy, *reference)


@documented("beta", *_SHARED)
class GammaSimPOLoss(_QueuedLoss):
    """`gamma_simpo_loss` with a queue of recent gaps, as a module. See `GammaDPOLoss`.

    Parameters
    ----------
    {parameters}

    Examples
    --------
    >>> from gamma_loss import PUBLISHED_SETTINGS
    >>> loss_module = GammaSimPOLoss(**PUBLISHED_SETTINGS["llama-3-8b-instruct"], queue_size=0)
    >>> loss, aux = loss_module(torch.tensor([-0.8, -0.9]), torch.tensor([-1.4, -0.8]))
    >>> round(float(loss), 4)
    2.307
    """

    def __init__(
        self, *, beta: float, centered: bool = False, queue_size: int = 2048, **options: Any
    ) -> None:
        super().__init__(gamma_simpo_loss, queue_size, beta=beta, centered=centered, **options)

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        *,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, GammaLossAux]:
        """Return the ``(loss, aux)`` of `gamma_simpo_loss`."""
        return self._loss(mask, weights, policy_chosen_logps, policy_rejected_logps)


@documented(*_SHARED)
class GammaPreferenceLoss(_QueuedLoss):
    """`gamma_preference_loss` with a queue of recent gaps, as a module. See `GammaDPOLoss`.

    Parameters
    ----------
    {parameters}

    Examples
    --------
    >>> loss_module = GammaPreferenceLoss(gamma0=1.0, tau=1.0)
    >>> loss, aux = loss_module(torch.tensor([-1.0, 0.0, 3.0]))
    >>> round(float(loss), 4)  # the queue is still empty: the value of the function
    1.0936
    """

    def __init__(self, *, centered: bool = False, queue_size: int = 2048, **options: Any) -> None:
        super().__init__(gamma_preference_loss, queue_size, centered=centered, **options)

    def forward(
        self, reward_gaps: Tensor, *, mask: Tensor | None = None, weights: Tensor | None = None
    ) -> tuple[Tensor, GammaLossAux]:
        """Return the ``(loss, aux)`` of `gamma_preference_loss`."""
        return self._loss(mask, weights, reward_gaps)
