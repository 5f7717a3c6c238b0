"""The commands as a user starts them: exit codes, and errors of one line that name flag or file."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from PIL import Image

from rdm_fast.cli import commands as cli
from rdm_fast.config.recipes import recipe
from rdm_fast.config.saved import config_from_dict
from rdm_fast.data.loaders.dali_loader import install_line
from tests.data.loaders.dali_here import without_dali
from tests.forks import ROOT, call, environment
from tests.tiny import command

Done = subprocess.CompletedProcess[str]


def start(*args: str, cwd: Path) -> Done:
    """A process of Python from the start, as a user's."""
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, env=environment(), capture_output=True, text=True
    )


def error(done: Done, code: int) -> str:
    """The one line that a failed start leaves on stderr besides warnings."""
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning:")]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


def tiny(out: Path, flags: str = "") -> list[str]:
    """Arguments of a run of one epoch, four steps."""
    return [*command(f"--epochs 1 {flags}"), "--out", str(out)]


def losses(run: Path) -> list[float]:
    text = (run / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    found = [float(loss) for loss in re.findall(r'"loss": ?([-\d.e]+)', text)]
    assert all(-1 - 1e-6 <= loss <= 1 + 1e-6 for loss in found)
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, which tests leave as it is."""
    out = tmp_path_factory.mktemp("finished") / "run"
    done = call("train.py", *tiny(out), cwd=out.parent)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """The same run in a folder that a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


# ---- without torch ---------------------------------------------------------------------------

ANSWERS = [
    (0, "train --help"),
    (0, "train cifar10_byol --help"),
    (2, "train --optim.epoch 3"),
    (2, "train digit_byol"),
    (2, "train --method byol --predictor none"),
    (2, "train --optim.epochs three"),
    (2, "train --resume x --lr 1"),
    (66, "train --resume x"),
    (0, "train digits_byol --print-config"),
    (0, "eval --help"),
    (2, "eval x --protocl y"),
    (2, "doctor --batches 0"),
    (0, "preview --help"),
    (2, "export"),
    (2, "report"),
    (2, "sweep --sigma 2"),
]
PROGRAM = """
import json, sys
from rdm_fast.cli.commands import main
codes = []
for line in sys.argv[1:]:
    try:
        main(line.split())
    except SystemExit as ended:
        codes.append(ended.code)
loaded = [name for name in ("tyro", "torch", "numpy") if name in sys.modules]
print(json.dumps([codes, loaded]))
"""


def test_help_and_mistakes_are_answered_before_torch_is_imported(tmp_path: Path) -> None:
    done = start("-c", PROGRAM, *(line for _, line in ANSWERS), cwd=tmp_path)
    codes, loaded = json.loads(done.stdout.splitlines()[-1])
    assert codes == [code for code, _ in ANSWERS]
    assert loaded == ["tyro"]
    assert done.stderr.count("\n") == done.stderr.count("error: ") == sum(c > 0 for c in codes)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("script", "flag", "near"),
    [
        ("train.py", "--optim.epoch", "--optim.epochs"),
        ("eval_linear.py", "--protocl", "--protocol"),
    ],
)
def test_a_script_answers_a_mistyped_flag(
    script: str, flag: str, near: str, tmp_path: Path
) -> None:
    line = error(start(str(ROOT / script), flag, "3", cwd=tmp_path), 2)
    assert flag in line and near in line


