"""The README's code works when pasted."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = [
    block
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    if "integrations.trl" not in block  # run by test_trl.py
]


def test_there_are_examples():
    assert len(BLOCKS) >= 3


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0])
def test_block_runs(block, monkeypatch):
    for library in ("torch", "jax"):
        if f"import {library}" in block:
            pytest.importorskip(library)
    alone = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    for name, value in {**alone, "GLOO_SOCKET_IFNAME": "lo"}.items():
        monkeypatch.setenv(name, str(value))
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    if "dist" in names:
        names["dist"].destroy_process_group()


def test_the_distributed_loop_is_short_and_the_one_that_is_tested_on_five_ranks():
    (block,) = (block for block in BLOCKS if "DistributedDataParallel" in block)
    assert len(block.splitlines()) < 15
    assert block in (Path(__file__).parents[1] / "docs" / "queue.md").read_text()
