"""The solve in chunks against the solve of the whole, and the program that scores a dataset."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracles
import pytest
import ranks as work
from strategies import CORNERS, HARD, MILD

from gamma_loss import (
    _solver,
    gamma_dpo_loss,
    gamma_simpo_loss,
    label_smoothing_from_shift,
    solve_margins,
    solve_margins_streaming,
    streaming,
)

SETTINGS = [
    MILD,
    HARD,
    {"gamma0": 0.375, "tau": 10.0},
    {"gamma0": 1.0, "tau": 0.1},
    {"gamma0": 4.0, "tau": 0.1},
    {"gamma0": 100.0, "tau": 1e-3},
    {"gamma0": 1e-3, "tau": 1e-3},
    {"gamma0": 100.0, "tau": 1e3},
]
PROGRAM = Path(__file__).parents[1] / "docs" / "examples" / "score_dataset.py"
# Of the library tested here, whatever is installed, and of the modules beside the program.
PATH = os.pathsep.join(map(str, (PROGRAM.parents[2], PROGRAM.parent)))


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize(
    ("size", "scale"), [(1, 1.0), (2, 5.0), (900, 0.1), (900, 5.0), (900, 3e3)]
)
def test_chunks_equal_the_whole(setting, size, scale):
    gaps = work.pool(size, scale)
    rule = solve_margins_streaming(np.array_split(gaps, 3), **setting)
    whole = solve_margins(gaps, **setting)
    margins = rule.margins(gaps)
    np.testing.assert_allclose(margins, whole.margins, rtol=0, atol=1e-10 * setting["gamma0"])
    assert margins.mean() == pytest.approx(setting["gamma0"], rel=1e-12)
    assert rule.multiplier == pytest.approx(float(whole.multiplier), rel=1e-10, abs=1e-12)
    assert rule.error_bound <= 1e-12


UNDERFLOW = ([746.0, 900.0], 1.0, 1.0)  # σ(γ0 - g) is the smallest number there is, and 0


@pytest.mark.parametrize(("gaps", "gamma0", "tau"), [*CORNERS, UNDERFLOW])
def test_corners_of_the_domain(gaps, gamma0, tau):
    rule = solve_margins_streaming([np.array(gaps)], gamma0=gamma0, tau=tau)
    expected, _ = oracles.margins(np.array(gaps), gamma0, tau)
    np.testing.assert_allclose(rule.margins(gaps), expected, rtol=0, atol=1e-10 * gamma0)
    assert rule.error_bound <= 1e-12


@pytest.mark.parametrize("setting", [MILD, {"gamma0": 3.0, "tau": 0.5}], ids=str)
@pytest.mark.parametrize("readings", [1, 2])
def test_the_error_bound_holds_for_an_unfinished_solve(setting, readings, monkeypatch):
    gaps, gamma0 = work.pool(50), setting["gamma0"]
    monkeypatch.setattr(streaming, "_MAX_READINGS", readings)
    rule = solve_margins_streaming([gaps], **setting)
    margins, exact = rule.margins(gaps), oracles.margins(gaps, **setting)[0]
    assert margins.mean() == pytest.approx(gamma0, rel=1e-12)
    assert 1e-9 < np.mean(np.abs(margins - exact)) / gamma0 <= rule.error_bound


def test_many_blocks_and_float32_chunks():
    gaps = work.pool(50_000).astype(np.float32)
    rule = solve_margins_streaming([gaps[:1], gaps[1:40_000], gaps[:0], gaps[40_000:]], **MILD)
    expected = solve_margins(gaps.astype(np.float64), **MILD)
    np.testing.assert_allclose(rule.margins(gaps), expected.margins, rtol=0, atol=1e-10)
    assert rule.pairs == 50_000


@pytest.mark.parametrize(
    ("setting", "most"), [(MILD, 9.0), (HARD, 11.5), ({"gamma0": 1.0, "tau": 0.1}, 13.5)], ids=str
)
def test_pairs_start_close_to_their_roots(setting, most, monkeypatch):
    gaps, steps = np.random.default_rng(0).normal(1.0, 3.0, 100_000), []

    def counted(xp, pairs, u, *rest):
        steps.append(u.size)
        return newton_step(xp, pairs, u, *rest)

    newton_step = _solver.newton_step
    monkeypatch.setattr(_solver, "newton_step", counted)
    rule = solve_margins_streaming([gaps], **setting)
    assert sum(steps) / gaps.size <= most
    assert rule.error_bound < 1e-13


def test_few_pairs_far_from_their_roots_leave_all_at_rounding_error():
    gaps = np.random.default_rng(0).normal(0.0, 0.25, 4000)
    setting = {"gamma0": 2.3, "tau": 6.5}
    rule, whole = solve_margins_streaming([gaps], **setting), solve_margins(gaps, **setting)
    np.testing.assert_allclose(rule.margins(gaps), whole.margins, rtol=1e-13)


@pytest.mark.parametrize("gaps", [[1e307, 1.0, 2.0], [1.7e308] * 9 + [-1.7e308, 0.0], [-1e307]])
@pytest.mark.parametrize(
    "setting", [MILD, HARD, {"gamma0": 0.05, "tau": 1e-3}, {"gamma0": 100.0, "tau": 1e-3}], ids=str
)
def test_finite_gaps_of_any_size(gaps, setting):
    rule = solve_margins_streaming([np.array(gaps)], **setting)
    expected, _ = oracles.margins(np.array(gaps), **setting)
    np.testing.assert_allclose(rule.margins(gaps), expected, rtol=0, atol=1e-12 * setting["gamma0"])
    assert rule.error_bound < 1e-12
    assert np.isfinite(rule.margins([1.7e308, -1.7e308])).all()


class Changing:
    """Chunks that hold other gaps from one of the readings on."""

    def __init__(self, first, then, reading):
        self.first, self.then, self.left = first, then, reading

    def __iter__(self):
        self.left -= 1
        return iter([np.array(self.first if self.left > 0 else self.then)])


@pytest.mark.parametrize("setting", [MILD, HARD], ids=str)
@pytest.mark.parametrize(
    "then",
    [
        [1.0, -2.0, 5.5],
        [1.0, -2.0, -50.0],
        [1.0, -2.0],
        [],
        [1.0, -2.0, np.nan],
        [0.0, -1.0, 0.5],  # of the same sum
        [1.0, -2.0, np.nextafter(0.5, 1)],
    ],
)
@pytest.mark.parametrize("reading", [3, 4])  # one look at the type is no reading, and counts here
def test_chunks_that_change_are_refused(setting, then, reading):
    with pytest.raises(ValueError, match="chunks must give the same gaps at each reading"):
        solve_margins_streaming(Changing([1.0, -2.0, 0.5], then, reading), **setting)


def test_chunks_may_be_cut_anew_at_each_reading():
    gaps = work.pool(40_000)

    class Cut:
        readings = 0

        def __iter__(self):
            self.readings += 1
            return iter(np.array_split(gaps, self.readings))

    rule = solve_margins_streaming(Cut(), **HARD)
    assert rule.error_bound < 1e-13
    assert rule.pairs == 40_000


def test_gaps_that_are_not_finite_take_no_part():
    gaps = work.pool(20)
    gaps[3], gaps[7] = np.nan, np.inf
    rule = solve_margins_streaming([gaps], **MILD)
    np.testing.assert_allclose(rule.margins(gaps), solve_margins(gaps, **MILD).margins, atol=1e-10)
    assert np.isnan(rule.margins(gaps)[[3, 7]]).all()
    assert rule.pairs == 18


def test_gamma0_of_zero():
    rule = solve_margins_streaming([np.array([1.0, np.nan])], gamma0=0.0, tau=1.0)
    np.testing.assert_array_equal(rule.margins([2.0, np.inf]), [0.0, np.nan])


def test_bad_chunks():
    with pytest.raises(TypeError, match="chunks must be readable several times, got list_iterator"):
        solve_margins_streaming(iter([np.zeros(2)]), **MILD)
    with pytest.raises(ValueError, match="chunks must hold at least one finite gap, got none"):
        solve_margins_streaming([np.array([np.nan])], **MILD)
    with pytest.raises(ValueError, match=r"chunks must be 1-D, .* got shape \(2, 1\)"):
        solve_margins_streaming([np.zeros((2, 1))], **MILD)


# --- the program ---


def run(*arguments, ranks=1, program=(PROGRAM,)):
    """Start the program, for several ranks with the environment that torchrun makes."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": PATH}
    if ranks > 1:
        pytest.importorskip("torch")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    processes = [
        subprocess.Popen(
            [sys.executable, *program, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**environment, "RANK": str(rank)},
        )
        for rank in range(ranks)
    ]
    texts = [process.communicate(timeout=120) for process in processes]
    out, errors = ("".join(parts) for parts in zip(*texts, strict=True))
    return subprocess.CompletedProcess([], max(p.returncode for p in processes), out, errors)


