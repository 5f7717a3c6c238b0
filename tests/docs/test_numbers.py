"""Every number on the pages has a command, and `bench.numbers` notices one that is wrong."""

import importlib.util
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import bench.numbers as numbers
from bench.measured import (
    DEFAULT,
    FEW,
    KNN,
    LINEAR,
    NETWORKS,
    RANK,
    SWEEP,
    VARIANTS,
    Column,
    Runs,
    Values,
    lowest_rank,
    measure_branches,
    measure_digits,
    measure_sweep,
    response,
    with_seeds,
)  # fmt: skip
from bench.pages import ENTRIES, Entry, claim, shown
from rdm_fast.config.recipes import RECIPES
from rdm_fast.tools.report.read import Run

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "kernels" / "README.md", ROOT / "bench" / "README.md",
]  # fmt: skip
BLOCK = re.compile(r"^<!-- (\w+): begin -->$.*?^<!-- \1: end -->$", re.DOTALL | re.MULTILINE)

# Code, formulas and links hold settings, not measurements; versions and section numbers neither.
NOT_MEASURED = [
    re.compile(r"^```.*?^```|\$\$.*?\$\$", re.DOTALL | re.MULTILINE),
    re.compile(r"^ {4}.*$|`[^`\n]+`|\$[^$\n]+\$|\[[^\]]*\]\([^)]*\)", re.MULTILINE),
    re.compile(r"\b(?:Python|torch|Triton|lightly|Pillow|Apache|section)[- ]\d+(?:\.\d+)+"),
]
MEASURED = re.compile(r"\d\.\d|\de-\d|\d ?(?:%|images/s|ms\b|MiB|GiB)|± ?\d")


def unbacked(text: str, names: set[str]) -> list[str]:
    """Lines with a measured number outside the blocks with these names."""
    text = BLOCK.sub(lambda match: "" if match[1] in names else match[0], text)
    for pattern in NOT_MEASURED:
        text = pattern.sub("", text)
    return [line for line in text.splitlines() if MEASURED.search(line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_measured_number_has_a_command(page: Path) -> None:
    name = str(page.relative_to(ROOT))
    registered = {key for key, entry in ENTRIES.items() if name in entry.blocks}
    text = page.read_text("utf-8")
    assert {match[1] for match in BLOCK.finditer(text)} == registered
    found = unbacked(text, registered)
    advice = "measured: a block of bench/pages.py; a setting: code font"
    assert not found, f"{name}: {found[0]!r} has a number ({advice})"


@pytest.mark.parametrize(
    ("line", "is_measured"),
    [
        ("| RDM | 98.2 |", True),
        ("| RDM | 98 % |", True),
        ("It makes 1,240 images/s.", True),
        ("A step takes 25 ms.", True),
        ("It needs 3 GiB.", True),
        ("The error is 7e-13 at most.", True),
        ("| RDM | 98 ± 1 |", True),
        ("<!-- other: begin -->\n98.2\n<!-- other: end -->", True),
        ("<!-- mine: begin -->\n98.2\n<!-- mine: end -->", False),
        ("The default is `0.05`; $u = 2.5$; [1.2](x.md).", False),
        ("    rdm train --lr 0.5", False),
        ("Needs Python 3.11 and torch 2.15.0; batch 256, 60 epochs.", False),
    ],
)
def test_what_counts_as_a_measured_number(line: str, is_measured: bool) -> None:
    assert bool(unbacked(line, {"mine"})) == is_measured


def test_every_entry_is_measured_or_says_why_not() -> None:
    for name, entry in ENTRIES.items():
        assert bool(entry.measure) != bool(entry.why), name
        assert bool(entry.columns) == (name in {p.stem for p in numbers.RESULTS.glob("*.json")})
    assert any(entry.quick for entry in ENTRIES.values())


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if entry.columns])
def test_pages_show_the_results(name: str) -> None:
    assert not numbers.stale(name)
    for row in numbers.read_record(name)["values"].values():
        assert row.keys() <= ENTRIES[name].columns.keys()


# ---- the rule ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("committed", "new", "column", "allowed"),
    [
        ([98.0, 99.0, 100.0], 1, Column(1, 0.1), 5.7735),  # 5 (1 + 1/3)^1/2, s = 1
        ([98.0, 99.0, 100.0], 3, Column(1, 0.1), 4.0825),  # 5 (2/3)^1/2
        ([98.0, 98.0], 1, Column(1, 0.25), 0.25),
        ([60.0], 1, Column(1, 1.0, 0.2), 12.0),
        ([2.0], 1, Column(1, 1.0, 0.2), 1.0),
    ],
)
def test_the_tolerance(committed: list[float], new: int, column: Column, allowed: float) -> None:
    assert numbers.tolerance(committed, new, column) == pytest.approx(allowed, abs=1e-4)


