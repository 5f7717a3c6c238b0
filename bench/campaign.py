"""All measurements that a lent GPU should answer, in stages of at most nine minutes each.

    python -m bench.campaign [STAGE ...] --out DIR [--wheels DIR]     on the machine
    python -m bench.campaign --smoke --out DIR      each stage in its smallest form, on any CPU
    python -m bench.campaign table                  bench/results/*/*.json into bench/README.md

In a checkout that is not installed, put `PYTHONPATH=kernels` before it. A stage writes
DIR/STAGE.json when it ends: the machine, its commands, what they measured, and whether they passed.
If it fails or is stopped at its limit, that is recorded with the measurements so far, and the next
stage starts.

The machine needs torch, torchvision, triton and the packages in `NEEDED`. The campaign reports
those that are missing and downloads nothing: `--wheels` names a folder with their wheels.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from bench.machine import ROOT, describe
from bench.report import write_table

RESULTS = ROOT / "bench" / "results"
NEEDED = {  # import name: distribution
    "numpy": "numpy",
    "pytest": "pytest",
    "pytest_benchmark": "pytest-benchmark",
    "pytest_timeout": "pytest-timeout",
    "cpuinfo": "py-cpuinfo",
    "hypothesis": "hypothesis",
    "sortedcontainers": "sortedcontainers",
    "tyro": "tyro",
    "docstring_parser": "docstring-parser",
    "typeguard": "typeguard",
}
LIMIT_S = 520.0  # of a stage; a lent machine ends a command after ten minutes
TAIL = 6000  # characters of output to keep


@dataclass(frozen=True)
class Stage:
    """Commands to run one after the other, and a reader of their measurements."""

    commands: list[list[str]]
    smoke: list[list[str]]
    read: Callable[[Path], Any]  # the scratch folder's results, as JSON values
    limit_s: float = LIMIT_S


def rows(scratch: Path) -> list[dict[str, Any]]:
    """The rows that benchmarks wrote."""
    path = scratch / "rows.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def numbers(scratch: Path) -> dict[str, Any]:
    """The JSON files that other commands wrote, by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(scratch.glob("*.json"))}


def outcomes(scratch: Path) -> dict[str, Any]:
    """Numbers of tests by outcome and names of failed tests, for each test run."""
    found = {}
    for path in sorted(scratch.glob("*.xml")):
        cases = ElementTree.parse(path).getroot().iter("testcase")
        tally: dict[str, Any] = {"passed": 0, "skipped": 0, "failed": []}
        for case in cases:
            kinds = {child.tag for child in case}
            if kinds & {"failure", "error"}:
                tally["failed"].append(f"{case.get('classname')}::{case.get('name')}")
            else:
                tally["skipped" if "skipped" in kinds else "passed"] += 1
        found[path.stem] = tally
    return found


def tests(name: str, *arguments: str) -> list[str]:
    """A run of pytest; {scratch} stands for the stage's folder here and below."""
    report = f"--junitxml={{scratch}}/{name}.xml"
    return ["-m", "pytest", "-q", "--continue-on-collection-errors", report, *PARALLEL, *arguments]


def benchmarks(file: str, *arguments: str) -> list[str]:
    report = ["--rows={scratch}/rows.jsonl", "--benchmark-columns=median,iqr,rounds"]
    return ["-m", "pytest", "-q", f"bench/{file}", *report, *arguments]


def script(module: str, name: str, *arguments: str) -> list[str]:
    """A run of a module of bench that writes {scratch}/name.json."""
    return ["-m", f"bench.{module}", "--json", f"{{scratch}}/{name}.json", *arguments]


def kernel_tests() -> list[list[str]]:
    """The tests of the compiled kernels, one run a file, so that finished files are recorded."""
    files = sorted((ROOT / "tests" / "kernels").glob("test_*.py"))
    return [tests(path.stem, str(path.relative_to(ROOT))) for path in files]


