"""What this site does besides MkDocs' own: figures out of files, formulas as MathML."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import figures
import jinja2
from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

API = Path(__file__).parent / "api"
ENTRIES = {
    entry.rpartition(".")[2]: entry
    for page in API.glob("*.md")
    for entry in re.findall(r"^::: (.*)$", page.read_text("utf-8"), re.MULTILINE)
}
JINJA = jinja2.Environment(undefined=jinja2.StrictUndefined)
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)

# A formula of a docstring, as text, by what LaTeX makes of it.
LATEX = {
    r" {4,}": r" \\qquad ",
    r"γ0": r"γ_0",
    r"Σ": r"\\sum ",
    r"_([a-z]{2,})": r"_{\\mathrm{\1}}",
    r"\b(log|exp|softmax|logits|KL|uniform)\b": r"\\operatorname{\1}",
    r"\b(plain|conservative|robust|over the labels|that count)\b": r"\\text{\1 }",
}
TEXT_FORMULA = re.compile(
    r'<div class="highlight"><pre><span></span><code>([^<]*[ℓσΣ][^<]*)</code></pre></div>'
)
SHAPE = re.compile(r"\(<code>\((.*?)\)</code>")
NAME = re.compile(r"(?<!<b>)<code>(\w+)</code>")

# What TeX spaces otherwise than a browser does what the converter makes of it.
SPACING = {
    r"<mi>(log|tanh|sinh|cosh)</mi>": r'<mo lspace="0.17em" rspace="0.17em">\1</mo>',
    r"((?:&#x00028;|&#x0003D;)</mo>)<mo>&#x02212;": r'\1<mo form="prefix">&#x02212;',
    r"<mo>(&#x0221E;)</mo>": r"<mi>\1</mi>",
    r'<mo(?: stretchy="false")?>(&#x0007C;)</mo>': r'<mo lspace="0" rspace="0">\1</mo>',
}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Call the functions of figures.py where a page asks for them."""
    if not page.meta.get("figures"):
        return markdown
    return JINJA.from_string(markdown).render(vars(figures))


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Turn LaTeX into MathML, which browsers render by themselves."""
    if page.url.startswith("api/"):
        content = _reference(content)

    def mathml(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        formula = convert(html.unescape(match[2]).strip(), display=display)
        for pattern, replacement in SPACING.items():
            formula = re.sub(pattern, replacement, formula)
        if "\\" in formula or "<mi>&<" in formula:
            raise PluginError(f"LaTeX that latex2mathml does not know: {match[2]}")
        return formula

    return FORMULA.sub(mathml, content)


def _reference(content: str) -> str:
    """Make docstrings readable: formulas, types, and links from names to their entries."""

    def formula(match: re.Match[str]) -> str:
        lines = html.unescape(match[1]).strip("\n").splitlines()
        for pattern, latex in LATEX.items():
            lines = [re.sub(pattern, latex, line) for line in lines]
        return "".join(f'<div class="arithmatex">\\[{html.escape(line)}\\]</div>' for line in lines)

    def types(match: re.Match[str]) -> str:  # parsed as if they were Python
        shape = re.compile(r"shape\((.*?)\)(?=$|,)")
        return f"(<code>{shape.sub(_shape, match[1])}</code>"

    def link(match: re.Match[str]) -> str:
        entry = ENTRIES.get(match[1])
        return f'<autoref identifier="{entry}">{match[0]}</autoref>' if entry else match[0]

    return NAME.sub(link, SHAPE.sub(types, TEXT_FORMULA.sub(formula, content)))


def _shape(match: re.Match[str]) -> str:
    one = match[1] and "," not in match[1]
    return f"shape ({match[1]}{',' * bool(one)})"
