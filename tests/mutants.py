"""Small edits of the code, each of which a named test must notice: ``python -m tests.mutants``.

Each edit is made alone, in a copy of the repository, and only its tests run. The end is a score,
and exit code 1 where an edit survives or its old text is not found exactly once. With words, such
as ``python -m tests.mutants _solver``, only edits run whose file or test has one of them.
"""

import importlib
import os
import re
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path

import pytest

ROOT, PATIENCE = Path(__file__).parents[1], 600  # seconds for the tests of an edit
MUTANTS = [  # file (in gamma_loss), the edit as «old→new» in its text, words of the tests to fail
    # the solver
    ("_solver.py", "MILD_DIFFICULTY = 1.5, «8.5→30.0»", "margins at_the_edges numpy-around"),
    ("_solver.py", "MAX_ITER = «96→3»", "margins over_the_domain numpy-float64"),
    ("_solver.py", "if is_double else passes «- 1→+ 4»", "solver mild_passes"),
    ("_solver.py", "passes = 4 if a < «0.42→0.9»", "solver mild_passes"),
    ("_solver.py", "«8→8e-9» * eps / curvature", "margins few_passes"),
    ("_solver.py", "rho = «curvature→2e-4 * curvature» * largest",
     "solver the_error_bound_of_a_mild_solve_holds_before_its_end"),
    ("_solver.py", "far = num.log1p(a) + «50→5»", "margins over_the_domain numpy-float64"),
    ("_solver.py", "cap = num.log(most) / «a→a / 9»", "margins over_the_domain numpy-float64"),
    # pools
    ("_pool.py", "«margins = xp.where(kept, margins, xp.full_like(margins, gamma0))→pass»",
     "margins choose_the_pool numpy-masks"),
    ("_pool.py", "else weights, «zero→zero + 1»)", "margins choose_the_pool jax-masks"),
    ("_pool.py",
     "«xp.where(mask, weights, 0 * counted)→weights»", "margins choose_the_pool numpy-all"),
    ("_pool.py", "size <«= _comm.GATHER_LIMIT→ 0»:",
     "distributed few_collectives"),
    # losses
    ("_compute.py", "deficit = «counted→»((", "losses a_masked_pair"),
    ("_compute.py", "reward_gaps=«xp.detach(gaps)→gaps»", "losses only_the_loss"),
    ("_compute.py", "xp.sigmoid(«xp.detach(deficit)→deficit»)", "losses only_the_loss"),
    ("_compute.py",
     "chosen = chosen - «xp.detach(references[0])→references[0]»", "losses are_pair_weights mean"),
    ("_compute.py",
     "«pair_weights * counted(weights)→pair_weights»", "losses are_pair_weights mean"),
    ("_compute.py",
     "«shifts if settings.centered else margins→margins»", "losses values_and_aux numpy-dpo"),
    ("_compute.py", "«total = total / comm.size→pass»", "distributed equals_whole 2-gather"),
    ("_compute.py", "gaps = «1 * logps→logps»[0]", "losses shares_memory numpy"),
    # the backends
    ("_backend.py",
     "return «array.detach() if array.requires_grad else array→array»", "losses only_the_loss"),
    ("_backend.py", "return «self.jax.lax.stop_gradient(array)→array»", "losses only_the_loss"),
    ("_backend.py", "steps_per_read = False, «4→400»", "margins is_read"),
    ("_backend.py",
     "if «self.finfo(array.dtype).bits < 32→False» else array", "losses half_precision_is_upcast"),
    # ranks, a mesh
    ("_ranks.py", "«dist.ReduceOp.MAX→dist.ReduceOp.SUM»", "distributed equals_whole 3-reduce"),
    ("_ranks.py", "self.sizes)[«self.rank→0»]", "distributed equals_whole 3-gather"),
    ("_ranks.py", "digest = «-1 if failed→0 if True» else", "distributed other_settings"),
    ("_comm.py", "«self.jax.lax.pmax→self.jax.lax.psum»(", "mesh equals_whole"),
    ("_comm.py", "axis=«values.ndim - 1→0», tiled=True", "mesh equals_whole"),
    ("_comm.py", "start = «self.jax.lax.axis_index(self.axis) * size→0»", "mesh equals_whole"),
    # the operator
    ("_operator.py", "NUMPY_LIMIT = 2**«16→20»", "implementations on_the_cpu"),
    ("_operator.py", "return «_pool.solve_eagerly if is_mild else solve→_pool.solve_eagerly»",
     "compilers few_nodes"),
    ("_operator.py", "«_without_triton.add(device.type)→pass»", "kernels without_a_driver"),
    # checks
    ("_checks.py", "MAX_A = «1e9→1e12»", "bad_input out_of_its_range"),
    ("_checks.py",
     "isinstance(value, Real)« or isinstance(value, bool)→»", "bad_input out_of_its_range"),
    ("_checks.py", "least=0, below=«0.5→0.6»", "bad_input out_of_its_range"),
    ("_checks.py",
     "«(weights >= 0) & xp.isfinite(weights)→weights >= 0»", "bad_input a_weight_that_is_none"),
    ("_checks.py", "«weights + 0 * xp.sqrt(weights)→weights»", "bad_input a_weight_that_is_none"),
    ("_checks.py", "    if «device→False and device» != ", "bad_input two_libraries"),
    # streaming
    ("streaming.py", "if «again != pool→False»:", "streaming that_change"),
    ("streaming.py", "bound = min(«2 * (wrong + left)→0.2 * left», 2.0)", "streaming unfinished"),
    ("streaming.py",
     "u = u_grid[index]« + (at - index) * rise[index]→»", "streaming close_to_their_roots"),
    ("streaming.py", "«block = block[np.isfinite(block)]→pass»", "streaming cut_anew"),
    # matching
    ("matching.py", "_MIN_T = 1e-«9→2»", "matching hardly_determine"),
    ("matching.py", "if width <= 1e-«9→3» * np.abs(gaps).max():", "matching hardly_determine"),
    ("matching.py", "most = max(«most,→0.9 * most, 0.9 *» measure(", "matching is_said"),
    # smoothing
    ("smoothing.py",
     "near = -xp.log1p(xp.sigmoid(-m) * «xp.expm1(small)→small»)", "smoothing smoothing_is_exact"),
    ("smoothing.py",
     "size = xp.sigmoid(high) * xp.sigmoid(«-low→low»)", "smoothing smoothing_is_exact"),
    ("smoothing.py", "xp.softplus(x «+→-» ", "smoothing no_shift"),
    # metrics
    ("metrics.py", "aux.reward_gaps >«→=» 0,", "metrics"),
    ("metrics.py", "weights «* weights →»/ xp.where", "metrics"),
    ("metrics.py", "shown, infinity = aux.mask | «~xp.any(aux.mask)→aux.mask»", "metrics"),
    # queues
    ("queue.py", "keep = «xp.isfinite(values)→values == values»", "queue a_deque"),
    ("queue.py", "stable=«True→False»", "queue a_long_queue"),
    ("torch/queue.py", "«self.gaps.copy_→self.mask.copy_(state.mask), self.gaps.copy_»(state.gaps)",
     "queue an_interrupt"),
    ("torch/queue.py", "torch.where(«self.mask→self.mask | True», ", "queue sample"),
    # plots
    ("plots.py", 'style = {"color": «_colour(ax.collections)→COLOURS[0]», "label"', "plots"),
    ("plots.py", "«gaps = gaps[np.isfinite(gaps)]→pass»", "plots"),
    ("plots.py", "return COLOURS[«len(artists) % len(COLOURS)→0»]", "plots"),
    # the kernel
    ("kernels/math.py", "return 1 / (1 + tl.exp(«-x→x»))", "kernels up_to_the_limit"),
    ("kernels/math.py", "«14 if x.dtype == tl.float64→7 if True» else 8", "kernels exact_near_0"),
    ("kernels/math.py", "tl.where(near, «x→y», tl.log(y)", "kernels exact_near_0"),
    ("kernels/solve.py", "tl.constexpr(«16→400»)", "kernels up_to_the_limit"),
    ("kernels/solve.py", "rho = «0.5→0.05» * (tl.max(v, 0)", "kernels near_the_error"),
    ("kernels/solve.py", "bound = «2→0.2» * tl.sum(weights * x", "kernels near_the_error"),
    ("kernels/solve.py", "«tl.where(valid, gaps, high)→gaps»", "kernels no_part"),
    # the modules of torch
    ("torch/modules.py",
     "«again and torch._C._current_graph_task_id() != -1→False»", "modules pushes_once"),
    ("torch/modules.py", "if «self.training and not→not» again:", "modules never_writes"),
    ("torch/modules.py", "_WARMUP = «100→99»", "modules nothing_happens"),
    ("torch/logps.py", "CPU_CHUNK, DEVICE_CHUNK = 2**«19→29»", "logps so_many_logits"),
    # TRL and the programs
    ("integrations/trl.py",
     '«chosen - batch.get("margin", 0.0) / self.beta→chosen»', "trl of_an_evaluation"),
    ("integrations/trl.py", "(«(chosen > 0) & (rejected > 0)→chosen > -1») *", "trl truncated"),
    ("docs/examples/trl_dpo.py", 'if «len(data["train"]) < 2→False»:', "trl_programs wrong_input"),
    ("docs/examples/trl_dpo.py",
     "if «not 0 <= config.seed < 2**32→False»:", "trl_programs wrong_input"),
    ("docs/examples/noisy_preferences.py",
     "context = «recent[-RECENT_GAPS:]→None»", "noisy_preferences recent_gaps"),
    ("docs/examples/noisy_preferences.py",
     "field.flip(1)«→ if field.dtype != torch.bool else field», field) for field",
     "noisy_preferences a_flip_swaps"),
]  # fmt: skip


