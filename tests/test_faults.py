"""What a long run meets: being killed, and going on for very long."""

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gamma_loss import GammaPreferenceLoss

JOB = Path(__file__).parent / "resumable_job.py"
SOAK_STEPS = int(os.environ.get("GAMMA_LOSS_SOAK_STEPS", "1500"))


def start(folder, steps):
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, JOB, folder, str(steps)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL")
def test_a_killed_run_resumes_to_the_bit(torch, tmp_path):
    steps = 100
    never_killed, killed = (
        start(tmp_path / "never_killed", steps),
        start(tmp_path / "killed", steps),
    )
    for _ in range(30):
        assert killed.stdout.readline()
    killed.send_signal(signal.SIGKILL)  # some part of a later step is under way
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    resumed = start(tmp_path / "killed", steps)
    first = int(resumed.communicate()[0].split()[0])
    never_killed.communicate()
    assert resumed.returncode == never_killed.returncode == 0
    assert 30 <= first < steps, "it went on in mid-run"

    ours, theirs = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
        for name in ("killed", "never_killed")
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
