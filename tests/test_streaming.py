"""The solve in chunks against the solve of the whole, and the program that scores a dataset."""

import contextlib
import json
import multiprocessing
import os
import runpy
import signal
import socket
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

EDGES = [
    *CORNERS,
    ([746.0, 900.0], 1.0, 1.0),  # σ(γ0 - g) is the smallest number there is, and 0
    *((gaps, gamma0, tau) for gaps in ([1e307, 1.0, 2.0], [1.7e308] * 9 + [-1.7e308, 0.0], [-1e307])
      for gamma0, tau in ((4.0, 10.0), (4.0, 0.1), (0.05, 1e-3), (100.0, 1e-3))),
    # of which few are far from their roots
    (np.random.default_rng(0).normal(0.0, 0.25, 4000), 2.3, 6.5),
    # of which few step on alone, and come closer than all others
    (np.repeat([13.143, -1e4, 149.42, 264.92, 0.0], [68, 198, 16, 1894, 1]), 10.065, 0.00106),
]  # fmt: skip


@pytest.mark.parametrize("where", ["edges", "anywhere"])
def test_accuracy_and_error_bound_over_the_domain(where):
    for gaps, gamma0, tau in EDGES if where == "edges" else problems("float64")[::2]:
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


@pytest.mark.parametrize(
    "then",
    [[1, -2, 5.5], [1, -2, -50], [1, -2], [], [1, -2, np.nan],
     [0, -1, 0.5],  # of the same sum
     [1, -2, np.nextafter(0.5, 1)]],
    ids=str,
)  # fmt: skip
def test_chunks_that_change_are_refused(then):
    class Changing:
        """Chunks that hold other gaps from one of the readings on."""

        def __init__(self, reading):
            self.left = reading

        def __iter__(self):
            self.left -= 1
            return iter([np.array([1.0, -2.0, 0.5] if self.left > 0 else then, dtype=float)])

    for setting in (MILD, HARD):
        for reading in (3, 4):  # one look at the type is no reading, and counts here
            with pytest.raises(ValueError, match="chunks must give the same gaps at each reading"):
                solve_margins_streaming(Changing(reading), **setting)


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

PROGRAM = Path(__file__).parents[1] / "docs" / "examples" / "score_dataset.py"


