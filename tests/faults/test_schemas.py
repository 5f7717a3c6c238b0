"""A file that was changed, with sound digests or without any, is refused by file and field."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from rdm_fast.cli import commands
from rdm_fast.config.saved import LATER
from rdm_fast.errors import DataError, UserError
from rdm_fast.run.folder import read_config, read_status
from rdm_fast.telemetry.lines import JsonLines, SpectrumLines
from rdm_fast.tools.report.read import read_run
from rdm_fast.tools.sweep.make import _claim
from tests.faults.test_checkpoint_faults import vouch
from tests.forks import call
from tests.runs import final_state, metrics, newest, run, run_to, with_log
from tests.tiny import tiny

DELETED = object()
WRONG = [DELETED, None, "x", [1], {}, -5, 10**12, 10**400, float("nan"), True, 1.5]
CONFIG = with_log(tiny(), probe=True)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after four steps; tests change a copy."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    run_to(out, CONFIG, 4)
    return out


@pytest.fixture
def copy(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def with_field(table: Any, path: tuple[str, ...], value: object) -> Any:
    """A copy of nested tables with one field changed or deleted."""
    first, *rest = path
    changed = dict(table)
    if rest:
        changed[first] = with_field(table[first], tuple(rest), value)
    elif value is DELETED:
        del changed[first]
    else:
        changed[first] = value
    return changed


def fields(table: dict[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in table.items():
        yield (*prefix, name)
        if isinstance(value, dict) and name != "optimizer":  # tensors by parameter
            yield from fields(value, (*prefix, name))


def refused(path: Path, field: str) -> None:
    """The trainer refuses the folder by file and field."""
    with pytest.raises(DataError) as error:
        run(path, CONFIG)
    assert field in str(error.value), error.value


# ---- checkpoints -----------------------------------------------------------------------------

STATE = [("step",), ("data",), ("optimizer",), ("scaler",), ("skipped",), ("collapse_guard",),
         ("filter_engine",), ("skipped", "total"), ("skipped", "in_a_row"),
         ("collapse_guard", "low"), ("filter_engine", "name"),
         ("filter_engine", "failures")]  # fmt: skip
SOUND = {("optimizer",): ({},), ("scaler",): ({},), ("filter_engine", "name"): (None,)}
"""Values among WRONG that are right: no plain values, and an engine that is not chosen yet."""


def test_the_list_of_fields_is_that_of_a_checkpoint(stopped: Path) -> None:
    state = json.loads((newest(stopped) / "state.json").read_text())
    assert {*fields(state)} == {*STATE, ("probe",)}  # the probe has tensors only


@pytest.mark.parametrize("path", STATE, ids=".".join)
def test_a_wrong_field_of_a_checkpoint_is_named(path: tuple[str, ...], copy: Path) -> None:
    step = newest(copy)
    file = step / "state.json"
    state = json.loads(file.read_text())
    first = STATE.index(path)
    for value in (DELETED, *(WRONG[1:] * 2)[first % len(WRONG) :][:3]):  # the others in turn
        if any(value is each or value == each for each in SOUND.get(path, ())):
            continue
        file.write_text(json.dumps(with_field(state, path, value)))
        vouch(step)
        for older in copy.glob("checkpoints/*"):
            if older != step:
                shutil.rmtree(older)
        refused(copy, path[-1])


def tensors(file: Path, name: str, change: Any) -> None:
    """Change a tensor of a checkpoint's file, or delete it, and vouch for the result."""
    held = load_file(file)
    held[name] = change(held[name]) if change else held.pop(name)
    if not change:
        del held[name]
    save_file(held, file)
    vouch(file.parent)


