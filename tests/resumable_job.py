"""A training job that saves after every step and goes on where its folder's checkpoint ends."""

import os
import sys
from pathlib import Path

import torch

from gamma_loss import GammaDPOLoss


def main(folder, steps):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))
    loss_module = GammaDPOLoss(beta=1.0, gamma0=4.0, tau=10.0, queue_size=50)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    parts = {"model": model, "loss": loss_module, "optimizer": optimizer}
    checkpoint, losses = folder / "checkpoint.pt", []
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        torch.set_rng_state(saved["rng"])
        losses = saved["losses"]
    for step in range(len(losses), steps):
        policy = model(torch.randn(3, 8)).T
        loss, _ = loss_module(*policy, *torch.randn(2, 3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        state = {name: part.state_dict() for name, part in parts.items()}
        torch.save({**state, "rng": torch.get_rng_state(), "losses": losses}, folder / "new")
        os.replace(folder / "new", checkpoint)
        print(step, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
