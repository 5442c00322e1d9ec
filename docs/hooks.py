"""Additions to MkDocs: figures from files, MathML, links to the glossary, the version."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import figures
import jinja2
from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.utils import get_relative_url

from gamma_loss import __version__

API = Path(__file__).parent / "api"
ENTRIES = {
    entry.rpartition(".")[2]: entry
    for page in API.glob("*.md")
    for entry in re.findall(r"^::: (.*)$", page.read_text("utf-8"), re.MULTILINE)
}
JINJA = jinja2.Environment(undefined=jinja2.StrictUndefined)
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)

# Terms of the glossary with their places, and the elements in which none is linked.
TERMS = {
    term.lower(): place or term.lower().replace(" ", "-")
    for term, place in re.findall(
        r"^## (.*?)(?: \{ #(\w+) \})?$",
        (API.parent / "glossary.md").read_text("utf-8"),
        re.MULTILINE,
    )
}
TERM = re.compile(rf"(?<![\w-])({'|'.join(TERMS)})(s|es)?(?![\w-])", re.IGNORECASE)
UNLINKED = ("a", "autoref", "code", "figure", "h1", "h2", "h3", "h4", "math", "pre", "svg", "th")
TAG = re.compile(r"(<(/?)(\w+)[^>]*>)")

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
# Two entries of a reference that follow each other with the same description, and one without.
ENTRY = (
    r'<li class="doc-section-item field-body">\s*(<b>(?:(?!</?li).)*</b>)((?:(?!</?li).)*?)\s*–\s*'
)
SHARED = re.compile(
    ENTRY + r'(<div class="doc-md-description">(?:(?!</?li).)*?</div>)\s*</li>\s*'
    + ENTRY + r"\3\s*</li>", re.DOTALL
)  # fmt: skip
EMPTY = re.compile(r'–\s*<div class="doc-md-description">\s*</div>')
ANY = '(<code><span title="typing.Any">Any</span></code>)'
SHAPE = re.compile(r"\(<code>\((.*?)\)</code>")
NAME = re.compile(r"(?<!<b>)<code>(\w+)</code>")

RELATION = r"(?<=\s)(?:=|\\le|\\ge|\\approx)(?=\s)"

# What TeX spaces otherwise than a browser does what the converter makes of it.
SPACING = {
    r"<mi>(log|tanh|sinh|cosh)</mi>": r'<mo lspace="0.17em" rspace="0.17em">\1</mo>',
    r"((?:&#x00028;|&#x0003D;)</mo>)<mo>&#x02212;": r'\1<mo form="prefix">&#x02212;',
    r"<mo>(&#x0221E;)</mo>": r"<mi>\1</mi>",
    r'<mo(?: stretchy="false")?>&#x0007C;': '<mo lspace="0" rspace="0" stretchy="false">|',
    r'<mo accent="true">&#x02015;</mo>': '<mo class="bar"></mo>',  # drawn by the style
}


def on_config(config: Any) -> None:
    """Give the header its version; Material shows it where it shows a repository."""
    config.extra["release"] = __version__
    config.repo_url = config.repo_url or "."


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Call the functions of figures.py where a page asks for them."""
    if page.parent is None:  # a menu of one page would be empty space
        page.meta.setdefault("hide", ["navigation"])
    if not page.meta.get("figures"):
        return markdown
    return JINJA.from_string(markdown).render(vars(figures))


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Turn LaTeX into MathML, which browsers render without a script, and link the glossary."""
    if page.url.startswith("api/"):
        content = _reference(content)

    def mathml(match: re.Match[str]) -> str:
        latex = html.unescape(match[2]).strip()
        if match[1] == "span":
            return _mathml(latex, "inline")
        parts = (map(_mathml, _split(part, RELATION)) for part in _split(latex, r"\\qquad"))
        rows = "".join(f"<div>{''.join(part)}</div>" for part in parts)
        return f'<div class="formulas">{rows}</div>'

    content = FORMULA.sub(mathml, content)
    if page.file.src_uri in ("glossary.md", "changelog.md") or page.url.startswith("api/"):
        return content
    return _link_terms(content, get_relative_url("glossary/", page.url))


def _split(latex: str, pattern: str) -> list[str]:
    """Split a formula outside of all brackets, where a narrow page may start a new line."""
    parts, depth = [""], 0
    for piece in re.split(rf"({pattern}|\\left\b|\\right\b|[{{}}()\[\]])", latex):
        depth += (piece in ("{", "(", "[", r"\left")) - (piece in ("}", ")", "]", r"\right"))
        if depth == 0 and re.fullmatch(pattern, piece):
            parts.append("")
        parts[-1] += piece.replace(r"\qquad", "")
    return [part for part in parts if part.strip()]


def _mathml(latex: str, display: str = "block") -> str:
    formula = convert(latex, display=display)
    for pattern, replacement in SPACING.items():
        formula = re.sub(pattern, replacement, formula)
    if "\\" in formula or "<mi>&<" in formula:
        raise PluginError(f"LaTeX that latex2mathml does not know: {latex}")
    return formula


def _link_terms(content: str, glossary: str) -> str:
    """Link the first use of each term on a page to its entry."""
    unseen, closed_to, parts = dict(TERMS), 0, []

    def link(match: re.Match[str]) -> str:
        place = unseen.pop(match[1].lower(), None)
        return f'<a class="term" href="{glossary}#{place}">{match[0]}</a>' if place else match[0]

    pieces = TAG.split(content)
    for text, tag, closing, name in zip(
        pieces[::4], *([*pieces[i::4], ""] for i in (1, 2, 3)), strict=True
    ):
        if not closed_to:  # "γ-" stays with the name of its loss
            text = re.sub(r"γ-\w+", r'<span class="nobr">\g<0></span>', TERM.sub(link, text))
        parts += [text, tag]
        if name in UNLINKED:
            closed_to += -1 if closing else 1
    return "".join(parts)


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

    def joined(match: re.Match[str]) -> str:  # the default is that of the first name
        kind = re.sub(r", default:.*(?=\))", "", match[2], flags=re.DOTALL)
        return (f'<li class="doc-section-item field-body">{match[1]}, {match[4]}{kind} – '
                f"{match[3]}</li>")  # fmt: skip

    content = EMPTY.sub("", content.replace(ANY, ""))
    while (shorter := SHARED.sub(joined, content)) != content:
        content = shorter
    return NAME.sub(link, SHAPE.sub(types, TEXT_FORMULA.sub(formula, content)))


def _shape(match: re.Match[str]) -> str:
    one = match[1] and "," not in match[1]
    return f"shape ({match[1]}{',' * bool(one)})"
