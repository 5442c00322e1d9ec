"""What is drawn is what was given, in the units that the axes name."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gamma_loss import gamma_preference_loss, metrics

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")

from matplotlib.colors import to_hex  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from gamma_loss.plots import (  # noqa: E402
    plot_margin_history,
    plot_margins,
    plot_reward_gaps,
    plot_smoothing_history,
)

GAPS, MASK = np.array([-1.0, 0.5, 9.0, 3.0]), np.array([True, True, False, True])
ROW = {"gamma/mean": 4.0, "gamma/min": 3.5, "gamma/max": 5.0, "gamma/implied_smoothing": 0.02}


def axes():
    return Figure().subplots()


def aux_of(library):
    gaps, mask = library.array(GAPS), library.array(MASK, "bool")
    return gamma_preference_loss(gaps, gamma0=1.0, tau=1.0, mask=mask)[1]


def heights(bars):
    return sorted({y for _, y in bars.get_xy().tolist() if y})


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_margins_of_an_aux_without_its_masked_pairs(library):
    aux = aux_of(library)
    ax = plot_margins(aux, gamma0=1.0, ax=axes())
    (dots,) = ax.collections
    expected = np.stack([GAPS, library.numpy(aux.margins)], 1)[MASK]
    np.testing.assert_array_equal(dots.get_offsets(), expected)
    (line,) = ax.lines
    assert line.get_ydata() == [1.0, 1.0]
    assert [text.get_text() for text in ax.texts] == ["$γ_0$"]
    assert "reward gap" in ax.get_xlabel()
    assert "target margin" in ax.get_ylabel()
    assert ax.get_xlabel().endswith("(reward units)")
    assert ax.get_ylabel().endswith("(reward units)")
    assert ax.get_legend() is None


def test_margins_of_arrays_twice_on_the_same_axes():
    ax = axes()
    assert plot_margins(GAPS, GAPS + 1, ax=ax, label="clean") is ax
    plot_margins(GAPS, GAPS + 2, ax=ax, label="flipped", s=30)
    first, second = ax.collections
    np.testing.assert_array_equal(second.get_offsets(), np.stack([GAPS, GAPS + 2], 1))
    assert second.get_sizes() == [30]
    assert [to_hex(dots.get_facecolor()) for dots in (first, second)] == ["#0072b2", "#d55e00"]
    assert legend(ax) == ["clean", "flipped"]
    assert not ax.lines


def test_half_precision_and_gradients_of_torch(torch):
    gaps = torch.tensor(GAPS, dtype=torch.bfloat16, requires_grad=True)
    ax = plot_margins(gaps, gaps * 2, ax=axes())
    np.testing.assert_array_equal(ax.collections[0].get_offsets(), np.stack([GAPS, 2 * GAPS], 1))


def test_distribution_of_reward_gaps(library):
    ax = plot_reward_gaps(aux_of(library), bins=[-2.0, 1.0, 4.0], ax=axes(), density=False)
    (bars,) = ax.patches
    assert heights(bars) == [1, 2]
    assert ax.get_ylabel() == "pairs"
    assert "reward gap" in ax.get_xlabel()


def test_distribution_is_a_density_of_what_is_finite():
    ax = axes()
    plot_reward_gaps(np.array([np.nan, 0.1, 0.2, np.inf, 1.5]), bins=[0.0, 0.5, 2.0], ax=ax)
    plot_reward_gaps(GAPS, ax=ax, label="other")
    first, second = ax.patches
    assert heights(first) == pytest.approx([1 / 3 / 1.5, 2 / 3 / 0.5])
    assert ax.get_ylabel() == "density (per reward unit)"
    assert to_hex(first.get_facecolor()) != to_hex(second.get_facecolor())
    assert legend(ax) == ["other"]


def test_histories_skip_rows_without_the_metrics(library):
    trained = {"step": 10, "loss": 0.5, **ROW}
    arrays = {"step": 20, **{name: library.array(value) for name, value in ROW.items()}}
    arrays["gamma/max"] = library.array(7.0)
    history = [trained, {"step": 15, "eval_loss": 0.4}, arrays]
    margins = plot_margin_history(history, gamma0=4.0, ax=axes())
    (band,), (mean, line) = margins.collections, margins.lines
    assert mean.get_xydata().tolist() == [[10, 4], [20, 4]]
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices.tolist()}
    assert corners == {(10, 3.5), (10, 5), (20, 3.5), (20, 7)}
    assert legend(margins) == ["smallest to largest in the batch", "mean of the batch"]
    assert line.get_ydata() == [4.0, 4.0]
    ax = plot_smoothing_history(history, ax=axes())
    assert ax.lines[0].get_xydata().tolist() == [[10, 0.02], [20, 0.02]]
    for drawn, unit in ((ax, "(share of labels)"), (margins, "(reward units)")):
        assert drawn.get_xlabel() == "training step"
        assert drawn.get_ylabel().endswith(unit)


def test_history_of_our_metrics_is_numbered_and_two_runs_differ(library):
    logs = metrics(aux_of(library))
    ax = plot_margin_history([logs, logs], ax=axes(), label="first")
    plot_margin_history([logs], ax=ax, label="second")
    assert ax.lines[0].get_xdata().tolist() == [1, 2]
    assert legend(ax) == ["first", "second"]
    assert len({line.get_color() for line in ax.lines}) == 2
    ax = plot_smoothing_history(iter([logs]), ax=axes())
    assert ax.lines[0].get_ydata() == [float(logs["gamma/implied_smoothing"])]


def test_a_new_figure_where_no_axes_are_given():
    from matplotlib import pyplot as plt

    before = plt.get_fignums()
    ax = plot_smoothing_history([ROW])
    try:
        assert plt.get_fignums() == [*before, ax.figure.number]
    finally:
        plt.close(ax.figure)


def test_example_draws_what_the_docs_show(torch, monkeypatch, tmp_path):
    from matplotlib import pyplot as plt

    docs = Path(__file__).parents[1] / "docs"
    monkeypatch.setattr(sys, "argv", ["draw_plots.py", "--out-dir", str(tmp_path)])
    runpy.run_path(str(docs / "examples" / "draw_plots.py"), run_name="__main__")
    plt.close("all")
    drawn = {file.name for file in tmp_path.iterdir()}
    assert drawn == set(
        re.findall(r'picture\("(plots_\w+\.svg)"', (docs / "plots.md").read_text("utf-8"))
    )
    assert drawn == {file.name for file in docs.glob("plots_*.svg")}
    assert all(file.stat().st_size < 1e5 for file in docs.glob("plots_*.svg"))


@pytest.mark.parametrize(
    ("draw", "error", "complaint"),
    [
        (lambda: plot_margins(GAPS), TypeError, "margins must be given with an array"),
        (lambda: plot_margins(GAPS, GAPS[:3]), ValueError, r"shape of pairs, \(4,\), got \(3,\)"),
        (lambda: plot_margins(GAPS[None], GAPS), ValueError, r"pairs must be 1-D, .* \(1, 4\)"),
        (lambda: plot_reward_gaps(np.array([np.nan])), ValueError, "must have a finite gap"),
        (lambda: plot_margin_history([]), ValueError, "history must have a row with gamma/mean, "),
        (lambda: plot_smoothing_history([{"loss": 1.0}]), ValueError, "with gamma/implied_smooth"),
    ],
)
def test_wrong_arguments(draw, error, complaint):
    with pytest.raises(error, match=complaint):
        draw()


def test_an_aux_has_its_margins():
    _, aux = gamma_preference_loss(GAPS, gamma0=1.0, tau=1.0)
    with pytest.raises(TypeError, match="and not with an aux"):
        plot_margins(aux, aux.margins)


def test_importing_the_package_does_not_import_matplotlib_and_the_extra_is_named():
    code = """
import sys, gamma_loss
assert "matplotlib" not in sys.modules
sys.modules["matplotlib.axes"] = None
try:
    import gamma_loss.plots
except ImportError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "gamma_loss.plots needs matplotlib: pip install 'gamma-loss[plots]'" in out.stdout
