"""Mistakes that a client must see: each changes the losses of this library in a trainer's process.

`python -m tests.clients NAME --sabotage` makes them one by one.
"""

from gamma_loss import GammaDPOLoss, GammaSimPOLoss, preference_loss

OPTIONS = {  # other arguments than the recipe's
    "no queue": {"queue_size": 0},
    "each process by itself": {"group": None},
    "tau a tenth larger": {"tau": 1.1},  # the runs have 1
}
RESULTS = {  # another loss than the right one, made from it and from the loss without margins
    "no margins": lambda right, plain: plain,
    "the right value, the gradient of no margins": lambda right, plain: (
        right.detach() + plain - plain.detach()
    ),
    "the right value, the gradient reversed": lambda right, plain: 2 * right.detach() - right,
    "the right value, half the gradient": lambda right, plain: (right.detach() + right) / 2,
    "a queue that evaluation writes": lambda right, plain: right,
}
ALL = [*OPTIONS, *RESULTS]


def apply(name, patch=setattr):
    """Make a mistake, in this process."""
    for kind in (GammaDPOLoss, GammaSimPOLoss):

        def init(self, *, original=kind.__init__, **options):
            original(self, **{**options, **OPTIONS.get(name, {})})

        def forward(self, *logps, original=kind.forward, **options):
            if name == "a queue that evaluation writes":
                self.train()
            right, aux = original(self, *logps, **options)
            chosen, rejected, *reference = logps
            ratios = chosen - rejected - (reference[0] - reference[1] if reference else 0.0)
            margin = 0.0 if self.settings["centered"] else self.settings["gamma0"]
            plain = preference_loss(self.settings["beta"] * ratios, margin)
            plain = plain.mean() if right.ndim == 0 else plain
            return RESULTS.get(name, lambda right, plain: right)(right, plain), aux

        patch(kind, "__init__", init)
        patch(kind, "forward", forward)
