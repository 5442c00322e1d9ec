"""``python -m gamma_loss``, and ``help(gamma_loss)``."""

import pydoc
import re
import runpy
import sys

import numpy as np
import oracles
import pytest

import gamma_loss
from gamma_loss import __main__ as program


def test_the_report_has_a_line_each_and_the_solve_passes(capsys):
    with pytest.raises(SystemExit) as end:
        runpy.run_path(program.__file__, run_name="__main__")
    assert end.value.code == 0
    first, packages, auto, result = capsys.readouterr().out.splitlines()
    assert first.startswith(f"gamma_loss {gamma_loss.__version__}, Python 3.")
    for name in ("numpy", "torch", "jax", "triton", "trl", "scipy"):
        assert re.search(rf"\b{name} (not installed|\d)", packages)
    assert auto.startswith('impl="auto" takes ')
    assert re.fullmatch(r"self-test: passed, error bound \d\.\de-1\d", result)


def test_its_margins_are_an_independent_solution():
    expected = oracles.margins(program.GAPS, 4.0, 10.0)[0]
    np.testing.assert_allclose(program.MARGINS, np.asarray(expected, float), rtol=0, atol=1e-7)


@pytest.mark.parametrize(("margins", "bound"), [((4.0,) * 4, 1e-15), (program.MARGINS, 0.1)])
def test_wrong_or_unproven_margins_end_with_exit_code_1(monkeypatch, capsys, margins, bound):
    solution = gamma_loss.MarginSolution(np.array(margins), np.float64(0.3), np.float64(bound))
    monkeypatch.setattr(gamma_loss, "solve_margins", lambda *_, **__: solution)
    assert program.main() == 1
    assert f"self-test: FAILED, error bound {bound:.1e}" in capsys.readouterr().out


def test_without_torch_the_solve_is_numpy_s_and_help_works(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert program.main() == 0
    assert "takes eager: torch cannot be imported" in capsys.readouterr().out
    assert "sequence_logps  " in pydoc.render_doc(gamma_loss)


def test_with_a_gpu_it_says_that_triton_takes_its_tensors(monkeypatch):
    torch = pytest.importorskip("torch")
    from gamma_loss import _operator

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(_operator, "launcher", lambda device: torch)
    assert program.auto()[0].startswith("triton for CUDA tensors, ")


def test_help_shows_every_public_name_with_its_line():
    described = dict(re.findall(r"^ {4}(\w+) {2,}(\S.*\.)$", gamma_loss.__doc__, re.MULTILINE))
    assert set(described) == set(gamma_loss.__all__)
