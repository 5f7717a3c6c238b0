"""All measurements that a GPU lent for half an hour should answer: six commands, the first first.

    python -m bench.campaign --plan                 the commands, their limits, and what they need
    python -m bench.campaign COMMAND ... --out DIR [--bundle DIR]
    python -m bench.campaign --smoke --out DIR      all of them in their smallest form, on any CPU
    python -m bench.campaign table                  bench/results/*/*.jsonl into bench/README.md

In a checkout that is not installed, put `PYTHONPATH=kernels` before it. A command writes one file,
COMMAND.jsonl: first the machine, then for each stage its name, its rows, each the moment that it
exists, and how it ended. A stage ends at its limit, and one that fails leaves the last lines of its
error; either way the next one starts. Time that a stage leaves goes to those after it.

The machine needs torch, torchvision, triton, numpy, scikit-learn, pytest with -benchmark and
-timeout, hypothesis, pyyaml, rich and safetensors. Nothing is downloaded.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from shutil import which

from bench.machine import ROOT, describe
from bench.report import write_table
from bench.rows import append

RESULTS = ROOT / "bench" / "results"
TAIL = 4000  # characters of a failed stage's output to keep


@dataclass(frozen=True)
class Stage:
    """Arguments of python; {rows} stands for the command's file, {out} for the folder of runs."""

    arguments: list[str]
    limit_s: float
    under: tuple[str, ...] = ()
    """A program and its flags to run python under, where it is installed."""


def tests(*arguments: str) -> list[str]:
    # Triton compiles for minutes, on one core per process
    parallel = ["-n", "8"] if find_spec("xdist") and (os.cpu_count() or 1) >= 16 else []
    report = ["-p", "bench.rows", "--rows={rows}", "--continue-on-collection-errors"]
    return ["-m", "pytest", "-q", *report, *parallel, *arguments]


def benchmarks(*arguments: str) -> list[str]:
    report = ["-p", "bench.rows", "--rows={rows}", "--benchmark-columns=median,iqr,rounds"]
    return ["-m", "pytest", "-q", *report, *arguments]


def script(module: str, *arguments: str) -> list[str]:
    return ["-m", f"bench.{module}", "--rows={rows}", *arguments]


def test_files(marker: str) -> list[str]:
    """Test files with tests of this marker; DALI's are left out, for it is too large to carry."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    found = [f for f in files if marker in f.read_text("utf-8") and "dali" not in f.name]
    return [str(file.relative_to(ROOT)) for file in found]


def of_kernels() -> list[str]:
    files = sorted((ROOT / "tests" / "kernels").glob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if file.name != "test_aot.py"]


SANITIZER = ("compute-sanitizer", "--error-exitcode=9", "--print-limit=20")
METHODS = "simsiam and not symsimsiam"
COMMANDS: dict[str, dict[str, Stage]] = {
    "correctness": {
        "gpu": Stage(tests("-m", "gpu", *test_files("mark.gpu")), 140),
        "kernels": Stage(tests(*of_kernels()), 250),
        "memory": Stage(
            benchmarks("bench/bench_kernels.py", "--benchmark-disable", "-k", "rdm"), 90, SANITIZER
        ),
    },
    "micro": {
        "library": Stage(
            benchmarks(
                *("bench/bench_parts.py", "bench/bench_kernels.py", "--first", "--seconds=0.3"),
                *("-k", "not blocks and not compiled"),
            ),
            170,
        ),
        "blocks": Stage(benchmarks("bench/bench_parts.py", "--seconds=0.2", "-k", "blocks"), 130),
        "profile": Stage(script("profile", "--shape", "512", "2048"), 60),
    },
    "loss": {
        "loss": Stage(benchmarks("bench/bench_spectral_loss.py", "--first", "--seconds=0.4"), 240),
    },
    "step": {
        "step": Stage(
            benchmarks("bench/bench_step.py", "--first", "--seconds=1", "-k", METHODS), 100
        ),
        "peers": Stage(script("compare_peers", "--case", "cifar10 resnet18 32px b512"), 80),
        "views": Stage(
            benchmarks(
                *("bench/bench_augment.py", "bench/bench_data_wait.py", "--first"),
                *("--seconds=0.3", "-k", "not imagenet"),
            ),
            60,
        ),
    },
    "accuracy": {
        "large": Stage(
            script("accuracy", "--engine", "gemm", "--dtype", "bfloat16", "--shape", "512", "2048"),
            120,
        ),
        "wide": Stage(script("accuracy", "--engine", "gemm", "eigh", "--shape", "128", "384"), 70),
        "prototypes": Stage(script("prototypes"), 20),
    },
    "learning": {
        "learning": Stage(
            script("learning", "--out={out}/learning", "--epochs=8", "--minutes=2"), 150
        ),
    },
}
CARRIED = {  # and variables of the environment to name it
    "step": (
        "lightly's wheel, unpacked into runs/carried/site; without it, its rows are left out",
        "PYTHONPATH=kernels:runs/carried/site",
    ),
    "learning": (
        "CIFAR-10 as runs/carried/cifar10_jpeg.npz; without the variable, scikit-learn's digits",
        "PYTHONPATH=kernels RDM_CIFAR10_NPZ=runs/carried/cifar10_jpeg.npz",
    ),
}


# ---- running -------------------------------------------------------------------------------------


def environment(*, small: bool) -> dict[str, str]:
    """Environment of the stages: this checkout first, then what the caller has."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    switch = {"RDM_BENCH_SMALL": "1"} if small else {}
    return os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)} | switch


