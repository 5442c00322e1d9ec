"""The code of pages, as they have it."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "recipes"
SETTING = {"gamma0": 4.0, "tau": 10.0}  # of all recipes


def blocks(page, language="python"):
    """The blocks of code of a page, which is named by its path from the root."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)


def code(recipe, language="python"):
    return "\n".join(blocks(f"docs/recipes/{recipe}.md", language))
