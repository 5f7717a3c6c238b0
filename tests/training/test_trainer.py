"""Whole runs in process: exact resume, faults, signals, and the same run on 1, 2 and 4 ranks."""

import errno
import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rdm_fast.config import Config
from rdm_fast.data import Batch
from rdm_fast.data.loaders.batch import Loader
from rdm_fast.errors import DataError, Interrupted, NonFinite, OutputFailed
from rdm_fast.evaluation import online_accuracy as online
from rdm_fast.filters.engines import choice
from rdm_fast.run import checkpoint
from rdm_fast.run.folder import RunFolder, read_status
from rdm_fast.runtime.distributed import rank, world_size
from rdm_fast.runtime.signals import SIGNALS
from rdm_fast.telemetry import timer
from rdm_fast.training import trainer as trainer_module
from rdm_fast.training.train_step import StepReport, TrainStep
from rdm_fast.training.trainer import Trainer
from rdm_kernels.filter_steps import INACCURATE
from tests import runs
from tests.ranks import run_ranks
from tests.runs import CPU, final_state, in_step, metrics, run, run_to, run_with_stops, with_log
from tests.spies import calls_of
from tests.tiny import tiny, with_small_views

STEPS = 8  # two epochs of four
TIMEOUT = 300.0  # seconds, for all that is done in one set of ranks
STOP = Trainer.ask_to_stop


def fp16(config: Config) -> Config:
    """In float16, which a CPU emulates, so for an even smaller model."""
    return replace(config, precision="fp16", model=replace(config.model, width=2))


def torch_loader(config: Config) -> Config:
    return replace(config, data=replace(config.data, loader="torch", workers=2))


LARS = tiny("digits_byol", optimizer="lars", decay_norm_and_bias=False, clip_each=0.1)
DECAYING = {"optimizer": "adamw", "base_lr": 1e-3, "weight_decay_end": 0.4, "clip_norm": 0.1}
CONFIGS: dict[str, Config] = {
    "rdm_simsiam": tiny("digits_rdm_simsiam"),
    "byol": tiny("digits_byol"),
    "byol with lars in parts": replace(LARS, optim=replace(LARS.optim, accumulate=2)),
    "rdm_byol with small views": with_small_views("digits_rdm_byol"),
    "simsiam with adamw": tiny("digits_simsiam", **DECAYING),
    "rdm_simsiam in fp16": fp16(tiny("digits_rdm_simsiam")),
}
Undisturbed = Callable[[str], Path]
Band = list[tuple[float, float]]


@pytest.fixture(scope="module", autouse=True)
def quick_and_restless() -> Iterator[None]:
    """Load the images once for all trainers. The loss scale starts so high that it overflows, and
    rises after every two steps that did not."""
    with pytest.MonkeyPatch.context() as patch:
        prepared = cache(trainer_module.load)
        patch.setattr(trainer_module, "load", lambda config, split, _=None: prepared(config, split))
        scaler = partial(torch.amp.GradScaler, init_scale=2.0**22, growth_interval=2)
        patch.setattr(torch.amp, "GradScaler", scaler)
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The folder of an undisturbed run of a configuration, by name."""
    folder = tmp_path_factory.mktemp("undisturbed")

    def of(name: str) -> Path:
        path = folder / name.replace(" ", "-")
        if not path.exists():
            run(path, CONFIGS[name])
        return path

    return of


def assert_same_run(path: Path, other: Path) -> None:
    assert metrics(path) == metrics(other)
    assert (path / "spectrum.jsonl").read_bytes() == (other / "spectrum.jsonl").read_bytes()
    state, expected = final_state(path), final_state(other)
    assert [name for name in expected if state.get(name) != expected[name]] == []
    assert state.keys() == expected.keys()


# ---- an engine that fails --------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:filter.engine=gemm was not accurate")
@pytest.mark.parametrize("stops", [[3], [4]], ids=["before its status is read", "after"])
def test_a_failure_of_the_gemm_engine_is_counted_and_kept_across_a_resume(
    stops: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the engine had not been accurate in the third step: eigh from the fourth on."""
    monkeypatch.setattr(choice, "choose", lambda config, device: "gemm")
    used: list[str] = []
    config = with_log(tiny(), every=1)

    def prepare(trainer: Trainer, stop: int = 0) -> None:
        assert trainer.selector is not None
        selector = trainer.selector

        def after(report: StepReport) -> None:
            used.append(str(selector.name))
            if report.number == 2:
                selector.watch(torch.tensor([0, INACCURATE], dtype=torch.int32))
            if report.number + 1 == stop:
                trainer.ask_to_stop()

        trainer.after_step.append(after)

    run(tmp_path / "undisturbed", config, prepare)
    assert used == ["gemm"] * 3 + ["eigh"] * 5
    lines = metrics(tmp_path / "undisturbed")
    assert [line["filter_failures"] for line in lines if "loss" in line] == [0] * 3 + [1] * 5
    for stop in stops:
        with pytest.raises(Interrupted):
            run(tmp_path / "stopped", config, partial(prepare, stop=stop))
    run(tmp_path / "stopped", config, prepare)
    assert_same_run(tmp_path / "stopped", tmp_path / "undisturbed")


