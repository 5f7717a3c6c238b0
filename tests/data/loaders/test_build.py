"""The loaders against each other, across ranks, workers and restarts."""

import pickle
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from rdm_fast.config import AugmentConfig, Config, DataConfig, OptimConfig, ViewConfig
from rdm_fast.data import Batch, ImageSet, Loader, build_loader, load
from rdm_fast.data.images.sets import PixelImages
from rdm_fast.data.loaders.dali_loader import install_line
from rdm_fast.data.loaders.torch_loader import ViewsOfImages
from rdm_fast.data.views.sampler import epoch_order
from rdm_fast.errors import DataError, Unavailable, UsageError
from rdm_fast.runtime.precision import dtype_of_views
from tests.data.files import good_images, packed, read_folder
from tests.data.loaders.dali_here import DECODING, HERE, LOADERS, needs_dali, without_dali
from tests.spies import nothing_waits, refused

Pixels = NDArray[np.uint8]
CPU = torch.device("cpu")
VIEW = ViewConfig(crop_scale=(0.2, 1), jitter=0.8, grey=0.2, blur=0.5, flip=0.5)
AUGMENT = AugmentConfig(
    size=16, view1=VIEW, view2=replace(VIEW, solarize=0.2),
    small_views=2, small_size=10, small_blur=0.9,
)  # fmt: skip


def configure(loader: str = "auto", workers: int = 0, batch: int = 16, **changes: object) -> Config:
    return Config(
        method="byol",
        data=DataConfig(name="arrays", loader=loader, workers=workers, max_bad=0),
        augment=AUGMENT,
        optim=OptimConfig(global_batch=batch),
        **changes,
    )


def build(
    config: Config, images: ImageSet, rank: int = 0, world: int = 1, device: torch.device = CPU
) -> Loader:
    return build_loader(config, images, rank=rank, world_size=world, device=device)


def batches(
    config: Config, images: ImageSet, epoch: int = 0, start: int = 0, rank: int = 0, world: int = 1
) -> list[Batch]:
    return list(build(config, images, rank, world).epoch(epoch, start))


def levels(view: Tensor) -> NDArray[np.float64]:
    std, mean = (torch.tensor(x)[:, None, None] for x in (AUGMENT.std, AUGMENT.mean))
    return ((view * std + mean) * 255).round().double().numpy()


def same(a: Batch, b: Batch) -> bool:
    tensors = [[*batch.views, batch.labels, batch.indices] for batch in (a, b)]
    return all(map(torch.equal, *tensors))


@pytest.fixture(scope="module")
def images(photographs: Pixels) -> ImageSet:
    """Six batches of 16."""
    return PixelImages(photographs, np.arange(96) % 3, ["a", "b", "c"])


@pytest.fixture(scope="module")
def whole(images: ImageSet) -> Callable[[str], list[Batch]]:
    """Epoch 1 of a loader, on one rank."""
    made: dict[str, list[Batch]] = {}

    def of(loader: str) -> list[Batch]:
        if loader not in made:
            made[loader] = batches(configure(loader), images, epoch=1)
        return made[loader]

    return of


Whole = Callable[[str], list[Batch]]


@pytest.fixture
def encoded(jpeg_files: list[bytes]) -> ImageSet:
    return packed(jpeg_files)


# ---- which loader ----------------------------------------------------------------------------


def test_auto_is_resident_if_decoded_else_torch(images: ImageSet, encoded: ImageSet) -> None:
    assert build(configure(), images).name == "resident"
    assert build(configure(batch=4), encoded).name == "torch"


