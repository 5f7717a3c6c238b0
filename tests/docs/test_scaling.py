"""docs/scaling: the files are complete and start commands that exist."""

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

from rdm_fast.cli.commands import COMMANDS
from rdm_fast.errors import Interrupted, RankLost

DOCS = Path(__file__).parents[2] / "docs"
FILES = {file.name: file.read_text("utf-8") for file in sorted((DOCS / "scaling").iterdir())}
YAML = {
    name: list(yaml.safe_load_all(text)) for name, text in FILES.items() if name.endswith("yaml")
}
# what starts training, with the words after it up to the end of the command
STARTS = re.compile(r"torchrun(?:\.sh)? +([a-z]+[0-9]*_\w+(?: [^\n#`&|]*)?)")


def container_commands(node: Any) -> Iterator[list[str]]:
    """Every command of a Kubernetes container: command and args together."""
    if isinstance(node, dict):
        if "command" in node:
            yield [*node["command"], *node.get("args", [])]
        for value in node.values():
            yield from container_commands(value)
    elif isinstance(node, list):
        for value in node:
            yield from container_commands(value)


@pytest.mark.parametrize("name", FILES)
def test_each_file_is_on_the_page_and_starts_one_training_that_parses(name: str) -> None:
    assert f"(scaling/{name})" in (DOCS / "scaling.md").read_text("utf-8")
    text = re.sub(r"\\\n#? *", "", FILES[name])  # joins lines, also in a comment
    found = [shlex.split(words.rstrip('" ')) for words in STARTS.findall(text)]
    for words in container_commands(YAML.get(name, [])):
        assert words[:4] == ["torchrun", "-m", "rdm_fast", "train"]
        found.append(words[4:])
    assert len(found) == 1
    COMMANDS["train"].parse([re.sub(r"\$\{?\w+\}?", "8", word) for word in found[0]])


def test_shell_scripts_are_sound() -> None:
    """By bash's parser, and by shellcheck if it is installed."""
    task = YAML["skypilot.yaml"][0]
    for text in (FILES["torchrun.sh"], FILES["slurm.sbatch"], task["setup"], task["run"]):
        subprocess.run(["bash", "-n"], input=text, text=True, check=True, timeout=30)
        if shutil.which("shellcheck"):
            done = subprocess.run(
                ["shellcheck", "--shell=bash", "-"],
                input=text, capture_output=True, text=True, timeout=180,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout
    assert FILES["torchrun.sh"].startswith("#!/usr/bin/env bash\n")
    assert FILES["slurm.sbatch"].startswith("#!/usr/bin/env bash\n")


def test_schedulers_restart_runs_that_were_saved_or_lost_a_rank() -> None:
    again = [Interrupted.code, RankLost.code]
    task = YAML["skypilot.yaml"][0]
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == again
    assert f"{again[0]} | {again[1]}) scontrol requeue" in FILES["slurm.sbatch"]


FAKE_TORCHRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$WORDS"
mkdir -p "$OUT"
[ -z "$STATUS" ] || printf '{\\n "state": "failed",\\n "code": %s,\\n "step": 3\\n}\\n' "$STATUS" > "$OUT/status.json"
exit "$CODE"
"""  # noqa: E501


def write_script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("code", "status", "expected"),
    [("0", "0", 0), ("1", "75", 75), ("1", "71", 71), ("1", "0", 1), ("1", "", 1), ("0", "75", 0)],
)
def test_torchrun_sh_returns_the_exit_code_of_the_run(
    code: str, status: str, expected: int, tmp_path: Path
) -> None:
    write_script(tmp_path / "torchrun", FAKE_TORCHRUN)
    words = tmp_path / "words"
    settings = {
        "PATH": f"{tmp_path}:/usr/bin:/bin", "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a",
        "OUT": str(tmp_path / "a run"), "WORDS": str(words), "CODE": code, "STATUS": status,
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


def test_slurm_saves_before_the_time_limit_and_requeues_itself(tmp_path: Path) -> None:
    """The batch script passes its signal on to the rank that holds the run folder's lock."""
    tools = tmp_path / "bin"
    tools.mkdir()
    write_script(tools / "torchrun", SAVES_ON_USR1)
    write_script(tools / "srun", '#!/usr/bin/env bash\nshift\nSLURM_NODEID=0 exec "$@"\n')
    write_script(tools / "scontrol", '#!/usr/bin/env bash\necho "$@" >> "$ASKED"; echo a\n')
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
