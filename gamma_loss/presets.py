"""The settings that the authors published."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType


def _simpo(beta: float, gamma_beta_ratio: float, tau: float) -> Mapping[str, float]:
    return MappingProxyType({"beta": beta, "gamma0": beta * gamma_beta_ratio, "tau": tau})


class _Settings(dict[str, Mapping[str, float]]):
    def __missing__(self, name: object) -> Mapping[str, float]:
        raise KeyError(f"no published setting {name!r}: there are {', '.join(self)}")


PUBLISHED_SETTINGS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    _Settings({
        "mistral-7b-instruct": _simpo(beta=2.5, gamma_beta_ratio=0.15, tau=10.0),
        "llama-3-8b-instruct": _simpo(beta=10.0, gamma_beta_ratio=0.4, tau=10.0),
        "gemma-2-9b-it": _simpo(beta=10.0, gamma_beta_ratio=0.5, tau=20.0),
        "qwen-2.5-7b-instruct": _simpo(beta=10.0, gamma_beta_ratio=0.3, tau=3.0),
    })
)  # fmt: skip
"""Keyword arguments of `gamma_simpo_loss` for the authors' four γ-SimPO runs, by model.

Source: Sun et al., Findings of ACL 2025, arXiv:2506.03690, and their training configurations, where
gamma0 (reward units) is given as beta * gamma_beta_ratio.
"""
