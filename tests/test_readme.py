"""The README's code works when pasted."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_blocks_run():
    pytest.importorskip("torch")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    blocks = [block for block in blocks if "integrations.trl" not in block]  # in test_trl.py
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_the_changed_lines_of_a_dpo_loop_are_dpo_at_a_large_tau():
    torch = pytest.importorskip("torch")
    from gamma_loss import gamma_dpo_loss

    (diff,) = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    before, after = (
        "".join(line[1:] for line in diff.splitlines(keepends=True) if line[0] == sign)
        for sign in "-+"
    )
    torch.manual_seed(0)
    numbers = dict.fromkeys(re.findall(r"\b(?:reference_)?(?:chosen|rejected)\w*", before))
    given = {name: 10 * torch.randn(16, dtype=torch.float64) for name in numbers}
    assert len(given) == 4
    losses = []
    for lines in (before, after, after.replace("tau=2.3", "tau=1e12")):
        found = {"torch": torch, "gamma_dpo_loss": gamma_dpo_loss, "beta": 0.1, **given}
        exec(compile(lines, "README.md", "exec"), found)
        losses.append(float(found["loss"]))
    assert losses[2] == pytest.approx(losses[0], rel=1e-10)
    assert losses[1] != pytest.approx(losses[0], rel=1e-4)
