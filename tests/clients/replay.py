"""A trainer's run, and its logged losses against first principles.

The losses are computed anew from what the model was given and what it answered (`recorder`), by
plain formulas in extended precision and by the oracle's margins, with a queue of plain arrays.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracles
import tiny_lm

TESTS = str(Path(__file__).parents[1])
QUEUE = 2048  # the default of the losses
RECORD = "import recorder\n\nrecorder.start()\n"  # at the head of what a trainer runs
ROUNDING = 3e-5  # of float32 in rewards of about 100, four of which make a gap


def pairs(count):
    """Pairs whose responses differ from their first token on, by which a response is found."""
    rows = [{name: text.strip() for name, text in row.items()} for row in tiny_lm.pairs(3 * count)]
    return [row for row in rows if row["chosen"][0] != row["rejected"][0]][:count]


def start(folder, command, **environment):
    """Run a command in a folder, with this environment's programs, and show what fails."""
    shutil.copy(Path(__file__).with_name("recorder.py"), folder)
    programs = Path(sys.executable).parent
    environment = {
        **os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([".", TESTS, os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo", **environment,
    }  # fmt: skip
    with open(folder / "log.txt", "w") as log:
        done = subprocess.run(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    if done.returncode:
        raise RuntimeError(f"{command} failed:\n{(folder / 'log.txt').read_text('utf-8')[-5000:]}")


def calls(folder, rank):
    """Every call of the model in a process, and in the one that took up its work, in order."""
    found = []
    for path in sorted(folder.glob(f"calls-{rank}-*.npz")):
        arrays = np.load(path)
        names = ("tokens", "mask", "logits", "policy")
        for i in range(len(arrays.files) // len(names)):
            found.append({name: arrays[f"{i} {name}"] for name in names})
    return found


def log_probabilities(call, average):
    """The log-probabilities of the responses: a row of the chosen, one of the rejected."""
    found = []
    rows = [
        (tokens[mask > 0], logits[mask > 0].astype(oracles.Real))
        for tokens, mask, logits in zip(call["tokens"], call["mask"], call["logits"], strict=True)
    ]
    half = len(rows) // 2
    for i, (tokens, logits) in enumerate(rows):
        other = rows[(i + half) % len(rows)][0]
        shared = next(t for t in range(len(tokens)) if tokens[t] != other[t])
        each = [
            logits[t - 1, tokens[t]] - np.log(np.exp(logits[t - 1]).sum())
            for t in range(shared, len(tokens))
        ]
        found.append(sum(each) / (len(each) if average else 1))
    return np.array(found).reshape(2, half)


def gaps(process, beta, reference):
    """The reward gaps of a process's micro-batches; γ-DPO has a reference, γ-SimPO averages."""
    found = []
    for i, call in enumerate(process):
        if not call["policy"]:
            continue
        logps = log_probabilities(call, average=not reference)
        if reference:
            near = [
                k
                for k, other in enumerate(process)
                if not other["policy"] and np.array_equal(other["tokens"], call["tokens"])
            ]
            logps -= log_probabilities(process[min(near, key=lambda k: abs(k - i))], average=False)
        found.append(beta * (logps[0] - logps[1]))
    return found


def expected(processes, *, beta, gamma0, tau, reference, plain=False):
    """The loss of each micro-batch over all processes: γ-DPO centred, γ-SimPO not."""
    queue, losses = np.empty(0), []
    each = (gaps(process, beta, reference) for process in processes)
    for parts in zip(*each, strict=True):
        new = np.concatenate(parts)
        pool = np.concatenate([queue, new])
        margins = oracles.margins(pool, gamma0, tau)[0][len(queue) :]
        shift = 0 if reference else gamma0
        losses.append(oracles.simpo(new, shift if plain else margins - gamma0 + shift).mean())
        queue = pool[-QUEUE:]
    return losses


def compare(folder, name, *, ranks=1, accumulated=1, **setting):
    """Hold a run's logged losses to first principles; what was run, and by how much they differ."""
    processes = [calls(folder, rank) for rank in range(ranks)]
    ours, plain = (
        np.array(expected(processes, plain=plain, **setting), dtype=float)
        .reshape(-1, accumulated)
        .mean(1)
        for plain in (False, True)
    )
    theirs = np.array(logged(folder))
    assert len(theirs) == len(ours), (len(theirs), len(ours))
    difference = np.abs(theirs - ours).max()
    margins_do = np.abs(plain - ours).max()
    run = {"run": name, "steps": len(ours), "largest_difference": float(f"{difference:.1e}"),
           "margins_change_the_loss_by": float(f"{margins_do:.1e}")}  # fmt: skip
    print(json.dumps(run, ensure_ascii=False))
    # Without margins the losses would differ by far more than float32 does.
    assert difference < ROUNDING < margins_do / 10, run
    return run


def logged(folder):
    """The training losses in the last state that a `Trainer` has saved, one a step."""
    path = max(folder.rglob("trainer_state.json"), key=lambda path: path.stat().st_mtime)
    history = json.loads(path.read_text("utf-8"))["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]
