"""Small edits of the code, each of which a named test must notice: ``python -m tests.mutants``.

Each edit is made alone, in a copy of the repository, and only its tests run. The end is a score,
and exit code 1 where an edit survives or its old text is not found exactly once. With words, such
as ``python -m tests.mutants _solver``, only edits run whose file or test has one of them.
"""

import importlib
import os
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path

import pytest

ROOT, G, E = Path(__file__).parents[1], "gamma_loss/", "docs/examples/"
PATIENCE = 600  # seconds for the tests of an edit
DOMAIN = "margins::test_accuracy_and_error_bound_over_the_domain"
EDGES = "margins::test_accuracy_at_the_edges[numpy-around mild settings]"
PARTS = "margins::test_masks_contexts_and_weights_choose_the_pool"
SETTINGS = "bad_input::test_a_setting_of_a_wrong_type_or_out_of_its_range_is_refused"
VALUES = "losses::test_values_and_aux_in_every_library[numpy-dpo]"
GRADIENTS = "losses::test_gradients_are_pair_weights[mean]"
REPEATS = "losses::test_reductions_are_over_pairs_that_take_part_and_a_weight_is_a_repetition"
WHOLE = "distributed::test_sharded_equals_whole"
MESH = "mesh::test_sharded_equals_whole"
STREAM = "streaming::test_accuracy_and_error_bound_over_the_domain"
KERNEL = "kernels::test_pools_up_to_the_limit_are_solved_and_larger_ones_left"
BATCH = "trl::test_the_loss_of_an_evaluation_from_first_principles"
WRONG = "trl::test_wrong_input_ends_in_one_line"
NEAR_0 = "kernels::test_functions_that_triton_lacks_are_exact_near_0"
LONG = "queue::test_a_long_queue_in_every_library_keeps_its_order"
NOISY = "noisy_preferences::test_"

