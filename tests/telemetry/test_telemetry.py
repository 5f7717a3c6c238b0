"""rdm_fast.telemetry: the file as a JSON parser reads it, and as one undisturbed run writes it."""

import json
import math
import os
import pty
import resource
import subprocess
import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rdm_fast.config.recipes import RECIPES
from rdm_fast.config.saved import config_from_dict
from rdm_fast.errors import Unavailable
from rdm_fast.run import environment as environment_module
from rdm_fast.run.environment import describe_environment
from rdm_fast.run.folder import RunFolder
from rdm_fast.telemetry import KEYS, SPECTRUM_KEYS, Plan, Telemetry, read_spectra
from rdm_fast.telemetry.console import ConsoleLine, progress_line
from rdm_fast.telemetry.lines import JsonLines, SpectrumLines
from rdm_fast.telemetry.trackers import TensorBoard
from rdm_fast.training.trainer import Trainer
from tests.forks import Forked
from tests.runs import TIMING, in_step, run, with_log
from tests.spies import refused
from tests.tiny import tiny

CONFIG = RECIPES["digits_rdm_simsiam"]()
ENVIRONMENT = {"torch": "2.15.0", "config": {"optim": {"lr": 0.1}}}
PLAN = Plan(total_steps=420, steps_per_epoch=7, global_batch=200)
METRICS = {
    "epoch": 3.0, "loss": -0.81234567, "lr": 0.064, "images_per_s": 2000.0, "data_wait_s": 0.003,
    "effective_rank/online": 31.234, "effective_rank/target": 28.0,
}  # fmt: skip


def strict(text: str) -> Any:
    """JSON as RFC 8259 has it: no NaN, no Infinity."""

    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not JSON")

    return json.loads(text, parse_constant=refuse)


def records(path: Path) -> list[dict[str, Any]]:
    text = path.read_text()
    assert text.endswith("\n")
    return [strict(line) for line in text.splitlines()]


def write(path: Path, steps: range, resumed: int = 0, environment: Any = None) -> None:
    lines = JsonLines(path, environment or ENVIRONMENT, resumed)
    for step in steps:
        lines.log(step, {"loss": 1 / step})
    lines.close()


def spectra(step: int) -> dict[str, Any]:
    values = np.linspace(step + 1, 0, 5) / 7
    response = np.array([step, np.nan])
    return {"online": values, "response": response, "alignment": step / 7}


def write_spectra(path: Path, steps: range, resumed: int = 0) -> None:
    lines = SpectrumLines(path, resumed)
    for step in steps:
        lines.log(step, spectra(step))
    lines.close()


# ---- metrics.jsonl ---------------------------------------------------------------------------


def test_the_first_line_is_the_environment_and_the_others_are_flat(tmp_path: Path) -> None:
    """And each is there, to the last digit, as soon as it is logged."""
    expected: list[dict[str, Any]] = [{"environment": ENVIRONMENT}]
    lines = JsonLines(tmp_path / "m", ENVIRONMENT)
    for step in range(1, 4):
        lines.log(step, {"loss": 1 / step})
        expected.append({"step": step, "loss": 1 / step})
        assert records(tmp_path / "m") == expected
    lines.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null(tmp_path: Path, value: float) -> None:
    lines = JsonLines(tmp_path / "m", ENVIRONMENT)
    others = {"note": "nan", "count": 3, "missing": None}
    lines.log(1, {"loss": value, **others})
    lines.close()
    assert records(tmp_path / "m")[1] == {"step": 1, "loss": None, **others}


@pytest.mark.parametrize("died_at", [10, 13, 20])
@pytest.mark.parametrize("resumed", [0, 7, 10])
@pytest.mark.parametrize("write", [write, write_spectra])
def test_a_resumed_file_is_as_if_undisturbed(
    tmp_path: Path, write: Callable[..., None], died_at: int, resumed: int
) -> None:
    write(tmp_path / "whole", range(1, 21))
    write(tmp_path / "m", range(1, died_at + 1))
    with (tmp_path / "m").open("a") as file:
        file.write('{"step": 21, "lo')  # torn by a kill
    write(tmp_path / "m", range(resumed + 1, 21), resumed)
    assert (tmp_path / "m").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize(
    "damage", [b"", b'{"environm', b"\0\0\0\n", b"\xff\n", b"[]\n3\nnull\n", b'{"loss": 1}\n']
)
def test_a_file_without_a_whole_first_line_gets_one(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "m").write_bytes(damage)
    write(tmp_path / "m", range(3, 5), resumed=2)
    assert [r.get("step", "environment") for r in records(tmp_path / "m")] == ["environment", 3, 4]