@pytest.fixture
def entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], list[str]]:
    """Installs numbers of one page that are measured as three values around a mean."""
    (tmp_path / "page.md").write_text("a\n<!-- mine: begin -->\n<!-- mine: end -->\nb\n")
    columns = {"top-1": Column(1, 0.25)}
    monkeypatch.setattr(numbers, "ROOT", tmp_path)
    monkeypatch.setattr(numbers, "RESULTS", tmp_path)

    def install(mean: float, n: int = 3) -> list[str]:
        values = {"row": {"top-1": [mean - 1, mean + 1, mean][-n:]}}
        made = Entry(
            blocks={"page.md": shown("run", columns)}, command="measure",
            measure=lambda runs, quick: values, seeds=range(3), columns=columns,
        )  # fmt: skip
        monkeypatch.setitem(ENTRIES, "mine", made)
        return ["mine"]

    return install


def test_only_a_wrong_number_fails(entry: Callable[..., list[str]], tmp_path: Path) -> None:
    assert numbers.main([*entry(99.0), "--write"]) == 0
    page = (tmp_path / "page.md").read_text("utf-8")
    assert "| row | 3 | 99.0 ± 1.0 |" in page and page.startswith("a\n") and page.endswith("b\n")
    assert json.loads((tmp_path / "mine.json").read_text("utf-8"))["seeds"] == [0, 1, 2]

    # 5 (1 + 1/3)^1/2 = 5.77 for one value, 5 (2/3)^1/2 = 4.08 for three
    for mean, n, status in [
        (93.3, 1, 0), (93.2, 1, 1), (104.7, 1, 0), (104.8, 1, 1), (94.9, 3, 1), (95.0, 3, 0),
        (math.nan, 1, 1),
    ]:  # fmt: skip
        assert numbers.main([*entry(mean, n), "--check"]) == status, (mean, n)


def test_a_page_that_was_edited_fails(entry: Callable[..., list[str]], tmp_path: Path) -> None:
    numbers.main([*entry(99.0), "--write"])
    page = tmp_path / "page.md"
    page.write_text(page.read_text("utf-8").replace("99.0", "99.4"), "utf-8")
    assert numbers.main([*entry(99.0), "--check"]) == 1
    assert numbers.main(["mine", "--render"]) == 0
    assert numbers.main(["mine", "--check"]) == 0