@pytest.mark.parametrize(
    "change",
    [
        None,
        lambda t: t.to(torch.int32),
        lambda t: torch.full_like(t, float("nan")) if t.is_floating_point() else t[:-1].clone(),
        lambda t: torch.zeros(3, dtype=t.dtype),
        lambda t: t[..., None].contiguous().clone(),
    ],
    ids=["deleted", "integers", "not finite", "short", "deep"],
)
@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("model", "backbone.conv1.weight"),
        ("model", "backbone.bn1.running_var"),
        ("optim", "backbone.conv1.weight/momentum_buffer"),
        ("extra", "torch_rng"),
        ("extra", "probe/weight"),
        ("extra", "probe/bias_momentum"),
    ],
)
def test_a_wrong_tensor_of_a_checkpoint_is_named(
    file: str, name: str, change: Any, copy: Path
) -> None:
    tensors(newest(copy) / f"{file}.safetensors", name, change)
    refused(copy, name.rpartition("/")[2] if "probe" in name else name)


def test_an_optimizer_without_state_and_a_step_past_the_end_are_named(copy: Path) -> None:
    step = newest(copy)
    later = step.with_name(f"step-{10**12}")
    shutil.copytree(step, later)
    state = json.loads((step / "state.json").read_text())
    (later / "state.json").write_text(json.dumps(state | {"step": 10**12}))
    vouch(later)
    refused(copy, str(10**12))
    shutil.rmtree(later)
    save_file({}, step / "optim.safetensors")
    vouch(step)
    refused(copy, "momentum_buffer")


def test_a_wrong_checkpoint_is_refused_wherever_it_is_read(copy: Path) -> None:
    step = newest(copy)
    tensors(step / "model.safetensors", "backbone.bn1.weight", lambda t: t * float("inf"))
    for words in (
        ["train.py", "--resume", copy],
        ["eval_linear.py", step],
        ["rdm", "export", step, "--to", "safetensors"],
    ):
        done = call(*words, cwd=copy)
        assert done.returncode == 65 and "backbone.bn1.weight" in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1
    done = call("rdm", "report", copy, cwd=copy)  # draws what there is, and says what is not
    assert done.returncode == 0 and "backbone.bn1.weight" in (copy / "report.html").read_text()


# ---- the other files -------------------------------------------------------------------------


def test_a_wrong_field_of_status_and_run_json_is_named(copy: Path) -> None:
    for name, read in (("status.json", read_status), ("run.json", read_config)):
        file = copy / name
        sound = file.read_text()
        for (field,) in fields(json.loads(sound)):
            for value in WRONG:
                kind = type(json.loads(sound)[field])
                free = field in ("message", "created", "version") and value == "x"
                inside = (name, field, value) == ("status.json", "rank", 10**12)
                if free or inside or (field == "project" and kind is not str):
                    continue
                file.write_text(json.dumps(with_field(json.loads(sound), (field,), value)))
                with pytest.raises(DataError) as error:
                    read(copy)
                assert name in str(error.value) and field in str(error.value)
        file.write_text(sound)
        read(copy)


def test_a_wrong_setting_of_config_yaml_is_named(copy: Path) -> None:
    file = copy / "config.yaml"
    sound = yaml.safe_load(file.read_text())
    for i, path in enumerate(fields(sound)):
        inner: Any = sound
        for part in path:
            inner = inner[part]
        for value in (WRONG * 2)[i % len(WRONG) :][:3]:  # in turn: reading YAML is slow
            if isinstance(inner, dict) and value == {}:
                continue  # the settings in it are missing then
            if value is DELETED and ".".join(path) in LATER:
                continue
            file.write_text(json.dumps(with_field(sound, path, value)))
            try:
                config = read_config(copy)
            except DataError as error:
                named = str(error).replace("-", "_")
                assert path[-1] in named or path[0] in named, (path, value, named)
            else:  # within its bounds
                for part in path:
                    config = getattr(config, part)
                if isinstance(value, float) and isinstance(config, str):
                    value = json.dumps(value)  # YAML 1.1 reads NaN as text
                held = list(config) if isinstance(config, tuple) else config
                assert held == value and type(held) is type(value), (path, value)


