"""The site builds without a warning, its links lead somewhere, and a browser has nothing to say."""

import html
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import pytest

import gamma_loss

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


LINK = re.compile(r'\s(?:href|src|xlink:href)="?([^">\s]*)')
PLACE = re.compile(r'\sid="?([^">\s]*)')


def test_every_link_leads_to_a_page_and_a_place_on_it(site):
    texts = {page: (site / page / "index.html").read_text("utf-8") for page in pages(site)}
    places = {page: {*PLACE.findall(text), ""} for page, text in texts.items()}
    assert len(texts) > 20
    for page, text in texts.items():
        links = {html.unescape(link) for link in LINK.findall(text)}
        assert len(links) > 20
        for link in links:
            address, place = urldefrag(urljoin(URL + page, link))
            if not address.startswith(URL):
                assert urlsplit(address).scheme in ("https", "data"), link
                continue
            path = unquote(address.removeprefix(URL))
            there = site / path / "index.html" if path.endswith("/") or not path else site / path
            assert there.is_file(), (page, link)
            assert path not in places or unquote(place) in places[path], (page, link)


@pytest.mark.parametrize(
    ("page", "name"), [("losses", "gamma_dpo_loss"), ("modules", "torch.GammaDPOLoss")]
)
def test_the_reference_lists_every_parameter_of_a_signature(site, page, name):
    pytest.importorskip("torch")
    text = (site / "api" / page / "index.html").read_text("utf-8")
    entry = text.partition(f'id="gamma_loss.{name}"')[2].partition('id="gamma_loss.')[0]
    signature = entry.partition("Parameters:")[0]
    value = getattr(gamma_loss, name.removeprefix("torch."))
    for parameter in inspect.signature(value).parameters:
        assert f"<b><code>{parameter}</code></b>" in entry
        assert re.search(rf"\b{parameter}\b", signature)
    assert "options" not in signature


def test_the_first_use_of_a_term_leads_to_the_glossary(site):
    text = (site / "method" / "index.html").read_text("utf-8")
    for term in ("gap", "kappa", "error-bound"):
        assert text.count(f'href="../glossary/#{term}"') == 1, term


@pytest.fixture(scope="module")
def address(site, serve):
    return serve(site)


@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_is_quiet_and_can_be_read(site, browser, address, scheme, width):
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
    look, said = (ROOT / "tests" / "look.js").read_text("utf-8"), []
    for path in pages(site):
        page = context.new_page()
        page.on("console", lambda message, path=path: said.append((path, message.text)))
        page.on("pageerror", lambda error, path=path: said.append((path, str(error))))
        page.on("requestfailed", lambda request, path=path: said.append((path, request.url)))
        page.goto(f"{address}/{path}")
        said.extend((path, complaint) for complaint in page.evaluate(look))
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
