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
LOSSES = {  # as the clients set them
    "γ-DPO": {"beta": 0.5, "reference": True},
    "γ-SimPO": {"beta": 10.0, "reference": False},
}
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


def runs(folder, table, losses, common, files, command):
    """Yield the runs of a table, each in a folder with a tiny model, these files and its config.

    A run's name begins with the name of its loss. Two ranks are two processes.
    """
    for name, options in table.items():
        loss, here = name.partition(",")[0], folder / name
        config = {**common, **losses[loss], **options}
        ranks, starts = config.pop("ranks", 1), config.pop("starts", [{}])
        tiny_lm.build(here / "model")
        for path, text in files.items():
            (here / path).parent.mkdir(parents=True, exist_ok=True)
            (here / path).write_text(text)
        for change in starts:  # a second one resumes
            (here / "config.yaml").write_text(json.dumps({**config, **change}))
            start(here, command, ranks)
        accumulated = config.get("gradient_accumulation_steps", 1)
        yield compare(here, name, ranks=ranks, accumulated=accumulated, **SETTING, **LOSSES[loss])


def start(folder, command, ranks):
    """Run a command in a folder, with this environment's programs, and show what fails."""
    shutil.copy(Path(__file__).with_name("recorder.py"), folder)
    programs = Path(sys.executable).parent
    environment = {
        **os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([".", TESTS, os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo", "AXOLOTL_DO_NOT_TRACK": "1",
    }  # fmt: skip
    if ranks > 1 and command[0] == "python":
        command = ["torchrun", f"--nproc-per-node={ranks}", *command[1:]]
    elif ranks > 1:
        environment["NPROC_PER_NODE"] = str(ranks)  # which ms-swift reads
    with open(folder / "log.txt", "w") as log:
        done = subprocess.run(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    if done.returncode:
        raise RuntimeError(f"{command} failed:\n{(folder / 'log.txt').read_text('utf-8')[-5000:]}")


def calls(folder, rank):
    """Every call of the model in a process, and in the one that took up its work, in order."""
    return [dict(np.load(path)) for path in sorted(folder.glob(f"calls-{rank}-*.npz"))]


def log_probabilities(call, average):
    """The log-probability of each row's response, and how it changes with the logits."""
    values, slopes = [], np.zeros(call["logits"].shape)
    places = [np.flatnonzero(mask) for mask in call["mask"]]
    texts = [tokens[kept] for tokens, kept in zip(call["tokens"], places, strict=True)]
    for row, text in enumerate(texts):
        other = texts[row - len(texts) // 2]  # the pair's other response
        start = next(t for t in range(len(text)) if text[t] != other[t])
        tokens, before = text[start:], places[row][start - 1 : -1]
        logits = call["logits"][row][before].astype(oracles.Real)
        sums = np.exp(logits).sum(1, keepdims=True)
        chosen = np.eye(logits.shape[1])[tokens]
        share = len(tokens) if average else 1
        values.append((chosen * (logits - np.log(sums))).sum() / share)
        slopes[row, before] = (chosen - np.exp(logits) / sums) / share
    return np.array(values), slopes


def micro_batches(process, beta, reference):
    """Yield a process's, each with its reward gaps. γ-SimPO averages; γ-DPO does not."""
    for i, call in enumerate(process):
        if not call["policy"]:
            continue
        logps, slopes = log_probabilities(call, average=not reference)
        if reference:
            near = [
                k
                for k, other in enumerate(process)
                if not other["policy"] and np.array_equal(other["tokens"], call["tokens"])
            ]
            nearest = process[min(near, key=lambda k: abs(k - i))]
            logps = logps - log_probabilities(nearest, average=False)[0]
        chosen, rejected = np.split(logps, 2)
        yield call["gradient"], slopes, beta * (chosen - rejected)


def expected(processes, *, beta, gamma0, tau, reference):
    """The loss of each micro-batch over all processes, with margins and without; the gradients.

    γ-DPO is centred, γ-SimPO is not. Of gradients there are pairs: as it was, as it should be.
    """
    queue, losses, gradients = np.empty(0), [], []
    each = (micro_batches(process, beta, reference) for process in processes)
    for parts in zip(*each, strict=True):
        new = np.concatenate([gaps for _, _, gaps in parts])
        pool = np.concatenate([queue, new])
        margins = oracles.margins(pool, gamma0, tau)[0][len(queue) :]
        shift = 0 if reference else gamma0
        margins += shift - gamma0
        losses.append([oracles.simpo(new, margin).mean() for margin in (margins, shift)])
        weights = np.split(oracles.sigmoid(margins - new), len(parts))
        for (gradient, slopes, gaps), weight in zip(parts, weights, strict=True):
            fall = beta * weight / len(gaps)  # of the loss, per unit of a pair's log-ratio
            right = slopes * np.concatenate([-fall, fall])[:, None, None]
            assert gradient.shape == right.shape, "no gradient has reached the logits"
            gradients.append((gradient, right))
        queue = pool[-QUEUE:]
    return losses, gradients


def compare(folder, name, *, ranks=1, accumulated=1, **setting):
    """Hold a run's logged losses to first principles, and its gradients at the logits."""
    processes = [calls(folder, rank) for rank in range(ranks)]
    losses, gradients = expected(processes, **setting)
    ours, plain = np.array(losses, dtype=float).reshape(-1, accumulated, 2).mean(1).T
    theirs = np.array(logged(folder))
    assert len(theirs) == len(ours), (len(theirs), len(ours))
    found = {
        "largest_difference": np.abs(theirs - ours).max(),
        "gradients_differ_by": max(
            np.abs(gradient * accumulated - right).max() / np.abs(right).max()
            for gradient, right in gradients
        ),
        "margins_change_the_loss_by": np.abs(plain - ours).max(),
    }
    difference, gradients_differ, margins_do = found.values()
    run = {"run": name, "steps": len(ours)} | {key: float(f"{found[key]:.1e}") for key in found}
    print(json.dumps(run, ensure_ascii=False))
    # Without margins the losses would differ by far more than float32 does.
    assert difference < ROUNDING < margins_do / 10, run
    assert gradients_differ < GRADIENT, run
    return run


def logged(folder):
    """The training losses in the last state that a `Trainer` has saved, one a step."""
    path = max(folder.rglob("trainer_state.json"), key=lambda path: path.stat().st_mtime)
    history = json.loads(path.read_text("utf-8"))["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]