def complaint(done):
    """The one line in which a run of the program says what is wrong."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [part for part in done.stderr.splitlines() if "score_dataset.py: " in part]
    return line.partition("score_dataset.py: ")[2]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def options(setting, out):
    return ["--gamma0", setting["gamma0"], "--tau", setting["tau"], "--out", out]


@pytest.fixture
def gaps_file(tmp_path):
    pytest.importorskip("tqdm")
    gaps = work.pool(2001)
    gaps[5] = np.nan
    np.save(tmp_path / "gaps.npy", gaps)
    return tmp_path / "gaps.npy", gaps


@pytest.mark.parametrize("ranks", [1, 2])
def test_scores_of_gaps(gaps_file, tmp_path, ranks):
    file, gaps = gaps_file
    done = run(file, *options(HARD, tmp_path / "scores.npy"), ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert "2000 finite gaps of 2001" in done.stdout
    assert "pass 1: 100%" in done.stderr
    rows = np.load(tmp_path / "scores.npy")
    margins = solve_margins(gaps, **HARD).margins
    close = {"rtol": 1e-6, "atol": 1e-30}  # float32
    np.testing.assert_allclose(rows["margin"], margins, **close)
    np.testing.assert_allclose(rows["pair_weight"], 1 / (1 + np.exp(gaps - margins)), **close)
    finite = np.isfinite(gaps)
    expected = label_smoothing_from_shift(gaps[finite], (margins - HARD["gamma0"])[finite])
    np.testing.assert_allclose(rows["label_smoothing"][finite], expected, **close)
    assert np.isnan(rows["label_smoothing"][~finite]).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gaps.npy", "scores.npy"]


@pytest.mark.parametrize("reference", [False, True])
def test_scores_of_log_probabilities(tmp_path, reference):
    pytest.importorskip("tqdm")
    logps = np.random.default_rng(0).normal(size=(4 if reference else 2, 30)) * 3 - 20
    names = ["policy_chosen_logps", "policy_rejected_logps"]
    names += ["reference_chosen_logps", "reference_rejected_logps"] * reference
    lines = [json.dumps(dict(zip(names, column, strict=True))) for column in logps.T]
    (tmp_path / "logps.jsonl").write_text("\n\n".join(lines))
    more = ["--beta", 0.5, "--centered"] if reference else ["--beta", 0.5]
    done = run(tmp_path / "logps.jsonl", *options(MILD, tmp_path / "scores.npy"), *more)
    assert done.returncode == 0, done.stderr
    loss = gamma_dpo_loss if reference else gamma_simpo_loss
    _, aux = loss(*logps, beta=0.5, **MILD)
    rows = np.load(tmp_path / "scores.npy")
    np.testing.assert_allclose(rows["margin"], aux.margins, rtol=1e-6)
    np.testing.assert_allclose(rows["pair_weight"], aux.pair_weights, rtol=1e-6)
    assert not list(tmp_path.glob("*.gaps.npy"))


def test_parquet(gaps_file, tmp_path):
    file, gaps = gaps_file
    done = run(file, *options(MILD, tmp_path / "scores.parquet"))
    try:
        from pyarrow import parquet
    except ImportError:
        assert done.returncode == 2
        assert "a .parquet output needs pyarrow: pip install pyarrow, or write .npy" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    columns = parquet.read_table(tmp_path / "scores.parquet").to_pydict()
    assert list(columns) == ["margin", "pair_weight", "label_smoothing"]
    np.testing.assert_allclose(columns["margin"], solve_margins(gaps, **MILD).margins, rtol=1e-6)


GOOD = {"policy_chosen_logps": -1, "policy_rejected_logps": -2.0}
REFERENCE = {"reference_chosen_logps": -1.5, "reference_rejected_logps": -1.0}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"policy_chosen_logps": -1}', ":3: 'policy_rejected_logps' must be a number, got None"),
        ('{"policy_chosen_logps": "-1"}', ":3: 'policy_chosen_logps' must be a number, got '-1'"),
        (json.dumps({**GOOD, "policy_chosen_logps": 10**400}), ":3: a number of 401 digits"),
        ("[1]", ":3: got list: each line must be a JSON object"),
        ("{", ":3: Expecting property name"),
        ("[" * 100_000, ":3: maximum recursion depth"),
        (json.dumps({**GOOD, **REFERENCE}), ":3: has them, unlike the first line: gaps with"),
    ],
)
def test_a_malformed_line_is_named_with_its_number(tmp_path, line, words):
    pytest.importorskip("tqdm")
    file = tmp_path / "logps.jsonl"
    file.write_text(f"{json.dumps(GOOD)}\n\n{line}\n")
    done = run(file, "--beta", 1, *options(MILD, tmp_path / "out.npy"))
    assert complaint(done).startswith(f"{file}{words}")
    assert names(tmp_path) == ["logps.jsonl"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_lines_without_the_reference_among_lines_with_it(tmp_path, ranks):
    pytest.importorskip("tqdm")
    file = tmp_path / "logps.jsonl"
    file.write_text(json.dumps({**GOOD, **REFERENCE}) + "\n" + json.dumps(GOOD))
    done = run(file, "--beta", 1, *options(MILD, tmp_path / "out.npy"), ranks=ranks)
    assert complaint(done) == (
        f"{file}:2: has no reference log-probabilities, unlike the first line: gaps with and "
        "without are not comparable, so give reference_*_logps on all lines or on none"
    )
    assert names(tmp_path) == ["logps.jsonl"]


NO_GAPS = [
    (np.zeros(0), "must hold gaps in a 1-D array of floats, got float64 (0,)"),
    (np.zeros((2, 2)), "must hold gaps in a 1-D array of floats, got float64 (2, 2)"),
    (np.arange(3), "must hold gaps in a 1-D array of floats, got int64 (3,)"),
    (np.full(3, np.nan), "none of its 3 gaps is finite: look at how"),
    (np.array([None, 1.0]), "no .npy file of numbers (Array can't be memory-mapped"),
    (b"", "no .npy file of numbers (EOF"),
    (b"PK\3\4 a zip file, as .npz is", "no .npy file of numbers (the magic string"),
    ("cut short", "no .npy file of numbers (mmap length is greater than file size)"),
]


@pytest.mark.parametrize(
    ("content", "words", "ranks"),
    # What all ranks find out together, and what each finds out alone.
    [*((*case, 1) for case in NO_GAPS), (*NO_GAPS[3], 2), (*NO_GAPS[-1], 2)],
    ids=str,
)
def test_arrays_that_hold_no_gaps(tmp_path, content, words, ranks):
    pytest.importorskip("tqdm")
    file, out = tmp_path / "gaps.npy", tmp_path / "out.npy"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        np.save(file, work.pool(100) if isinstance(content, str) else content)
        os.truncate(file, file.stat().st_size - 8 * isinstance(content, str))
    out.write_text("of yesterday")
    assert complaint(run(file, *options(MILD, out), ranks=ranks)).startswith(f"{file}: {words}")
    assert out.read_text() == "of yesterday"
    assert names(tmp_path) == ["gaps.npy", "out.npy"]


SMALL_FILES = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""  # the system refuses to let a file grow, as it does on a full disk


@pytest.mark.parametrize("suffix", ["npy", "parquet"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_loses_nothing(gaps_file, tmp_path, suffix, ranks):
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    pytest.importorskip("resource")
    file, _ = gaps_file
    out = tmp_path / f"out.{suffix}"
    out.write_text("of yesterday")

    done = run(file, *options(MILD, out), ranks=ranks, program=("-c", SMALL_FILES, PROGRAM))
    assert "File too large" in complaint(done)
    assert out.read_text() == "of yesterday"
    assert names(tmp_path) == ["gaps.npy", out.name]


KILLED = """
import os, runpy, signal, sys
program = runpy.run_path(sys.argv[1])
scores, count = program["scores"], 0
def die_in_the_second_chunk(*arguments):
    global count
    count += 1
    if count == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return scores(*arguments)