def program(arguments, printed, environment, edit):
    """Run the program, edited by a function of its names; what it prints goes to a file."""
    with (
        pytest.MonkeyPatch.context() as patch,
        printed.open("w", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        patch.setattr(sys, "argv", [str(PROGRAM), *map(str, arguments)])
        for name, value in environment.items():
            patch.setenv(name, str(value))
        names = runpy.run_path(str(PROGRAM))["main"].__globals__
        if edit:
            edit(names)
        names["run"](names["main"])


@pytest.fixture
def run(tmp_path_factory):
    """Run the program here, or edited or for several ranks in processes of their own."""
    pytest.importorskip("tqdm")
    folder, environment = tmp_path_factory.mktemp("printed"), {"GLOO_SOCKET_IFNAME": "lo"}
    printed = [folder / "0", folder / "1"]

    def run(*arguments, ranks=1, edit=None):
        """The exit code, and what was printed."""
        if ranks == 1 and not edit:
            try:
                program(arguments, printed[0], {}, None)
            except SystemExit as exit:
                return exit.code, printed[0].read_text("utf-8")
            return 0, printed[0].read_text("utf-8")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch._dynamo", "torch.distributed", "hypothesis"])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            several = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
        more = {**environment, **(several if ranks > 1 else {}), "WORLD_SIZE": ranks}
        processes = [
            context.Process(
                target=program, args=(arguments, printed[rank], {**more, "RANK": rank}, edit)
            )
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
        texts = [file.read_text("utf-8") for file in printed[:ranks]]
        return max((process.exitcode for process in processes), key=abs), "".join(texts)

    return run


def complaint(done):
    """The one line in which a run of the program says what is wrong."""
    code, text = done
    assert code == 2, text
    assert "Traceback" not in text
    (line,) = [part for part in text.splitlines() if "score_dataset.py: " in part]
    return line.partition("score_dataset.py: ")[2]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def options(setting, out):
    return ["--gamma0", setting["gamma0"], "--tau", setting["tau"], "--out", out]


@pytest.fixture
def gaps_file(tmp_path):
    gaps = work.pool(2001)
    gaps[5] = np.nan
    np.save(tmp_path / "gaps.npy", gaps)
    return tmp_path / "gaps.npy", gaps


@pytest.mark.parametrize("ranks", [1, 2])
def test_scores_of_gaps_are_those_of_the_library(run, gaps_file, tmp_path, ranks):
    file, gaps = gaps_file
    code, text = run(file, *options(HARD, tmp_path / "scores.npy"), ranks=ranks)
    assert code == 0, text
    assert "2000 finite gaps of 2001" in text
    assert "pass 1: 100%" in text
    rows = np.load(tmp_path / "scores.npy")
    margins = solve_margins(gaps, **HARD).margins
    close = {"rtol": 1e-6, "atol": 1e-30}  # float32
    np.testing.assert_allclose(rows["margin"], margins, **close)
    np.testing.assert_allclose(rows["pair_weight"], 1 / (1 + np.exp(gaps - margins)), **close)
    finite = np.isfinite(gaps)
    expected = label_smoothing_from_shift(gaps[finite], (margins - HARD["gamma0"])[finite])
    np.testing.assert_allclose(rows["label_smoothing"][finite], expected, **close)
    assert np.isnan(rows["label_smoothing"][~finite]).all()
    assert names(tmp_path) == ["gaps.npy", "scores.npy"]


CHOSEN, REJECTED = "policy_chosen_logps", "policy_rejected_logps"
GOOD = {CHOSEN: -1, REJECTED: -2.0}
BOTH = GOOD | {"reference_chosen_logps": -1.5, "reference_rejected_logps": -1.0}


@pytest.mark.parametrize("reference", [False, True])
def test_scores_of_log_probabilities_are_those_of_the_loss(run, tmp_path, reference):
    columns = BOTH if reference else GOOD
    logps = np.random.default_rng(0).normal(size=(len(columns), 30)) * 3 - 20
    lines = [json.dumps(dict(zip(columns, column, strict=True))) for column in logps.T]
    (tmp_path / "logps.jsonl").write_text("\n\n".join(lines))
    more = ["--beta", 0.5, *["--centered"] * reference]
    code, text = run(tmp_path / "logps.jsonl", *options(MILD, tmp_path / "scores.npy"), *more)
    assert code == 0, text
    loss = gamma_dpo_loss if reference else gamma_simpo_loss
    _, aux = loss(*logps, beta=0.5, **MILD)
    rows = np.load(tmp_path / "scores.npy")
    np.testing.assert_allclose(rows["margin"], aux.margins, rtol=1e-6)
    np.testing.assert_allclose(rows["pair_weight"], aux.pair_weights, rtol=1e-6)
    assert names(tmp_path) == ["logps.jsonl", "scores.npy"]


UNLIKE = "unlike the first line: gaps with and without are not comparable"
MALFORMED = [  # the last line, the first, and what is said of the last
    ("{", GOOD, 1, "Expecting property name"),  # the rest of it is in test_examples
    ({CHOSEN: -1}, GOOD, 1, f"'{REJECTED}' must be a number, got None"),
    ({CHOSEN: "-1"}, GOOD, 1, f"'{CHOSEN}' must be a number, got '-1'"),
    (BOTH, GOOD, 1, f"has them, {UNLIKE}"),
    (GOOD, BOTH, 1, f"has no reference log-probabilities, {UNLIKE}"),
    (GOOD, BOTH, 2, f"has no reference log-probabilities, {UNLIKE}"),
]


def test_a_malformed_line_is_named_with_its_number(run, tmp_path):
    file = tmp_path / "logps.jsonl"
    for line, first, ranks, words in MALFORMED:
        line = line if isinstance(line, str) else json.dumps(line)
        file.write_text(f"{json.dumps(first)}\n\n{line}\n")
        done = run(file, "--beta", 1, *options(MILD, tmp_path / "out.npy"), ranks=ranks)
        assert complaint(done).startswith(f"{file}:3: {words}")
        assert names(tmp_path) == ["logps.jsonl"]


NO_GAPS = [
    (np.zeros((2, 2)), 1, "must hold gaps in a 1-D array of floats, got float64 (2, 2)"),
    (np.arange(3), 1, "must hold gaps in a 1-D array of floats, got int64 (3,)"),
    (np.full(3, np.nan), 1, "none of its 3 gaps is finite: look at how"),
    (np.full(3, np.nan), 2, "none of its 3 gaps is finite: look at how"),
    (np.array([None, 1.0]), 1, "no .npy file of numbers (Array can't be memory-mapped"),
    (b"PK\3\4 a zip file, as .npz is", 1, "no .npy file of numbers (the magic string"),
    ("cut short", 1, "no .npy file of numbers (mmap length is greater than file size)"),
]


def test_arrays_that_hold_no_gaps_are_refused(run, tmp_path):
    file, out = tmp_path / "gaps.npy", tmp_path / "out.npy"
    out.write_text("of yesterday")
    for content, ranks, words in NO_GAPS:
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            np.save(file, work.pool(100) if isinstance(content, str) else content)
            os.truncate(file, file.stat().st_size - 8 * isinstance(content, str))
        assert complaint(run(file, *options(MILD, out), ranks=ranks)).startswith(f"{file}: {words}")
        assert out.read_text() == "of yesterday"
        assert names(tmp_path) == ["gaps.npy", "out.npy"]


def on_a_full_disk(_):
    """The system refuses to let a file grow."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


@pytest.mark.parametrize(("suffix", "ranks"), [("npy", 1), ("npy", 2), ("parquet", 1)])
def test_a_full_disk_loses_nothing(run, gaps_file, tmp_path, suffix, ranks):
    pytest.importorskip("pyarrow" if suffix == "parquet" else "resource")
    out = tmp_path / f"out.{suffix}"
    out.write_text("of yesterday")
    done = run(gaps_file[0], *options(MILD, out), ranks=ranks, edit=on_a_full_disk)
    assert "File too large" in complaint(done)
    assert out.read_text() == "of yesterday"
    assert names(tmp_path) == ["gaps.npy", out.name]


def killed_in_the_second_chunk(names):
    scores, calls = names["scores"], []

    def dying(*arguments):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return scores(*arguments)

    names |= {"scores": dying, "CHUNK": 1000}


@pytest.mark.parametrize("suffix", ["npy", "parquet"])
def test_a_killed_run_leaves_no_half_of_an_output(run, gaps_file, tmp_path, suffix):
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    out = tmp_path / f"out.{suffix}"
    code, text = run(gaps_file[0], *options(MILD, out), edit=killed_in_the_second_chunk)
    assert code == -9, text
    assert names(tmp_path) == ["gaps.npy", out.name + ".part"]
    Path(f"{out}.part").write_bytes(b"x" * 100_000)  # longer than what is to come
    assert run(gaps_file[0], *options(MILD, out))[0] == 0
    assert names(tmp_path) == ["gaps.npy", out.name]
    if suffix == "npy":
        assert len(np.load(out)) == 2001
        assert out.stat().st_size < 100_000


def failing_in_the_second_pass(names):
    mapped = names["Gaps"].mapped

    def fails(gaps):
        if getattr(gaps, "passes", 0) == 2 and os.environ["RANK"] == "1":
            raise OSError("no disk")
        return mapped(gaps)

    names["Gaps"].mapped = fails


def test_a_rank_that_cannot_read_on_ends_all(run, gaps_file, tmp_path):
    arguments = gaps_file[0], *options(MILD, tmp_path / "out.npy")
    done = run(*arguments, ranks=2, edit=failing_in_the_second_pass)
    assert "rank 1 of the group failed: OSError: no disk" in complaint(done)
    assert names(tmp_path) == ["gaps.npy"]


def test_bad_arguments_are_refused(run, gaps_file, tmp_path, monkeypatch):
    (tmp_path / "folder.npy").mkdir()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for arguments, words in (
        (("--beta", 1, *options(MILD, tmp_path / "out.npy")), "--beta is for a .jsonl file"),
        (options(MILD, tmp_path), "--out must end in one of .npy, .parquet, got"),
        (options(MILD, tmp_path / "folder.npy"), "--out is a folder"),
        (options(MILD, tmp_path / "out.parquet"), "a .parquet output needs pyarrow: pip install "),
    ):
        assert words in complaint(run(gaps_file[0], *arguments))


def test_parquet_is_written(run, gaps_file, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    assert run(gaps_file[0], *options(MILD, tmp_path / "scores.parquet"))[0] == 0
    columns = parquet.read_table(tmp_path / "scores.parquet").to_pydict()
    assert list(columns) == ["margin", "pair_weight", "label_smoothing"]
    margins = solve_margins(gaps_file[1], **MILD).margins
    np.testing.assert_allclose(columns["margin"], margins, rtol=1e-6)