def selection(tests: list[str]) -> list[str]:
    """Return pytest's arguments: files, and words that are in the tests' names."""
    words = [[f"test_{each}" if i == 0 else each for i, each in enumerate(test.split())]
             for test in tests]  # fmt: skip
    files = dict.fromkeys(f"tests/{each[0]}.py" for each in words)
    return [*files, "-k", " or ".join(f"({' and '.join(each)})" for each in words)]


def outcome(copy: Path, tests: list[str]) -> int:
    """Return pytest's exit code, of a child that need not import torch again."""
    if not (child := os.fork()):
        code = 3
        try:
            signal.alarm(PATIENCE * len(tests))
            os.chdir(copy)
            sys.path[:0] = [str(copy), str(copy / "docs" / "examples")]
            with (copy.parent / "log").open("w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            code = int(pytest.main(["-qx", "-p", "no:cacheprovider", *selection(tests)]))
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    status = os.waitpid(child, 0)[1]
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 1  # it hung, or crashed


def run(copy: Path, path: str, edit: str, test: str) -> str:
    """What becomes of one edit."""
    file = copy / (path if path.startswith("docs/") else f"gamma_loss/{path}")
    text, (before, old, new, after) = file.read_text("utf-8"), re.split("[«→»]", edit)
    old, new = before + old + after, before + new + after
    if (count := text.count(old)) != 1:
        return f"ERROR: the old text is found {count} times"
    file.write_text(text.replace(old, new), "utf-8")
    code = outcome(copy, [test])
    file.write_text(text, "utf-8")
    return {0: "SURVIVED", 1: "killed", 2: "killed"}.get(code, f"ERROR: pytest says {code}")


def main(words: list[str]) -> int:
    chosen = [each for each in MUTANTS if not words or any(w in each[0] + each[2] for w in words)]
    sys.dont_write_bytecode = True  # two edits of one second and size would look the same
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "CI": "1"}
    for name in ("numpy", "scipy.optimize", "torch"):
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "site"))
        if code := outcome(copy, list(dict.fromkeys(each[2] for each in chosen))):
            print((copy.parent / "log").read_text("utf-8")[-3000:])
            print(f"a test fails without any edit: pytest ended with {code}")
            return 2
        survived = errors = 0
        for path, edit, test in chosen:
            said = run(copy, path, edit, test)
            survived, errors = survived + (said == "SURVIVED"), errors + said.startswith("ERROR")
            print(f"{said:9} {path}: {edit}, {test}", flush=True)
    killed = len(chosen) - survived - errors
    score = f"{killed} of {len(chosen)} edits killed ({killed / max(len(chosen), 1):.0%})"
    print(f"{score}, {survived} survived, {errors} errors")
    return int(survived + errors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
