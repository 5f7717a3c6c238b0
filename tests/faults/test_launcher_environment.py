"""A launcher's environment is read in one place: a wrong variable is one line that names it."""

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rdm_fast.cli import commands as cli
from rdm_fast.errors import UsageError
from rdm_fast.runtime import distributed
from rdm_fast.runtime.launcher import NUMBERS, OF_A_RANK, Launched, launched
from rdm_fast.tools.sweep import queue
from tests.forks import ROOT, call, environment, start
from tests.tiny import command

TORCHRUN = {
    "RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
}  # fmt: skip
SRUN = {
    "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "1234", "SLURM_STEP_ID": "2", "SLURM_NNODES": "2",
    "SLURM_JOB_NODELIST": "gpu[007-009,12],big1",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in OF_A_RANK:
        monkeypatch.delenv(name, raising=False)
    yield


def refused(given: dict[str, str]) -> str:
    with pytest.raises(UsageError) as caught:
        launched(given)
    return str(caught.value)


# ---- torchrun --------------------------------------------------------------------------------


def test_without_a_launcher_a_process_is_alone() -> None:
    assert launched({}) == Launched() == launched({"WORLD_SIZE": "1"})
    assert launched({"LOCAL_RANK": "3", "MASTER_PORT": "1"}).world_size == 1


def test_torchrun_says_who_a_process_is_and_where_ranks_meet() -> None:
    assert launched(TORCHRUN) == Launched(1, 4, 1, "127.0.0.1", 29500, "", "torchrun")
    single = launched({"RANK": "0", "WORLD_SIZE": "1"})
    assert (single.rank, single.world_size, single.local_rank) == (0, 1, None)


@pytest.mark.parametrize("name", [name for name in TORCHRUN if name in NUMBERS])
@pytest.mark.parametrize("value", ["abc", "", " 1", "-1", "1.0", "1e3", "²", "9" * 30, "1_0", "\n"])
def test_a_number_that_is_none_is_named(name: str, value: str) -> None:
    assert name in refused({**TORCHRUN, name: value})


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"RANK": "4"}, "RANK"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK"),
        ({"LOCAL_WORLD_SIZE": "5"}, "LOCAL_WORLD_SIZE"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR"),
        ({"RANK": None}, "RANK"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR"),
        ({"MASTER_PORT": None}, "MASTER_PORT"),
    ],
)
def test_values_that_contradict_each_other_or_are_missing_are_named(
    changes: dict[str, str | None], name: str
) -> None:
    given = {k: v for k, v in {**TORCHRUN, **changes}.items() if v is not None}
    assert name in refused(given)


# ---- srun ------------------------------------------------------------------------------------


def test_srun_numbers_ranks_and_the_first_host_of_its_step_is_the_meeting_point() -> None:
    found = launched(SRUN)
    assert found[:4] == (3, 4, 1, "gpu007") and found.launcher == "srun"
    assert 1024 < found.port < 32768  # below the ports that the kernel gives to connections
    assert launched({**SRUN, "SLURM_PROCID": "0"}).port == found.port
    assert launched({**SRUN, "SLURM_STEP_ID": "3"}).port != found.port
    assert launched({**SRUN, "SLURM_STEP_NODELIST": "a-[1,3]-x,b"}).address == "a-1-x"
    assert launched({**SRUN, "SLURM_NNODES": "1"}).address == "127.0.0.1"
    assert launched({**SRUN, "MASTER_ADDR": "head", "MASTER_PORT": "77"})[3:5] == ("head", 77)
    bare = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}
    assert launched(bare)[:2] == (1, 2)
    assert launched({**bare, "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7"}).address == "10.0.0.7"
    assert launched({**SRUN, **TORCHRUN}).launcher == "torchrun"  # srun starts torchrun


@pytest.mark.parametrize(
    "given",
    [
        {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"},  # salloc's shell
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "ENVIRONMENT": "BATCH"},  # sbatch's script
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1",
         "SLURM_STEP_ID": "4294967290"},  # salloc's shell as an interactive step
        {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "ENVIRONMENT": "BATCH"},
    ],
)  # fmt: skip
def test_a_job_that_has_no_several_tasks_here_is_one_process(given: dict[str, str]) -> None:
    assert launched(given) == Launched()


@pytest.mark.parametrize("name", ["SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"])
def test_a_number_of_srun_that_is_none_is_named(name: str) -> None:
    assert name in refused({**SRUN, name: "x"})
    assert "SLURM_PROCID" in refused({**SRUN, "SLURM_PROCID": "4"})


