"""Adds two pages to the site that are not in docs/: the READMEs of bench/ and kernels/.

On the site docs/ is the root, so links to and from these pages are rewritten.
"""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
ELSEWHERE = ("bench/README.md", "kernels/README.md")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the two pages."""
    for name in ELSEWHERE:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Rewrite the links between docs/ and the added pages."""
    if page.file.src_uri in ELSEWHERE:
        return markdown.replace("](../docs/", "](../")
    for name in ELSEWHERE:
        markdown = markdown.replace(f"](../{name}", f"]({name}")
    return markdown