MUTANTS = [  # file, old text, new text, the test that must fail
    # the solver
    (G + "_solver.py", "MILD_DIFFICULTY = 1.5, 8.5", "MILD_DIFFICULTY = 1.5, 30.0", EDGES),
    (G + "_solver.py", "MAX_ITER = 96", "MAX_ITER = 3", DOMAIN + "[numpy-float64]"),
    (G + "_solver.py", "if is_double else passes - 1", "if is_double else passes + 4",
     "solver::test_the_number_of_mild_passes"),
    (G + "_solver.py", "passes = 4 if a < 0.42", "passes = 4 if a < 0.9",
     "solver::test_the_number_of_mild_passes"),
    (G + "_solver.py", "8 * eps / bend", "8e-9 * eps / bend",
     "margins::test_a_mild_pool_takes_few_passes"),
    (G + "_solver.py", "rho = bend * largest", "rho = 2e-4 * bend * largest",
     "solver::test_the_error_bound_of_a_mild_solve_holds_before_its_end"),
    (G + "_solver.py", "far = num.log1p(a) + 50", "far = num.log1p(a) + 5",
     DOMAIN + "[numpy-float64]"),
    (G + "_solver.py", "cap = num.log(most) / a", "cap = num.log(most) / a / 9",
     DOMAIN + "[numpy-float64]"),
    # pools
    (G + "_pool.py", "margins = xp.where(kept, margins, xp.full_like(margins, gamma0))", "pass",
     PARTS + "[numpy-masks]"),
    (G + "_pool.py", "else weights, zero)", "else weights, zero + 1)", PARTS + "[jax-masks]"),
    (G + "_pool.py", "xp.where(mask, weights, 0 * counted)", "weights", PARTS + "[numpy-all]"),
    (G + "_pool.py", "size <= _comm.GATHER_LIMIT:", "size < 0:",
     "distributed::test_every_rank_issues_the_same_collectives"
     "_and_only_small_ones_above_the_limit"),
    # losses
    (G + "_compute.py", "deficit = counted((", "deficit = ((",
     "losses::test_a_masked_pair_leaves_no_nan_in_a_gradient_and_another_only_its_own"),
    (G + "_compute.py", "reward_gaps=xp.detach(gaps)", "reward_gaps=gaps",
     "losses::test_only_the_loss_has_a_gradient"),
    (G + "_compute.py", "xp.sigmoid(xp.detach(deficit))", "xp.sigmoid(deficit)",
     "losses::test_only_the_loss_has_a_gradient"),
    (G + "_compute.py", "chosen = chosen - xp.detach(references[0])",
     "chosen = chosen - references[0]", GRADIENTS),
    (G + "_compute.py", "pair_weights * counted(weights)", "pair_weights", GRADIENTS),
    (G + "_compute.py", "shifts if settings.centered else margins", "margins", VALUES),
    (G + "_compute.py", "total = total / comm.size", "pass", WHOLE + "[2-gather]"),
    (G + "_compute.py", "gaps = 1 * logps[0]", "gaps = logps[0]",
     "losses::test_no_output_shares_memory_with_another_array[numpy]"),
    # the backends
    (G + "_backend.py", "return array.detach() if array.requires_grad else array", "return array",
     "losses::test_only_the_loss_has_a_gradient"),
    (G + "_backend.py", "return self.jax.lax.stop_gradient(array)", "return array",
     "losses::test_only_the_loss_has_a_gradient"),
    (G + "_backend.py", "steps_per_read = False, 4", "steps_per_read = False, 400",
     "margins::test_a_device_is_read_every_few_steps"),
    (G + "_backend.py", "if self.finfo(array.dtype).bits < 32 else array", "if False else array",
     "margins::test_half_precision_is_upcast"),
    # ranks, a mesh
    (G + "_ranks.py", "dist.ReduceOp.MAX", "dist.ReduceOp.SUM", WHOLE + "[3-reduce]"),
    (G + "_ranks.py", "self.sizes)[self.rank]", "self.sizes)[0]",
     WHOLE + "[3-gather]"),
    (G + "_ranks.py", "digest = -1 if failed else", "digest = 0 if True else",
     "distributed::test_ranks_with_other_settings_are_told"),
    (G + "_comm.py", "self.jax.lax.pmax(", "self.jax.lax.psum(", MESH),
    (G + "_comm.py", "axis=values.ndim - 1, tiled=True", "axis=0, tiled=True", MESH),
    (G + "_comm.py", "start = self.jax.lax.axis_index(self.axis) * size", "start = 0", MESH),
    # the operator
    (G + "_operator.py", "NUMPY_LIMIT = 2**16", "NUMPY_LIMIT = 2**20",
     "implementations::test_which_library_solves_on_the_cpu"),
    (G + "_operator.py", "return _pool.solve_eagerly if is_mild else solve",
     "return _pool.solve_eagerly", "compilers::test_a_solve_takes_few_nodes_of_a_graph"),
    (G + "_operator.py", "_without_triton.add(device.type)", "pass",
     "implementations::test_a_missing_triton_warns_once_and_eager_answers"),
    # checks
    (G + "_checks.py", "MAX_A = 1e9", "MAX_A = 1e12", SETTINGS),
    (G + "_checks.py", "isinstance(value, Real) or isinstance(value, bool)",
     "isinstance(value, Real)", SETTINGS),
    (G + "_checks.py", 'least=0, below=0.5', 'least=0, below=0.6', SETTINGS),
    (G + "_checks.py", "(weights >= 0) & xp.isfinite(weights)", "weights >= 0",
     "bad_input::test_a_weight_that_is_none_is_refused_or_shows_in_the_loss_of_its_pair"),
    (G + "_checks.py", "weights + 0 * xp.sqrt(weights)", "weights",
     "bad_input::test_a_weight_that_is_none_is_refused_or_shows_in_the_loss_of_its_pair"),
    (G + "_checks.py", "    if device != ", "    if False and device != ",
     "bad_input::test_arrays_of_two_libraries_or_devices_are_refused"),
    # streaming
    (G + "streaming.py", "if again != pool:", "if False:",
     "streaming::test_chunks_that_change_are_refused"),
    (G + "streaming.py", "bound = min(2 * (wrong + left), 2.0)", "bound = min(0.2 * left, 2.0)",
     "streaming::test_the_error_bound_holds_for_an_unfinished_solve"),
    (G + "streaming.py", "u = u_grid[index] + (at - index) * rise[index]", "u = u_grid[index]",
     "streaming::test_pairs_start_close_to_their_roots"),
    (G + "streaming.py", "block = block[np.isfinite(block)]", "pass",
     "streaming::test_chunks_of_any_dtype_and_size_cut_anew_at_each_reading_are_one_pool"),
    # matching
    (G + "matching.py", "_MIN_T = 1e-9", "_MIN_T = 1e-2",
     "matching::test_weights_that_hardly_determine_the_three_numbers"),
    (G + "matching.py", "if width <= 1e-9 * np.abs(gaps).max():", "if width <= 1e-3 * np.abs("
     "gaps).max():", "matching::test_weights_that_hardly_determine_the_three_numbers"),
    (G + "matching.py", "most = max(most, measure(", "most = max(0.9 * most, 0.9 * measure(",
     "matching::test_the_number_that_is_said_is_the_largest_there_is"),
    # smoothing
    (G + "smoothing.py", "near = -xp.log1p(xp.sigmoid(-m) * xp.expm1(small))",
     "near = -xp.log1p(xp.sigmoid(-m) * small)", "smoothing::test_smoothing_is_exact"),
    (G + "smoothing.py", "size = xp.sigmoid(high) * xp.sigmoid(-low)",
     "size = xp.sigmoid(high) * xp.sigmoid(low)", "smoothing::test_smoothing_is_exact"),
    (G + "smoothing.py", "xp.softplus(x + ", "xp.softplus(x - ",
     "smoothing::test_every_library_is_exact_and_gives_nan_where_there_is_no_shift"),
    # metrics
    (G + "metrics.py", "aux.reward_gaps > 0,", "aux.reward_gaps >= 0,",
     "metrics"),
    (G + "metrics.py", "weights * weights / xp.where", "weights / xp.where", "metrics"),
    (G + "metrics.py", "shown, infinity = aux.mask | ~xp.any(aux.mask)",
     "shown, infinity = aux.mask | aux.mask", "metrics"),
    # queues
    (G + "queue.py", "keep = xp.isfinite(values)", "keep = values == values",
     "queue::test_a_queue_is_a_deque_of_the_finite_unmasked_gaps"),
    (G + "queue.py", "stable=True", "stable=False", LONG),
    (G + "torch/queue.py", "self.gaps.copy_(state.gaps)",
     "self.mask.copy_(state.mask), self.gaps.copy_(state.gaps)",
     "queue::test_an_interrupt_anywhere_in_a_push_leaves_a_queue"),
    (G + "torch/queue.py", "torch.where(self.mask, ", "torch.where(self.mask | True, ",
     "queue::test_sample"),
    # plots
    (G + "plots.py", 'style = {"color": _colour(ax.collections), "label"',
     'style = {"color": COLOURS[0], "label"', "plots"),
    (G + "plots.py", "gaps = gaps[np.isfinite(gaps)]", "pass", "plots"),
    (G + "plots.py", "return COLOURS[len(drawn) % len(COLOURS)]", "return COLOURS[0]", "plots"),
    # the kernel
    (G + "kernels/math.py", "return 1 / (1 + tl.exp(-x))", "return 1 / (1 + tl.exp(x))", KERNEL),
    (G + "kernels/math.py", "14 if x.dtype == tl.float64 else 8", "7 if True else 8", NEAR_0),
    (G + "kernels/math.py", "tl.where(near, x, tl.log(y)", "tl.where(near, y, tl.log(y)", NEAR_0),
    (G + "kernels/solve.py", "tl.constexpr(16)", "tl.constexpr(400)", KERNEL),
    (G + "kernels/solve.py", "rho = 0.5 * (tl.max(v, 0)", "rho = 0.05 * (tl.max(v, 0)",
     "kernels::test_the_error_bound_holds_before_the_end_and_is_near_the_error"),
    (G + "kernels/solve.py", "bound = 2 * tl.sum(weights * x", "bound = 0.2 * tl.sum(weights * x",
     "kernels::test_the_error_bound_holds_before_the_end_and_is_near_the_error"),
    (G + "kernels/solve.py", "tl.where(valid, gaps, high)", "gaps",
     "kernels::test_entries_that_take_no_part_cost_no_pass"),
    # the modules of torch
    (G + "torch/modules.py", "again and torch._C._current_graph_task_id() != -1", "False",
     "modules::test_activation_checkpointing_pushes_once_and_changes_no_bit"),
    (G + "torch/modules.py", "if self.training and not again:", "if not again:",
     "modules::test_evaluation_reads_and_never_writes"),
    (G + "torch/modules.py", "_WARMUP = 100", "_WARMUP = 99",
     "modules::test_a_run_in_which_nothing_happens_says_so_once_and_names_a_tau_that_helps"),
    (G + "torch/logps.py", "CPU_CHUNK, DEVICE_CHUNK = 2**19", "CPU_CHUNK, DEVICE_CHUNK = 2**29",
     "logps::test_the_softmax_of_so_many_logits_is_formed_at_once"),
    # TRL and the programs
    (G + "integrations/trl.py", "chosen - batch.get(\"margin\", 0.0) / self.beta", "chosen", BATCH),
    (G + "integrations/trl.py", "((chosen > 0) & (rejected > 0)) *", "(chosen > -1) *",
     "trl::test_a_response_truncated_to_nothing_takes_no_part"),
    (E + "trl_dpo.py", "if len(data[\"train\"]) < 2:", "if False:", WRONG),
    (E + "trl_dpo.py", "if not 0 <= config.seed < 2**32:", "if False:", WRONG),
    (E + "noisy_preferences.py", "context = recent[-RECENT_GAPS:]", "context = None",
     NOISY + "recent_gaps_are_the_context_and_the_bar_shows_what_was_learned"),
    (E + "noisy_preferences.py", "field.flip(1), field) for field", "field.flip(1) if field.dtype "
     "!= torch.bool else field, field) for field",
     NOISY + "a_flip_swaps_whole_responses_of_any_lengths"),
]  # fmt: skip


