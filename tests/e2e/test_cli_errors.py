"""train.py and eval_linear.py as a user starts them: how soon they answer, and how they fail.

Every start that imports torch costs seconds, so one finished run serves several tests, and where
a few starts have shown how the process itself ends, the rest call the same entry in this process.
"""

import os
import re
import resource
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image

from rdm_fast.cli import commands as cli
from rdm_fast.data.loaders.dali_loader import install_line
from tests.data.loaders.dali_here import without_dali
from tests.tiny import command

Call = Callable[..., subprocess.CompletedProcess[str]]
ROOT = Path(__file__).parents[2]
SHARE = 0.3  # that an answer may take of the time in which torch alone is imported


def start(
    script: str, *words: object, cwd: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a script of the checkout from another folder, on one thread, without a GPU."""
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, words)],
        cwd=cwd,
        env=env(**environment),
        capture_output=True,
        text=True,
        timeout=120,
    )


def env(**changed: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    fixed = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | fixed | changed


def error(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The one line that a failed start leaves on stderr besides warnings."""
    everything = done.stdout + done.stderr
    assert done.returncode == code, everything
    assert "Traceback" not in everything
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    others = [other for other in done.stderr.splitlines() if other != line]
    assert all(other.startswith("warning:") for other in others), done.stderr
    return line


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Like `start`, but in this process, where torch is imported already."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def run(script: str, *words: object) -> subprocess.CompletedProcess[str]:
        entry = {"train.py": cli.train, "eval_linear.py": cli.evaluate}[script]
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            entry(list(map(str, words)), script)
        out, err = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return subprocess.CompletedProcess(script, ended.value.code, out, err)

    return run


def tiny(out: Path, flags: str = "") -> list[str]:
    """Words of a run of one epoch, four steps."""
    return [*command(f"--epochs 1 {flags}"), "--out", str(out)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of a finished run."""
    out = tmp_path_factory.mktemp("finished") / "run"
    done = start("train.py", *tiny(out), cwd=out.parent)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """The same run in a folder that may be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


# ---- answers that need no torch ---------------------------------------------------------------

ANSWERS = {
    "help": ("train.py", "--help", 0),
    "help of a recipe": ("train.py", "cifar10_byol --help", 0),
    "mistyped flag": ("train.py", "--optim.epoch 3", 2),
    "unknown recipe": ("train.py", "digit_byol", 2),
    "impossible combination": ("train.py", "--method byol --predictor none", 2),
    "wrong type": ("train.py", "--optim.epochs three", 2),
    "configuration": ("train.py", "digits_byol --print-config", 0),
    "evaluation's help": ("eval_linear.py", "--help", 0),
    "evaluation's mistyped flag": ("eval_linear.py", "x --protocl y", 2),
}


def timed(program: str, cwd: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    """A program of Python, and the processor's time that it took: it waits for nothing else, and
    the wall clock of a busy machine says little."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=cwd, env=env(), capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.fixture(scope="module")
def torch_s(tmp_path_factory: pytest.TempPathFactory) -> float:
    """What importing torch takes here."""
    return min(timed("import torch", tmp_path_factory.mktemp("torch"))[1] for _ in range(2))


@pytest.mark.parametrize(("script", "words", "code"), ANSWERS.values(), ids=ANSWERS)
def test_an_answer_comes_at_once_and_without_importing_torch(
    script: str, words: str, code: int, tmp_path: Path, torch_s: float
) -> None:
    report = (
        "import atexit, runpy, sys; "
        "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr)); "
        f"sys.argv = ['{script}', *{words.split()}]; "
        f"runpy.run_path({str(ROOT / script)!r}, run_name='__main__')"
    )
    done, seconds = timed(report, tmp_path)
    assert done.returncode == code, done.stderr
    *lines, torch_was_imported = done.stderr.splitlines()
    assert torch_was_imported == "False"
    assert len(lines) == (code != 0) and all(line.startswith("error: ") for line in lines)
    assert seconds <= SHARE * torch_s
    assert not any(tmp_path.iterdir())


def test_the_check_for_torch_can_fail(tmp_path: Path) -> None:
    report = "import sys, torch; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", report], cwd=tmp_path, env=env(), capture_output=True, text=True
    )
    assert done.stdout.strip() == "True"


def test_print_config_is_a_configuration_that_can_be_read(tmp_path: Path) -> None:
    from rdm_fast.config.recipes import recipe
    from rdm_fast.config.saved import config_from_dict

    done = start("train.py", "cifar10_rdm_byol", "--print-config", cwd=tmp_path)
    assert config_from_dict(yaml.safe_load(done.stdout)) == recipe("cifar10_rdm_byol")


# ---- the command line, the output folder: still without torch ---------------------------------


def test_a_mistyped_flag_is_told_the_nearest_name(tmp_path: Path) -> None:
    done = start("train.py", "--optim.epoch", "3", cwd=tmp_path)
    assert "did you mean --optim.epochs?" in error(done, 2)


def test_an_unknown_recipe_is_told_the_nearest_name(tmp_path: Path) -> None:
    done = start("train.py", "digits_rdm_simsim", cwd=tmp_path)
    assert "unknown recipe digits_rdm_simsim: did you mean digits_rdm_simsiam?" in error(done, 2)


def test_a_global_batch_that_does_not_divide_over_the_ranks(tmp_path: Path) -> None:
    words = tiny(tmp_path / "run", "--optim.global-batch 200")
    done = start("train.py", *words, cwd=tmp_path, WORLD_SIZE="3")
    assert "optim.global_batch=200 does not give each of 3 rank(s)" in error(done, 2)
    assert not (tmp_path / "run").exists()


def test_other_ranks_leave_the_error_line_to_rank_zero(tmp_path: Path) -> None:
    done = start("train.py", "--nonsense", cwd=tmp_path, WORLD_SIZE="3", RANK="1")
    assert done.returncode == 2 and done.stderr == ""


def test_an_output_folder_with_foreign_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("irreplaceable")
    done = start("train.py", *tiny(tmp_path), cwd=tmp_path)
    assert "holds files of something else" in error(done, 73)
    done = start("train.py", *tiny(tmp_path), "--overwrite", cwd=tmp_path)
    assert "holds files of something else" in error(done, 73)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]
    assert (tmp_path / "thesis.tex").read_text() == "irreplaceable"


def test_a_file_where_the_output_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    done = start("train.py", *tiny(tmp_path / "run"), cwd=tmp_path)
    assert "is a file: name a folder" in error(done, 73)
    assert (tmp_path / "run").read_text() == "mine"


def test_resuming_a_folder_that_is_not_there(tmp_path: Path) -> None:
    done = start("train.py", "--resume", tmp_path / "none", cwd=tmp_path)
    assert f"{tmp_path / 'none'} is not a run folder" in error(done, 66)
    assert not any(tmp_path.iterdir())


def test_another_configuration_contradicts_the_run(finished: Path) -> None:
    done = start("train.py", *tiny(finished, "--model.width 8"), cwd=finished.parent)
    line = error(done, 78)
    assert "model.width 4 -> 8" in line and "another --out" in line


# ---- the `rdm` command ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        ([], 2, "usage: rdm {train,eval"),
        (["--help"], 0, "usage: rdm {train,eval"),
        (["trian"], 2, "error: unknown command trian: did you mean train?"),
        (["zzz"], 2, "error: unknown command zzz: commands: train, eval, doctor"),
        (["train", "--sigm"], 2, "error: unknown flag --sigm: did you mean --sigma?"),
        (["eval"], 2, "error: name a run folder"),
        (["eval", "--help"], 0, "usage: rdm eval"),
        (["doctor", "--sigm"], 2, "error: unknown flag --sigm: did you mean --sigma?"),
        (["doctor", "--help"], 0, "usage: rdm doctor [RECIPE]"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_rdm_has_the_same_commands_and_doctor(
    words: list[str], code: int, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    out, err = capsys.readouterr()
    assert ended.value.code == code and (out + err).startswith(expected)


def test_debug_shows_the_traceback_before_the_error_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        cli.train(["--debug", "--sigm"])
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback") and lines[-1].startswith("error: unknown flag --sigm")


# ---- data -------------------------------------------------------------------------------------


def test_a_missing_dataset(tmp_path: Path) -> None:
    flags = f"--data.name folder --data.root {tmp_path / 'nowhere'}"
    done = start("train.py", *tiny(tmp_path / "run", flags), cwd=tmp_path)
    assert f"--data.root {tmp_path / 'nowhere'} does not exist" in error(done, 66)


def test_an_empty_folder_has_no_images(call: Call, tmp_path: Path) -> None:
    """A root without a train folder lacks something (66); an empty train folder is bad data."""
    root = tmp_path / "images"
    root.mkdir()
    flags = f"--data.name folder --data.root {root}"
    done = call("train.py", *tiny(tmp_path / "run", flags))
    assert f"--data.root {root} has no train images" in error(done, 66)
    (root / "train").mkdir()
    done = call("train.py", *tiny(tmp_path / "run", flags))
    assert f"{root / 'train'} (--data.root) has no images" in error(done, 65)


def test_a_data_set_smaller_than_the_global_batch(call: Call, tmp_path: Path) -> None:
    done = call("train.py", *tiny(tmp_path / "run", "--batch-size 3000"))
    assert "--optim.global-batch 3000 is more than the 1400 training images" in error(done, 2)


def test_log_of_data_with_exact_zeros_trains_and_stays_finite(call: Call, tmp_path: Path) -> None:
    """Black images have one and the same projection, so that singular values of every batch are
    zero, and their logarithm does not exist."""
    folder = tmp_path / "images/train/any"
    folder.mkdir(parents=True)
    for shade in range(8):
        Image.new("RGB", (16, 16), (30 * max(0, shade - 4), 0, 0)).save(folder / f"{shade}.png")
    flags = (
        f"--data.name folder --data.root {tmp_path / 'images'} --data.workers 0 "
        "--data.loader torch --augment.mean 0 0 0 --augment.std 1 1 1 --batch-size 4 --log.every 1 "
        "--filter.kind log --filter.location online"
    )
    done = call("train.py", *tiny(tmp_path / "run", flags))
    assert done.returncode == 0, done.stderr
    assert_finite_losses(tmp_path / "run", steps=2)


def test_a_bad_image_is_left_out_and_listed_or_stops_the_run(call: Call, tmp_path: Path) -> None:
    folder = tmp_path / "images/train/any"
    folder.mkdir(parents=True)
    for shade in range(8):
        Image.new("RGB", (16, 16), (30 * shade, 0, 0)).save(folder / f"{shade}.png")
    (folder / "bad.png").touch()
    flags = (
        f"--data.name folder --data.root {tmp_path / 'images'} --data.workers 0 "
        "--data.loader torch --augment.mean 0 0 0 --augment.std 1 1 1 --batch-size 4 --log.every 1"
    )
    run = tmp_path / "run"
    told = error(call("train.py", *tiny(run, flags)), 65)
    assert "1 of 9 images" in told and f"{folder / 'bad.png'} (empty)" in told
    assert "--data.max-bad" in told
    done = call("train.py", *tiny(run, f"{flags} --data.max-bad 0.2"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("1 of 9 images") == 1
    assert (run / "bad_files.tsv").read_text() == f"path\treason\n{folder / 'bad.png'}\tempty\n"
    assert_finite_losses(run, steps=2)


def assert_finite_losses(run: Path, steps: int) -> None:
    text = (run / "metrics.jsonl").read_text()
    losses = [float(x) for x in re.findall(r'"loss": ?(NaN|-?[\d.e+-]+|null|-?Infinity)', text)]
    assert len(losses) == steps and "NaN" not in text and "Infinity" not in text
    assert all(-1 - 1e-6 <= loss <= 1 + 1e-6 for loss in losses)


# ---- devices and engines ----------------------------------------------------------------------


def test_dali_that_is_not_installed(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_dali(monkeypatch)
    done = call("train.py", *tiny(tmp_path / "run", "--data.loader dali"))
    line = error(done, 69)
    assert "--data.loader dali needs NVIDIA DALI" in line and install_line() in line


def test_a_gpu_that_is_not_there(call: Call, tmp_path: Path) -> None:
    done = call("train.py", *tiny(tmp_path / "run", "--device cuda"))
    assert "--device cuda" in error(done, 69)


def test_an_engine_that_cannot_do_the_filter(call: Call, tmp_path: Path) -> None:
    done = call("train.py", *tiny(tmp_path / "run", "--filter.engine gemm --filter.center"))
    assert "filter.engine=gemm cannot" in error(done, 2)


def test_the_gemm_engine_trains(call: Call, tmp_path: Path) -> None:
    done = call("train.py", *tiny(tmp_path / "run", "--filter.engine gemm"))
    assert done.returncode == 0 and "filter engine gemm" in done.stdout
    assert_finite_losses(tmp_path / "run", 2)


# ---- a finished run and its checkpoints -------------------------------------------------------


def test_a_finished_run_says_so(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.glob("checkpoints/*/*")}
    done = start("train.py", *tiny(finished), cwd=finished.parent)
    assert done.returncode == 0 and "is finished: evaluate it with eval_linear.py" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in finished.glob("checkpoints/*/*")} == before


def test_evaluating_a_folder_that_is_no_run(call: Call, tmp_path: Path) -> None:
    done = call("eval_linear.py", tmp_path / "none")
    assert f"{tmp_path / 'none'} does not exist" in error(done, 66)


def test_a_checkpoint_of_another_architecture(call: Call, copy: Path) -> None:
    """The checkpoint of one run in the folder of another."""
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["model"]["width"] = 8
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    done = call("eval_linear.py", copy, "--protocol", "closed-form")
    line = error(done, 65)
    assert "step-00000004" in line and "resnet8" in line


def test_a_checkpoint_with_tensors_of_other_names(call: Call, copy: Path) -> None:
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["model"] |= {"backbone": "resnet18"}
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    done = call("eval_linear.py", copy, "--protocol", "closed-form")
    line = error(done, 65)
    assert "missing" in line or "not match" in line or "shape" in line, line


def test_a_truncated_checkpoint_asked_for_by_name(copy: Path) -> None:
    step = copy / "checkpoints/step-00000004"
    model = step / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1])
    done = start("eval_linear.py", step, "--protocol", "closed-form", cwd=copy.parent)
    line = error(done, 65)
    assert "step-00000004" in line and "model.safetensors" in line


def test_evaluating_a_run_whose_newest_checkpoint_is_truncated_takes_the_one_before(
    call: Call,
    copy: Path,
) -> None:
    model = copy / "checkpoints/step-00000004/model.safetensors"
    model.write_bytes(model.read_bytes()[:-1])
    done = call("eval_linear.py", copy, "--protocol", "closed-form")
    assert done.returncode == 0, done.stderr
    everything = done.stdout + done.stderr
    assert "warning:" in everything and "step-00000004" in everything
    assert "tensors matched, 0 missing, step 2" in everything


def test_evaluating_a_run_without_any_sound_checkpoint(call: Call, copy: Path) -> None:
    for model in copy.glob("checkpoints/*/model.safetensors"):
        model.write_bytes(b"")
    done = call("eval_linear.py", copy)
    assert "has no sound checkpoint" in error(done, 66)
