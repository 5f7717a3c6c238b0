"""docs/scaling: files that a user copies are whole, and what they start exists."""

import ast
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from rdm_fast.cli.parse import parse_evaluate, parse_train
from rdm_fast.errors import Interrupted, RankLost

DOCS = Path(__file__).parents[2] / "docs"
FILES = sorted((DOCS / "scaling").iterdir())
SHELL = [file for file in FILES if file.suffix in (".sh", ".sbatch")]
YAML = [file for file in FILES if file.suffix == ".yaml"]
# what starts training, with the words after it up to the end of the command
STARTS = re.compile(
    r"(?:torchrun(?:\.sh)?|train\.py|rdm train|-m rdm_fast train) +"
    r"([a-z]+[0-9]*_\w+(?: [^\n#`&|]*)?)"
)


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def commands(text: str) -> list[list[str]]:
    """The words after every start of training in a text of commands."""
    text = re.sub(r"\\\n#? *", "", text)  # joined lines, also in a comment
    return [shlex.split(words.rstrip('" ')) for words in STARTS.findall(text)]


def lists(node: Any) -> Iterator[list[str]]:
    """Every command of a Kubernetes container: command and args together."""
    if isinstance(node, dict):
        if "command" in node:
            yield [*node["command"], *node.get("args", [])]
        for value in node.values():
            yield from lists(value)
    elif isinstance(node, list):
        for value in node:
            yield from lists(value)


def training(file: Path) -> list[list[str]]:
    found = commands(file.read_text("utf-8"))
    if file.suffix == ".yaml":
        for document in yaml.safe_load_all(file.read_text("utf-8")):
            for words in lists(document):
                assert words[:4] == ["torchrun", "-m", "rdm_fast", "train"]
                found.append(words[4:])
    return found


def test_the_page_names_every_file_and_no_other() -> None:
    text = (DOCS / "scaling.md").read_text("utf-8")
    assert sorted(set(re.findall(r"\(scaling/([\w.]+)\)", text))) == [file.name for file in FILES]


@pytest.mark.parametrize("file", [DOCS / "scaling.md", *FILES], ids=lambda file: file.name)
def test_every_training_command_is_understood(file: Path) -> None:
    found = training(file)
    assert found or file.name in ("torchrun.sh",)
    for words in found:
        words = [re.sub(r"\$\{?\w+\}?", "8", word) for word in words]
        assert parse_train(words).config


def test_the_commands_are_found() -> None:
    """A pattern that finds nothing would make the test above say nothing."""
    counts = {file.name: len(training(file)) for file in [DOCS / "scaling.md", *FILES]}
    assert counts == {
        "scaling.md": 5, "kubeflow.yaml": 1, "ray_train.py": 1, "skypilot.yaml": 1,
        "slurm.sbatch": 1, "torchrun.sh": 1,
    }  # fmt: skip


def test_every_evaluation_command_is_understood() -> None:
    text = (DOCS / "scaling.md").read_text("utf-8")
    found = re.findall(r"eval_linear\.py +([^\n#`]+)", text)
    assert found
    for words in found:
        assert parse_evaluate(shlex.split(words)).checkpoint


def test_every_flag_on_the_page_exists() -> None:
    text = (DOCS / "scaling.md").read_text("utf-8")
    for flag in set(re.findall(r"`(--(?:parallel|optim|log)[\w.-]+)`", text)):
        value = {"--parallel.compress": "bf16", "--optim.backend": "apex"}.get(flag, "8")
        parse_train([flag] if flag == "--parallel.static-graph" else [flag, value])