def test_mpirun_is_told_what_to_use_instead() -> None:
    assert "OMPI_COMM_WORLD_SIZE" in refused({"OMPI_COMM_WORLD_SIZE": "2"})
    assert launched({"OMPI_COMM_WORLD_SIZE": "1"}) == Launched()
    assert launched({"PMI_SIZE": "4", **SRUN}).launcher == "srun"


# ---- commands --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "words", "variables", "name"),
    [
        ("train.py", ["--epochs", "1"], {"RANK": "abc"}, "RANK"),
        ("train.py", ["--epochs", "1"], {"RANK": "1"}, "WORLD_SIZE"),
        ("train.py", ["--epoch", "1"], {"RANK": "1"}, "WORLD_SIZE"),
        ("train.py", [], {**TORCHRUN, "MASTER_ADDR": "no such host", "RANK": "0"}, "MASTER_ADDR"),
        ("eval_linear.py", ["runs/a"], {**TORCHRUN, "LOCAL_RANK": ""}, "LOCAL_RANK"),
        ("rdm", ["export", "a"], {"WORLD_SIZE": "0"}, "WORLD_SIZE"),
        ("rdm", ["sweep"], {**SRUN, "SLURM_PROCID": "99"}, "SLURM_PROCID"),
    ],
)
def test_every_command_answers_with_one_line_on_any_rank(
    script: str, words: list[str], variables: dict[str, str], name: str, tmp_path: Path
) -> None:
    if script == "train.py":
        words = command("--out run") + words
    done = call(script, *words, cwd=tmp_path, **variables)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
    assert name in done.stderr


def test_a_process_that_does_not_know_its_rank_speaks_for_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where another program calls the command."""
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "--epoch", "1"])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.count("\n") == 1 and "WORLD_SIZE" in err


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        variables = {**TORCHRUN, "RANK": "0", "MASTER_PORT": str(taken.getsockname()[1])}
        done = call("train.py", *command("--out run"), cwd=tmp_path, **variables)
    assert done.returncode == 2 and "MASTER_PORT" in done.stderr, done.stderr


def test_the_gpu_of_a_rank_follows_from_what_its_launcher_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)

    def chosen(given: dict[str, str]) -> str:
        for name in (*TORCHRUN, *SRUN):
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        return str(distributed.choose_device("auto"))

    assert chosen({}) == "cuda:0" and chosen(TORCHRUN) == "cuda:1"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert chosen(SRUN) == "cuda:0"  # the others are not shown to this task
    with pytest.raises(UsageError, match="LOCAL_RANK"):
        chosen({name: value for name, value in TORCHRUN.items() if "LOCAL" not in name})


def test_two_tasks_of_srun_are_one_run_of_two_ranks(tmp_path: Path) -> None:
    """Without srun here: with its variables."""
    words = command("--out run --optim.epochs 1")
    port = 20000 + os.getpid() % 10000
    tasks = [
        start("train.py", *words, cwd=tmp_path, out=tmp_path / f"{rank}", env=environment() | {
            "SLURM_PROCID": f"{rank}", "SLURM_NTASKS": "2", "SLURM_LOCALID": f"{rank}",
            "SLURM_JOB_ID": str(port), "SLURM_STEP_ID": "0", "SLURM_NNODES": "1",
        })
        for rank in range(2)
    ]  # fmt: skip
    codes = [task.wait() for task in tasks]
    texts = [(tmp_path / f"{rank}").read_text() for rank in range(2)]
    assert codes == [0, 0], texts
    assert "2 rank(s)" in texts[0] and texts[1] == ""


def test_a_sweep_under_one_srun_task_starts_runs_that_are_no_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {**SRUN, **TORCHRUN}.items():
        monkeypatch.setenv(name, value)
    assert launched(queue._environment(None, 1)) == Launched()


def test_no_other_module_reads_these_variables() -> None:
    found = []
    for path in (ROOT / "rdm_fast").rglob("*.py"):
        if path.name not in ("launcher.py", "launch.py"):  # the reader, and what sets them
            text = {
                node.value
                for node in ast.walk(ast.parse(path.read_text("utf-8")))
                if isinstance(node, ast.Constant) and isinstance(node.value, str)
            }
            found += [f"{path.name}: {name}" for name in text & {*TORCHRUN, *SRUN}]
    assert found == []


@pytest.mark.parametrize("name", ["doctor", "sweep"])
def test_a_command_for_one_process_refuses_to_be_a_rank(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable, value in SRUN.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("SLURM_PROCID", "0")
    with pytest.raises(SystemExit) as ended:
        cli.main([name])
    assert ended.value.code == 2 and "srun" in capsys.readouterr().err
