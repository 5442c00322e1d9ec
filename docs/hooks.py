"""What this site does besides MkDocs' own: figures out of files, formulas as MathML."""

from __future__ import annotations

import html
import re
from typing import Any

import figures
import jinja2
from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

JINJA = jinja2.Environment(undefined=jinja2.StrictUndefined)
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)

# What TeX spaces otherwise than a browser does what the converter makes of it.
SPACING = {
    r"<mi>(log)</mi>": r'<mo lspace="0.17em" rspace="0.17em">\1</mo>',
    r"((?:&#x00028;|&#x0003D;)</mo>)<mo>&#x02212;": r'\1<mo form="prefix">&#x02212;',
    r"<mo>(&#x0221E;)</mo>": r"<mi>\1</mi>",
    r'<mo(?: stretchy="false")?>(&#x0007C;)</mo>': r'<mo lspace="0" rspace="0">\1</mo>',
}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Call the functions of figures.py where a page asks for them."""
    if not page.meta.get("figures"):
        return markdown
    return JINJA.from_string(markdown).render(vars(figures))


def on_page_content(content: str, **_: Any) -> str:
    """Turn LaTeX into MathML, which browsers render by themselves."""

    def mathml(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        formula = convert(html.unescape(match[2]).strip(), display=display)
        for pattern, replacement in SPACING.items():
            formula = re.sub(pattern, replacement, formula)
        if "\\" in formula or "<mi>&<" in formula:
            raise PluginError(f"LaTeX that latex2mathml does not know: {match[2]}")
        return formula

    return FORMULA.sub(mathml, content)
