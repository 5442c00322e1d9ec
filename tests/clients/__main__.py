"""Install trainers, run the recipes in them, and record what was run.

    python -m tests.clients [NAME ...] [--folder FOLDER]

Each trainer gets an environment of its own under the folder (a temporary one where none is given),
with the pins of NAME.txt beside this file, and NAME.py is run in it. What passes is written to
benchmarks/results/clients.json, from which the pages say what was run, and when.
"""

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import venv
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "clients.json"
NAMES = sorted(pins.stem for pins in Path(__file__).parent.glob("*.txt"))


def pins(name):
    return Path(__file__).with_name(f"{name}.txt")


def install(name, folder):
    """Make an environment with a client's pins, all of them there and no others' choice."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    pip = [python, "-m", "pip", "install", "-q", "--no-deps"]
    subprocess.run([*pip, "-r", pins(name), "-e", ROOT], check=True)
    # Packages that a client needs only on a GPU are left out. No pin may contradict another.
    check = subprocess.run([python, "-m", "pip", "check"], stdout=subprocess.PIPE, text=True)
    if wrong := [line for line in check.stdout.splitlines() if " has requirement " in line]:
        raise RuntimeError(f"{pins(name)}: {'; '.join(wrong)}")
    return python


def inside(name):
    """Run a client in the environment that it is called in, and record that."""
    client = importlib.import_module(f"clients.{name}")
    with tempfile.TemporaryDirectory() as folder:
        runs = list(client.run(Path(folder)))
    pinned = {pin.partition("==")[0] for pin in pins(name).read_text("utf-8").split()}
    return {
        "trainer": client.PACKAGE,
        "version": version(client.PACKAGE),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "versions": {
            each: version(each) for each in ("torch", "transformers", "trl") if each in pinned
        },
        "runs": runs,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--folder", type=Path, help="where environments are made, and found again")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    if options.inside:
        found = {options.names[0]: inside(options.names[0])}
        record = (json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}) | found
        text = json.dumps(dict(sorted(record.items())), indent=1, ensure_ascii=False)
        RESULTS.write_text(text + "\n", "utf-8")
        return 0
    failed = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        for name in options.names or NAMES:
            print(f"== {name}", flush=True)
            try:
                python = install(name, folder.absolute() / name)
                command = [python, "-m", "clients", name, "--inside"]
                subprocess.run(command, cwd=ROOT / "tests", check=True)
            except (subprocess.CalledProcessError, RuntimeError) as error:
                print(error, file=sys.stderr)
                failed.append(name)
    print("failed: " + ", ".join(failed) if failed else "all passed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
