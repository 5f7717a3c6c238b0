"""rdm_fast.evaluation.protocols against the reference's schedules, written out."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from rdm_fast.evaluation.protocols import PROTOCOLS, Protocol


def test_the_command_line_of_an_evaluation_does_not_import_torch() -> None:
    code = "import sys, rdm_fast.evaluation.options; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def torch_schedule(protocol: Protocol) -> list[float]:
    """The same schedule by PyTorch's own scheduler, stepped once per epoch."""
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


def test_settings_are_the_references() -> None:
    imagenet = PROTOCOLS["reference-imagenet"]
    assert imagenet.lr == pytest.approx(0.1 * imagenet.batch / 256, rel=1e-12)
    simsiam, byol = PROTOCOLS["reference-imagenet100"], PROTOCOLS["reference-imagenet100-byol"]
    assert (simsiam.lr, byol.lr) == (30.0, 0.3)
    assert replace(byol, name=simsiam.name, lr=simsiam.lr) == simsiam


def test_an_epoch_has_as_many_steps_as_in_the_source() -> None:
    """main_lincls.py's DataLoader drops nothing; solo-learn's and DALI's drop the last batch."""
    n = 1_281_167
    for name, drop_last, batch, expected in [
        ("reference-imagenet", False, 4096, 313),
        ("reference-imagenet100", True, 256, 5004),
        ("reference-cifar", True, 256, 5004),
    ]:
        protocol = PROTOCOLS[name]
        loader = torch.utils.data.DataLoader(range(n), batch, drop_last=drop_last)  # type: ignore[arg-type, var-annotated]
        used = protocol.images_per_epoch(n, protocol.batch_for(n))
        assert -(-used // protocol.batch) == len(loader) == expected


def test_a_small_training_set_is_one_batch_and_a_large_one_many() -> None:
    protocol = PROTOCOLS["reference-imagenet"]
    assert (protocol.batch_for(1400), protocol.batch_for(50_000)) == (1400, 4096)
    assert PROTOCOLS["closed-form"].batch_for(50_000) == 50_000


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("reference-cifar", {"epochs": 0}),
        ("reference-cifar", {"lr": 0.0}),
        ("reference-cifar", {"batch": 0}),
        ("reference-cifar", {"schedule": "steps"}),
        ("reference-cifar", {"milestones": (0.5,)}),
        ("sgd-sweep", {"lrs": ()}),
        ("sgd-sweep", {"weight_decays": ()}),
        ("sgd-sweep", {"epochs": 0}),
    ],
    ids=str,
)
def test_impossible_settings_are_an_error(name: str, changes: dict[str, object]) -> None:
    with pytest.raises(ValueError) as error:
        replace(PROTOCOLS[name], **changes)  # type: ignore[arg-type]
    assert name in str(error.value)