names = program["main"].__globals__
names["scores"], names["CHUNK"] = die_in_the_second_chunk, 1000
del sys.argv[0]
program["run"](program["main"])
"""


@pytest.mark.parametrize("suffix", ["npy", "parquet"])
def test_a_killed_run_leaves_no_half_of_an_output(gaps_file, tmp_path, suffix):
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    file, _ = gaps_file
    out = tmp_path / f"out.{suffix}"
    arguments = [str(argument) for argument in (PROGRAM, file, *options(MILD, out))]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": PATH},
    )
    assert done.returncode == -9, done.stderr
    assert names(tmp_path) == ["gaps.npy", out.name + ".part"]
    Path(f"{out}.part").write_bytes(b"x" * 100_000)  # longer than what is to come
    assert run(file, *options(MILD, out)).returncode == 0
    assert names(tmp_path) == ["gaps.npy", out.name]
    if suffix == "npy":
        assert len(np.load(out)) == 2001
        assert out.stat().st_size < 100_000


FAILING = """
import os, runpy, sys
program = runpy.run_path(sys.argv[1])
mapped = program["Gaps"].mapped
def fails_in_the_second_pass(gaps):
    if getattr(gaps, "passes", 0) == 2 and os.environ["RANK"] == "1":
        raise OSError("no disk")
    return mapped(gaps)
program["Gaps"].mapped = fails_in_the_second_pass
del sys.argv[0]
program["run"](program["main"])
"""


def test_a_rank_that_cannot_read_on_ends_all(gaps_file, tmp_path):
    file, _ = gaps_file
    done = run(
        file, *options(MILD, tmp_path / "out.npy"), ranks=2, program=("-c", FAILING, PROGRAM)
    )
    assert "rank 1 of the group failed: OSError: no disk" in complaint(done)
    assert names(tmp_path) == ["gaps.npy"]


def test_bad_arguments(gaps_file, tmp_path):
    file, _ = gaps_file
    done = run(file, "--beta", 1, *options(MILD, tmp_path / "out.npy"))
    assert done.returncode == 2
    assert "--beta is for a .jsonl file" in done.stderr
    done = run(file, *options(MILD, tmp_path))
    assert done.returncode == 2
    assert "--out must end in one of .npy, .parquet, got" in done.stderr
    (tmp_path / "folder.npy").mkdir()
    done = run(file, *options(MILD, tmp_path / "folder.npy"))
    assert done.returncode == 2
    assert "--out is a folder" in done.stderr