def test_another_environment_is_recorded_once_where_it_begins(tmp_path: Path) -> None:
    other = {**ENVIRONMENT, "torch": "2.16.0"}
    write(tmp_path / "m", range(1, 6))
    write(tmp_path / "m", range(5, 8), resumed=4, environment=other)
    write(tmp_path / "m", range(7, 9), resumed=6, environment=other)
    added = {"environment": other, "resumed_step": 4}
    steps = [{"step": step, "loss": 1 / step} for step in range(1, 9)]
    first = {"environment": ENVIRONMENT}
    assert records(tmp_path / "m") == [first, *steps[:4], added, *steps[4:]]
    write(tmp_path / "m", range(3, 4), resumed=2)  # from before that environment
    assert records(tmp_path / "m") == [first, *steps[:3]]


def test_a_full_disk_loses_no_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = JsonLines(tmp_path / "m", ENVIRONMENT)
    lines.log(1, {"loss": 1.0})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    room = (tmp_path / "m").stat().st_size + 10  # so the next line would be torn
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        for step in (2, 3, 4):
            lines.log(step, {"loss": 1.0})
            assert [r.get("step") for r in records(tmp_path / "m")] == [None, 1]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    lines.log(5, {"loss": 1.0})
    lines.close()
    assert [r.get("step") for r in records(tmp_path / "m")] == [None, 1, 2, 3, 4, 5]
    assert capsys.readouterr().err.count("warning: m waits in memory") == 1


def test_spectra_are_read_as_they_were_logged_to_five_digits(tmp_path: Path) -> None:
    write_spectra(tmp_path / "s", range(1, 4))
    assert records(tmp_path / "s")[0] == {"keys": SPECTRUM_KEYS}
    assert records(tmp_path / "s")[1]["response"] == [1.0, None]
    found = read_spectra(tmp_path / "s")
    assert [record["step"] for record in found] == [1, 2, 3]
    for record in found:
        expected = spectra(record["step"])
        assert float(record["alignment"]) == expected["alignment"]
        np.testing.assert_allclose(record["online"], expected["online"], rtol=5e-5)
        np.testing.assert_array_equal(record["response"], expected["response"])
    assert read_spectra(tmp_path / "none") == []


# ---- ranks and trackers ----------------------------------------------------------------------


def open_telemetry(out: Path, rank: int, **log: object) -> Telemetry:
    config = config_from_dict({"log": log})
    folder = RunFolder.open(str(out), config, overwrite=False, rank=rank)
    telemetry = Telemetry.open(folder, config, ENVIRONMENT, PLAN)
    folder.close()
    return telemetry


def test_only_rank_0_writes_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (1, 2):
        with open_telemetry(tmp_path, rank, tensorboard=True) as telemetry:
            telemetry.log(1, METRICS)
            telemetry.log_spectra(1, spectra(1))
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""
    with open_telemetry(tmp_path, 0) as telemetry:
        telemetry.log(1, METRICS)
    assert records(tmp_path / "metrics.jsonl")[1] == {"step": 1, **METRICS}
    assert "loss -0.8123" in capsys.readouterr().out


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_shows_one_scalar_a_key_and_hides_what_a_resume_repeats(tmp_path: Path) -> None:
    first = TensorBoard(tmp_path)
    for step in (1, 2, 3):
        first.log(step, {"loss": step / 4, "note": "text", "rank_difference": None})
    first.close()
    second = TensorBoard(tmp_path, resumed_step=2)
    second.log(3, {"loss": 7.0})
    second.close()
    assert scalars(tmp_path) == {"loss": [(1, 0.25), (2, 0.5), (3, 7.0)]}


TIMES = dict.fromkeys(TIMING, 0.0)


def fail(_: Trainer) -> None:
    raise MemoryError


TRACKERS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}


@pytest.mark.parametrize("extra", TRACKERS)
def test_a_missing_tracker(extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, TRACKERS[extra], None)
    with refused(Unavailable, f"--log.{extra} ", f"rdm-fast[{extra}]"):
        open_telemetry(tmp_path, 0, **{extra: True})
    open_telemetry(tmp_path / "other rank", 1, **{extra: True})


