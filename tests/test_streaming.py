"""The solve in chunks against the solve of the whole, and the program that scores a dataset."""

import contextlib
import io
import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracles
import pytest
import ranks as work
from strategies import CORNERS, HARD, MILD, problems

from gamma_loss import (
    _solver,
    gamma_dpo_loss,
    gamma_simpo_loss,
    label_smoothing_from_shift,
    solve_margins,
    solve_margins_streaming,
    streaming,
)

PROGRAM = Path(__file__).parents[1] / "docs" / "examples" / "score_dataset.py"
# Of the library tested here, whatever is installed, and of the modules beside the program.
PATH = os.pathsep.join(map(str, (PROGRAM.parents[2], PROGRAM.parent)))


EDGES = [
    *CORNERS,
    ([746.0, 900.0], 1.0, 1.0),  # σ(γ0 - g) is the smallest number there is, and 0
    *((gaps, gamma0, tau) for gaps in ([1e307, 1.0, 2.0], [1.7e308] * 9 + [-1.7e308, 0.0], [-1e307])
      for gamma0, tau in ((4.0, 10.0), (4.0, 0.1), (0.05, 1e-3), (100.0, 1e-3))),
    # of which few are far from their roots
    (np.random.default_rng(0).normal(0.0, 0.25, 4000), 2.3, 6.5),
]  # fmt: skip


@pytest.mark.parametrize("where", ["edges", "anywhere"])
def test_accuracy_and_error_bound_over_the_domain(where):
    for gaps, gamma0, tau in EDGES if where == "edges" else problems("float64"):
        gaps = np.asarray(gaps)
        rule = solve_margins_streaming(np.array_split(gaps, 3), gamma0=gamma0, tau=tau)
        exact, nu = oracles.margins(gaps, gamma0, tau)
        margins, scale = rule.margins(gaps), 1 + gamma0 / tau
        assert oracles.error(margins, exact, nu, np.clip(gaps, -1e4, 1e4), gamma0, tau) <= 1
        assert margins.mean() == pytest.approx(gamma0, rel=1e-13 * scale)
        assert abs(rule.multiplier - nu) <= 1e-13 * scale
        assert np.mean(np.abs(margins - exact)) / gamma0 <= rule.error_bound <= 1e-12
        assert np.isfinite(rule.margins([1.7e308, -1.7e308])).all()


@pytest.mark.parametrize("setting", [MILD, {"gamma0": 3.0, "tau": 0.5}], ids=str)
def test_the_error_bound_holds_for_an_unfinished_solve(setting, monkeypatch):
    gaps, gamma0 = work.pool(50), setting["gamma0"]
    for readings in (1, 2):
        monkeypatch.setattr(streaming, "_MAX_READINGS", readings)
        rule = solve_margins_streaming([gaps], **setting)
        margins, exact = rule.margins(gaps), oracles.margins(gaps, **setting)[0]
        assert margins.mean() == pytest.approx(gamma0, rel=1e-12)
        assert 1e-9 < np.mean(np.abs(margins - exact)) / gamma0 <= rule.error_bound


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


class Changing:
    """Chunks that hold other gaps from one of the readings on."""

    def __init__(self, first, then, reading):
        self.first, self.then, self.left = first, then, reading

    def __iter__(self):
        self.left -= 1
        return iter([np.array(self.first if self.left > 0 else self.then)])


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
def test_chunks_that_change_are_refused(then):
    for setting in (MILD, HARD):
        for reading in (3, 4):  # one look at the type is no reading, and counts here
            with pytest.raises(ValueError, match="chunks must give the same gaps at each reading"):
                solve_margins_streaming(Changing([1.0, -2.0, 0.5], then, reading), **setting)


def test_chunks_of_any_dtype_and_size_cut_anew_at_each_reading_are_one_pool():
    gaps = work.pool(40_000).astype(np.float32)
    gaps[3], gaps[7] = np.nan, np.inf  # which take no part

    class Cut:
        readings = 0

        def __iter__(self):
            self.readings += 1
            return iter([gaps[:0], *np.array_split(gaps, self.readings)])

    rule = solve_margins_streaming(Cut(), **HARD)
    expected = solve_margins(gaps.astype(float), **HARD).margins
    np.testing.assert_allclose(rule.margins(gaps), expected, rtol=0, atol=1e-12)
    assert rule.error_bound < 1e-13
    assert rule.pairs == 39_998
    rule = solve_margins_streaming([np.array([1.0, np.nan])], gamma0=0.0, tau=1.0)
    np.testing.assert_array_equal(rule.margins([2.0, np.inf]), [0.0, np.nan])


# --- the program ---


def run(*arguments, ranks=1, program=None):
    """Run the program in this process, or for several ranks in as many, as torchrun does."""
    arguments, printed = list(map(str, arguments)), [io.StringIO(), io.StringIO()]
    if ranks == 1 and not program:
        code = 0
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(printed[0]),
            contextlib.redirect_stderr(printed[1]),
        ):
            patch.setattr(sys, "argv", [str(PROGRAM), *arguments])
            try:
                runpy.run_path(str(PROGRAM), run_name="__main__")
            except SystemExit as exit:
                code = exit.code or 0
        out, errors = (each.getvalue() for each in printed)
        return subprocess.CompletedProcess([], code, out, errors)
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": PATH}
    if ranks > 1:
        pytest.importorskip("torch")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    command = [sys.executable, *(["-c", program] if program else []), str(PROGRAM), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank)}, **pipes)
        for rank in range(ranks)
    ]
    texts = [process.communicate(timeout=120) for process in processes]
    out, errors = ("".join(parts) for parts in zip(*texts, strict=True))
    codes = {process.returncode for process in processes}
    return subprocess.CompletedProcess([], max(codes, key=abs), out, errors)


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
def test_scores_of_gaps_are_those_of_the_library(gaps_file, tmp_path, ranks):
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
def test_scores_of_log_probabilities_are_those_of_the_loss(tmp_path, reference):
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