# ---- exact resume, one rank ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "stops"),
    [(name, (1, 4, 6)) for name in CONFIGS] + [("rdm_simsiam", range(1, STEPS))],
)
def test_a_run_that_is_resumed_ends_with_the_bits_of_an_undisturbed_one(
    name: str, stops: Sequence[int], undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """After its first step, at the end of an epoch, within one; and after every step."""
    run_with_stops(tmp_path / "run", CONFIGS[name], stops)
    assert_same_run(tmp_path / "run", undisturbed(name))


def test_the_runs_compared_do_move_everything_that_is_compared(undisturbed: Undisturbed) -> None:
    """A constant loss scale, or no skipped step, would prove nothing."""
    state = checkpoint.load(runs.newest(undisturbed("rdm_simsiam in fp16"))).state
    skipped = state["skipped"]["total"]
    assert 0 < skipped < STEPS - 2
    assert state["scaler"]["scale"] > 2.0 ** (22 - skipped)  # it was raised again
    for name, config in CONFIGS.items():
        path = undisturbed(name)
        ended = checkpoint.load(runs.newest(path))
        torch.manual_seed(config.seed)
        with RunFolder.open(str(path), config, overwrite=False, rank=0) as folder:
            started = Trainer(config, folder, CPU).snapshot()
        assert ended.step == STEPS
        assert all(value.any() for value in ended.optim.values())
        moved = [k for k in started.model if not torch.equal(started.model[k], ended.model[k])]
        assert len(moved) > 0.9 * len(started.model)


@pytest.mark.parametrize(
    "config",
    [torch_loader(tiny()), tiny("digits_symsimsiam")],
    ids=["worker processes", "symsimsiam"],
)
def test_resume_is_exact_with(config: Config, tmp_path: Path) -> None:
    run(tmp_path / "undisturbed", config)
    run_with_stops(tmp_path / "resumed", config, [3])
    assert_same_run(tmp_path / "resumed", tmp_path / "undisturbed")


def test_starting_a_finished_run_changes_nothing(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """As after a kill between the last checkpoint and the status `finished`."""
    path = Path(shutil.copytree(undisturbed("byol"), tmp_path / "run"))
    run(path, CONFIGS["byol"])
    assert_same_run(path, undisturbed("byol"))


def test_the_log_has_the_momentum_of_the_step_just_done(undisturbed: Undisturbed) -> None:
    """tau = 1 - (1 - 0.99) (cos(pi k / K) + 1) / 2 in step k of K, from 0."""
    logged = [line["ema_momentum"] for line in metrics(undisturbed("byol"))]
    tau = [1 - (1 - 0.99) * (math.cos(math.pi * k / STEPS) + 1) / 2 for k in (1, 3, 5, 7)]
    assert logged == pytest.approx(tau)


# ---- signals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_stops_after_the_running_step_saved_and_nothing_is_lost(
    number: signal.Signals, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    kill = partial(in_step, step=5, action=lambda _: os.kill(os.getpid(), number))
    with pytest.raises(Interrupted) as stopped:
        run(tmp_path / "run", CONFIGS["rdm_simsiam"], kill)
    assert stopped.value.code == 75
    assert runs.newest(tmp_path / "run").name == "step-00000005"
    assert [signal.getsignal(each) for each in SIGNALS] == before
    run(tmp_path / "run", CONFIGS["rdm_simsiam"])
    assert_same_run(tmp_path / "run", undisturbed("rdm_simsiam"))


def test_a_signal_in_the_last_step_lets_it_finish(undisturbed: Undisturbed, tmp_path: Path) -> None:
    run(tmp_path / "run", CONFIGS["byol"], partial(in_step, step=STEPS, action=STOP))
    assert_same_run(tmp_path / "run", undisturbed("byol"))


# ---- what is not finite ----------------------------------------------------------------------


def spoil(trainer: Trainer, *steps: int) -> None:
    """Put a NaN into the batches of these steps of the run, counted from 1."""

    def before(batch: Batch, number: int) -> None:
        if number + 1 in steps:
            batch.view2[1] = math.nan

    trainer.before_step.append(before)


@pytest.mark.parametrize("name", ["rdm_simsiam", "byol", "rdm_simsiam in fp16"])
def test_steps_not_finite_stop_the_run_and_touch_no_parameter(name: str, tmp_path: Path) -> None:
    config = with_log(CONFIGS[name], max_nonfinite=3, save_every=1)
    kept: list[Trainer] = []
    with pytest.raises(NonFinite) as stopped:
        run(tmp_path / "run", config, lambda t: (kept.append(t), spoil(t, 5, 6, 7)))
    assert stopped.value.code == 71
    with pytest.raises(Interrupted):
        run(tmp_path / "clean", config, lambda t: (kept.append(t), in_step(t, 4, STOP)))
    assert [trainer.step for trainer in kept] == [7, 4]
    spoiled, clean = (trainer.train_step.method.state_dict() for trainer in kept)
    assert [key for key in clean if not torch.equal(spoiled[key], clean[key])] == []


def test_fewer_steps_that_are_not_finite_are_counted_and_training_continues(tmp_path: Path) -> None:
    """Five in all, but never three in a row; two of them are separated by a resume."""
    config = with_log(tiny(), every=1, max_nonfinite=3)
    spoiled = (1, 2, 4, 5, 7)

    def prepare(trainer: Trainer) -> None:
        spoil(trainer, *spoiled)
        in_step(trainer, 4, STOP)

    for stopped in (True, False):
        with pytest.raises(Interrupted) if stopped else nullcontext():
            run(tmp_path / "run", config, prepare)
    lines = metrics(tmp_path / "run")
    assert [line["skipped_steps"] for line in lines] == [1, 2, 2, 3, 4, 4, 5, 5]
    assert [line["loss"] is None for line in lines] == [s in spoiled for s in range(1, 9)]
    ended = checkpoint.load(runs.newest(tmp_path / "run"))
    assert all(tensor.isfinite().all() for tensor in ended.model.values())


def test_steps_that_are_not_finite_are_counted_across_a_resume(tmp_path: Path) -> None:
    config = with_log(tiny(), every=1, max_nonfinite=3)

    def prepare(trainer: Trainer) -> None:
        spoil(trainer, 4, 5, 6)
        in_step(trainer, 5, STOP)

    for error in (Interrupted, NonFinite):
        with pytest.raises(error):
            run(tmp_path / "run", config, prepare)
    assert metrics(tmp_path / "run")[-1]["step"] == 5


def test_fp16_gradients_that_never_fit_stop_the_run(tmp_path: Path) -> None:
    """Lowering the loss scale is no use where the gradient itself is not finite."""
    config = with_log(fp16(tiny(epochs=8)), max_nonfinite=3)

    def prepare(trainer: Trainer) -> None:
        weight = next(trainer.train_step.method.parameters())
        weight.register_hook(lambda gradient: gradient * math.inf)

    with pytest.raises(NonFinite):
        run(tmp_path / "run", config, prepare)


# ---- checkpoints that cannot be written or read ----------------------------------------------


def fail_saves(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    save = checkpoint.save

    def failing(folder: Path, snapshot: checkpoint.Snapshot, *args: Any) -> Path:
        if snapshot.step in steps:
            raise OSError(errno.ENOSPC, "no space left on device")
        return save(folder, snapshot, *args)

    monkeypatch.setattr(checkpoint, "save", failing)


def test_a_save_that_fails_is_a_warning_and_changes_nothing(
    undisturbed: Undisturbed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fail_saves(monkeypatch, {1, 2, 4, 5})
    run(tmp_path / "run", with_log(CONFIGS["rdm_simsiam"], save_every=1))
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning:" in line]
    assert [f"step {step}:" in text for step, text in zip((1, 2, 4, 5), warnings, strict=True)]
    assert_same_run(tmp_path / "run", undisturbed("rdm_simsiam"))


@pytest.mark.parametrize(
    ("failing", "save_every", "stop"),
    [({3, 4, 5}, 1, 0), ({3}, 2, 3)],
    ids=["the third in a row", "at a stop"],
)
def test_a_run_that_cannot_be_saved_stops_and_is_not_called_saved(
    failing: set[int], save_every: int, stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_saves(monkeypatch, failing)
    config = with_log(tiny(), save_every=save_every)
    with pytest.raises(OutputFailed) as stopped:
        run(tmp_path / "run", config, partial(in_step, step=stop, action=STOP))
    assert stopped.value.code == 74
    assert runs.newest(tmp_path / "run").name == "step-00000002"


def test_no_run_is_called_finished_without_its_last_checkpoint(
    undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, config = tmp_path / "run", CONFIGS["rdm_simsiam"]
    with monkeypatch.context() as patch:
        fail_saves(patch, {STEPS})
        with pytest.raises(OutputFailed):
            run(path, config)
    assert read_status(path)["state"] != "finished"
    run(path, config)
    assert_same_run(path, undisturbed("rdm_simsiam"))


def damage(step_folder: Path) -> None:
    file = step_folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def stopped_at_5(path: Path, config: Config) -> list[Path]:
    """The two checkpoints of a run that was stopped after step 5, newest first."""
    run_to(path, config, 5)
    return sorted((path / "checkpoints").iterdir(), reverse=True)


def test_a_damaged_checkpoint_is_skipped_with_a_warning_and_the_run_is_the_same(
    undisturbed: Undisturbed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, config = tmp_path / "run", CONFIGS["rdm_simsiam"]
    newest, _ = stopped_at_5(path, config)
    damage(newest)
    capsys.readouterr()
    run(path, config)
    out = capsys.readouterr().out
    assert f"{newest.name} is damaged" in out and "from step 4" in out
    assert_same_run(path, undisturbed("rdm_simsiam"))


def test_a_run_whose_checkpoints_are_all_damaged_is_refused_and_left_alone(tmp_path: Path) -> None:
    path, config = tmp_path / "run", tiny()
    for step_folder in stopped_at_5(path, config):
        damage(step_folder)
    before = (path / "metrics.jsonl").read_bytes()
    with pytest.raises(DataError) as refused:
        run(path, config)
    assert refused.value.code == 65 and str(path / "checkpoints") in str(refused.value)
    assert (path / "metrics.jsonl").read_bytes() == before
    assert len(list((path / "checkpoints").iterdir())) == 2


# ---- telemetry -------------------------------------------------------------------------------


def test_knn_is_logged_from_a_bounded_bank_and_training_does_not_feel_it(
    undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = calls_of(monkeypatch, online, "knn_accuracy")
    path = tmp_path / "run"
    run_with_stops(path, with_log(CONFIGS["rdm_simsiam"], knn_every=1, knn_bank=100), [4])
    found = {line["step"]: line["knn_top1"] for line in metrics(path) if "knn_top1" in line}
    assert list(found) == [0, 4, 8] and all(10 < top1 <= 100 for top1 in found.values())
    assert [len(bank) for bank, *_ in calls] == [100, 100, 100]
    assert final_state(path) == final_state(undisturbed("rdm_simsiam"))


def test_a_tensorboard_file_has_the_loss_of_metrics_jsonl(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_with_stops(tmp_path / "run", with_log(tiny(), tensorboard=True), [3])
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    logged = [(event.step, event.value) for event in events.Scalars("loss")]
    lines = [(line["step"], line["loss"]) for line in metrics(tmp_path / "run")]
    assert logged == [(step, pytest.approx(loss)) for step, loss in lines]


@pytest.mark.parametrize(("recipe", "warned"), [("digits_rdm_simsiam", 1), ("digits_simsiam", 0)])
def test_a_filter_of_a_thin_batch_is_warned_of(
    recipe: str, warned: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tiny(recipe, epochs=1, global_batch=140)
    config = replace(config, model=replace(config.model, projector_dim=1121))
    run_to(tmp_path / "run", config, 1)
    assert capfd.readouterr().out.count("warning: --optim.global-batch 140 ") == warned


@pytest.mark.parametrize("wait", [0.0, 8.0])
def test_the_wait_for_data_is_the_loaders_whatever_a_step_takes(
    wait: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that only the loader and the step move: steps of 2 s, evaluations of 100 s."""
    now = [0.0]

    def passes(seconds: float) -> None:
        now[0] += seconds

    class Slow:
        name, steps_per_epoch = "slow", 4

        def __init__(self, loader: Loader) -> None:
            self.loader = loader

        def epoch(self, epoch: int, start: int) -> Iterator[Batch]:
            for batch in self.loader.epoch(epoch, start):
                passes(wait)
                yield batch

    def prepare(trainer: Trainer) -> None:
        trainer.loader = Slow(trainer.loader)  # type: ignore[assignment]
        trainer.after_step.append(lambda _: passes(2.0))
        monkeypatch.setattr(trainer.accuracy, "measure", lambda *_: passes(100.0) or {})

    monkeypatch.setattr(timer, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    run(tmp_path / "run", with_log(tiny(), every=1, knn_every=1), prepare)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    found = [(line["data_wait_s"], line["images_per_s"]) for line in lines if "loss" in line]
    assert found == [(wait, 336 / (2 + wait))] * 8


# ---- several ranks ---------------------------------------------------------------------------


# Views of 16 pixels: with fewer, a run amplifies rounding too fast for a band measured by samples.
EVERY_STEP = with_log(tiny(size=16), every=1)
BYOL_EVERY_STEP = with_log(LARS, every=1)
RANK_STOPS = {2: (1, 4), 4: (3,)}  # within an epoch, and at its end
SPOILED = {
    "rdm_simsiam": tiny("digits_rdm_simsiam"),
    "byol in fp16": fp16(tiny("digits_byol")),
}


def _indices(path: Path, config: Config) -> list[list[int]]:
    """Train, and return the images of every step, over all ranks in rank order."""
    seen: list[list[int]] = []

    def before(batch: Batch, _: int) -> None:
        parts = [torch.empty_like(batch.indices) for _ in range(world_size())]
        if world_size() > 1:
            dist.all_gather(parts, batch.indices)
        else:
            parts = [batch.indices]
        seen.append(torch.cat(parts).tolist())

    run(path, config, lambda trainer: trainer.before_step.append(before))
    return seen


def _rank_runs(folder: Path, moved: Path) -> list[list[int]]:
    """All runs on 2 or 4 ranks."""
    trainer_module.load = cache(trainer_module.load)
    seen = _indices(folder / "undisturbed", EVERY_STEP)
    run_with_stops(folder / "resumed", EVERY_STEP, RANK_STOPS[world_size()])
    run_to(moved, EVERY_STEP, 3 if world_size() == 4 else 5)
    if world_size() == 2:
        run(folder / "byol", BYOL_EVERY_STEP)
        run_with_stops(folder / "byol-3", BYOL_EVERY_STEP, [3])
        run(folder / "local-norm", replace(EVERY_STEP, sync_bn=False))
        for name, config in SPOILED.items():
            _spoiled(folder / f"spoiled-{name}", config)
    return seen


def _cold_runs(folder: Path) -> None:
    TrainStep.warm_up_ddp_buckets = lambda self: None  # type: ignore[method-assign]
    run(folder / "undisturbed", EVERY_STEP)
    run_with_stops(folder / "resumed", EVERY_STEP, RANK_STOPS[4])


def _spoiled(path: Path, config: Config) -> None:
    """NaN in the last rank's batch only; batch norms do not carry it to the others."""
    config = replace(with_log(config, every=1, max_nonfinite=2), sync_bn=False)
    kept: list[Trainer] = []

    def prepare(trainer: Trainer) -> None:
        kept.append(trainer)
        if rank() == world_size() - 1:
            spoil(trainer, 2, 4, 5)

    try:
        run(path, config, prepare)
    except NonFinite:
        step = kept[0].step
        path.with_name(f"{path.name}-rank{rank()}").write_text(str(step))
    weights = torch.cat([p.flatten() for p in kept[0].train_step.method.parameters()])
    assert weights.isfinite().all()
    first = weights.clone()
    dist.broadcast(first, src=0)
    assert torch.equal(weights, first)


@dataclass(frozen=True)
class RankRuns:
    """Folders of what `_rank_runs` did on a number of ranks, and the images of every step."""

    folders: dict[int, Path]
    seen: dict[int, list[list[int]]]
    moved: Path
    """Stopped after step 3 on 4 ranks, after step 5 on 2 ranks, and not continued since."""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> RankRuns:
    root = tmp_path_factory.mktemp("ranks")
    done = RankRuns({4: root / "4", 2: root / "2"}, {}, root / "moved")
    for world, folder in done.folders.items():
        every_rank = run_ranks(
            world, _rank_runs, folder, done.moved, tmp_path=root, timeout=TIMEOUT
        )
        done.seen[world] = every_rank[0]
    return done


@pytest.fixture(scope="module")
def order(tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """The images of every step on one rank."""
    return _indices(tmp_path_factory.mktemp("one") / "run", EVERY_STEP)


@pytest.fixture(scope="module")
def band(tmp_path_factory: pytest.TempPathFactory) -> Band:
    return runs.rounding_band(tmp_path_factory.mktemp("band"), EVERY_STEP)


@pytest.mark.parametrize(
    ("world", "resumed", "other"),
    [(2, "resumed", "undisturbed"), (4, "resumed", "undisturbed"), (2, "byol-3", "byol")],
)
def test_resume_is_exact_on_ranks(world: int, resumed: str, other: str, ranks: RankRuns) -> None:
    assert_same_run(ranks.folders[world] / resumed, ranks.folders[world] / other)


@pytest.mark.slow
def test_without_warm_up_resume_is_not_exact_on_four_ranks(tmp_path: Path) -> None:
    """If this fails, the installed torch no longer rebuilds its buckets after the first backward
    pass, and `warm_up_ddp_buckets` may go."""
    run_ranks(4, _cold_runs, tmp_path, tmp_path=tmp_path, timeout=TIMEOUT)
    assert final_state(tmp_path / "resumed") != final_state(tmp_path / "undisturbed")


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_see_the_images_of_one_rank_in_its_order_and_have_its_losses(
    world: int, ranks: RankRuns, band: Band, order: list[list[int]]
) -> None:
    assert ranks.seen[world] == order
    assert runs.outside(runs.losses(ranks.folders[world] / "undisturbed"), band) == []


def test_batch_norms_that_are_not_synchronized_lie_outside_the_band_of_rounding(
    ranks: RankRuns, band: Band
) -> None:
    assert len(runs.outside(runs.losses(ranks.folders[2] / "local-norm"), band)) >= 4


def test_nan_on_one_rank_reaches_no_parameter_and_stops_both_in_one_step(ranks: RankRuns) -> None:
    for name in SPOILED:
        folder = ranks.folders[2] / f"spoiled-{name}"
        stops = [folder.with_name(f"{folder.name}-rank{rank}").read_text() for rank in range(2)]
        assert stops == ["5", "5"], name


def test_a_run_may_continue_with_another_number_of_ranks(ranks: RankRuns, band: Band) -> None:
    run(ranks.moved, EVERY_STEP)
    assert runs.outside(runs.losses(ranks.moved), band) == []
    worlds = [
        record["environment"]["world_size"]
        for record in map(json.loads, (ranks.moved / "metrics.jsonl").read_text().splitlines())
        if "environment" in record
    ]
    assert worlds == [4, 2, 1]
