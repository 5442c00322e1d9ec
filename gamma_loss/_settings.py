"""The settings of a loss: checked in one place, and documented in one place."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from gamma_loss import _checks
from gamma_loss._backend import in_dynamo

REDUCTIONS = ("mean", "sum", "none")
IMPLEMENTATIONS = ("auto", "eager", "compile", "triton")

DOCS = {
    "beta": """float
        Reward units per nat, > 0.""",
    "gamma0": """float
        Mean target margin in reward units: 0, or from 1e-14 to 1e12. SimPO's is
        ``beta * gamma_beta_ratio``. A centred loss subtracts only γ_i - gamma0.""",
    "tau": """float
        Weight of the KL term in nats, > 0. A large tau keeps every margin at gamma0. gamma0 / tau
        is from 1e-30 to 1e9. The difficulty of the margin problem is κ = gamma0² / tau.""",
    "centered": """bool
        True subtracts γ_i - gamma0 from the gap, False subtracts γ_i.""",
    "context": """array, shape (others,), QueueState or GapQueue, optional
        Other gaps in reward units that join the margin problem and carry no loss, such as a queue
        of recent gaps. A queue brings its own mask. Constants for autograd.""",
    "context_mask": """boolean array, shape (others,), optional
        True for the entries of `context` that take part.""",
    "mask": """boolean array, shape (pairs,), optional
        True for the pairs that take part in the margin problem, the loss and its mean.""",
    "weights": """array, shape (pairs,), optional
        Non-negative weight of each pair, in the margin problem and in the mean. A pair of weight 2
        counts as two equal pairs, a pair of weight 0 as masked. A common factor changes nothing
        but the sum. A weight that is not a non-negative finite number is a ValueError where its
        value is free to read; elsewhere the loss of its pair is NaN. Gaps of `context` weigh 1.""",
    "label_smoothing": """float
        Share ε of flipped labels, in [0, 0.5). With ℓ(s) = -log σ(s), cDPO's loss is
        ``(1 - ε) ℓ(s) + ε ℓ(-s)``.""",
    "robust": """bool
        True uses rDPO's loss ``((1 - ε) ℓ(s) - ε ℓ(-s)) / (1 - 2ε)`` instead of cDPO's.""",
    "reduction": """{"mean", "sum", "none"}
        Over the pairs that take part. "none" gives one loss a pair, 0 for a masked pair.""",
    "impl": """{"auto", "eager", "compile", "triton"}
        How to solve for the margins. All agree to rounding.

        - "eager": array operations one by one. On CPU tensors it runs NumPy on a view, except for
          pools over 65,536 gaps with more than one thread. JAX compiles one program a shape.
        - "compile" (torch): a program compiled by Inductor, at the first call for each kind of pool
          (dtype, device, optional arguments), not for each size or setting. Where Inductor fails
          (without a C++ compiler; outside mild settings with torch 2.6), a warning says so, and the
          solve is as with "eager".
        - "triton" (torch, on a GPU that Triton knows): one kernel launch. Pools beyond the kernel's
          limit are solved as "eager" does.
        - "auto": "triton" for a tensor on such a GPU, else "eager". In a graph of torch.compile or
          torch.export, and under torch.func, a mild problem (gamma0 < 1.5 tau, and about
          gamma0² < 3 tau) becomes part of the graph; any other becomes one operator.""",
    "queue_size": """int
        How many recent gaps join the margin problem; 0 for none. With a group every rank pushes the
        gaps of all ranks, and so holds the same queue.""",
    "group": """torch.distributed.ProcessGroup or, for JAX, str, optional
        The ranks that share one margin problem (``torch.distributed.group.WORLD`` is all), or the
        name of a mesh axis inside jax.shard_map. All ranks call this together, with the same
        settings and dtype; each gives its own pairs and context, or none. Up to 131,072 gaps are
        gathered; of more only sums are exchanged. `impl` is then "auto" or "eager". "mean" is over
        the pairs of all ranks: the loss of a rank is the sum over its own pairs, divided by all
        pairs that take part and multiplied by the number of ranks, so that the average over ranks
        (which DDP and FSDP take of gradients) is that of one process with all pairs.""",
}

RETURNS = """Returns
    -------
    loss : array
        Scalar, or shape (pairs,) with ``reduction="none"``; float32 or, for float64 input, float64.
    aux : GammaLossAux
        Margins, rewards, pair weights and the error bound of the solve.

    Raises
    ------
    TypeError
        For an argument that is not an array, of another library, or of a wrong dtype.
    ValueError
        For shapes or devices that differ, an empty or not 1-D array, or a setting out of its range.
"""


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """The settings of a loss that are no arrays; units are in `DOCS`."""

    gamma0: float
    tau: float
    centered: bool
    beta: float = 1.0
    label_smoothing: float = 0.0
    robust: bool = False
    reduction: str = "mean"
    impl: str = "auto"

    def __post_init__(self) -> None:
        gamma0, tau = _checks.problem(self.gamma0, self.tau)
        set_ = functools.partial(object.__setattr__, self)
        set_("gamma0", gamma0)
        set_("tau", tau)
        set_("beta", _checks.number("beta", self.beta, above=0))
        set_("label_smoothing", _checks.label_smoothing(self.label_smoothing))
        _checks.flag("centered", self.centered)
        _checks.flag("robust", self.robust)
        _checks.choice("reduction", self.reduction, REDUCTIONS)
        _checks.choice("impl", self.impl, IMPLEMENTATIONS)

    @property
    def linear_coef(self) -> float:
        """The c of ``ℓ(s) + c s``: both kinds of label smoothing, as ℓ(-s) = ℓ(s) + s."""
        return linear_coef(self.label_smoothing, self.robust)


def linear_coef(epsilon: float, robust: bool) -> float:
    """Return the c of ``ℓ(s) + c s`` that label smoothing ε adds."""
    return -epsilon / (1 - 2 * epsilon) if robust else epsilon


@functools.lru_cache(maxsize=256, typed=True)
def _cached(**settings: Any) -> LossSettings:
    return LossSettings(**settings)


def loss_settings(**settings: Any) -> LossSettings:
    """Return checked settings; the same settings are checked once."""
    try:
        # Dynamo warns of a cache.
        return LossSettings(**settings) if in_dynamo() else _cached(**settings)
    except TypeError:  # not hashable, so of a wrong type
        return LossSettings(**settings)


Function = TypeVar("Function", bound=Callable[..., Any])
_ARRAYS = ("context", "context_mask", "mask", "weights")
SHARED = ("gamma0", "tau", "centered", *_ARRAYS, "label_smoothing", "robust", "reduction", "impl",
          "group")  # fmt: skip


def documented(*shared: str) -> Callable[[Function], Function]:
    """Put the shared parameters into a docstring, for {parameters}, and into the signature."""

    def decorate(function: Function) -> Function:
        names = dict.fromkeys(shared)
        text = "\n".join(f"    {name} : {DOCS[name]}" for name in names)
        function.__doc__ = (function.__doc__ or "").replace("    {parameters}", text)
        function.__doc__ = function.__doc__.replace("{returns}\n", RETURNS)
        signature = inspect.signature(function)
        own = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
        known = {each.name for each in own}
        defaults = {each.name: each.default for each in dataclasses.fields(LossSettings)}
        more = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty
                if defaults.get(name) is dataclasses.MISSING else defaults.get(name),
            )
            for name in names if name not in known
        ]  # fmt: skip
        if len(own) < len(signature.parameters):
            signature = signature.replace(parameters=[*own, *more])
            function.__signature__ = signature  # type: ignore[attr-defined]
        return function

    return decorate