def test_a_measurement_that_fails_is_reported(
    entry: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    numbers.main([*entry(99.0), "--write"])

    def broken(runs: Runs, quick: bool) -> Values:
        return {"row": {"top-1": [float(runs.call("-c", "raise SystemExit('no memory')"))]}}

    monkeypatch.setitem(ENTRIES, "mine", replace(ENTRIES["mine"], measure=broken))
    assert numbers.main(["mine", "--check"]) == 1
    assert "no memory" in capsys.readouterr().out


def test_the_list_says_what_is_not_checked(capsys: pytest.CaptureFixture) -> None:
    assert numbers.main([]) == 0
    listed = capsys.readouterr().out
    for name, entry in ENTRIES.items():
        assert name in listed and entry.command in listed and entry.why in listed
    with pytest.raises(SystemExit) as error:
        numbers.main(["nothing"])
    assert error.value.code == 2


# ---- values ------------------------------------------------------------------------------------


def test_values_of_a_sweep_and_the_claim_made_of_them(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = {"online": 1.0, "target": 4.0, "projection": 4.0}
    row = {"knn_top1": 97.0, "probe_top1": 98.0, "effective_rank": ranks, "rank_difference": 3.0}
    rows = [
        row | {"filter": "online s^1", "rank_difference_lowest": 0.5},
        row | {"filter": "target s^-1", "rank_difference_lowest": 0.1},
        row | {"filter": "no filter", "rank_difference_lowest": 0.0},
    ]

    def call(runs: Runs, _: str, module: str, command: str, *arguments: str) -> None:
        assert importlib.util.find_spec(f"{module}.__main__") and command == "sweep"
        out = Path(arguments[arguments.index("--out") + 1])
        out.mkdir()
        (out / "sweep.json").write_text(json.dumps({"rows": rows}))

    monkeypatch.setattr(Runs, "call", call)
    values = measure_sweep(runs, quick=False)
    assert [value for [value] in values["online s^1"].values()] == [97, 98, 1, 4, 4, 3, 0.5]
    assert list(values["online s^1"]) == list(SWEEP)
    assert "All 2 filters" in claim({"values": values})
    values["target s^-1"]["lowest"] = [0.0]
    assert "1 of the 2 filters" in claim({"values": values})


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """Runs whose seed k ends with effective rank 50 + k, after 1, 9 and 7 at epochs 1 to 3."""

    def read(path: Path, label: str) -> Run:
        seed = int(path.name[-1]) if "seed" in path.name else 0
        ranks = zip((1, 2, 3, 60), (1.0, 9.0, 7.0, 50.0 + seed), strict=True)
        lines = [{"step": 7 * e, "epoch": e, "effective_rank/projection": r} for e, r in ranks]
        config = RECIPES["digits_rdm_simsiam"]()
        evaluation = {"top1": 90.0 + seed, "knn_top1": 80.0 + seed}
        return Run(path, label, config=config, lines=lines, evaluation=evaluation)

    monkeypatch.setattr("bench.measured.read_run", read)
    probed = SimpleNamespace(top1=97.7, knn_top1=97.5)
    monkeypatch.setattr("bench.measured.score", lambda *args, **options: probed)
    monkeypatch.setattr(Runs, "evaluated", lambda self, runs: list(runs))
    return Runs(tmp_path, jobs=1)


def test_digits_have_every_seed_with_and_without_the_filter(runs: Runs) -> None:
    with_filter, without, pixels = measure_digits(runs, quick=False).values()
    assert with_filter == without == {
        LINEAR: [90, 91, 92, 93, 94], KNN: [80, 81, 82, 83, 84], RANK: [50, 51, 52, 53, 54]
    }  # fmt: skip
    assert pixels == {LINEAR: [97.7], KNN: [97.5]}
    paths = {runs.path(row) for flags in VARIANTS.values() for row in with_seeds(flags)}
    assert len(paths) == 10
    assert measure_digits(runs, quick=True) == {
        DEFAULT: {LINEAR: [90], KNN: [80], RANK: [50]}, "raw pixels, same probe": pixels
    }  # fmt: skip


def test_each_branch_of_each_seed_is_evaluated_once(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []

    def call(_: Runs, program: str, run: str, *arguments: str) -> None:
        *flags, _, out = arguments
        asked.append((program, *flags))
        Path(out).mkdir()
        found = {"top1": 90.0 + int(run[-1]), "knn_top1": 80.0, "effective_rank": len(flags)}
        (Path(out) / "x.json").write_text(json.dumps(found))

    monkeypatch.setattr(Runs, "call", call)
    values = measure_branches(runs, quick=False)
    assert measure_branches(runs, quick=False) == values
    assert asked == [("eval_linear.py", *flags) for flags in NETWORKS.values() for _ in FEW]
    for title, flags in NETWORKS.items():
        tops = [90.0 + seed for seed in FEW]
        alike = {KNN: [80.0] * len(FEW), RANK: [len(flags)] * len(FEW)}
        assert values[title] == {LINEAR: tops} | alike


def test_the_lowest_rank_is_that_after_the_guards_warm_up(runs: Runs) -> None:
    assert lowest_rank(runs.folder) == 50.0  # 5 % of 60 epochs: the first three are left out


def test_the_measured_response_of_known_directions() -> None:
    """s falls, g is its exact order but for the weakest, which is cut off in one record."""
    s = np.array([100.0, 50, 20, 10, 4, 2, 1])
    g = np.array([0.9, 0.8, 0.7, 0.1, -0.05, 0.03, np.nan])
    first = {"s": np.full(7, 1e9), "response": np.full(7, 1e9)}  # not among the last three
    full = {"s": s, "response": np.where(np.isnan(g), 0, g)}
    all_, strong, strongest, weak = response([first, full, full, {"s": s, "response": g}])
    # Ranks 6 5 4 3 2 1 and 6 5 4 3 1 2: 1 - 6 * 2 / (6 * 35)
    assert all_ == pytest.approx(1 - 12 / 210)
    assert strong == pytest.approx(1.0)  # the four above 5
    assert strongest == pytest.approx(0.8) and weak == pytest.approx((0.1 + 0.05 + 0.03) / 3)
