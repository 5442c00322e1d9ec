"""Lists what can be measured, and what each costs: ``python -m benchmarks``."""

import re
from pathlib import Path


def listing() -> list[str]:
    """Return a line for each benchmark: its command, minutes, and question."""
    lines = []
    for path in sorted(Path(__file__).parent.glob("*.py")):
        text = path.read_text("utf-8")
        if seconds := re.search(r"^SECONDS = (\d+)", text, re.MULTILINE):
            question = text.removeprefix('"""').partition("\n")[0]
            minutes = f"{int(seconds[1]) / 60:.0f} min"
            lines.append(f"python -m benchmarks.{path.stem:<12} {minutes:>6}  {question}")
    question = "Does γ-PO help under label noise?"
    return [*lines, f"python -m benchmarks.{'noise_study':<12} {'hours':>6}  {question}"]


if __name__ == "__main__":
    print(*listing(), "All take --help; --quick only tries whether they run.", sep="\n")
