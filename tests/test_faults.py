"""What a long run meets: being killed, and going on for very long."""

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gamma_loss import GammaPreferenceLoss

SOAK_STEPS = int(os.environ.get("GAMMA_LOSS_SOAK_STEPS", "600"))


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL")
def test_a_killed_run_resumes_to_the_bit(torch, tmp_path, capsys):
    import resumable_job

    killed, never_killed = (tmp_path / name for name in ("killed", "never_killed"))
    killed.mkdir()
    never_killed.mkdir()
    with subprocess.Popen(
        [sys.executable, resumable_job.__file__, killed, "60"],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as run:
        for _ in range(20):
            assert run.stdout.readline()
        run.kill()  # some part of a later step is under way
    assert run.returncode == -signal.SIGKILL
    threads = torch.get_num_threads()
    try:
        resumable_job.main(killed, 60)
        first = int(capsys.readouterr().out.split()[0])
        assert 20 <= first < 60, "it went on in mid-run"
        resumable_job.main(never_killed, 60)
    finally:
        torch.set_num_threads(threads)
    ours, theirs = (
        torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (killed, never_killed)
    )
    assert ours["loss"]["queue.mask"].all()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_soak(torch):
    """GAMMA_LOSS_SOAK_STEPS=100000 python -m pytest tests/test_faults.py -k soak: the long one."""
    generator = torch.Generator().manual_seed(0)
    loss_module = GammaPreferenceLoss(gamma0=4.0, tau=10.0)
    scale = torch.nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([scale], lr=1e-3)
    memory, tensors = [], []
    for step in range(1, SOAK_STEPS):
        drift = 10 * torch.randn((), generator=generator)
        gaps = scale * (drift + 5 * torch.randn(1 + step % 7, generator=generator))
        if step % 50 == 0:  # one pair is broken, and masked so that training goes on
            gaps = torch.where(torch.arange(len(gaps)) == 0, torch.nan, gaps)
        loss, aux = loss_module(gaps, mask=torch.isfinite(gaps))
        optimizer.zero_grad()
        loss.backward()
        if step % 50:  # NaN reaches the scale through its product with the broken pair
            optimizer.step()
        # ν and the range are of order 1; float32 solves to 2e-6 of x and rounds a σ to 1e-7.
        assert aux.error_bound < 1e-5, step
        if step in (SOAK_STEPS // 3 + 1, SOAK_STEPS - 1):
            del loss, aux, gaps
            gc.collect()
            tensors.append(sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects()))
            memory.append(_resident_bytes())
    assert tensors[1] <= tensors[0]  # fewer where other tests left garbage
    assert loss_module.queue.mask.all() == (SOAK_STEPS * 4 > 2048)
    # Room for the allocator; a batch that was kept each step would be 100,000 times 512 bytes.
    assert memory[1] - memory[0] < 16 * 2**20


def _resident_bytes():
    statistics = Path("/proc/self/statm")
    return int(statistics.read_text().split()[1]) * 4096 if statistics.exists() else 0
