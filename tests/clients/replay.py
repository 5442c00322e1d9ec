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


def responses(call):
    """Yield each row's tokens of the response, the places before them, and the logits there."""
    places = [np.flatnonzero(mask) for mask in call["mask"]]
    texts = [tokens[kept] for tokens, kept in zip(call["tokens"], places, strict=True)]
    for i, text in enumerate(texts):
        other = texts[i - len(texts) // 2]  # the pair's other response
        start = next(t for t in range(len(text)) if text[t] != other[t])
        before = places[i][start - 1 : -1]
        yield text[start:], before, call["logits"][i][before].astype(oracles.Real)


def log_probabilities(call, average):
    """The log-probabilities of the responses: a row of the chosen, one of the rejected."""
    found = []
    for tokens, _, logits in responses(call):
        each = logits[range(len(tokens)), tokens] - np.log(np.exp(logits).sum(1))
        found.append(each.mean() if average else each.sum())
    return np.array(found).reshape(2, -1)


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
    found, half = np.zeros(call["logits"].shape), len(weights)
    for row, (tokens, before, logits) in enumerate(responses(call)):
        slope = -np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        slope[range(len(tokens)), tokens] += 1
        scale = beta * weights[row % half] / half / (len(tokens) if average else 1)
        found[row, before] = (-scale if row < half else scale) * slope
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
