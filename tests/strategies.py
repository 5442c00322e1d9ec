"""Random pools of reward gaps and settings, over the whole domain that the library promises."""

import functools

import numpy as np
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

CORNERS = [  # (gaps, gamma0, tau): corners of the domain, κ up to 1e7
    ([1e4, -1e4], 100.0, 1e-3),
    ([0.0], 100.0, 1e-3),
    ([-1e4, -1e4, 1e4], 1e-3, 1e3),
    ([100.0, 101.0, 99.0, 150.0, 0.0], 100.0, 1e-3),
    ([22.67784608, 3580.15056838], 82.10179909, 6.29615817),  # undamped Newton cycles on these
    ([36.99357678, 112.57673386], 70.12594492, 20.54958846),
    ([1.70807319, 1e4], 16.89889605, 2.26420756),
    ([1e4] + 14 * [0.0], 1.0, 2.478752e-3),  # one pair has all the mass to rounding error
]
MILD, HARD = {"gamma0": 4.0, "tau": 10.0}, {"gamma0": 4.0, "tau": 0.1}
LIMIT = 1e4  # gaps are promised to work within ± this


def _uniform(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False, allow_infinity=False)


def log_uniform(low: float, high: float) -> st.SearchStrategy[float]:
    return _uniform(np.log(low), np.log(high)).map(lambda x: float(np.exp(x)))


gamma0s = log_uniform(1e-3, 1e2)
taus = log_uniform(1e-3, 1e3)


@st.composite
def pools(draw, min_size: int = 1, max_size: int = 40) -> np.ndarray:
    """A pool of gaps: clusters, outliers, ties and every scale, not only a bell curve."""
    size = draw(st.integers(min_size, max_size))
    centre = draw(st.one_of(st.just(0.0), _uniform(-LIMIT, LIMIT), _uniform(-100, 100)))
    scale = draw(log_uniform(1e-6, LIMIT))
    shape = draw(st.sampled_from(["normal", "cauchy", "two", "outlier", "powers", "levels"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    gaps = {
        "normal": lambda: rng.normal(size=size) * scale,
        "cauchy": lambda: rng.standard_cauchy(size) * scale,
        "two": lambda: rng.choice([-1.0, 1.0], size) * scale,
        "outlier": lambda: np.where(np.arange(size) == 0, rng.choice([-LIMIT, LIMIT]), 0.0),
        "powers": lambda: rng.choice([-1.0, 1.0], size) * 10 ** rng.uniform(-6, 4, size),
        "levels": lambda: rng.choice(rng.normal(size=3) * scale, size),
    }[shape]()
    return np.clip(centre + gaps, -LIMIT, LIMIT)


@functools.cache
def problems(dtype: str, count: int = 100) -> list[tuple]:
    """Random problems, the same for all implementations: so the oracle solves each once."""
    found = []

    @settings(max_examples=count, database=None, phases=[Phase.generate])
    @given(pools(), gamma0s, taus)
    def collect(gaps, gamma0, tau):
        found.append((gaps.astype(dtype), gamma0, tau))

    collect()
    return found
