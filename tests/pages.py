"""The code of the recipes, as their pages have it."""

import re
from pathlib import Path

PAGES = Path(__file__).parents[1] / "docs" / "recipes"
SETTING = {"gamma0": 4.0, "tau": 10.0}  # of all pages


def code(page, language="python"):
    text = (PAGES / f"{page}.md").read_text("utf-8")
    return "\n".join(re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL))