def test_a_run_of_an_earlier_version_goes_on_exactly(copy: Path, tmp_path: Path) -> None:
    """It lacks the settings that were added since."""
    file = copy / "config.yaml"
    plain = yaml.safe_load(file.read_text())
    for name in LATER:
        table, _, key = name.rpartition(".")
        del plain[table][key]
        if not plain[table]:
            del plain[table]
    file.write_text(yaml.safe_dump(plain))
    (copy / "run.lock").write_text("1")
    assert read_config(copy) == CONFIG
    run(copy, read_config(copy))
    run(tmp_path / "undisturbed", CONFIG)
    assert metrics(copy) == metrics(tmp_path / "undisturbed")
    assert final_state(copy) == final_state(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    "text",
    [
        "&a [*a]",
        "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]",
        "x" * (1 << 19),
        "{" * 5000,
        "seed: " + "9" * 5000,
        "seed: !!python/object/apply:os.system [true]",
        "- 1",
        "",
    ],
    ids=["circle", "laughs", "large", "deep", "digits", "tag", "list", "empty"],
)
def test_an_odd_config_yaml_is_refused(text: str, copy: Path) -> None:
    (copy / "config.yaml").write_text(text)
    done = call("train.py", "--resume", copy, cwd=copy)
    assert done.returncode == 65 and "config" in done.stderr and len(done.stderr) < 600


def test_a_sweep_of_another_program_is_left_alone(tmp_path: Path) -> None:
    for text in ("[]", "{}", '{"project": "other"}', '{"project": 3}', "{", "[" * 9999):
        (tmp_path / "sweep.json").write_text(text)
        with pytest.raises(DataError) as error:
            _claim(tmp_path)
        assert "sweep.json" in str(error.value)
        assert (tmp_path / "sweep.json").read_text() == text


# ---- information: a wrong line costs itself --------------------------------------------------

LINES = [
    *(json.dumps({"step": value, "loss": 1.0}) for value in WRONG[1:]),
    *("[" * 9999, "{", "3", '{"resumed_step": "x"}'),
]


def test_wrong_lines_of_metrics_are_left_out_with_a_warning(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, write in (("metrics.jsonl", JsonLines), ("spectrum.jsonl", SpectrumLines)):
        file = copy / name
        sound = file.read_text()
        file.write_text(sound + "".join(f"{line}\n" for line in LINES) + '{"step": 3')
        first = json.loads(sound.splitlines()[0]).get("environment")
        writer = write(file, *([first] if first else []), resumed_step=4)
        writer.close()
        assert file.read_text() == sound
        assert f"{len(LINES)} line(s) of {file}" in capsys.readouterr().err


def test_a_report_says_what_is_wrong_and_draws_the_rest(copy: Path) -> None:
    result = {"protocol": "closed-form", "top1": 90.0, "knn_top1": None, "classes": 10}
    (copy / "evaluation").mkdir()
    file = copy / "evaluation/step-00000004-x.json"
    for field in ("protocol", "top1", "knn_top1"):
        for value in (*WRONG, float("inf")):
            file.write_text(json.dumps(with_field(result, (field,), value)))
            read = read_run(copy, "run")
            sound = (field, value) in [("protocol", "x"), ("knn_top1", None)] or (
                type(value) is float and value == 1.5 and field != "protocol"
            )
            said = [note for note in read.notes if file.name in note and field in note]
            assert bool(said) != sound and bool(read.evaluation) == sound, (field, value)
    with (copy / "metrics.jsonl").open("a") as lines:
        lines.write("".join(f"{line}\n" for line in LINES))
        lines.write(json.dumps({"step": 4, "loss": 10**400, "std": "x", "epoch": 10**400}) + "\n")
    with (copy / "spectrum.jsonl").open("a") as lines:
        lines.write('{"step": 1e400}\n{"step": 4, "online": "x"}\n')
    with pytest.raises(SystemExit) as ended:
        commands.main(["report", str(copy), "--map", "none", "--device", "cpu"])
    assert ended.value.code == 0


def test_no_refusal_is_longer_than_a_screen(copy: Path) -> None:
    """A message shows the beginning of what it found."""
    for value in ("x" * 10**5, [[[[[[1] * 999] * 99] * 9]]], "\x1b]0;x\x07\n"):
        (copy / "status.json").write_text(json.dumps({"state": value}))
        with pytest.raises(UserError) as error:
            read_status(copy)
        assert len(str(error.value)) < 400 and re.fullmatch(r"[ -~]+", str(error.value))
