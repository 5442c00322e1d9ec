"""Runs the example programs as a shell would, and functions as torchrun would."""

import contextlib
import inspect
import io
import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path
from subprocess import CompletedProcess
from unittest import mock

from _common import run as run_main


def run(program, *arguments):
    """Return the exit code of a module's `main`, its output and its errors."""
    argv, out, err, code = list(map(str, arguments)), io.StringIO(), io.StringIO(), 0
    taken = [argv] if inspect.signature(program.main).parameters else []
    with (
        mock.patch.object(sys, "argv", [program.__file__, *argv]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            run_main(program.main, *taken)
        except SystemExit as ended:
            code = ended.code
    return CompletedProcess(argv, code, out.getvalue(), err.getvalue())


def output(program, *arguments):
    """Return what a program prints, which has to end well."""
    done = run(program, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def complaint(program, *arguments):
    """Return the line with which a program refuses what it was given."""
    done = run(program, *arguments)
    assert done.returncode == 2, done.stdout
    assert not {"Traceback", "usage:"} & set(done.stderr.split())
    line = done.stderr.splitlines()[-1]  # after the progress of reading the data
    assert len(line) < 600
    name, _, problem = line.partition(": ")
    assert name == Path(program.__file__).name
    return problem


def write(rows, name="pairs.jsonl"):
    """Write rows as JSON lines, and return the name of the file."""
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return name


def together(ranks, function, *arguments, imports="gamma_loss.torch"):
    """Have so many processes call a function, with the environment that torchrun gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([imports])  # once for all processes
    processes = []
    for rank in map(str, range(ranks)):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(ranks),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                       "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}  # fmt: skip
        processes.append(context.Process(target=_call, args=(environment, function, arguments)))
        processes[-1].start()
    for process in processes:
        process.join(400)
    assert [process.exitcode for process in processes] == [0] * ranks


def _call(environment, function, arguments):
    os.environ |= environment
    function(*arguments)
