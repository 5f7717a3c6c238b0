"""What mkdocs does besides mkdocs.yml: pages that lie with what they describe join the site.

On the site they keep their path in the repository, where docs/ is the root; links to and from
them, which are right in the repository, are written anew.
"""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
ELSEWHERE = ("bench/README.md", "kernels/README.md")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    for name in ELSEWHERE:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Links that leave docs/ for such a page, and those that come from it."""
    if page.file.src_uri in ELSEWHERE:
        return markdown.replace("](../docs/", "](../")
    for name in ELSEWHERE:
        markdown = markdown.replace(f"](../{name}", f"]({name}")
    return markdown
