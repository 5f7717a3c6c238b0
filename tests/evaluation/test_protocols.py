"""rdm_fast.evaluation.protocols against the reference's schedules, written out."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from rdm_fast.errors import UsageError
from rdm_fast.evaluation.protocols import PROTOCOLS, Protocol, find_protocol


def test_choosing_a_protocol_does_not_import_torch() -> None:
    code = "import sys, rdm_fast.evaluation.protocols; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def torch_schedule(protocol: Protocol) -> list[float]:
    """The same schedule by PyTorch's own scheduler, stepped once an epoch."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=protocol.lr)
    scheduler: torch.optim.lr_scheduler.LRScheduler
    if protocol.schedule == "cosine":
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, protocol.epochs)
    else:
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [60, 80])
    rates = []
    for _ in range(protocol.epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("name", [name for name in PROTOCOLS if name.startswith("reference")])
def test_learning_rates_are_those_of_pytorchs_scheduler(name: str) -> None:
    protocol = PROTOCOLS[name]
    rates = [protocol.lr_at(epoch) for epoch in range(protocol.epochs)]
    # The cosine scheduler multiplies 90 ratios, so float64 rounding adds up to about 1e-14.
    assert rates == pytest.approx(torch_schedule(protocol), rel=1e-12, abs=1e-12 * protocol.lr)


def test_imagenet_scales_the_learning_rate_with_its_batch_as_the_reference() -> None:
    protocol = PROTOCOLS["reference-imagenet"]
    assert protocol.lr == pytest.approx(0.1 * protocol.batch / 256, rel=1e-12)


def test_the_two_imagenet100_protocols_differ_in_name_and_learning_rate_alone() -> None:
    simsiam, byol = PROTOCOLS["reference-imagenet100"], PROTOCOLS["reference-imagenet100-byol"]
    assert (simsiam.lr, byol.lr) == (30.0, 0.3)
    assert replace(byol, name=simsiam.name, lr=simsiam.lr) == simsiam


def test_a_small_training_set_is_one_batch_and_a_large_one_many() -> None:
    protocol = PROTOCOLS["reference-imagenet"]
    assert (protocol.batch_for(1400), protocol.batch_for(50_000)) == (1400, 4096)
    assert PROTOCOLS["closed-form"].batch_for(50_000) == 50_000


def test_an_unknown_protocol_is_told_the_known_ones() -> None:
    with pytest.raises(
        UsageError, match=r"--protocol cifar is not.*closed-form, logistic, reference-cifar"
    ):
        find_protocol("cifar", "digits")
    assert find_protocol("reference-cifar", "digits") is PROTOCOLS["reference-cifar"]
    assert find_protocol("auto", "digits") is PROTOCOLS["logistic"]
    assert find_protocol("auto", "folder") is PROTOCOLS["closed-form"]
    assert find_protocol("auto", "cifar10") is PROTOCOLS["reference-cifar"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "at least 1 epoch"),
        ({"lr": 0.0}, "positive lr"),
        ({"batch": 0}, "batch of at least"),
        ({"schedule": "steps"}, "steps needs milestones"),
        ({"milestones": (0.5,)}, "cosine has none"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_meant_are_refused(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=f"protocol reference-cifar .*{message}"):
        replace(PROTOCOLS["reference-cifar"], **changes)  # type: ignore[arg-type]