def node(test: str) -> str:
    name, _, rest = test.partition("::")
    return f"tests/test_{name}.py" + ("::" + rest) * bool(rest)


def outcome(copy: Path, tests: list[str]) -> int:
    """Pytest's exit code for tests in the copy, in a child that need not import torch again."""
    if not (child := os.fork()):
        code = 3
        try:
            signal.alarm(PATIENCE * len(tests))
            os.chdir(copy)
            sys.path[:0] = [str(copy), str(copy / "docs" / "examples")]
            with (copy.parent / "log").open("w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            code = int(pytest.main(["-qx", "-p", "no:cacheprovider", *map(node, tests)]))
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    status = os.waitpid(child, 0)[1]
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 1  # it hung, or crashed


def run(copy: Path, path: str, old: str, new: str, test: str) -> str:
    """What becomes of one edit."""
    file = copy / path
    text = file.read_text("utf-8")
    if (count := text.count(old)) != 1:
        return f"ERROR: the old text is found {count} times"
    file.write_text(text.replace(old, new), "utf-8")
    code = outcome(copy, [test])
    file.write_text(text, "utf-8")
    return {0: "SURVIVED", 1: "killed", 2: "killed"}.get(code, f"ERROR: pytest says {code}")


def main(words: list[str]) -> int:
    chosen = [each for each in MUTANTS if not words or any(w in each[0] + each[3] for w in words)]
    sys.dont_write_bytecode = True  # two edits of one second and size would look the same
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "CI": "1"}
    for name in ("numpy", "scipy.optimize", "torch"):
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "site"))
        if code := outcome(copy, list(dict.fromkeys(each[3] for each in chosen))):
            print((copy.parent / "log").read_text("utf-8")[-3000:])
            print(f"a test fails without any edit: pytest ended with {code}")
            return 2
        survived = errors = 0
        for path, old, new, test in chosen:
            said = run(copy, path, old, new, test)
            survived, errors = survived + (said == "SURVIVED"), errors + said.startswith("ERROR")
            print(f"{said:9} {path}: {old!r:.50} -> {new!r:.40}, {test}", flush=True)
    killed = len(chosen) - survived - errors
    score = f"{killed} of {len(chosen)} edits killed ({killed / max(len(chosen), 1):.0%})"
    print(f"{score}, {survived} survived, {errors} errors")
    return int(survived + errors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
