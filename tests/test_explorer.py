"""The interactive figure: its solver against the library's in Node, itself in a browser."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from strategies import CORNERS, HARD, MILD

from gamma_loss import PUBLISHED_SETTINGS, match_logistic, solve_margins

ASSETS = Path(__file__).parents[1] / "docs" / "assets"
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>γ</title>
<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">
<link rel="stylesheet" href="explorer.css"><div id="explorer"></div>
<script src="solve.js"></script><script src="explorer.js"></script></html>"""


SETTINGS = [{"gamma0": s["gamma0"], "tau": s["tau"]} for s in PUBLISHED_SETTINGS.values()]
SETTINGS.append({"gamma0": 2.0, "tau": 0.5})


def in_node(function, problems):
    """Return what a function of solve.js gives for the arguments of each problem."""
    node = shutil.which("node")
    if not node:
        pytest.skip("needs node")
    file, data = json.dumps(str(ASSETS / "solve.js")), json.dumps(problems)
    program = f"const all = {data}.map(each => require({file}).{function}(...each));"
    done = subprocess.run(
        [node, "-e", f"{program} console.log(JSON.stringify(all))"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


def test_margins_in_node_are_the_library_s():
    rng = np.random.default_rng(0)
    problems = [
        (rng.normal(setting["gamma0"] / 2, scale, 60).tolist(), *setting.values())
        for setting in (MILD, HARD, *SETTINGS, {"gamma0": 8.0, "tau": 0.05})
        for scale in (1e-3, 3.0, 300.0)
    ]
    problems += CORNERS  # of the domain
    found = in_node("solveMargins", problems)
    for (gaps, gamma0, tau), each in zip(problems, found, strict=True):
        expected = solve_margins(np.array(gaps), gamma0=gamma0, tau=tau)
        atol = 1e-9 * min(gamma0, 1)
        np.testing.assert_allclose(each["margins"], expected.margins, rtol=0, atol=atol)
        assert each["multiplier"] == pytest.approx(float(expected.multiplier), abs=atol)


@pytest.mark.parametrize("centered", [False, True])
def test_the_matched_loss_in_node_is_the_library_s(centered):
    pytest.importorskip("scipy")
    gaps, problems = np.random.default_rng(1).normal(1.0, 3.0, 200), []
    for setting in SETTINGS:
        shift = setting["gamma0"] * centered
        weights = 1 / (1 + np.exp(gaps + shift - solve_margins(gaps, **setting).margins))
        problems.append((gaps.tolist(), weights.tolist(), setting["gamma0"] - shift))
    for setting, each in zip(SETTINGS, in_node("matchLogistic", problems), strict=True):
        expected = match_logistic(gaps, **setting, centered=centered)[:3]
        found = [each[name] for name in ("scale", "margin", "betaFactor")]
        assert found == pytest.approx(list(expected), rel=1e-4, abs=1e-4)


@pytest.fixture(scope="module")
def address(tmp_path_factory, serve):
    folder = tmp_path_factory.mktemp("page")
    (folder / "index.html").write_text(PAGE, "utf-8")
    for file in ("solve.js", "explorer.js", "explorer.css"):
        shutil.copy(ASSETS / file, folder)
    return f"{serve(folder)}/"


@pytest.fixture
def page(browser, address, request):
    """The figure in a window of the asked width; nothing may be said, nor asked of others."""
    width = getattr(request, "param", 1400)
    page = browser.new_page(viewport={"width": width, "height": 900})
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda asked: asked.url.startswith((address, "data:")) or said.append(asked))
    page.goto(address)
    page.wait_for_selector("svg")
    yield page
    page.close()
    assert not said


def close(page, gamma0, tau, mean, deviation, flips, centered):
    """The readouts are the library's: κ, margins' range and deviation, beta factor, ratios."""
    from scipy.stats import norm

    page.wait_for_timeout(400)  # a frame, and the delay of the address
    texts = page.locator("#explorer dd").all_inner_texts()
    numbers = [[float(n) for n in re.findall(r"-?\d+\.?\d*", text)] for text in texts]
    (kappa,), found, (factor, *_), ratios = numbers
    flipped = round(200 * flips)
    parts = [norm.ppf((np.arange(n) + 0.5) / n) for n in (200 - flipped, flipped)]
    gaps = np.concatenate([mean + deviation * parts[0], deviation * parts[1] - mean])
    margins = solve_margins(gaps, gamma0=gamma0, tau=tau).margins
    shift = gamma0 * centered
    match = match_logistic(gaps, gamma0=gamma0, tau=tau, centered=centered)
    weights = [
        1 / (1 + np.exp(gaps + shift - margins)),
        1 / (1 + np.exp(gaps + shift - gamma0)),
        match.scale / (1 + np.exp(match.beta_factor * gaps - match.margin)),
    ]
    expected = [gamma0**2 / tau, margins.min(), margins.max(), margins.std(), match.beta_factor]
    expected += [w[200 - flipped :].mean() / w[: 200 - flipped].mean() for w in weights]
    shown = kappa, *found, factor, ratios[0], *ratios[-2:]
    np.testing.assert_allclose(shown, expected, rtol=6e-3)  # of three digits


def test_the_figure_shows_the_library_s_numbers_and_its_address_makes_it_again(page, address):
    pytest.importorskip("scipy")
    close(page, 2, 1, 1, 3, 0.2, True)
    page.get_by_role("button", name="Qwen").click()
    close(page, 3, 3, 1, 3, 0.2, False)
    page.get_by_label("Share of flipped pairs").press("ArrowRight")
    page.get_by_label("Mean of clean gaps").press("ArrowRight")
    page.get_by_label("Loss").select_option("dpo")
    close(page, 3, 3, 1.25, 3, 0.25, True)
    link = page.get_by_role("link", name="Link to this picture").get_attribute("href")
    assert page.url == address + link
    curves = page.locator("svg path").evaluate_all("all => all.map(each => each.outerHTML)")
    page.goto("about:blank")
    page.goto(address + link)
    close(page, 3, 3, 1.25, 3, 0.25, True)
    assert page.locator("svg path").evaluate_all("all => all.map(e => e.outerHTML)") == curves
    page.get_by_role("button", name="Reset").click()
    close(page, 2, 1, 1, 3, 0.2, True)


def test_an_address_is_read_as_far_as_it_makes_sense_and_without_flips_has_no_ratio(page, address):
    pytest.importorskip("scipy")
    page.goto(address + "#explorer?gamma0=4&tau=-3&flips=much&loss=ppo&x=1&constructor=1")
    close(page, 4, 1, 1, 3, 0.2, True)
    page.goto(address + "#explorer?flips=0&deviation=0.25")
    page.wait_for_timeout(400)
    assert page.locator("#explorer dd").last.inner_text().strip() == "no flips"
    assert "NaN" not in page.locator("#explorer").inner_html()


@pytest.mark.parametrize("page", [1400, 390], indirect=True)
def test_the_figure_can_be_read_at_any_width_and_by_a_screen_reader(page):
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator("svg text").evaluate_all(
        "all => all.every(each => parseFloat(getComputedStyle(each).fontSize) >= 9)"
    )
    for figure in page.get_by_role("img").all():
        assert "γ-DPO: " in figure.get_attribute("aria-label")
    assert page.get_by_role("img").count() == 2
    for slider in page.get_by_role("slider").all():
        assert re.search(
            r"\d (reward units|nats|of 200 pairs)$", slider.get_attribute("aria-valuetext")
        )
    assert page.get_by_role("slider").count() == 5
