"""bench.campaign and its tables: no measurement is lost."""

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.autograd import DeviceType

import bench.learning as learning
import bench.rows
from bench.campaign import COMMANDS, ROOT, Stage, environment, limit_of, plan, run_command, tests
from bench.machine import H100, floor, peak
from bench.markdown import replace_between
from bench.profile import summary, trace
from bench.report import SECTIONS, UNMEASURED, read, seconds, write_table
from tests.spies import refused

ROW = {
    "bench": "bench_gram", "case": "8x8", "name": "rdm", "median_s": 2e-5, "iqr_s": 1e-6,
    "rounds": 5, "iterations": 9,
}  # fmt: skip
WRITE = f"from bench.rows import *; append(Path({{rows!r}}), {ROW!r})".replace(
    "{rows!r}", "'{rows}'"
)


def run(stages: dict[str, Stage], out: Path, monkeypatch: pytest.MonkeyPatch, **how: Any) -> Any:
    """What a command of these stages leaves: whether it passed, its head, and its stages."""
    monkeypatch.setitem(COMMANDS, "micro", stages)
    passed = run_command("micro", out / "runs", out, **({"small": False} | how))
    return passed, *read(out / "micro.jsonl")


def test_a_failed_stage_keeps_its_rows_and_its_error_and_the_next_one_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails = f"{WRITE}; raise ValueError('the reason')"
    stages = {"library": Stage(["-c", fails], 60), "blocks": Stage(["-c", WRITE], 60)}
    passed, head, (first, second) = run(stages, tmp_path, monkeypatch, commit="abc")
    assert not passed and head["machine"]["commit"] == "abc" and not head["smoke"]
    assert first["status"] == 1 and first["rows"] == [ROW]
    assert "ValueError: the reason" in first["tail"]
    assert second["status"] == 0 and second["rows"] == [ROW] and not second["tail"]
    assert run({"library": Stage(["-c", WRITE], 60)}, tmp_path, monkeypatch)[0]


def test_a_stage_at_its_limit_is_stopped_with_its_children_and_leaves_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child writes into a pipe and holds it open as long as it lives."""
    fifo = tmp_path / "alive"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    shell = ["sh", "-c", f"exec > {fifo}; echo; exec sleep 600"]
    child = f"import subprocess; subprocess.run({shell!r})"
    write = f"open('{{rows}}', 'a').write({json.dumps(ROW)!r} + chr(10))"
    stages = {
        "library": Stage(["-c", f"{write}; {child}"], 4),
        "blocks": Stage(["-c", write], 0),  # time ran out before it
        "profile": Stage(["-c", ""], 100),
        "loss": Stage(["-c", "import time; time.sleep(2)"], 0),  # has what `profile` left
    }
    _, _, ended = run(stages, tmp_path, monkeypatch)
    assert ended[0]["status"] is None and ended[0]["rows"] == [ROW]
    assert [stage["status"] for stage in ended[2:]] == [0, 0]
    assert os.read(reader, 9) == b"\n"
    assert select.select([reader], [], [], 60)[0], "a writer is still alive"
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_a_program_that_is_not_installed_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checker").write_text('#!/bin/sh\necho checked > checked\nshift; exec "$@"\n')
    (tmp_path / "checker").chmod(0o755)
    monkeypatch.setattr("bench.campaign.ROOT", tmp_path)
    stages = {"library": Stage(["-c", "print()"], 60, ("checker", "--strict"))}
    for where in ("", str(tmp_path)):
        monkeypatch.setenv("PATH", f"{where}:{os.environ['PATH']}")
        assert run(stages, tmp_path, monkeypatch)[0]
        assert (tmp_path / "checked").exists() == bool(where)


def test_the_plan_has_six_commands_that_fit_into_a_lease() -> None:
    assert [*COMMANDS] == ["correctness", "micro", "loss", "step", "accuracy", "learning"]
    assert all(limit_of(name) <= 540 for name in COMMANDS)
    assert sum(map(limit_of, COMMANDS)) <= 28 * 60
    lines = plan().splitlines()
    assert all(any(f"bench.campaign {name} --out" in line for line in lines) for name in COMMANDS)


def test_every_stage_has_a_table_and_files_that_exist() -> None:
    titles = [title for stages in COMMANDS.values() for title in stages]
    assert {*titles} == {*SECTIONS} and len(titles) == len(SECTIONS)
    words = [word for stages in COMMANDS.values() for s in stages.values() for word in s.arguments]
    files = [word for word in words if word.endswith(".py")]
    assert len(files) > 20 and all((ROOT / file).is_file() for file in files)
    assert not any("dali" in file for file in files)


def test_the_smallest_form_is_one_variable_of_the_environment() -> None:
    small, full = environment(small=True), environment(small=False)
    assert {name for name in small if small[name] != full.get(name)} == {"RDM_BENCH_SMALL"}


def test_outcomes_of_tests_are_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    outcomes = bench.rows.Outcomes(path)

    def end(when: str, outcome: str, error: str = "") -> None:
        outcomes.pytest_runtest_logreport(
            SimpleNamespace(
                nodeid=f"a.py::{when}", when=when, outcome=outcome, passed=outcome == "passed",
                duration=0.5, longreprtext=error,
            )  # type: ignore[arg-type]
        )  # fmt: skip

    end("setup", "passed")
    end("call", "passed")
    end("call", "failed", "\n".join(map(str, range(99))))
    end("setup", "skipped", "no GPU")
    outcomes.pytest_collectreport(
        SimpleNamespace(nodeid="b.py", failed=True, passed=False, outcome="failed",
                        longreprtext="no module")  # type: ignore[arg-type]
    )  # fmt: skip
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["outcome"] for row in found] == ["passed", "failed", "skipped", "failed"]
    assert [row["error"][-5:] for row in found] == ["", "97\n98", "o GPU", "odule"]


def test_the_workers_of_a_parallel_run_write_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their reports reach the process that started them."""
    registered: list[object] = []
    manager = SimpleNamespace(register=registered.append)
    config: Any = SimpleNamespace(getoption=lambda _: Path("x"), pluginmanager=manager)
    bench.rows.pytest_configure(config)
    config.workerinput = {}
    bench.rows.pytest_configure(config)
    assert len(registered) == 1
    for cores, found in ((16, ["-n", "8"]), (8, [])):
        monkeypatch.setattr("bench.campaign.find_spec", lambda name: name)
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        assert tests("a.py")[7:] == [*found, "a.py"]


