"""rdm_fast.evaluation.online_probe: it learns, and does not change the run."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdm_fast.config import Config
from rdm_fast.data.images.datasets import load_digits
from rdm_fast.evaluation.online_probe import OnlineProbe
from rdm_fast.evaluation.probe import LinearClassifier
from rdm_fast.runtime.distributed import rank, world_size
from tests.ranks import run_ranks
from tests.runs import final_state, metrics, run, run_to, run_with_stops, with_log
from tests.tiny import tiny, with_small_views

CPU = torch.device("cpu")


def config(**optim: Any) -> Config:
    return with_log(tiny(**optim), probe=True)


class Probe(OnlineProbe):
    """A probe that reads a backbone whose embeddings are its inputs."""

    def __init__(self, config: Config) -> None:
        self.backbone = nn.Identity().train()
        super().__init__(config, load_digits("train"), self.backbone, CPU)

    def step(self, *embeddings: Tensor, labels: Tensor, share: float = 1, skipped: int = 0) -> None:
        """A training step whose learning rate is this share of the run's highest."""
        for embedding in embeddings:
            self.backbone(embedding)
        rate = share * self.config.optim.lr
        self.update(labels, lr=rate, skipped=torch.tensor(float(skipped)))

    @property
    def found(self) -> LinearClassifier:
        assert self.classifier is not None
        return self.classifier


def data(seed: int, n: int = 24, d: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings of two views, [n, d] each, and labels, some of them absent."""
    generator = torch.Generator().manual_seed(seed)
    view1, view2 = torch.randn(2, n, d, generator=generator)
    return view1, view2, torch.randint(-1, 10, (n,), generator=generator)


def test_an_update_is_a_step_of_sgd_on_both_views() -> None:
    probe, reference = Probe(config()), nn.Linear(6, 10)
    start = probe._start(6)
    reference.load_state_dict({name: start[name] for name in ("weight", "bias")})
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1 * 0.5, momentum=0.9)
    for step in range(4):
        view1, view2, labels = data(step)
        probe.step(view1, view2, labels=labels, share=0.5)
        logits = reference(torch.cat([view1, view2]))
        optimizer.zero_grad()
        F.cross_entropy(logits, labels.repeat(2), ignore_index=-1).backward()
        optimizer.step()
    for name, expected in reference.named_parameters():
        found = getattr(probe.found, name)
        torch.testing.assert_close(found, expected.detach(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("n_small", [0, 2])
def test_labels_follow_their_images_through_accumulated_parts(n_small: int) -> None:
    probe = Probe(with_log(with_small_views("digits_byol", n_small, accumulate=3), probe=True))
    labels = torch.arange(30) // 3
    embedding = F.one_hot(labels, 10).float()
    small = [-embedding[:10]] * n_small  # which teach nothing
    parts = [each for part in embedding.chunk(3) for each in (part, part, *small)]
    for _ in range(30):
        probe.step(embedding.flip(0), *parts, labels=labels)  # the first is a warm-up pass
    assert probe.found.logits(embedding).argmax(dim=1).tolist() == labels.tolist()


def test_evaluation_and_skipped_steps_teach_nothing() -> None:
    probe = Probe(config())
    view1, view2, labels = data(0)
    probe.step(view1, view2, labels=labels)
    before = {name: tensor.clone() for name, tensor in probe.state_dict().items()}
    probe.step(view1 * float("nan"), view2, labels=labels, skipped=1)
    assert all(torch.equal(before[name], tensor) for name, tensor in probe.state_dict().items())
    probe.backbone(view1), probe.backbone(view2)
    probe.backbone.eval()
    probe.step(view1 * float("nan"), labels=labels)
    assert all(tensor.isfinite().all() for tensor in probe.state_dict().values())


def test_without_the_flag_or_without_labels_there_is_no_probe() -> None:
    images, backbone = load_digits("train"), nn.Identity()
    unlabeled = type(images)(images.pixels, None, [])
    for probe in (
        OnlineProbe(tiny(), images, backbone, CPU),
        OnlineProbe(config(), unlabeled, backbone, CPU),
    ):
        backbone(torch.ones(2, 3))
        probe.update(torch.zeros(2).long(), lr=0.1, skipped=torch.zeros(()))
        assert probe.classifier is None and probe.state_dict() == {}


# ---- in a run ----------------------------------------------------------------------------------


def without_probe(state: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in state.items() if not name.startswith("extra:probe/")}


def measured(path: Path) -> list[float]:
    return [line["probe_top1"] for line in metrics(path) if "probe_top1" in line]


@pytest.mark.parametrize(
    ("recipe", "accumulate"), [("digits_rdm_simsiam", 2), ("digits_byol", 1)], ids=str
)
def test_a_run_is_the_same_bits_with_a_probe_and_resumes_with_it(
    recipe: str, accumulate: int, tmp_path: Path
) -> None:
    plain = with_log(tiny(recipe, accumulate=accumulate, epochs=1), knn_every=1)
    probed = with_log(plain, probe=True)
    run(tmp_path / "plain", plain)
    run(tmp_path / "probed", probed)
    run_with_stops(tmp_path / "stopped", probed, [3])
    found = final_state(tmp_path / "probed")
    assert without_probe(found) == final_state(tmp_path / "plain")
    assert len(found) - len(without_probe(found)) == 4
    assert final_state(tmp_path / "stopped") == found
    assert len(measured(tmp_path / "probed")) == 1
    assert measured(tmp_path / "probed") == measured(tmp_path / "stopped")
    assert measured(tmp_path / "plain") == []


def test_a_probe_may_be_added_to_a_run_that_is_resumed(tmp_path: Path) -> None:
    plain = tiny(epochs=1)
    run_to(tmp_path / "run", plain, 3)
    run(tmp_path / "run", with_log(plain, probe=True))
    assert len(without_probe(final_state(tmp_path / "run"))) < len(final_state(tmp_path / "run"))


def _on_a_rank() -> dict[str, Tensor]:
    probe = Probe(config())
    for step in range(3):
        view1, view2, labels = (part.chunk(world_size())[rank()] for part in data(step))
        probe.step(view1, view2, labels=labels)
    return probe.state_dict()


def test_two_ranks_learn_the_same_as_one(tmp_path: Path) -> None:
    alone = _on_a_rank()
    for found in run_ranks(2, _on_a_rank, tmp_path=tmp_path):
        for name, expected in alone.items():
            torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=0)
