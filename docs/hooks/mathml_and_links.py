"""Hooks of the documentation's build (mkdocs.yml): formulas as MathML, and links to files outside of docs/.

Formulas are written in TeX between dollar signs, which the pages of a repository's host show as well. Here they become
MathML: every browser draws it by itself, so that no page loads a script from elsewhere.

A page may link to any file of the repository by its relative path, as in a checkout. Such files are taken into the site:
Markdown as pages (the results, the changes), anything else as it is.
"""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
DOCS = "docs/"
_LINK = re.compile(r"(\]\()([^)\s#]+)([^)\s]*\))")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', flags=re.DOTALL)
_BEFORE_PUNCTUATION = re.compile(
    r'(<math\b[^>]*display="inline"(?:(?!</math>).)*</math>[,.;:)]+)', flags=re.DOTALL
)
_LOADED = re.compile(r"<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=\"?((?:https?:)?//[^\" >]+)")


def in_site(path: str) -> str:
    """Where a file of the repository is in the site."""
    return path.removeprefix(DOCS)


def in_repository(uri: str) -> str:
    """Where a page of the site is in the repository."""
    return DOCS + uri if (ROOT / DOCS / uri).exists() else uri


def linked(path: str, text: str) -> list[str]:
    """Files of the repository, by their paths in it, that the Markdown file at `path` links to."""
    targets = [match[2] for match in _LINK.finditer(text) if ":" not in match[2]]
    paths = [posixpath.normpath(posixpath.join(posixpath.dirname(path), target)) for target in targets]
    return [target for target in paths if not target.startswith("..") and (ROOT / target).is_file()]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every file outside of docs/ that a page links to, also through another such page."""
    pages = [in_repository(file.src_uri) for file in files.documentation_pages()]
    known = set(pages)
    while pages:
        page = pages.pop()
        for path in linked(page, (ROOT / page).read_text(encoding="utf-8")):
            if path in known or path.startswith(DOCS):
                continue
            known.add(path)
            files.append(File.generated(config, in_site(path), abs_src_path=str(ROOT / path)))
            if path.endswith(".md"):
                pages.append(path)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as they are in the repository, turned into links of the site."""
    here = posixpath.dirname(in_repository(page.file.src_uri))

    def turned(match: re.Match[str]) -> str:
        if ":" in match[2]:
            return match[0]
        target = in_site(posixpath.normpath(posixpath.join(here, match[2])))
        return match[1] + posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or ".") + match[3]

    return _LINK.sub(turned, markdown)


def on_page_content(html_text: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas as MathML; a comma stays in the line of its formula."""

    def drawn(match: re.Match[str]) -> str:
        formula = html.unescape(match[2])
        mathml = convert(formula, display="inline" if match[1] == "span" else "block")
        if "\\" in mathml or "<mi>&</mi>" in mathml:  # a command that the converter does not know
            raise PluginError(f"{page.file.src_uri}: not understood: {formula}")
        return mathml

    return _BEFORE_PUNCTUATION.sub(
        r'<span class="with-punctuation">\1</span>', _FORMULA.sub(drawn, html_text)
    )


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Refuse a page that loads anything from another host, or that shows a formula as TeX."""
    loaded = _LOADED.search(output)
    if loaded:
        raise PluginError(f"{page.file.src_uri}: loads {loaded[1]}; a page of this site needs no other host")
    if "arithmatex" in output:
        raise PluginError(f"{page.file.src_uri}: a formula has not become MathML")
    return output
