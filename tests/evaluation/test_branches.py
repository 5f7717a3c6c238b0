"""Which branch of a run is evaluated, and with which batch-norm statistics."""

import json
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from rdm_fast.data import load
from rdm_fast.data.images.sets import Subset
from rdm_fast.data.loaders.evaluation import evaluation_batches
from rdm_fast.errors import DataError, UsageError
from rdm_fast.evaluation import run as evaluation
from rdm_fast.evaluation.features import embed, recompute_statistics
from rdm_fast.evaluation.loaded_backbone import load_for_evaluation, load_method
from rdm_fast.evaluation.options import EvaluateCommand
from rdm_fast.methods import Method
from rdm_fast.models.batchnorm import norms_of
from rdm_fast.tools.export.write import export_checkpoint
from tests.random_run import save_random
from tests.ranks import run_ranks
from tests.runs import metrics, with_log
from tests.runs import run as train
from tests.spies import refused
from tests.tiny import tiny

CPU = torch.device("cpu")
STEP = "step-00000001"
CONFIG = tiny("digits_byol", size=16)
N = 1400  # training images


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of random weights and statistics, other ones in each branch."""
    path = tmp_path_factory.mktemp("run") / "run"
    save_random(path, CONFIG)
    return path


def method_of(run: Path) -> Method:
    return load_method(run / "checkpoints" / STEP, CONFIG)[0]


def evaluate(checkpoint: Path, **options: Any) -> Any:
    options = {"protocol": "closed-form"} | options
    command = EvaluateCommand(checkpoint=str(checkpoint), **options)
    return evaluation.evaluate(load_for_evaluation(command), command, CPU)


def embeddings(run: Path, out: Path, **options: Any) -> Tensor:
    """Of the test images, as `rdm eval` writes them."""
    file = out / f"{'-'.join(map(str, options.values()))}.npz"
    evaluate(run, features_out=str(file), out=str(out), **options)
    return torch.from_numpy(np.load(file)["test_features"])


def expected(backbone: nn.Module) -> Tensor:
    return embed(backbone.eval(), load(CONFIG.data, "test"), CONFIG, CPU, batch=64)[0]


def pixels() -> Tensor:
    """All training images, as evaluation shows them."""
    images = load(CONFIG.data, "train")
    (whole,) = evaluation_batches(images, CONFIG.augment, batch=N, device=CPU)
    return whole[0]


def test_each_branch_is_embedded_with_the_statistics_asked_for(run: Path, tmp_path: Path) -> None:
    method: Any = method_of(run)
    found = {
        "online": embeddings(run, tmp_path, branch="online"),
        "target": embeddings(run, tmp_path, branch="target"),
        "online's": embeddings(run, tmp_path, branch="target", bn="online"),
    }
    assert torch.equal(embeddings(run, tmp_path, branch="auto"), found["online"])
    assert torch.equal(found["online"], expected(method.backbone))
    assert torch.equal(found["target"], expected(method.target_backbone))
    mixed = method.target_backbone
    statistics = {k: v for k, v in method.backbone.state_dict().items() if "running" in k}
    mixed.load_state_dict(mixed.state_dict() | statistics)
    assert torch.equal(found["online's"], expected(mixed))
    kinds = list(found.values())
    assert not any(torch.equal(kinds[i], kinds[i - 1]) for i in range(3))


def test_a_result_names_branch_and_statistics_and_embeddings_are_never_mixed_up(
    run: Path, tmp_path: Path
) -> None:
    asked = [("online", "own"), ("target", "own"), ("target", "recompute")]
    tops, files = [], []
    for branch, bn in asked:
        before = set(tmp_path.iterdir())
        tops.append(evaluate(run, branch=branch, bn=bn, out=str(tmp_path)))
        new = set(tmp_path.iterdir()) - before
        (result,) = (json.loads(file.read_text()) for file in new if file.suffix == ".json")
        assert (result["branch"], result["bn"]) == (branch, bn)
        assert result["effective_rank"] > 1
        files.append(next(file for file in new if file.name.endswith("-test.safetensors")))
        assert len(new) == 3
    for i, file in enumerate(files):  # another branch's file under this name is not used
        shutil.copy(files[i - 1], file)
        branch, bn = asked[i]
        assert evaluate(run, branch=branch, bn=bn, out=str(tmp_path)) == tops[i]


def test_the_online_branch_is_evaluated_as_ever_and_finds_its_old_embeddings(
    run: Path, tmp_path: Path
) -> None:
    evaluate(run, out=str(tmp_path))
    cached = tmp_path / f"{STEP}-train.safetensors"
    assert {file.name for file in tmp_path.iterdir()} == {
        cached.name, f"{STEP}-test.safetensors", f"{STEP}-closed-form.json",
    }  # fmt: skip
    with safe_open(cached, framework="pt") as file:
        key = json.loads(file.metadata()["key"])
    assert set(key) == {
        "checkpoint", "data", "size", "interpolation", "mean", "std", "split", "precision",
        "device",
    }  # fmt: skip


def test_an_export_of_the_target_says_so_and_evaluates_alike(run: Path, tmp_path: Path) -> None:
    step = run / "checkpoints" / STEP
    method: Any = method_of(run)
    for branch, backbone in (("online", method.backbone), ("target", method.target_backbone)):
        out = tmp_path / f"{branch}.safetensors"
        export_checkpoint(step, "safetensors", branch=branch, out=out)  # type: ignore[arg-type]
        with safe_open(out, framework="pt") as file:
            assert json.loads(file.metadata()["rdm_fast"])["branch"] == branch
        assert f"| branch | {branch} |" in Path(f"{out}.md").read_text()
        found = embeddings(out, tmp_path, recipe="digits_byol")
        (tmp_path / "digits_byol.npz").unlink()
        assert torch.equal(found, expected(backbone))
    lines = export_checkpoint(step, "safetensors", branch="target")
    assert f"{STEP}-target-safetensors.safetensors" in lines[0]


# ---- recomputed statistics ---------------------------------------------------------------------


def encoder(run: Path) -> nn.Sequential:
    return nn.Sequential(*method_of(run).encoders["target"])


def test_recomputed_statistics_are_those_of_all_training_images(run: Path) -> None:
    network = encoder(run)
    old = deepcopy(network.state_dict())
    flags = [(module, module.training) for module in network.modules()]
    images = load(CONFIG.data, "train")
    assert recompute_statistics(network, images, CONFIG, CPU, batch=333)
    first: Any = network[0].bn1
    values = network[0].conv1(pixels()).double()  # what the first batch norm is given
    close = {"atol": 1e-6, "rtol": 1e-6}
    torch.testing.assert_close(first.running_mean.double(), values.mean((0, 2, 3)), **close)
    torch.testing.assert_close(first.running_var.double(), values.var((0, 2, 3)), **close)
    new = network.state_dict()
    same = {name for name in old if torch.equal(old[name], new[name])}
    assert same == {n for n in old if not n.endswith(("mean", "var", "tracked"))}
    assert flags == [(module, module.training) for module in network.modules()]
    assert all(norm.momentum == 0.1 for norm in norms_of(network))


def test_one_batch_of_all_images_is_torchs_update_bn(run: Path) -> None:
    ours, theirs = encoder(run), encoder(run)
    recompute_statistics(ours, load(CONFIG.data, "train"), CONFIG, CPU, batch=N)
    update_bn([pixels()], theirs)
    for name, tensor in theirs.state_dict().items():
        if "running" in name:
            torch.testing.assert_close(ours.state_dict()[name], tensor, atol=1e-6, rtol=1e-5)


def _recomputed(run: str) -> dict[str, Tensor]:
    network = encoder(Path(run))
    # 1400 images: batches of 127, and a last one of 3 after one image is put to the 11th
    recompute_statistics(network, load(CONFIG.data, "train"), CONFIG, CPU, batch=127)
    return {n: t for n, t in network.state_dict().items() if "running" in n}


def test_ranks_recompute_what_one_does(run: Path, tmp_path: Path) -> None:
    alone = _recomputed(str(run))
    for found in run_ranks(2, _recomputed, str(run), tmp_path=tmp_path):
        for name, tensor in alone.items():
            torch.testing.assert_close(found[name], tensor, atol=0, rtol=2e-7)


@pytest.mark.parametrize(("n", "batch", "sizes"), [(7, 3, [3, 4]), (6, 3, [3, 3]), (2, 5, [2])])
def test_no_batch_of_statistics_is_one_image(n: int, batch: int, sizes: list[int]) -> None:
    images = Subset(load(CONFIG.data, "train"), np.arange(n))
    given = {"batch": batch, "device": CPU, "whole": True}
    shown = [indices for _, indices in evaluation_batches(images, CONFIG.augment, **given)]  # type: ignore[arg-type]
    assert [len(indices) for indices in shown] == sizes
    assert torch.equal(torch.cat(shown), torch.arange(n))


class Torn(Subset):
    """The first training images, some of which cannot be read."""

    def __init__(self, n: int, torn: set[int]) -> None:
        super().__init__(load(CONFIG.data, "train"), np.arange(n))
        self.pixels, self._torn = None, torn

    def read(self, i: int) -> Any:
        if i in self._torn:
            raise DataError(f"image {i} is torn")
        return super().read(i)


def test_unreadable_images_and_one_alone_in_its_batch_take_no_part(run: Path) -> None:
    torn, whole = encoder(run), encoder(run)
    assert not recompute_statistics(torn, Torn(6, {0}), CONFIG, CPU, batch=2)
    recompute_statistics(whole, Torn(6, {0, 1}), CONFIG, CPU, batch=4)
    a, b = (network[0].bn1.running_mean for network in (torn, whole))
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    with refused(DataError, "--bn recompute"):
        recompute_statistics(torn, Torn(4, {0, 1, 3}), CONFIG, CPU, batch=2)


# ---- in a run ----------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["digits_byol", "digits_rdm_simsiam"])
def test_knn_of_both_branches_is_logged_and_is_that_of_evaluation(
    recipe: str, tmp_path: Path
) -> None:
    train(tmp_path, with_log(tiny(recipe, epochs=1), knn_every=1))
    logged = [line for line in metrics(tmp_path) if "knn_top1" in line]
    assert [line["step"] for line in logged] == [0, 4]
    has_target = recipe == "digits_byol"
    assert all(("knn_top1_target" in line) == has_target for line in logged)
    if has_target:
        assert logged[0]["knn_top1"] == logged[0]["knn_top1_target"]  # the target is a copy
    branches = {"online": "knn_top1", "target": "knn_top1_target"}
    for branch, key in [*branches.items()][: 1 + has_target]:
        assert evaluate(tmp_path, branch=branch).knn_top1 == logged[-1][key]


# ---- flags -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"bn": "online"}, "--bn online"),
        ({"branch": "online", "bn": "online"}, "--bn online"),
        ({"bn": "recompute", "batch": 1}, "--batch"),
        ({"branch": "both"}, "--branch"),
        ({"bn": "both"}, "--bn"),
    ],
    ids=str,
)
def test_flags_that_do_not_fit_a_run_are_named(
    options: dict[str, Any], named: str, run: Path
) -> None:
    with refused(UsageError, named):
        evaluate(run, **options)


def test_a_run_without_target_weights_and_a_file_have_no_target(run: Path, tmp_path: Path) -> None:
    simsiam, _ = save_random(tmp_path / "simsiam", tiny("digits_simsiam"))
    with refused(UsageError, "--branch target", "method=simsiam"):
        evaluate(simsiam, branch="target")
    with refused(UsageError, "--branch target", "method=simsiam"):
        export_checkpoint(simsiam, "safetensors", branch="target")
    file = tmp_path / "x.safetensors"
    export_checkpoint(run / "checkpoints" / STEP, "safetensors", out=file)
    for options in ({"branch": "target"}, {"branch": "online"}, {"bn": "online"}):
        with refused(UsageError, f"--{next(iter(options))}", str(file)):
            evaluate(file, recipe="digits_byol", **options)
    assert evaluate(file, recipe="digits_byol", bn="recompute").top1 > 10
