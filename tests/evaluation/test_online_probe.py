"""rdm_fast.evaluation.online_probe: what it learns, and that the run does not notice it."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdm_fast.config import Config
from rdm_fast.data.images.datasets import load_digits
from rdm_fast.evaluation.online_probe import OnlineProbe
from rdm_fast.runtime.distributed import rank, world_size
from tests.ranks import run_ranks
from tests.runs import final_state, metrics, run, run_to, run_with_stops, with_log
from tests.tiny import tiny

CPU = torch.device("cpu")


def made(config: Config) -> tuple[OnlineProbe, nn.Module]:
    """A probe that listens to a backbone whose embeddings are its inputs."""
    backbone = nn.Identity().train()
    return OnlineProbe(config, load_digits("train"), backbone, CPU), backbone


def config(**optim: Any) -> Config:
    return with_log(tiny(**optim), probe=True)


def data(seed: int, n: int = 24, d: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings of two views, [n, d] each, and labels, some of them absent."""
    generator = torch.Generator().manual_seed(seed)
    view1, view2 = torch.randn(2, n, d, generator=generator)
    return view1, view2, torch.randint(-1, 10, (n,), generator=generator)


def test_an_update_is_a_step_of_sgd_on_both_views() -> None:
    probe, backbone = made(config())
    reference, optimizer = None, None
    for step in range(4):
        view1, view2, labels = data(step)
        backbone(view1), backbone(view2)
        probe.update(labels, lr=0.5 * probe.config.optim.lr, skipped=torch.zeros(()))
        if reference is None:  # the oracle starts where the probe started
            reference = nn.Linear(6, 10)
            start = probe._start(6)
            reference.load_state_dict({"weight": start["weight"], "bias": start["bias"]})
            optimizer = torch.optim.SGD(reference.parameters(), lr=0.1 * 0.5, momentum=0.9)
        assert optimizer is not None
        logits = reference(torch.cat([view1, view2]))
        optimizer.zero_grad()
        F.cross_entropy(logits, labels.repeat(2), ignore_index=-1).backward()
        optimizer.step()
    found = probe.classifier
    assert found is not None and reference is not None
    torch.testing.assert_close(found.weight, reference.weight.detach(), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.bias, reference.bias.detach(), atol=1e-6, rtol=0)


def test_labels_follow_their_images_through_accumulated_parts() -> None:
    probe, backbone = made(config(accumulate=3))
    labels = torch.arange(30) // 3
    embedding = F.one_hot(labels, 10).float()
    for _ in range(30):
        with torch.no_grad():
            backbone(embedding.flip(0))  # a pass that only looks ahead
        for part in embedding.chunk(3):
            backbone(part), backbone(part)
        probe.update(labels, lr=probe.config.optim.lr, skipped=torch.zeros(()))
    found = probe.classifier
    assert found is not None
    assert found.logits(embedding).argmax(dim=1).tolist() == labels.tolist()


def test_nothing_is_learnt_from_evaluation_or_from_a_step_that_was_not_applied() -> None:
    probe, backbone = made(config())
    view1, view2, labels = data(0)
    backbone(view1), backbone(view2)
    probe.update(labels, lr=0.1, skipped=torch.zeros(()))
    before = {name: tensor.clone() for name, tensor in probe.state_dict().items()}
    backbone(view1 * float("nan")), backbone(view2)
    probe.update(labels, lr=0.1, skipped=torch.ones(()))
    assert all(torch.equal(before[name], tensor) for name, tensor in probe.state_dict().items())
    backbone(view1), backbone(view2)
    backbone.eval()(view1 * float("nan"))
    probe.update(labels, lr=0.1, skipped=torch.zeros(()))
    assert all(tensor.isfinite().all() for tensor in probe.state_dict().values())


def test_without_the_flag_or_without_labels_there_is_no_probe() -> None:
    images = load_digits("train")
    backbone = nn.Identity()
    for probe in (
        OnlineProbe(tiny(), images, backbone, CPU),
        OnlineProbe(config(), type(images)(images.pixels, None, []), backbone, CPU),
    ):
        backbone(torch.ones(2, 3))
        probe.update(torch.zeros(2).long(), lr=0.1, skipped=torch.zeros(()))
        assert probe.classifier is None and probe.state_dict() == {}


# ---- in a run --------------------------------------------------------------------------------


def without_probe(state: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in state.items() if not name.startswith("extra:probe/")}


@pytest.mark.parametrize(
    ("recipe", "accumulate"), [("digits_rdm_simsiam", 2), ("digits_byol", 1)], ids=str
)
def test_a_run_is_the_same_bits_with_a_probe_and_resumes_with_it(
    recipe: str, accumulate: int, tmp_path: Path
) -> None:
    plain = with_log(tiny(recipe, accumulate=accumulate), knn_every=1)
    probed = with_log(plain, probe=True)
    run(tmp_path / "plain", plain)
    run(tmp_path / "probed", probed)
    run_with_stops(tmp_path / "stopped", probed, [3])
    found = final_state(tmp_path / "probed")
    assert without_probe(found) == final_state(tmp_path / "plain")
    assert len(found) - len(without_probe(found)) == 4
    assert final_state(tmp_path / "stopped") == found
    measured = [line["probe_top1"] for line in metrics(tmp_path / "probed") if "probe_top1" in line]
    assert len(measured) == 2 and measured == [
        line["probe_top1"] for line in metrics(tmp_path / "stopped") if "probe_top1" in line
    ]
    assert not any("probe_top1" in line for line in metrics(tmp_path / "plain"))


def test_a_probe_may_be_added_to_a_run_that_goes_on(tmp_path: Path) -> None:
    plain = tiny()
    stop = with_log(plain, probe=True)

    run_to(tmp_path / "run", plain, 3)
    run(tmp_path / "run", stop)
    assert len(without_probe(final_state(tmp_path / "run"))) < len(final_state(tmp_path / "run"))


def _on_a_rank() -> dict[str, Tensor]:
    probe, backbone = made(config())
    for step in range(3):
        views = data(step)
        view1, view2, labels = (part.chunk(world_size())[rank()] for part in views)
        backbone(view1), backbone(view2)
        probe.update(labels, lr=probe.config.optim.lr, skipped=torch.zeros(()))
    return probe.state_dict()


def test_two_ranks_learn_what_one_does(tmp_path: Path) -> None:
    alone = _on_a_rank()
    for found in run_ranks(2, _on_a_rank, tmp_path=tmp_path):
        for name, expected in alone.items():
            torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=0)