def test_of_each_file_of_tests_the_smallest_form_runs_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dropped: list[object] = []
    hook = SimpleNamespace(pytest_deselected=lambda items: dropped.extend(items))
    names = ["tests/a.py", "tests/a.py", "tests/b.py", "bench/c.py", "bench/c.py"]
    all_items = [SimpleNamespace(path=ROOT / name, place=i) for i, name in enumerate(names)]
    for small, kept in ((False, range(5)), (True, (0, 2, 3, 4))):
        monkeypatch.setattr(bench.rows, "SMALL", small)
        items: Any = [*all_items]
        bench.rows.pytest_collection_modifyitems(SimpleNamespace(hook=hook), items)  # type: ignore[arg-type]
        assert items == [all_items[i] for i in kept]
    assert dropped == [all_items[1]]


def test_tables_show_results_and_refuse_those_of_a_smoke_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "results"
    readme.write_text("a\n<!-- results: begin -->\nold\n<!-- results: end -->\nb\n")
    results.mkdir()
    write_table(results, readme)
    assert UNMEASURED in readme.read_text() and "old" not in readme.read_text()

    run({"library": Stage(["-c", WRITE], 60)}, results / "gpu", monkeypatch)
    with (results / "gpu" / "micro.jsonl").open("a") as file:  # the machine is lost in a row
        test = {"test": "a.py::b", "outcome": "failed", "seconds": 1.0, "error": "e"}
        rows = [{"stage": "gpu", "command": "c"}, test]
        file.write("\n".join(map(json.dumps, rows)) + '\n{"test": "a.p')
    write_table(results, readme)
    text = readme.read_text("utf-8")
    assert "| gram | 8x8 | rdm | 20 µs | 1 µs | 5 x 9 |" in text
    assert "the machine was lost" in text and "1 failed\n- a.py::b" in text
    assert text.startswith("a\n") and text.endswith("\nb\n")

    run({"library": Stage(["-c", ""], 60)}, results / "gpu", monkeypatch, small=True)
    with refused(ValueError, "--smoke", "micro"):
        write_table(results, readme)


