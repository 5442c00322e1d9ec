"""What is drawn is what was given, in the units that the axes name."""

import re
import sys

import numpy as np
import pytest

from gamma_loss import gamma_preference_loss, metrics, solve_margins

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402
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


def heights(bars):
    return sorted({y for _, y in bars.get_xy().tolist() if y})


def test_an_aux_is_drawn_without_its_masked_pairs(library):
    gaps, mask = library.array(GAPS), library.array(MASK, "bool")
    _, aux = gamma_preference_loss(gaps, gamma0=1.0, tau=1.0, mask=mask)
    ax = plot_margins(aux, gamma0=1.0, ax=axes())
    expected = np.stack([GAPS, library.numpy(aux.margins)], 1)[MASK]
    np.testing.assert_array_equal(ax.collections[0].get_offsets(), expected)
    assert [list(line.get_ydata()) for line in ax.lines] == [[1.0, 1.0]]
    assert re.fullmatch(r"reward gap .* \(reward units\)", ax.get_xlabel())
    assert re.fullmatch(r"target margin .* \(reward units\)", ax.get_ylabel())
    ax = plot_reward_gaps(aux, bins=[-2.0, 1.0, 4.0], ax=axes(), density=False)
    assert heights(ax.patches[0]) == [1, 2]
    assert ax.get_ylabel() == "pairs"
    logs = metrics(aux)
    ax = plot_margin_history([logs, logs], ax=axes())
    assert ax.lines[0].get_xdata().tolist() == [1, 2]  # rows without a step are numbered
    plot_margin_history([logs], ax=ax)
    assert ax.lines[0].get_color() != ax.lines[1].get_color()
    ax = plot_smoothing_history(iter([logs]), ax=axes())
    assert ax.lines[0].get_ydata() == [float(logs["gamma/implied_smoothing"])]


def test_calls_on_the_same_axes_take_other_colours(torch):
    ax = axes()
    assert plot_margins(GAPS, GAPS + 1, ax=ax, label="clean") is ax
    half = torch.tensor(GAPS, dtype=torch.bfloat16, requires_grad=True)
    plot_margins(half, half * 2, ax=ax, label="flipped", s=30)
    first, second = ax.collections
    np.testing.assert_array_equal(second.get_offsets(), np.stack([GAPS, 2 * GAPS], 1))
    assert second.get_sizes() == [30]
    assert to_hex(first.get_facecolor()) != to_hex(second.get_facecolor())
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["clean", "flipped"]
    ax = axes()
    plot_reward_gaps(np.array([np.nan, 0.1, 0.2, np.inf, 1.5]), bins=[0.0, 0.5, 2.0], ax=ax)
    plot_reward_gaps(GAPS, ax=ax, label="other")
    first, second = ax.patches
    assert heights(first) == pytest.approx([1 / 3 / 1.5, 2 / 3 / 0.5])  # of what is finite
    assert ax.get_ylabel() == "density (per reward unit)"
    assert to_hex(first.get_facecolor()) != to_hex(second.get_facecolor())


def test_histories_skip_rows_without_the_metrics():
    history = [{"step": 10, **ROW}, {"step": 15, "eval_loss": 0.4},
               {"step": 20, **ROW, "gamma/max": np.array(7.0)}]  # fmt: skip
    ax = plot_margin_history(history, gamma0=4.0, ax=axes())
    (band,), (mean, line) = ax.collections, ax.lines
    assert mean.get_xydata().tolist() == [[10, 4], [20, 4]]
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices.tolist()}
    assert corners == {(10, 3.5), (10, 5), (20, 3.5), (20, 7)}
    assert line.get_ydata() == [4.0, 4.0]
    assert ax.get_xlabel() == "training step"
    before = plt.get_fignums()
    ax = plot_smoothing_history(history)  # without axes on a new figure
    assert plt.get_fignums() == [*before, ax.figure.number]
    plt.close(ax.figure)
    assert ax.lines[0].get_xydata().tolist() == [[10, 0.02], [20, 0.02]]
    assert ax.get_ylabel().endswith("(share of labels)")


def test_the_example_draws_the_page_s_pictures_in_its_settings(torch, monkeypatch, tmp_path):
    import draw_plots

    monkeypatch.setattr(sys, "argv", ["draw_plots.py", "--out-dir", str(tmp_path)])
    plt.close("all")
    draw_plots.main()
    margins, _, history, _ = (plt.figure(number).axes[0] for number in plt.get_fignums())
    plt.close("all")
    drawn = np.concatenate([dots.get_offsets().data for dots in margins.collections])
    expected = solve_margins(drawn[:, 0], gamma0=4.0, tau=2.0).margins
    np.testing.assert_allclose(drawn[:, 1], expected, rtol=1e-5)  # drawn from float32
    flipped = len(margins.collections[1].get_offsets())
    assert len(drawn) == 2048
    assert abs(flipped / 2048 - 0.2) < 5 * np.sqrt(0.2 * 0.8 / 2048)
    assert margins.lines[0].get_ydata() == history.lines[1].get_ydata() == [4.0, 4.0]
    np.testing.assert_allclose(history.lines[0].get_ydata(), 4.0, rtol=1e-5)
    assert history.lines[0].get_xdata().tolist() == list(range(5, 201, 5))


def test_wrong_arguments_are_named():
    _, aux = gamma_preference_loss(GAPS, gamma0=1.0, tau=1.0)
    for draw, error, complaint in [
        (lambda: plot_margins(GAPS), TypeError, "margins must be given with an array"),
        (lambda: plot_margins(aux, aux.margins), TypeError, "and not with an aux"),
        (lambda: plot_margins(GAPS, GAPS[:3]), ValueError, r"shape of pairs, \(4,\), got \(3,\)"),
        (lambda: plot_margins(GAPS[None], GAPS), ValueError, r"pairs must be 1-D, .* \(1, 4\)"),
        (lambda: plot_reward_gaps(np.array([np.nan])), ValueError, "must have a finite gap"),
        (lambda: plot_margin_history([]), ValueError, "history must have a row with gamma/mean, "),
    ]:
        with pytest.raises(error, match=complaint):
            draw()
