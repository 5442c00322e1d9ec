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
import pages
import tiny_lm

TESTS = str(Path(__file__).parents[1])
QUEUE = 2048  # the default of the losses
SETTING = {**pages.SETTING, "tau": 1.0}  # so that margins move the losses far more than rounding
ROUNDING = 1e-5  # of float32 in rewards of about 100, four of which make a gap
GRADIENT = 3e-5  # of the largest entry of a micro-batch's gradient at the logits


def pairs(count):
    """Pairs whose responses differ from their first token on, by which a response is found."""
    rows = [{name: text.strip() for name, text in row.items()} for row in tiny_lm.pairs(3 * count)]
    return [row for row in rows if row["chosen"][0] != row["rejected"][0]][:count]


def recipe(page):
    """The code of a page, recorded and with the tau of these runs."""
    code = pages.code(page)
    assert "10.0" in code  # which is tau alone
    return "import recorder\n\nrecorder.start()\n" + code.replace("10.0", "1.0")


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
        names = ("tokens", "mask", "logits", "gradient", "policy")
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
    """Each micro-batch of a process, with its reward gaps. γ-SimPO averages; γ-DPO does not."""
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
        found.append((call, beta * (logps[0] - logps[1])))
    return found


def gradient(call, weights, beta, average):
    """The gradient of a micro-batch's mean loss at the logits, from the weights of its pairs.

    The loss of a pair falls by its weight per unit of reward, a log-probability rises by one minus
    the probability of its token.
    """
    found = np.zeros(call["logits"].shape)
    half = len(weights)
    for row, (tokens, mask, logits) in enumerate(
        zip(call["tokens"], call["mask"], call["logits"], strict=True)
    ):
        places, other = np.flatnonzero(mask), (row + half) % (2 * half)
        others = call["tokens"][other][call["mask"][other] > 0]
        shared = next(t for t in range(len(places)) if tokens[places[t]] != others[t])
        scale = beta * weights[row % half] / half / (len(places) - shared if average else 1)
        for before, place in zip(places[shared - 1 : -1], places[shared:], strict=True):
            logp = logits[before].astype(oracles.Real)
            slope = -np.exp(logp - logp.max()) / np.exp(logp - logp.max()).sum()
            slope[tokens[place]] += 1
            found[row, before] += (-scale if row < half else scale) * slope
    return found


def expected(processes, *, beta, gamma0, tau, reference):
    """The loss of each micro-batch over all processes, with margins and without; the gradients.

    γ-DPO is centred, γ-SimPO is not. Of gradients there are pairs: as it was, as it should be.
    """
    queue, losses, gradients = np.empty(0), [], []
    each = (gaps(process, beta, reference) for process in processes)
    for parts in zip(*each, strict=True):
        new = np.concatenate([part for _, part in parts])
        pool = np.concatenate([queue, new])
        margins = oracles.margins(pool, gamma0, tau)[0][len(queue) :]
        shift = 0 if reference else gamma0
        margins += shift - gamma0
        losses.append([oracles.simpo(new, margin).mean() for margin in (margins, shift)])
        weights = np.split(oracles.sigmoid(margins - new), len(parts))
        for (call, _), share in zip(parts, weights, strict=True):
            right = gradient(call, share, beta, average=not reference)
            assert call["gradient"].shape == right.shape, "no gradient has reached the logits"
            gradients.append((call["gradient"], right))
        queue = pool[-QUEUE:]
    return losses, gradients


def compare(folder, name, *, ranks=1, accumulated=1, **setting):
    """Hold a run's logged losses to first principles, and its gradients at the logits."""
    processes = [calls(folder, rank) for rank in range(ranks)]
    losses, gradients = expected(processes, **setting)
    ours, plain = np.array(losses, dtype=float).reshape(-1, accumulated, 2).mean(1).T
    theirs = np.array(logged(folder))
    assert len(theirs) == len(ours), (len(theirs), len(ours))
    difference = np.abs(theirs - ours).max()
    margins_do = np.abs(plain - ours).max()
    off = max(
        np.abs(theirs * accumulated - right).max() / np.abs(right).max()
        for theirs, right in gradients
    )
    run = {"run": name, "steps": len(ours), "largest_difference": float(f"{difference:.1e}"),
           "gradients_differ_by": float(f"{off:.1e}"),
           "margins_change_the_loss_by": float(f"{margins_do:.1e}")}  # fmt: skip
    print(json.dumps(run, ensure_ascii=False))
    # Without margins the losses would differ by far more than float32 does.
    assert difference < ROUNDING < margins_do / 10, run
    assert off < GRADIENT, run
    return run


def logged(folder):
    """The training losses in the last state that a `Trainer` has saved, one a step."""
    path = max(folder.rglob("trainer_state.json"), key=lambda path: path.stat().st_mtime)
    history = json.loads(path.read_text("utf-8"))["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]
