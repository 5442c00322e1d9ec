"""Print the facts for a bug report and solve one pool; exit with 1 if that fails."""

import platform
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

import gamma_loss

PACKAGES = "numpy", "torch", "jax", "triton", "trl", "scipy"
GAPS = np.array([-2.0, 0.0, 2.0, 6.0])
MARGINS = 3.6255247, 3.6569413, 3.8267397, 4.8907943  # for gamma0 = 4, tau = 10; by bisection


def installed(name: str) -> str:
    """Return the version of a package, or "not installed"."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def auto() -> tuple[str, Any]:
    """Return what ``impl="auto"`` takes here, and the gaps as that takes them."""
    try:
        import torch
    except Exception as error:  # a broken installation may raise anything
        return f"eager: torch cannot be imported ({error})", GAPS
    gaps = torch.from_numpy(GAPS)
    if not torch.cuda.is_available():
        return "eager: torch sees no CUDA device", gaps
    from gamma_loss import _operator

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if _operator.launcher(torch.device("cuda")):
            return "triton for CUDA tensors, eager for others: both can be used", gaps.cuda()
    return f"eager: {caught[-1].message if caught else 'no triton'}", gaps.cuda()


def main() -> int:
    """Print the report; return the exit code."""
    python, system = platform.python_version(), platform.platform(terse=True)
    print(f"gamma_loss {gamma_loss.__version__}, Python {python}, {system}")
    print("installed: " + ", ".join(f"{name} {installed(name)}" for name in PACKAGES))
    choice, gaps = auto()
    print(f'impl="auto" takes {choice}')
    margins, _, bound = gamma_loss.solve_margins(gaps, gamma0=4.0, tau=10.0)
    right = bound < 1e-12 and np.allclose([*map(float, margins)], MARGINS, rtol=0, atol=1e-7)
    print(f"self-test: {'passed' if right else 'FAILED'}, error bound {bound:.1e}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
