"""bench.campaign and its tables: no measurement is lost."""

import json
import os
import select
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

import bench.campaign as campaign
from bench.campaign import STAGES, Stage, environment, install, rows, run_stage
from bench.machine import H100, floor, peak
from bench.markdown import replace_between
from bench.report import SECTIONS, UNMEASURED, seconds, write_table
from tests.spies import refused

ROW = (
    '{"bench": "bench_gram", "case": "8x8", "name": "rdm", "median_s": 2e-5, "iqr_s": 1e-6, '
    '"rounds": 5, "iterations": 9}'
)
WRITE = f"open('{{scratch}}/rows.jsonl', 'a').write({ROW!r} + '\\n')"


def stage(*programs: str, limit_s: float = 60.0) -> Stage:
    commands = [["-c", program] for program in programs]
    return Stage(commands, commands, rows, limit_s)


def run(stage: Stage, out: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setitem(STAGES, "kernels", stage)
    result = run_stage("kernels", out, environment(None), smoke=False)
    assert json.loads((out / "kernels.json").read_text("utf-8")) == result
    return result


def test_a_failed_stage_keeps_measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(stage(WRITE, "raise SystemExit(3)", WRITE), tmp_path, monkeypatch)
    assert not result["passed"]
    assert [command["status"] for command in result["commands"]] == [0, 3, 0]
    assert result["measured"] == [json.loads(ROW)] * 2


def test_a_stage_at_its_limit_is_stopped_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child writes into a pipe and holds it open as long as it lives."""
    fifo = tmp_path / "alive"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    shell = ["sh", "-c", f"exec > {fifo}; echo; exec sleep 600"]
    child = f"import subprocess; subprocess.run({shell!r})"
    result = run(stage(f"{WRITE}; {child}", WRITE, limit_s=4.0), tmp_path, monkeypatch)
    assert result["commands"][0]["status"] is None and not result["passed"]
    assert json.loads(ROW) in result["measured"]
    assert os.read(reader, 9) == b"\n"
    assert select.select([reader], [], [], 60)[0], "a writer is still alive"
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_stages_can_import_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = "rdm_brought-1.0.dist-info/"
    files = {
        "rdm_brought.py": "answer = 42",
        info + "METADATA": "Metadata-Version: 2.1\nName: rdm-brought\nVersion: 1.0\n",
        info + "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        info + "RECORD": "",
    }
    with zipfile.ZipFile(tmp_path / "rdm_brought-1.0-py3-none-any.whl", "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    install(tmp_path, tmp_path / "site")
    log = tmp_path / "log"
    command = [sys.executable, "-c", "import rdm_brought; print(rdm_brought.answer)"]
    assert campaign.run(command, log, environment(tmp_path / "site"), 60) == 0
    assert log.read_text() == "42\n"


def test_every_stage_has_a_table_and_a_smallest_form() -> None:
    assert set(SECTIONS) == set(STAGES)
    assert all(stage.smoke for stage in STAGES.values())


def test_tables_show_results_and_refuse_those_of_a_smoke_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "results"
    readme.write_text("a\n<!-- results: begin -->\nold\n<!-- results: end -->\nb\n")
    results.mkdir()
    write_table(results, readme)
    assert UNMEASURED in readme.read_text() and "old" not in readme.read_text()

    run(stage(WRITE), results / "gpu", monkeypatch)
    write_table(results, readme)
    assert "| gram | 8x8 | rdm | 20 µs | 1 µs | 5 x 9 |" in readme.read_text("utf-8")
    text = readme.read_text("utf-8")
    assert text.startswith("a\n") and text.endswith("\nb\n")

    run_stage("kernels", results / "gpu", environment(None), smoke=True)
    with refused(ValueError, "--smoke", "kernels"):
        write_table(results, readme)


def test_the_table_of_loaders_has_the_cost_of_data_and_each_loaders_speed() -> None:
    time = {"median_s": 0.5, "iqr_s": 0.01, "rounds": 7, "iterations": 8}
    fed = {"case": "c", "loader": "dali", "workers": 4, "unfed_s": 0.4, "data_percent": 20.0}
    alone = {"bench": "bench_jpeg", "loader": "torch", "workers": 2}
    speed = {"images_per_s": 1234.5, "cpu_ms_per_image": 7.891}
    text = "\n".join(SECTIONS["loader"]([time | fed, time | alone | speed]))
    assert "| c | dali, 4 workers | 500 ms ± 10 ms | 400 ms | 20.0 % |" in text
    assert "| jpeg | torch | 2 | 1,234 | 500 ms ± 10 ms | 7.89 |" in text
    assert SECTIONS["loader"]([])  # a stage without measurements


def test_missing_markers_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.md"
    for text in ("", "<!-- t: end --> <!-- t: begin -->", "<!-- t: begin --> only"):
        path.write_text(text)
        with refused(ValueError, "<!-- t: begin -->"):
            replace_between(path, "t", "new")
        assert path.read_text() == text


def test_the_floor_is_the_slower_of_bytes_and_operations() -> None:
    assert floor(H100, 3.35e12, {"bf16": 1.0}) == pytest.approx(1.0)
    assert floor(H100, 1.0, {"bf16": 989e12, "tf32": 494e12}) == pytest.approx(2.0)
    assert floor(H100, 3.35e12, {"bf16": 989e12}) == pytest.approx(1.0)  # they overlap
    assert peak("NVIDIA H100 80GB HBM3") == H100
    assert peak("NVIDIA H100 PCIe") is None and peak("NVIDIA A100-SXM4-80GB") is None
    h200 = peak("NVIDIA H200")
    assert h200 is not None and h200.bytes == 4.8e12


def test_times_have_a_unit() -> None:
    assert [seconds(t) for t in (2.0, 0.0123456, 4.2e-5)] == ["2 s", "12.3 ms", "42 µs"]