@pytest.mark.gpu
def test_auto_takes_dali_on_a_gpu(encoded: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    assert build(configure(batch=4), encoded, device=gpu).name == ("dali" if HERE else "torch")
    without_dali(monkeypatch)
    assert build(configure(batch=4), encoded, device=gpu).name == "torch"


def test_without_dali_an_error_helps(images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    pyproject = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text("utf-8"))
    extras = pyproject["project"]["optional-dependencies"]
    without_dali(monkeypatch)
    for cuda, extra in (("12.9", "dali-cuda12"), ("13.2", "dali"), (None, "dali")):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        assert install_line() == f"pip install '{extras[extra][0]}'"
        with refused(Unavailable, install_line()):
            build(configure("dali"), images)


def test_images_that_do_not_fit_are_refused(images: ImageSet, encoded: ImageSet) -> None:
    with pytest.raises(UsageError, match=r"--optim\.global-batch 128 .* 96 "):
        build(configure(batch=128), images)
    with pytest.raises(ValueError, match=r"optim\.global_batch=15"):
        build(configure(batch=15), images, world=2)
    with pytest.raises(UsageError, match=r"--data\.loader resident .*--data\.loader torch"):
        build(configure("resident", batch=4), encoded)
    with pytest.raises(UsageError, match=r"--augment\.mean"):
        build(configure(), load(DataConfig(name="digits"), "test"))


# ---- what a batch is -------------------------------------------------------------------------


@pytest.mark.parametrize("loader", ["resident", pytest.param("dali", marks=needs_dali)])
def test_loaders_show_the_same_images_over_an_epoch(loader: str, whole: Whole) -> None:
    off = []
    for a, b in zip(whole(loader), whole("torch"), strict=True):
        assert torch.equal(a.indices, b.indices) and torch.equal(a.labels, b.labels)
        for x, y in zip(a.views, b.views, strict=True):
            off.append(np.abs(levels(x) - levels(y)).reshape(len(x), -1))
    assert np.concatenate([(each > 4).ravel() for each in off]).mean() <= 0.01
    assert max(each.mean(axis=1).max() for each in off) <= 2.0
    for x, y in ((a.view1, a.view2), a.small):
        assert np.abs(levels(x) - levels(y)).mean() > 5  # views do differ


@pytest.mark.parametrize("loader", LOADERS)
def test_a_batch_is_as_the_trainer_expects(loader: str, images: ImageSet, whole: Whole) -> None:
    batch = whole(loader)[0]
    for view, side in zip(batch.views, (16, 16, 10, 10), strict=True):
        assert view.shape == (16, 3, side, side) and view.dtype == torch.float32
        assert view.is_contiguous(memory_format=torch.channels_last)
    assert batch.labels.dtype == batch.indices.dtype == torch.int64
    assert images.labels is not None
    assert batch.labels.tolist() == images.labels[batch.indices.numpy()].tolist()


@pytest.mark.parametrize("loader", LOADERS)
def test_each_view_is_drawn_from_its_own_settings(loader: str, images: ImageSet) -> None:
    view = ViewConfig(crop_scale=(1, 1), crop_ratio=(6 / 5, 6 / 5))  # 48 x 40 pixels
    augment = AugmentConfig(size=16, view1=view, view2=replace(view, flip=1))
    batch = batches(replace(configure(loader), augment=augment), images)[0]
    assert torch.equal(batch.view2, batch.view1.flip(3))


def test_images_of_several_sizes_are_decoded_in_workers(encoded: ImageSet) -> None:
    config = configure("torch", workers=1, batch=4)
    batch = batches(config, encoded)[0]
    assert batch.labels.tolist() == [-1] * 4  # none has a label
    make = pickle.loads(pickle.dumps(ViewsOfImages(config, encoded, 0)))
    _, view1, *_ = make(batch.indices.numpy())
    assert torch.equal(view1.permute(0, 3, 1, 2).double(), torch.from_numpy(levels(batch.view1)))


@pytest.mark.parametrize("loader", DECODING)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_is_one_sentence(loader: str, workers: int, tmp_path: Path) -> None:
    images = read_folder(good_images(tmp_path))
    images.path(2).write_bytes(images.path(2).read_bytes()[:500])
    with pytest.raises(DataError, match=r"2\.jpg") as caught:
        batches(configure(loader, workers, batch=4), images)
    assert "\n" not in str(caught.value)


# ---- epochs, ranks, restarts -----------------------------------------------------------------


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_see_what_one_sees(loader: str, world: int, images: ImageSet, whole: Whole) -> None:
    config = configure(loader)
    many = [batches(config, images, epoch=1, rank=rank, world=world) for rank in range(world)]
    for step, batch in enumerate(whole(loader)):
        parts = [own[step] for own in many]
        assert torch.equal(torch.cat([part.indices for part in parts]), batch.indices)
        for views in zip(*(part.views for part in parts), batch.views, strict=True):
            off = np.abs(levels(torch.cat(views[:-1])) - levels(views[-1]))
            assert off.mean() < 0.01  # a sum taken in another order may round differently


@pytest.mark.parametrize("loader", LOADERS)
def test_an_epoch_has_every_image_once_and_drops_the_rest(loader: str, images: ImageSet) -> None:
    made = build(configure(loader, batch=20), images)
    for epoch in range(3):
        seen = torch.cat([batch.indices for batch in made.epoch(epoch)])
        assert len(seen) == 20 * made.steps_per_epoch == 80
        np.testing.assert_array_equal(seen, epoch_order(made.config.seed, epoch, 96)[:80])


@pytest.mark.parametrize("loader", LOADERS)
def test_an_epoch_resumes_bit_for_bit(loader: str, images: ImageSet, whole: Whole) -> None:
    made, expected = build(configure(loader), images), whole(loader)
    left = made.epoch(0)
    next(left)
    resumed = made.epoch(1, 2)
    assert same(next(resumed), expected[2])
    next(left)
    assert all(map(same, resumed, expected[3:]))
    assert list(made.epoch(1, 6)) == []
    other = next(left)
    assert not torch.equal(other.indices, expected[0].indices)
    assert not torch.equal(next(build(configure(loader, seed=6), images).epoch(1)).indices,
                           expected[0].indices)  # fmt: skip


@pytest.mark.parametrize(
    ("loader", "workers"),
    [("torch", 1), ("torch", 2), *(pytest.param("dali", n, marks=needs_dali) for n in (2, 4))],
)
def test_workers_change_nothing(loader: str, workers: int, images: ImageSet, whole: Whole) -> None:
    helped = batches(configure(loader, workers), images, epoch=1)
    assert all(map(same, whole(loader), helped))


@pytest.mark.parametrize("loader", LOADERS)
def test_loading_leaves_the_global_generators_alone(loader: str, images: ImageSet) -> None:
    torch_state, numpy_state = torch.get_rng_state(), pickle.dumps(np.random.get_state())
    next(build(configure(loader), images).epoch(0))
    assert torch.equal(torch_state, torch.get_rng_state())
    assert numpy_state == pickle.dumps(np.random.get_state())


# ---- the resident loader on a GPU ------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_gpu_shows_what_a_cpu_shows(precision: str, images: ImageSet) -> None:
    config = configure("resident", precision=precision)
    gpu = torch.device("cuda")
    dtype = dtype_of_views(config.precision, gpu)
    pairs = zip(build(config, images, device=gpu).epoch(1), batches(config, images, 1), strict=True)
    for there, here in pairs:
        assert torch.equal(there.indices, here.indices)
        assert torch.equal(there.labels.cpu(), here.labels)
        for x, y in zip(there.views, here.views, strict=True):
            assert x.dtype == dtype and x.is_contiguous(memory_format=torch.channels_last)
            # of order 3; a level is 1 / (255 std) = 0.018, and but for ties all are equal
            off = (x.cpu().float() - y).abs() > 1e-5 + 3 * torch.finfo(dtype).eps / 2
            assert off.double().mean() <= 1e-3


@pytest.mark.gpu
def test_no_batch_waits_for_the_gpu(images: ImageSet) -> None:
    config = configure("resident", precision="bf16")
    made = build(config, images, device=torch.device("cuda")).epoch(0)
    next(made)  # compiles
    with nothing_waits():
        assert len(list(made)) == 5