def test_a_stage_has_a_table_of_its_rows() -> None:
    time = {"median_s": 0.5, "iqr_s": 0.01, "rounds": 7, "iterations": 8}
    fed = {"case": "c", "loader": "dali", "workers": 4, "unfed_s": 0.4, "data_percent": 20.0}
    made = {"bench": "bench_two_views", "case": "d", "name": "rdm", "graph_error": "e"}
    text = "\n".join(SECTIONS["views"]([time | fed, time | made]))
    assert "| c | dali, 4 workers | 500 ms ± 10 ms | 400 ms | 20.0 % |" in text
    assert "| two_views | d | rdm | 500 ms | 10 ms | 7 x 8 | failed |" in text
    cell = {"engine": "gemm", "dtype": "bfloat16", "shape": [2, 3], "filter": "f", "fault": ""}
    found = [cell | {"spectrum": "flat", "text": "1e-6"},
             cell | {"spectrum": "k^-1", "text": "2e-1", "fault": "over"},
             cell | {"filter": "h", "spectrum": "flat", "text": "0"}]  # fmt: skip
    text = "\n".join(SECTIONS["large"](found))
    assert "| f | 1e-6 | 2e-1 |\n| h | 0 |  |" in text and "f of k^-1: over" in text
    row = {"case": "2x3 s", "launches": 5, "us": 30.0, "kernels": [["k", 2, 20.0]]}
    assert "| 2x3 s | 5 | 30 µs | k 2 x 20 µs |" in SECTIONS["profile"]([row])[0]
    run = {"run": "r", "data": "digits", "epochs": 2, "knn_top1_by_step": [], "images_per_s": 9.0,
           "n": 1, "last": {"epoch": 1.0}}  # fmt: skip
    later = run | {"knn_top1_by_step": [[0, 1.0], [5, 88.5]], "evaluation": {"top1": 77.25}}
    (text,) = SECTIONS["learning"]([{"run": "new"}, run, later])
    assert text.count("\n") == 2 and "| r | digits | 1.0 of 2 | 88.50 | 77.25 |" in text


def test_a_profile_has_the_operators_of_one_call() -> None:
    row = trace("online2", 4, 6)
    assert row["case"] == "4x6 online2" and row["launches"] > 0 and row["us"] > 0
    assert "rdm::gram" in [name for name, *_ in row["kernels"]]


def test_on_a_gpu_a_profile_has_what_the_gpu_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.profile.GPU", True)
    kinds = {
        "cudaLaunchKernel": (DeviceType.CPU, 0),
        "a": (DeviceType.CUDA, 2),
        "b": (DeviceType.CUDA, 3),
    }
    found = summary(
        SimpleNamespace(key=key, count=2, self_device_time_total=us, device_type=kind)
        for key, (kind, us) in kinds.items()
    )
    assert found == {"launches": 4, "us": 5, "kernels": [("b", 2, 3), ("a", 2, 2)]}


def test_learning_stops_in_time_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    monkeypatch.setattr(learning, "SMALL", True)

    def call(minutes: str) -> dict[str, Any]:
        words = ["x", "--out", str(tmp_path), "--rows", str(rows), "--minutes", minutes]
        monkeypatch.setattr(sys, "argv", words)
        assert learning.main() == 0
        return json.loads(rows.read_text().splitlines()[-1])

    stopped = call("0")
    assert (tmp_path / "0" / "checkpoints" / "step-00000001").exists()
    assert "last" not in stopped and "evaluation" not in stopped
    done = call("9")
    assert done["last"]["step"] == 7 and done["evaluation"]["top1"] > 10
    content = rows.read_text()
    call("9")
    assert rows.read_text() == content  # nothing is left to do


PROGRAM = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in ("tyro", "docstring_parser", "typeguard", "lightly", "nvidia.dali"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
import bench.accuracy, bench.bench_augment, bench.bench_data_wait, bench.bench_parts
import bench.bench_step, bench.campaign, bench.compare_peers as peers, bench.profile
import bench.learning as learning, bench.prototypes
import tests.runs
assert peers.lightly_version() is None
if len(sys.argv) == 1:
    sys.exit()
sys.argv = ["learning", "--out", sys.argv[1], "--rows", sys.argv[1] + "/rows.jsonl"]
sys.exit(learning.main())
"""


def without_packages(*arguments: str) -> None:
    command = [sys.executable, "-c", PROGRAM, *arguments]
    environ = environment(small=True) | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr


def test_nothing_imports_packages_that_the_machine_lacks() -> None:
    without_packages()


@pytest.mark.slow
def test_learning_needs_no_package_that_the_machine_lacks(tmp_path: Path) -> None:
    without_packages(str(tmp_path))
    last = json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[-1])
    assert last["data"] == "digits" and last["evaluation"]["top1"] > 10


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