@pytest.fixture(params=["wandb", "trackio"])
def tracker(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def calls(tracker: str, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a tracker's package is asked to do."""
    calls: list[Any] = []
    run = types.SimpleNamespace(
        log=lambda metrics, step: calls.append((step, metrics)), finish=lambda: calls.append("end")
    )
    module = types.ModuleType(tracker)
    module.init = lambda **options: calls.append(options) or run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, tracker, module)
    return calls


def test_a_run_that_was_killed_sends_each_metric_of_a_step_once(
    tracker: str, calls: list[Any], tmp_path: Path
) -> None:
    config = with_log(tiny(epochs=2), every=1, knn_every=1, save_every=4, **{tracker: True})
    run(tmp_path / "whole", config)
    whole = [call for call in calls if isinstance(call, tuple)]
    calls.clear()
    for killed in (3, 7, 6):  # before the first checkpoint, after it, and before the last place
        with pytest.raises(MemoryError):
            run(tmp_path / "run", config, partial(in_step, step=killed, action=fail))
    run(tmp_path / "run", config)
    sent = [call for call in calls if isinstance(call, tuple)]
    assert [step for step, _ in sent] == [step for step, _ in whole]
    assert [{**m, **TIMES} for _, m in sent] == [{**m, **TIMES} for _, m in whole]
    calls.clear()
    folder = tmp_path / "run" / f"{tracker}.json"
    for text in ("", "[]", "{}", '{"run": 1}', '{"run": null, "step": 9, "keys": 3}'):
        folder.write_text(text)  # damaged: nothing is known
        with open_telemetry(tmp_path / "run", 0, **{tracker: True}) as telemetry:
            telemetry.log(1, {"loss": 0.5})
    assert [call for call in calls if isinstance(call, tuple)] == [(1, {"loss": 0.5})] * 5


def test_trackers_keep_the_id(tracker: str, calls: list[Any], tmp_path: Path) -> None:
    name = {"wandb": "id", "trackio": "name"}[tracker]
    for step in (1, 2):
        with open_telemetry(tmp_path, 0, **{tracker: True}) as telemetry:
            telemetry.log(step, {"loss": 0.5})
    first, second = calls[0], calls[3]
    assert calls[1:3] == [(1, {"loss": 0.5}), "end"]
    assert first[name] == second[name] == json.loads((tmp_path / "run.json").read_text())["id"]
    assert (first["project"], first["resume"]) == ("rdm-fast", "allow")
    assert first.get("dir", str(tmp_path)) == str(tmp_path) and first["config"] == ENVIRONMENT


def test_no_tracker_is_loaded_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in TRACKERS.values():
        monkeypatch.setitem(sys.modules, module, None)  # an import would fail
    with open_telemetry(tmp_path, 0) as telemetry:
        telemetry.log(1, METRICS)
    written = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert written >= {"metrics.jsonl", "spectrum.jsonl"} and not (tmp_path / "wandb").exists()
    with open_telemetry(tmp_path / "none", 0, spectrum_every=0) as telemetry:
        telemetry.log_spectra(1, spectra(1))
    assert not (tmp_path / "none/spectrum.jsonl").exists()


# ---- console ---------------------------------------------------------------------------------


def test_the_line_says_where_the_run_is() -> None:
    # 15 steps of 420 took 30 s, so 405 take 810 s; 2,000 images/s are 0.1 s a step of 200
    assert progress_line(15, METRICS, PLAN, elapsed=30.0) == (
        "epoch 3/60  step 15/420  loss -0.8123  lr 0.064  2,000 images/s  data wait 3%  "
        "effective rank 31.23 online, 28 target  ETA 13:30"
    )


def test_the_remaining_time_counts_this_sitting_only() -> None:
    plan = Plan(total_steps=420, steps_per_epoch=7, global_batch=200, resumed_step=400)
    assert progress_line(410, {"loss": 1.0}, plan, elapsed=3600.0).endswith("ETA 1:00:00")
    assert "ETA" not in progress_line(400, {"loss": 1.0}, plan, elapsed=1.0)


@pytest.mark.parametrize("step", [1, 7, 8, 420])
def test_the_epoch_is_the_one_the_step_belongs_to(step: int) -> None:
    line = progress_line(step, {"loss": math.nan}, PLAN, elapsed=1.0)
    assert line.startswith(f"epoch {(step - 1) // 7 + 1}/60  step {step}/420  loss nan")
    assert line.isascii()


def show_some_lines() -> None:
    console = ConsoleLine(PLAN)
    for step in (7, 14):
        console.log(step, {"loss": -0.5})
    console.log(14, {"knn_top1": 93.25})
    console.log(14, {"warning": "it collapses"})
    console.close()


def printed(folder: Path, terminal: bool, **variables: str) -> str:
    """What these lines look like on a pseudo-terminal, or in a file."""
    env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "TERM", "HOME", "COLUMNS")}
    if not terminal:
        process = Forked(show_some_lines, out=folder / "out", env=env | variables)
        assert process.wait() == 0
        return (folder / "out").read_text()
    master, slave = pty.openpty()
    process = Forked(show_some_lines, out=Path(os.ttyname(slave)), env=env | variables)
    assert process.wait() == 0
    output = os.read(master, 65536)
    os.close(slave)
    os.close(master)
    return output.decode().replace("\r\n", "\n")


