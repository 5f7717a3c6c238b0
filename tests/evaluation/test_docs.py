"""docs/evaluation.md: its tables are complete. (tests/docs/test_docs.py reads its commands.)"""

from pathlib import Path

from rdm_fast.evaluation.protocols import PROTOCOLS
from rdm_fast.models.pretrained import LAYOUTS
from rdm_fast.tools.export.targets import TARGETS

PAGE = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")


def test_the_page_names_all_there_is() -> None:
    for name in (*PROTOCOLS, *TARGETS):
        assert f"`{name}`" in PAGE, name
    for layout in LAYOUTS.values():
        assert not layout.prefix or layout.prefix == "module." or layout.prefix in PAGE, layout
