"""Time to make both views of a batch of images on the device.

    rdm          draw the parameters, send them, make both views
    rdm_op       only make them, with `rdm_kernels.augment_views`
    definition   the op's PyTorch body on the same device
    torchvision  transforms v2 on the batch: all images share one draw of each step, a weaker
                 augmentation that is less work
    kornia       its own draw for each image, where kornia is installed

Before it is timed, the op's levels are compared with the definition's on the CPU. The others draw
their own parameters, so only shape, range and mean of their views are checked.
"""

from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.bench_loader import kornia_view, natural_images, torchvision_view
from bench.conftest import chosen
from rdm_fast.config import AugmentConfig, Config, DataConfig, OptimConfig, ViewConfig
from rdm_fast.data.loaders.batch import draw_all_views
from rdm_fast.data.views.augment import blur_taps, view_table, views_of_table
from rdm_kernels.views.definition import make_views
from rdm_kernels.views.op import augment_views_op

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32

# images of a batch, their side, and the side of a view
SMALL = ["8x16 to 16"]
CASES = ["512x32 to 32", "512x96 to 96", "256x256 to 224"] if GPU else ["64x32 to 32"]
NAMES = ["rdm", "rdm_op", "definition", "torchvision"] + (["kornia"] if find_spec("kornia") else [])

VIEW = ViewConfig(crop_scale=(0.2, 1), jitter=0.8, grey=0.2, blur=0.5, flip=0.5)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = chosen(metafunc.config, SMALL, CASES)
    metafunc.parametrize(("name", "case"), [(name, case) for case in cases for name in NAMES])


def configure(n: int, size: int) -> Config:
    """SimSiam's views; CIFAR's recipes have no blur."""
    view = VIEW if size > 32 else ViewConfig(crop_scale=(0.2, 1), jitter=0.8, grey=0.2, flip=0.5)
    return Config(
        data=DataConfig(name="arrays", loader="resident"),
        augment=AugmentConfig(size=size, view1=view, view2=view),
        optim=OptimConfig(global_batch=n),
    )


def bench_two_views(measure: Callable[..., None], name: str, case: str) -> None:
    n, side, size = map(int, case.replace(" to ", "x").split("x"))
    config, images = configure(n, size), natural_images(n, side, side)
    augment = config.augment
    planes = torch.from_numpy(images.pixels).permute(0, 3, 1, 2).contiguous().to(DEVICE)
    indices = np.arange(n)
    table = view_table(draw_all_views(config, images, 0, indices), indices)
    there = table.to(DEVICE)
    taps, interpolation = blur_taps(augment, size), augment.interpolation

    def drawn() -> Tensor:
        fresh = view_table(draw_all_views(config, images, 0, indices), indices)
        fresh = (fresh.pin_memory() if GPU else fresh).to(DEVICE, non_blocking=True)
        return views_of_table(planes, fresh, augment, DTYPE)

    def defined() -> Tensor:
        mean, std = augment.mean, augment.std
        return make_views(planes, there, size, interpolation, taps, mean, std, DTYPE)

    def made() -> Tensor:
        return views_of_table(planes, there, augment, DTYPE)

    def by(transform: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        return lambda: torch.cat([transform(planes) for _ in range(2)])

    match name:
        case "torchvision":
            run = by(torchvision_view(augment, dtype=DTYPE))
        case "kornia":
            view = kornia_view(augment)
            run = by(lambda images: view(images.float() / 255).to(DTYPE))
        case _:
            run = {"rdm": drawn, "rdm_op": made, "definition": defined}[name]

    views = run()
    assert views.shape == (2 * n, 3, size, size) and views.dtype == DTYPE
    assert views.isfinite().all() and abs(float(views.float().mean())) < 1
    if name in ("rdm", "rdm_op"):
        some = table[:, :8]
        expected = augment_views_op(
            planes.cpu(), some, size, interpolation, taps, augment.mean, augment.std, torch.uint8
        )
        found = views_of_table(planes, some.to(DEVICE), augment, torch.uint8).cpu()
        assert (found != expected).double().mean() <= 1e-3, "the op does not give its definition"
    measure(
        run,
        bytes_moved=planes.numel() + views.numel() * views.element_size(),
        capturable=name == "rdm_op",
    )