PLAIN: dict[str, tuple[bool, dict[str, str]]] = {
    "a pipe": (False, {"TERM": "xterm"}), "a dumb terminal": (True, {"TERM": "dumb"}),
    "NO_COLOR": (True, {"TERM": "xterm", "NO_COLOR": "1"}), "no TERM": (True, {}),
}  # fmt: skip


@pytest.mark.parametrize(("terminal", "variables"), PLAIN.values(), ids=PLAIN)
def test_plain_lines(terminal: bool, variables: dict[str, str], tmp_path: Path) -> None:
    """Nothing can be redrawn there."""
    text = printed(tmp_path, terminal, **variables)
    assert "\x1b" not in text
    epochs = ["epoch 1/60  step 7/420", "epoch 2/60  step 14/420"]
    lines = [line.partition("  loss")[0] for line in text.splitlines()]
    assert lines == [*epochs, "step 14  knn_top1 93.25", "warning: it collapses"]


def test_one_line_is_redrawn_on_a_terminal_and_other_lines_stay_above_it(tmp_path: Path) -> None:
    text = printed(tmp_path, True, TERM="xterm", COLUMNS="60")
    assert "\x1b[2K" in text  # a line is erased before it is drawn again
    last_drawn = text.rindex("step 14/420")
    assert text.index("knn_top1 93.25") < last_drawn  # redrawn below what was printed
    assert text.rindex("\x1b[?25h") > last_drawn  # the cursor is given back


# ---- environment -----------------------------------------------------------------------------


def test_the_environment_has_versions_ranks_and_choices() -> None:
    found = describe_environment(
        CONFIG, device=torch.device("cpu"), world_size=4, loader="resident", engine="eigh"
    )
    assert strict(json.dumps(found)) == found
    assert found["torch"] == torch.__version__ and found["precision"] == "fp32"
    assert (found["world_size"], found["global_batch"], found["local_batch"]) == (4, 200, 50)
    assert (found["loader"], found["engine"]) == ("resident", "eigh")
    assert found["device"] and config_from_dict(found["config"]) == CONFIG


def test_the_commit_is_of_this_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
        return done.stdout.strip()

    file = tmp_path / "project" / "rdm_fast" / "run" / "environment.py"
    file.parent.mkdir(parents=True)
    file.write_text("")
    monkeypatch.setattr(environment_module, "__file__", str(file))
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    assert environment_module._git_commit() is None  # another project's checkout around it
    (tmp_path / ".git").rename(tmp_path / "project" / ".git")
    commit = git("-C", "project", "rev-parse", "HEAD")
    assert environment_module._git_commit() == f"{commit}-dirty"  # the file has moved in it


def test_every_metric_key_says_its_unit() -> None:
    fixed = (
        "step epoch loss lr ema_momentum images_per_s data_wait_s effective_rank/online "
        "effective_rank/target effective_rank/projection effective_rank/share rank_difference "
        "rank_difference/ema rank_difference/sharpening rank_difference/centring "
        "rank_difference/equipartition effective_rank/logits_online effective_rank/logits_target "
        "effective_rank/online_centred effective_rank/target_centred perplexity/online "
        "perplexity/target entropy/online entropy/target kl teacher_temp center_norm std alignment "
        " knn_top1 knn_top1_target probe_top1 grad_norm skipped_steps filter_failures "
        "warning gpu_mem_gib"
    )
    assert list(KEYS) == fixed.split() and all(KEYS.values())