GOOD = {"policy_chosen_logps": -1, "policy_rejected_logps": -2.0}
REFERENCE = {"reference_chosen_logps": -1.5, "reference_rejected_logps": -1.0}


MALFORMED = [
    ('{"policy_chosen_logps": -1}', "'policy_rejected_logps' must be a number, got None"),
    ('{"policy_chosen_logps": "-1"}', "'policy_chosen_logps' must be a number, got '-1'"),
    (json.dumps({**GOOD, "policy_chosen_logps": 10**400}), "a number of 401 digits"),
    ("[1]", "got list: each line must be a JSON object"),
    ("{", "Expecting property name"),
    ("[" * 100_000, "maximum recursion depth"),
]


def test_a_malformed_line_is_named_with_its_number(tmp_path):
    pytest.importorskip("tqdm")
    file = tmp_path / "logps.jsonl"
    for line, words in MALFORMED:
        file.write_text(f"{json.dumps(GOOD)}\n\n{line}\n")
        done = run(file, "--beta", 1, *options(MILD, tmp_path / "out.npy"))
        assert complaint(done).startswith(f"{file}:3: {words}")
        assert names(tmp_path) == ["logps.jsonl"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_lines_with_and_without_the_reference_are_not_mixed(tmp_path, ranks):
    pytest.importorskip("tqdm")
    file = tmp_path / "logps.jsonl"
    both, words = {**GOOD, **REFERENCE}, "has no reference log-probabilities, unlike the first line"
    mixed = ([both, GOOD], words), ([GOOD, both], "has them, unlike the first line")
    for lines, said in mixed[: 3 - ranks]:
        file.write_text("\n".join(map(json.dumps, lines)))
        done = run(file, "--beta", 1, *options(MILD, tmp_path / "out.npy"), ranks=ranks)
        assert complaint(done).startswith(f"{file}:2: {said}: gaps with and without are not compar")
        assert complaint(done).endswith("so give reference_*_logps on all lines or on none")
        assert names(tmp_path) == ["logps.jsonl"]


NO_GAPS = [
    (np.zeros((2, 2)), "must hold gaps in a 1-D array of floats, got float64 (2, 2)"),
    (np.arange(3), "must hold gaps in a 1-D array of floats, got int64 (3,)"),
    (np.full(3, np.nan), "none of its 3 gaps is finite: look at how"),
    (np.array([None, 1.0]), "no .npy file of numbers (Array can't be memory-mapped"),
    (b"PK\3\4 a zip file, as .npz is", "no .npy file of numbers (the magic string"),
    ("cut short", "no .npy file of numbers (mmap length is greater than file size)"),
]


@pytest.mark.parametrize("ranks", [1, 2])
def test_arrays_that_hold_no_gaps_are_refused(tmp_path, ranks):
    pytest.importorskip("tqdm")
    file, out = tmp_path / "gaps.npy", tmp_path / "out.npy"
    for content, words in NO_GAPS if ranks == 1 else [NO_GAPS[2]]:
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


@pytest.mark.parametrize(("suffix", "ranks"), [("npy", 1), ("npy", 2), ("parquet", 1)])
def test_a_full_disk_loses_nothing(gaps_file, tmp_path, suffix, ranks):
    pytest.importorskip("pyarrow" if suffix == "parquet" else "resource")
    file, _ = gaps_file
    out = tmp_path / f"out.{suffix}"
    out.write_text("of yesterday")
    done = run(file, *options(MILD, out), ranks=ranks, program=SMALL_FILES)
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
    done = run(file, *options(MILD, out), program=KILLED)
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
    done = run(file, *options(MILD, tmp_path / "out.npy"), ranks=2, program=FAILING)
    assert "rank 1 of the group failed: OSError: no disk" in complaint(done)
    assert names(tmp_path) == ["gaps.npy"]


def test_bad_arguments_are_refused_and_parquet_is_written_or_its_package_named(gaps_file, tmp_path):
    file, gaps = gaps_file
    (tmp_path / "folder.npy").mkdir()
    for arguments, words in (
        (("--beta", 1, *options(MILD, tmp_path / "out.npy")), "--beta is for a .jsonl file"),
        (options(MILD, tmp_path), "--out must end in one of .npy, .parquet, got"),
        (options(MILD, tmp_path / "folder.npy"), "--out is a folder"),
    ):
        assert words in complaint(run(file, *arguments))
    done = run(file, *options(MILD, tmp_path / "scores.parquet"))
    try:
        from pyarrow import parquet
    except ImportError:
        words = "a .parquet output needs pyarrow: pip install pyarrow, or write .npy"
        assert words in complaint(done)
        return
    assert done.returncode == 0, done.stderr
    columns = parquet.read_table(tmp_path / "scores.parquet").to_pydict()
    assert list(columns) == ["margin", "pair_weight", "label_smoothing"]
    np.testing.assert_allclose(columns["margin"], solve_margins(gaps, **MILD).margins, rtol=1e-6)
