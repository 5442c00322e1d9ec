"""The site builds without a warning, its links lead somewhere, and a browser has nothing to say."""

import importlib
import inspect
import itertools
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.xdist_group("site")  # which is built once
URL = "https://example.org/gamma/"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("material", reason="needs the extra docs")
    pytest.importorskip("mkdocstrings")
    folder = tmp_path_factory.mktemp("site")
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", folder],
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "SITE_URL": URL}, cwd=ROOT, check=True,
    )  # fmt: skip
    return folder


def pages(site):
    """The address of each page, from that of the site: "" or "api/losses/"."""
    folders = [file.parent.relative_to(site) for file in site.rglob("index.html")]
    return sorted(f"{folder.as_posix()}/" if folder.name else "" for folder in folders)


class Page(HTMLParser):
    """Collects what a page links to, and what can be linked to in it."""

    def __init__(self, file):
        super().__init__()
        self.links, self.ids = set(), set()
        self.feed(file.read_text("utf-8"))

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("href", "src", "xlink:href"):
                self.links.add(value)
            elif name == "id":
                self.ids.add(value)


def test_every_link_leads_to_a_page_and_a_place_on_it(site):
    found = {page: Page(site / page / "index.html") for page in pages(site)}
    assert len(found) > 20
    broken = []
    for page, parsed in found.items():
        for link in parsed.links:
            address, place = urldefrag(urljoin(URL + page, link))
            if not address.startswith(URL):
                assert urlsplit(address).scheme in ("https", "data"), link
                continue
            path = unquote(address.removeprefix(URL))
            there = site / path / "index.html" if path.endswith("/") or not path else site / path
            target = found.get(path)
            if not there.is_file() or (place and target and unquote(place) not in target.ids):
                broken.append((page, link))
    assert not broken


def test_the_sitemap_has_every_page(site):
    listed = re.findall("<loc>(.*?)</loc>", (site / "sitemap.xml").read_text("utf-8"))
    assert {URL + page for page in pages(site)} <= set(listed)


@pytest.mark.parametrize(
    ("page", "name"),
    [
        ("losses", "gamma_dpo_loss"),
        ("losses", "gamma_preference_loss"),
        ("margins", "solve_margins"),
        ("modules", "torch.GammaDPOLoss"),
    ],
)
def test_the_reference_lists_every_parameter_of_a_signature(site, page, name):
    pytest.importorskip("torch")
    text = (site / "api" / page / "index.html").read_text("utf-8")
    entry = text.partition(f'id="gamma_loss.{name}"')[2].partition('id="gamma_loss.')[0]
    signature = entry.partition("Parameters:")[0]
    module, _, function = f"gamma_loss.{name}".rpartition(".")
    for parameter in inspect.signature(
        getattr(importlib.import_module(module), function)
    ).parameters:
        assert f"<b><code>{parameter}</code></b>" in entry
        assert re.search(rf"\b{parameter}\b", signature)
    assert "options" not in signature


def test_the_reference_shows_nothing_that_python_adds_to_a_class(site):
    for file in (site / "api").rglob("index.html"):
        text = re.sub(r"<details.*?</details>", "", file.read_text("utf-8"), flags=re.DOTALL)
        for name in ("__annotations__", "__doc__", "__new__", "Alias for field", "new empty dict"):
            assert name not in text, (file, name)


def test_every_entry_of_the_reference_says_something_of_its_own(site):
    entry = re.compile(r'<div class="doc-md-description">(.*?)</div>\s*</li>', re.DOTALL)
    for file in (site / "api").rglob("index.html"):
        for items in re.findall(r"<ul>.*?</ul>", file.read_text("utf-8"), re.DOTALL):
            said = [each.strip() for each in entry.findall(items)]
            assert "" not in said, file
            assert all(one != two for one, two in itertools.pairwise(said)), (file, said)


def test_the_header_has_the_version_and_the_sections(site):
    gamma_loss = importlib.import_module("gamma_loss")
    header = (site / "index.html").read_text("utf-8").partition("</header>")[0]
    assert f">v{gamma_loss.__version__}</a>" in header
    assert header.count('class="md-tabs__link"') > 8


def test_the_first_use_of_a_term_leads_to_the_glossary(site):
    text = (site / "method" / "index.html").read_text("utf-8")
    for term in ("gap", "kappa", "margin", "multiplier", "pool", "error-bound", "matched-loss"):
        assert text.count(f'href="../glossary/#{term}"') == 1, term


@pytest.fixture(scope="module")
def address(site, serve):
    return serve(site)


LOOK = (ROOT / "tests" / "look.js").read_text("utf-8")  # what is wrong with a page


@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_is_quiet_and_can_be_read(site, browser, address, scheme, width):
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
    said = []
    for path in pages(site):
        page = context.new_page()
        page.on("console", lambda message, path=path: said.append((path, message.text)))
        page.on("pageerror", lambda error, path=path: said.append((path, str(error))))
        page.on("requestfailed", lambda request, path=path: said.append((path, request.url)))
        page.goto(f"{address}/{path}")
        said.extend((path, complaint) for complaint in page.evaluate(LOOK))
        page.close()
    context.close()
    assert not said, "\n".join(map(str, said))


def test_what_is_copied_has_no_prompts(browser, address):
    page = browser.new_page()
    page.goto(address + "/quickstart/")
    copied = page.evaluate(
        """() => {
            const code = [...document.querySelectorAll("code")].find(
                each => each.innerText.startsWith(">>> import numpy"));
            code.setAttribute("data-md-copying", "");
            return code.innerText;
        }"""
    )
    page.close()
    assert copied.startswith("import numpy as np\n")
    assert ">>>" not in copied
    assert "0.4538" not in copied