def marked(marker: str) -> list[str]:
    """Test files with tests of this marker; others may import what the machine lacks."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(f.relative_to(ROOT)) for f in files if f"mark.{marker}" in f.read_text("utf-8")]


# Triton compiles for minutes, on one core per process.
PARALLEL = ["-n", "8"] if find_spec("xdist") and (os.cpu_count() or 1) >= 16 else []
TINY = ["--small", "--seconds=0.002"]
KEPT = ["--out=runs/learning", "--minutes=8"]
SMALLEST = "cifar10 resnet8 8px b8"
PEERS = {
    "peers": [f"cifar10 resnet18 32px b{batch}" for batch in (256, 512)],
    "peers-imagenet": [f"imagenet resnet50 224px b{batch}" for batch in (128, 256)],
}
STAGES: dict[str, Stage] = {
    "correctness": Stage(
        [tests("gpu", "-m", "gpu", *marked("gpu")), *kernel_tests()],
        [
            tests("gpu", "-m", "gpu", *marked("gpu")),
            tests("kernels", "tests/kernels/test_gram.py", "-k", "several_tiles or split"),
        ],
        outcomes,
    ),
    "accuracy": Stage(
        [
            script("accuracy", "wide", "--engine", "gemm", "auto", "eigh"),
            script("accuracy", "tall", "--engine", "gemm", "--shape", "384", "128"),
            script(
                "accuracy",
                "large",
                "--engine",
                "gemm",
                "--dtype",
                "bfloat16",
                "--shape",
                "512",
                "2048",
            ),
        ],
        [script("accuracy", "wide", "--engine", "gemm", "--shape", "24", "40")],
        numbers,
    ),
    "kernels": Stage(
        [benchmarks("bench_kernels.py", "--seconds=0.4")],
        [benchmarks("bench_kernels.py", *TINY)],
        rows,
    ),
    **{
        name: Stage(
            [benchmarks("bench_spectral_loss.py", "--seconds=0.4", "-k", shapes)],
            [benchmarks("bench_spectral_loss.py", *TINY, "-k", few)],
            rows,
        )
        for name, shapes, few in (
            ("loss", "512x2048 or 256x or 1024x2048", "32x64"),
            ("loss-large", "2048x2048 or 4096x2048", "64x32 and target"),
            ("loss-huge", "4096x8192", "64x32 and online1"),
        )
    },
    **{
        name: Stage(
            [benchmarks("bench_step.py", "--seconds=2", "-k", recipes)],
            [benchmarks("bench_step.py", *TINY)],
            rows,
        )
        for name, recipes in (("step", "cifar10"), ("step-imagenet", "imagenet"))
    },
    **{
        name: Stage(
            [script("compare_peers", "peers", "--case", *cases)],
            [script("compare_peers", "peers", "--case", SMALLEST, "--rounds=1")],
            numbers,
        )
        for name, cases in PEERS.items()
    },
    "augment": Stage(
        [benchmarks("bench_augment.py", "--seconds=0.4")],
        [benchmarks("bench_augment.py", *TINY)],
        rows,
    ),
    "loader": Stage(  # with DALI where it is installed
        [
            benchmarks("bench_data_wait.py"),
            benchmarks("bench_loader.py", "-k", "jpeg or small"),
        ],
        [benchmarks("bench_data_wait.py", "--benchmark-disable")],
        rows,
    ),
    "learning": Stage(  # on RDM_CIFAR10_NPZ; a later call continues its runs
        [
            script(
                "learning",
                "learning",
                "--data",
                os.environ.get("RDM_CIFAR10_NPZ", "cifar10_jpeg.npz"),
                *KEPT,
            )
        ],
        [script("learning", "learning", "--smoke", "--epochs=1", "--out={scratch}/runs")],
        numbers,
    ),
}


# ---- running -------------------------------------------------------------------------------------


def missing() -> list[str]:
    """Needed distributions that cannot be imported."""
    return sorted(name for module, name in NEEDED.items() if find_spec(module) is None)


def install(wheels: Path, site: Path) -> None:
    """Install the wheels of a folder into another one, without network."""
    files = sorted(str(path) for path in wheels.glob("*.whl"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--target", str(site), *files], check=True)
    sys.path.insert(0, str(site))


def environment(site: Path | None) -> dict[str, str]:
    """Environment of the stages: this checkout first, then installed wheels."""
    paths = [str(ROOT), str(ROOT / "kernels"), str(site or ""), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)}


def run(command: list[str], log: Path, env: dict[str, str], limit_s: float) -> int | None:
    """Run a command with its output appended to a file; its exit status, or None at the limit."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=output, stderr=output, start_new_session=True
        )
        try:
            return process.wait(timeout=max(limit_s, 1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with all processes that it started
            process.wait()
            return None


def run_stage(
    name: str, out: Path, env: dict[str, str], *, smoke: bool, commit: str | None = None
) -> dict[str, Any]:
    """Run a stage, write its JSON file, and return the content."""
    stage, started = STAGES[name], time.monotonic()
    ended = []
    with tempfile.TemporaryDirectory() as folder:
        scratch, log = Path(folder), Path(folder) / "log"
        for arguments in stage.smoke if smoke else stage.commands:
            command = [sys.executable, *(a.replace("{scratch}", folder) for a in arguments)]
            status = run(command, log, env, stage.limit_s - (time.monotonic() - started))
            shown = shlex.join(["python", *(a.replace("{scratch}/", "") for a in arguments)])
            ended.append({"command": shown, "status": status})
        result = {
            "stage": name,
            "smoke": smoke,
            "machine": describe() | ({"commit": commit} if commit else {}),
            "commands": ended,
            "passed": all(command["status"] == 0 for command in ended),
            "seconds": round(time.monotonic() - started, 1),
            "measured": stage.read(scratch),
            "tail": log.read_text("utf-8", errors="replace")[-TAIL:].replace(folder, "SCRATCH"),
        }
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1), encoding="utf-8")
    part.replace(path)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.campaign", description=__doc__.split("\n")[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; table")
    parser.add_argument("--out", type=Path, help="folder for a JSON file per stage")
    parser.add_argument("--wheels", type=Path, help="folder with wheels that this machine lacks")
    parser.add_argument("--commit", help="commit of a checkout without .git")
    parser.add_argument("--smoke", action="store_true", help="run the smallest form of every stage")
    args = parser.parse_args()
    if args.stages == ["table"]:
        write_table(RESULTS, ROOT / "bench" / "README.md")
        return 0
    if unknown := set(args.stages) - {*STAGES}:
        parser.error(f"no stage {', '.join(sorted(unknown))}: choose from {', '.join(STAGES)}")
    if args.out is None:
        parser.error("--out is missing: give a folder for the results")
    if find_spec("tests.spectra") is None:
        parser.error("an installed package `tests` hides this checkout's: uninstall it")

    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder) if args.wheels else None
        if site:
            install(args.wheels, site)
        if lacking := missing():
            parser.error(
                f"cannot import {', '.join(lacking)}: put their wheels, which are pure Python, "
                "into a folder and pass it as --wheels"
            )
        passed = True
        for name in args.stages or STAGES:
            print(f"{name} ...", flush=True)
            result = run_stage(
                name, args.out, environment(site), smoke=args.smoke, commit=args.commit
            )
            passed &= result["passed"]
            verdict = "passed" if result["passed"] else "FAILED\n" + result["tail"]
            print(f"{name}: {result['seconds']:.0f} s, {verdict}", flush=True)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