def run(command: list[str], log: Path, env: Mapping[str, str], limit_s: float) -> int | None:
    """Run a command with its output in a file; its exit status, or None at the limit."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=output, stderr=output, start_new_session=True
        )
        try:
            return process.wait(timeout=max(limit_s, 1))
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with all processes that it started
            process.wait()


def run_command(name: str, out: Path, bundle: Path, *, small: bool, commit: str = "") -> bool:
    """Run the stages of a command; whether all passed. Its file in `bundle` is begun afresh."""
    out, path = out.resolve(), bundle.resolve() / f"{name}.jsonl"
    for folder in (out, path.parent):
        folder.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    machine = describe() | ({"commit": commit} if commit else {})
    append(path, {"campaign": name, "smoke": small, "machine": machine})
    deadline, passed = time.monotonic(), True
    for title, stage in COMMANDS[name].items():
        began, deadline = time.monotonic(), deadline + stage.limit_s
        append(path, {"stage": title, "command": shlex.join(["python", *stage.arguments])})
        filled = [
            a.replace("{rows}", str(path)).replace("{out}", str(out)) for a in stage.arguments
        ]
        under = stage.under if stage.under and which(stage.under[0]) else ()
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "log"
            status = run(
                [*under, sys.executable, *filled], log, environment(small=small), deadline - began
            )
            tail = log.read_text("utf-8", errors="replace")[-TAIL:] if status != 0 else ""
        seconds = round(time.monotonic() - began, 1)
        append(path, {"ended": title, "status": status, "seconds": seconds, "tail": tail})
        verdict = {0: "passed", None: "time ran out"}.get(status, f"exit status {status}")
        print(f"{name} {title}: {seconds:.0f} s, {verdict}\n{tail}".rstrip(), flush=True)
        passed &= status == 0
    return passed


def limit_of(name: str) -> float:
    return sum(stage.limit_s for stage in COMMANDS[name].values())


def plan() -> str:
    """The commands in their order, as to be given to the machine."""
    commit, lines = describe()["commit"], []
    for name, stages in COMMANDS.items():
        limits = ", ".join(f"{title} {stage.limit_s:.0f}" for title, stage in stages.items())
        carried, variables = CARRIED.get(name, ("nothing", "PYTHONPATH=kernels"))
        lines += [
            f"{name}: at most {limit_of(name):.0f} s ({limits})",
            f"  carries: {carried}",
            f"  {variables} python3 -m bench.campaign {name} --out runs/campaign "
            f'--bundle "$OUT" --commit {commit}',
        ]
    lines.append(f"in all: at most {sum(map(limit_of, COMMANDS)) / 60:g} minutes")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.campaign", description=__doc__.split("\n")[0])
    parser.add_argument(
        "commands", nargs="*", metavar="COMMAND", help=f"of {', '.join(COMMANDS)}; table"
    )
    parser.add_argument("--out", type=Path, help="folder of the runs, for a next command to go on")
    parser.add_argument("--bundle", type=Path, help="folder for the files of results; else --out")
    parser.add_argument("--commit", default="", help="commit of a checkout without .git")
    parser.add_argument("--plan", action="store_true", help="print the commands and what they need")
    parser.add_argument("--smoke", action="store_true", help="everything in its smallest form")
    args = parser.parse_args()
    if args.plan:
        print(plan())
        return 0
    if args.commands == ["table"]:
        write_table(RESULTS, ROOT / "bench" / "README.md")
        return 0
    if unknown := set(args.commands) - {*COMMANDS}:
        parser.error(f"no command {', '.join(sorted(unknown))}: choose from {', '.join(COMMANDS)}")
    if args.out is None:
        parser.error("--out is missing: give a folder for the runs")
    where = args.out, args.bundle or args.out
    passed = [
        run_command(name, *where, small=args.smoke, commit=args.commit)
        for name in args.commands or COMMANDS
    ]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