def test_print_config_prints_a_configuration_that_can_be_read(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        cli.train(["cifar10_rdm_byol", "--print-config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert config_from_dict(printed) == recipe("cifar10_rdm_byol")


# ---- what a run cannot use -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "code", "named"),
    [
        ("--data.name folder --data.root nowhere", 66, "--data.root nowhere"),
        ("--data.name folder --data.root empty", 66, "--data.root empty"),
        ("--data.name folder --data.root bare", 65, "bare/train (--data.root)"),
        ("--batch-size 3000", 2, "--optim.global-batch 3000"),
        ("--device cuda", 69, "--device cuda"),
        ("--filter.engine gemm --filter.center", 2, "filter.engine=gemm"),
        ("--resume none", 66, "none"),
    ],
)
def test_what_is_missing_or_impossible_is_named(
    flags: str, code: int, named: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()  # no train folder: something is missing
    (tmp_path / "bare" / "train").mkdir(parents=True)  # no images in it: the data are bad
    args = flags.split() if "--resume" in flags else tiny(Path("run"), flags)
    assert named in error(call("train.py", *args, cwd=tmp_path), code)


def test_a_global_batch_that_does_not_divide_over_the_ranks(tmp_path: Path) -> None:
    args = tiny(tmp_path / "run", "--optim.global-batch 200")
    ranks = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    assert "optim.global_batch=200" in error(call("train.py", *args, cwd=tmp_path, **ranks), 2)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_a_folder_or_file_of_something_else_is_left_alone(
    overwrite: Sequence[str], tmp_path: Path
) -> None:
    mine = tmp_path / "thesis.tex"
    mine.write_text("irreplaceable")
    for out in (tmp_path, mine):
        assert str(out) in error(call("train.py", *tiny(out), *overwrite, cwd=tmp_path), 73)
    assert [*tmp_path.iterdir()] == [mine] and mine.read_text() == "irreplaceable"


def test_dali_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_dali(monkeypatch)
    with pytest.raises(SystemExit) as ended:
        cli.train(tiny(tmp_path / "run", "--data.loader dali --device cpu"))
    line = capsys.readouterr().err
    assert ended.value.code == 69 and "--data.loader dali" in line and install_line() in line


# ---- data and filters that train -------------------------------------------------------------


def images(root: Path, levels: Sequence[int]) -> str:
    """Image files of one shade each; the flags to train on them."""
    folder = root / "train" / "any"
    folder.mkdir(parents=True)
    for i, level in enumerate(levels):
        Image.new("RGB", (16, 16), (level, 0, 0)).save(folder / f"{i}.png")
    return (
        f"--data.name folder --data.root {root} --data.workers 0 --data.loader torch "
        "--augment.mean 0 0 0 --augment.std 1 1 1 --batch-size 4 --log.every 1"
    )


def test_log_trains_on_data_with_singular_values_of_zero(tmp_path: Path) -> None:
    """Black images share one projection, so some singular values of a batch are exactly zero."""
    flags = images(tmp_path / "images", [0, 0, 0, 0, 0, 30, 60, 90])
    args = tiny(tmp_path / "run", f"{flags} --filter.kind log --filter.location online")
    done = call("train.py", *args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "run")) == 2


def test_a_bad_image_stops_the_run_or_is_skipped_and_listed(tmp_path: Path) -> None:
    flags = images(tmp_path / "images", range(0, 240, 30))
    bad, run = tmp_path / "images/train/any/bad.png", tmp_path / "run"
    bad.touch()
    line = error(call("train.py", *tiny(run, f"{flags} --data.max-bad 0"), cwd=tmp_path), 65)
    assert "1 of 9 images" in line and str(bad) in line and "--data.max-bad" in line
    done = call("train.py", *tiny(run, f"{flags} --data.max-bad 0.001"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("1 of 9 images") == 1
    assert (run / "bad_files.tsv").read_text() == f"path\treason\n{bad}\tempty\n"
    assert len(losses(run)) == 2


def test_the_gemm_engine_trains(tmp_path: Path) -> None:
    done = call("train.py", *tiny(tmp_path / "run", "--filter.engine gemm"), cwd=tmp_path)
    assert done.returncode == 0 and "filter engine gemm" in done.stdout
    assert len(losses(tmp_path / "run")) == 2


# ---- a finished run and its checkpoints ------------------------------------------------------


def test_a_finished_run_is_not_trained_again(finished: Path) -> None:
    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in finished.glob("checkpoints/*/*")}

    before = times()
    done = call("train.py", *tiny(finished), cwd=finished.parent)
    assert done.returncode == 0 and "finished" in done.stdout
    done = call("train.py", *tiny(finished, "--model.width 8"), cwd=finished.parent)
    assert "model.width 4 -> 8" in error(done, 78)
    assert times() == before


def test_evaluating_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert "none" in error(call("eval_linear.py", "none", cwd=tmp_path), 66)


@pytest.mark.parametrize("model", [{"width": 8}, {"backbone": "resnet18"}], ids=str)
def test_a_checkpoint_of_another_architecture(model: dict[str, object], copy: Path) -> None:
    """Tensors of other shapes, and of other names."""
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["model"] |= model
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    done = call("eval_linear.py", copy, "--protocol", "closed-form", cwd=copy)
    assert "step-00000004" in error(done, 65)


def test_a_truncated_checkpoint_is_an_error_by_name_and_passed_over_in_a_run(copy: Path) -> None:
    step = copy / "checkpoints/step-00000004"
    model = step / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1])
    line = error(call("eval_linear.py", step, cwd=copy), 65)
    assert step.name in line and model.name in line
    done = call("eval_linear.py", copy, "--protocol", "closed-form", cwd=copy)
    assert done.returncode == 0, done.stderr
    everything = done.stdout + done.stderr
    assert "warning:" in everything and step.name in everything and "step 2" in everything
    for model in copy.glob("checkpoints/*/model.safetensors"):
        model.write_bytes(b"")
    assert "checkpoint" in error(call("eval_linear.py", copy, cwd=copy), 66)