def check_shell(text: str) -> None:
    """By bash's parser, and by shellcheck where it is installed."""
    subprocess.run(["bash", "-n"], input=text, text=True, check=True, timeout=30)
    if shutil.which("shellcheck"):
        done = subprocess.run(
            ["shellcheck", "--shell=bash", "-"],
            input=text, capture_output=True, text=True, timeout=180,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", SHELL, ids=lambda file: file.name)
def test_shell_scripts_are_sound(file: Path) -> None:
    text = file.read_text("utf-8")
    assert text.startswith("#!/usr/bin/env bash\n")
    check_shell(text)


@pytest.mark.parametrize("file", YAML, ids=lambda file: file.name)
def test_yaml_files_parse(file: Path) -> None:
    assert all(isinstance(doc, dict) for doc in yaml.safe_load_all(file.read_text("utf-8")))


def test_the_shell_inside_yaml_is_sound() -> None:
    task = yaml.safe_load((DOCS / "scaling/skypilot.yaml").read_text("utf-8"))
    for key in ("setup", "run"):
        check_shell(task[key])


def test_schedulers_start_again_what_was_saved_or_lost_a_rank() -> None:
    again = [Interrupted.code, RankLost.code]
    task = yaml.safe_load((DOCS / "scaling/skypilot.yaml").read_text("utf-8"))
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == again
    slurm = (DOCS / "scaling/slurm.sbatch").read_text("utf-8")
    assert f"{again[0]} | {again[1]}) scontrol requeue" in slurm


def test_python_files_are_python() -> None:
    ast.parse((DOCS / "scaling/ray_train.py").read_text("utf-8"))


STANDIN = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$WORDS"
mkdir -p "$OUT"
[ -z "$TOLD" ] || printf '{\\n "state": "failed",\\n "code": %s,\\n "step": 3\\n}\\n' "$TOLD" > "$OUT/status.json"
exit "$CODE"
"""  # noqa: E501


def stand_in(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("code", "told", "expected"),
    [("0", "0", 0), ("1", "75", 75), ("1", "71", 71), ("1", "0", 1), ("1", "", 1), ("0", "75", 0)],
)
def test_torchrun_sh_ends_with_the_runs_own_code(
    code: str, told: str, expected: int, tmp_path: Path
) -> None:
    stand_in(tmp_path / "torchrun", STANDIN)
    words = tmp_path / "words"
    settings = {
        "PATH": f"{tmp_path}:/usr/bin:/bin", "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a",
        "OUT": str(tmp_path / "a run"), "WORDS": str(words), "CODE": code, "TOLD": told,
    }  # fmt: skip
    script = str(DOCS / "scaling/torchrun.sh")
    done = subprocess.run(
        ["bash", script, "digits_byol", "--epochs", "3"], env=settings, timeout=30
    )
    assert done.returncode == expected
    given = words.read_text().splitlines()
    assert given[given.index("-m") :] == [
        *("-m", "rdm_fast", "train", "digits_byol", "--epochs", "3"),
        *("--out", str(tmp_path / "a run")),
    ]
    assert given[given.index("--nproc-per-node") + 1] == "gpu"
    del settings["NODE_RANK"]
    assert subprocess.run(["bash", script], env=settings, timeout=30, stderr=-1).returncode != 0


SAVES_ON_USR1 = """#!/usr/bin/env bash
stop() {
  echo '{"code": 75}' > "$OUT/status.json"
  exit 1
}
trap stop USR1
mkdir -p "$OUT"
printf '{"pid": %s, "host": "a"}\\n' "$$" > "$OUT/run.lock.json"
sleep 60 &
wait
"""


def test_slurm_saves_before_the_time_is_up_and_queues_itself_again(tmp_path: Path) -> None:
    """SLURM signals the batch script; the rank that holds the run folder's lock gets one signal."""
    tools = tmp_path / "bin"
    tools.mkdir()
    stand_in(tools / "torchrun", SAVES_ON_USR1)
    stand_in(tools / "srun", '#!/usr/bin/env bash\nshift\nSLURM_NODEID=0 exec "$@"\n')
    stand_in(tools / "scontrol", '#!/usr/bin/env bash\necho "$@" >> "$ASKED"; echo a\n')
    out, asked = tmp_path / "run", tmp_path / "asked"
    settings = {
        "PATH": f"{tools}:/usr/bin:/bin", "OUT": str(out), "ASKED": str(asked),
        "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "a,b", "SLURM_JOB_ID": "17",
    }  # fmt: skip
    with subprocess.Popen(
        ["bash", "docs/scaling/slurm.sbatch"], cwd=DOCS.parent, env=settings
    ) as job:
        deadline = time.monotonic() + 30
        lock = out / "run.lock.json"
        while not (lock.exists() and lock.read_text().endswith("\n")):
            assert time.monotonic() < deadline and job.poll() is None
            time.sleep(0.01)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(timeout=30) == 75
    assert asked.read_text().splitlines() == ["show hostnames a,b", "requeue 17"]
