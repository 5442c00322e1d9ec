"""Draw the pictures of docs/api/trainers.md from a short training run on noisy labels.

A linear reward model learns from 2,048 pairs of random features, labelled by a known linear reward
(Bradley and Terry's model); 20 % of the labels are then flipped. γ-DPO's centred loss trains it for
200 steps, in a second or two. Everything is random but seeded.

    python draw_plots.py [--out-dir docs]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
import torch

from gamma_loss import gamma_preference_loss, metrics
from gamma_loss.plots import (
    plot_margin_history,
    plot_margins,
    plot_reward_gaps,
    plot_smoothing_history,
)

GAMMA0, TAU, STEPS, BATCH = 4.0, 2.0, 200, 128


def train(features: torch.Tensor) -> tuple[torch.Tensor, list[dict[str, float]]]:
    """Return the reward gaps of all pairs in the end, and the log."""
    weights = torch.zeros(features.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=0.02)
    history = []
    for step in range(1, STEPS + 1):
        batch = features[torch.randint(len(features), (BATCH,))]
        loss, aux = gamma_preference_loss(batch @ weights, gamma0=GAMMA0, tau=TAU, centered=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 5 == 0:
            logs = {name: float(value) for name, value in metrics(aux).items()}
            history.append({"step": step, **logs})
    return features @ weights.detach(), history


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out-dir", type=Path, default=Path(__file__).parents[1])
    args = parser.parse_args()
    mpl.use("Agg")
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "γ"})  # text stays text
    torch.manual_seed(0)
    true_weights, features = torch.randn(16) / 2, torch.randn(2048, 16)  # chosen minus rejected
    preferred = torch.rand(2048) < torch.sigmoid(features @ true_weights)
    flipped = torch.rand(2048) < 0.2
    features = torch.where((preferred ^ flipped)[:, None], features, -features)

    gaps, history = train(features)
    _, aux = gamma_preference_loss(gaps, gamma0=GAMMA0, tau=TAU)
    ax = plot_margins(gaps[~flipped], aux.margins[~flipped], label="clean", rasterized=True)
    plot_margins(
        gaps[flipped], aux.margins[flipped], gamma0=GAMMA0, ax=ax, label="flipped", rasterized=True
    )
    figures = {"margins": ax}
    edges = torch.linspace(-3, 3.5, 40).tolist()
    figures["reward_gaps"] = ax = plot_reward_gaps(gaps[~flipped], bins=edges, label="clean")
    plot_reward_gaps(gaps[flipped], bins=edges, ax=ax, label="flipped")
    figures["margin_history"] = plot_margin_history(history, gamma0=GAMMA0)
    figures["smoothing_history"] = plot_smoothing_history(history)
    for name, ax in figures.items():
        file = args.out_dir / f"plots_{name}.svg"
        ax.figure.savefig(file, dpi=200, metadata={"Date": None})
        print(file)


if __name__ == "__main__":
    main()
