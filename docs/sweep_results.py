"""Copy a sweep's table and figure into docs/sweep.md.

python docs/sweep_results.py runs/sweep_digits_rdm_simsiam
"""

import sys
from pathlib import Path

BEGIN, END = "<!-- sweep: begin -->", "<!-- sweep: end -->"
PAGE = Path(__file__).with_name("sweep.md")


def copy(sweep: Path, page: Path = PAGE) -> None:
    """Copy sweep.md between the page's markers, and sweep.png beside the page."""
    table = (sweep / "sweep.md").read_text(encoding="utf-8")
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    picture = "![Effective rank and rank difference of every filter](sweep.png)"
    text = f"{before}{BEGIN}\n{picture}\n\n{table}{END}{after}"
    (page.parent / "sweep.png").write_bytes((sweep / "sweep.png").read_bytes())
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("error: give the folder of a sweep")
    copy(Path(sys.argv[1]))
