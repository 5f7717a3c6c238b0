"""The loaders against each other, across ranks, workers and restarts; and evaluation batches."""

import io
import pickle
import tomllib
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from rdm_fast.config import AugmentConfig, Config, DataConfig, OptimConfig, ViewConfig
from rdm_fast.data import (
    Batch,
    ImageSet,
    build_loader,
    evaluation_batches,
    load,
)
from rdm_fast.data.images.folder import load_folder
from rdm_fast.data.images.sets import EncodedImages, PixelImages
from rdm_fast.data.loaders import dali_input, resident, torch_loader
from rdm_fast.data.loaders.batch import draw_all_views
from rdm_fast.data.loaders.dali_loader import install_line
from rdm_fast.data.loaders.torch_loader import ViewsOfImages
from rdm_fast.data.views.sampler import ViewParameters, epoch_order
from rdm_fast.errors import DataError, Unavailable, UsageError
from tests.data.loaders.dali_here import DECODING, HERE, LOADERS, needs_dali, without_dali

Pixels = NDArray[np.uint8]
CPU = torch.device("cpu")
VIEW = ViewConfig(crop_scale=(0.2, 1), jitter=0.8, grey=0.2, blur=0.5, flip=0.5)
AUGMENT = AugmentConfig(
    size=16, view1=VIEW, view2=replace(VIEW, solarize=0.2), small_views=2, small_size=10
)


def configure(loader: str = "auto", workers: int = 0, batch: int = 16, **changes: object) -> Config:
    return Config(
        method="byol",
        data=DataConfig(name="arrays", loader=loader, workers=workers),  # type: ignore[arg-type]
        augment=AUGMENT,
        optim=OptimConfig(global_batch=batch),
        **changes,  # type: ignore[arg-type]
    )


def batches(
    config: Config, images: ImageSet, epoch: int = 0, start: int = 0, rank: int = 0, world: int = 1
) -> list[Batch]:
    loader = build_loader(config, images, rank=rank, world_size=world, device=CPU)
    return list(loader.epoch(epoch, start))


def levels(view: Tensor) -> NDArray[np.float64]:
    std, mean = (torch.tensor(x)[:, None, None] for x in (AUGMENT.std, AUGMENT.mean))
    return ((view * std + mean) * 255).round().double().numpy()


def same(a: Batch, b: Batch) -> bool:
    return all(map(torch.equal, tensors(a), tensors(b)))


def tensors(batch: Batch) -> list[Tensor]:
    return [*batch.views, batch.labels, batch.indices]


@pytest.fixture(scope="module")
def images(photographs: Pixels) -> ImageSet:
    return PixelImages(photographs, np.arange(96) % 3, ["a", "b", "c"])


@pytest.fixture
def encoded(jpeg_files: list[bytes]) -> ImageSet:
    data = np.frombuffer(b"".join(jpeg_files), np.uint8)
    return EncodedImages(data, np.cumsum([0, *map(len, jpeg_files)]), None, [], "test.npz")


def choice(config: Config, images: ImageSet, device: torch.device = CPU) -> str:
    return build_loader(config, images, rank=0, world_size=1, device=device).name


def test_auto_keeps_decoded_images_resident_and_decodes_others_with_torch_on_a_cpu(
    images: ImageSet, encoded: ImageSet
) -> None:
    assert choice(configure(), images) == "resident"
    assert choice(configure(batch=4), encoded) == "torch"


@pytest.mark.gpu
def test_auto_decodes_with_dali_on_a_gpu_if_it_is_there(
    encoded: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = torch.device("cuda")
    assert choice(configure(batch=4), encoded, gpu) == ("dali" if HERE else "torch")
    without_dali(monkeypatch)
    assert choice(configure(batch=4), encoded, gpu) == "torch"


def test_dali_asked_for_and_absent_is_refused_with_the_line_that_installs_it(
    images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_dali(monkeypatch)
    with pytest.raises(Unavailable, match=r"DALI.*pip install 'nvidia-dali-cuda1\d0>=2\.4,<3'"):
        batches(configure("dali"), images)


def test_the_line_that_installs_dali_is_that_of_the_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    pyproject = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text("utf-8"))
    extras = pyproject["project"]["optional-dependencies"]
    for cuda, extra in (("12.9", "dali-cuda12"), ("13.2", "dali"), (None, "dali")):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        assert install_line() == f"pip install '{extras[extra][0]}'"


@pytest.mark.parametrize("loader", ["resident", pytest.param("dali", marks=needs_dali)])
def test_loaders_show_the_same_images_over_an_epoch(loader: str, images: ImageSet) -> None:
    other, torch_ = (batches(configure(name), images, epoch=2) for name in (loader, "torch"))
    assert len(other) == len(torch_) == 6
    off = []
    for a, b in zip(other, torch_, strict=True):
        assert torch.equal(a.indices, b.indices) and torch.equal(a.labels, b.labels)
        for x, y in zip(a.views, b.views, strict=True):
            off.append(np.abs(levels(x) - levels(y)).reshape(len(x), -1))
    assert np.concatenate([(each > 4).ravel() for each in off]).mean() <= 0.01
    assert max(each.mean(axis=1).max() for each in off) <= 2.0
    for x, y in ((a.view1, a.view2), a.small):
        assert np.abs(levels(x) - levels(y)).mean() > 5  # views do differ


@pytest.mark.parametrize("loader", LOADERS)
def test_a_batch_is_what_the_trainer_expects(loader: str, images: ImageSet) -> None:
    batch = batches(configure(loader), images)[0]
    for view, side in zip(batch.views, (16, 16, 10, 10), strict=True):
        assert view.shape == (16, 3, side, side) and view.dtype == torch.float32
        assert view.is_contiguous(memory_format=torch.channels_last)
    assert batch.labels.dtype == batch.indices.dtype == torch.int64
    assert images.labels is not None
    assert batch.labels.tolist() == images.labels[batch.indices.numpy()].tolist()


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_see_what_one_rank_sees(loader: str, world: int, images: ImageSet) -> None:
    config = configure(loader)
    one = batches(config, images, epoch=1)
    many = [batches(config, images, epoch=1, rank=rank, world=world) for rank in range(world)]
    for step, whole in enumerate(one):
        parts = [own[step] for own in many]
        assert torch.equal(torch.cat([part.indices for part in parts]), whole.indices)
        for views in zip(*(part.views for part in parts), whole.views, strict=True):
            off = np.abs(levels(torch.cat(views[:-1])) - levels(views[-1]))
            assert off.mean() < 0.01  # a sum taken in another order may round differently


@pytest.mark.parametrize("loader", LOADERS)
def test_an_epoch_has_every_image_once_and_drops_the_rest(loader: str, images: ImageSet) -> None:
    config = configure(loader, batch=20)
    seen = torch.cat([batch.indices for batch in batches(config, images, epoch=3)])
    assert len(seen) == 80 and len(seen.unique()) == 80
    np.testing.assert_array_equal(seen, epoch_order(config.seed, 3, 96)[:80])


@pytest.mark.parametrize("loader", LOADERS)
def test_every_epoch_has_the_planned_number_of_steps(loader: str, images: ImageSet) -> None:
    made = build_loader(configure(loader, batch=20), images, rank=1, world_size=2, device=CPU)
    for epoch in range(4):
        assert made.steps_per_epoch == 4 and len(list(made.epoch(epoch))) == 4


@pytest.mark.parametrize("loader", LOADERS)
def test_an_epoch_left_in_its_middle_disturbs_no_other(loader: str, images: ImageSet) -> None:
    made = build_loader(configure(loader), images, rank=0, world_size=1, device=CPU)
    whole = list(made.epoch(1))
    left = made.epoch(0)
    next(left)
    again = made.epoch(1, 2)
    assert same(next(again), whole[2])
    next(left)
    assert same(next(again), whole[3])


def test_every_loader_is_given_the_same_parameters(
    images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any loader, on any number of ranks, and going on from any step."""

    def table(loader: str, world: int, start: int) -> dict[int, bytes]:
        rows: dict[int, bytes] = {}

        def recorded(
            config: Config, images: ImageSet, epoch: int, indices: NDArray[np.int64]
        ) -> list[ViewParameters]:
            drawn = draw_all_views(config, images, epoch, indices)
            for row, i in enumerate(indices.tolist() if epoch == 1 else ()):
                rows[i] = b"".join(
                    getattr(p, field.name)[row].tobytes() for p in drawn for field in fields(p)
                )
            return drawn

        for module in (resident, torch_loader, dali_input):
            monkeypatch.setattr(module, "draw_all_views", recorded)
        for rank in range(world):
            made = build_loader(configure(loader), images, rank=rank, world_size=world, device=CPU)
            list(made.epoch(1, start))
        return rows

    whole = table("resident", 1, 0)
    assert len(whole) == 96
    loaders = ["resident", "torch"] + ["dali"] * HERE
    for loader in loaders:
        for world in (1, 2, 4):
            assert table(loader, world, 0) == whole
        rest = table(loader, 1, 4)
        assert len(rest) == 32 and rest == {i: whole[i] for i in rest}


@pytest.mark.parametrize("loader", LOADERS)
def test_an_epoch_continues_in_its_middle_bit_for_bit(loader: str, images: ImageSet) -> None:
    whole = batches(configure(loader), images, epoch=1)
    rest = batches(configure(loader), images, epoch=1, start=4)
    assert len(rest) == 2 and all(map(same, whole[4:], rest))
    assert batches(configure(loader), images, epoch=1, start=6) == []


@pytest.mark.parametrize("loader", LOADERS)
def test_epochs_and_seeds_show_other_views(loader: str, images: ImageSet) -> None:
    first = batches(configure(loader), images)[0]
    assert same(first, batches(configure(loader), images)[0])
    assert not torch.equal(first.indices, batches(configure(loader), images, epoch=1)[0].indices)
    assert not torch.equal(first.indices, batches(configure(loader, seed=6), images)[0].indices)


@pytest.mark.parametrize("loader", LOADERS)
def test_each_view_is_drawn_from_its_own_settings(loader: str, images: ImageSet) -> None:
    whole = ViewConfig(crop_scale=(1, 1), crop_ratio=(6 / 5, 6 / 5))  # 48 x 40 pixels
    augment = AugmentConfig(size=16, view1=whole, view2=replace(whole, flip=1))
    batch = batches(replace(configure(loader), augment=augment), images)[0]
    assert torch.equal(batch.view2, batch.view1.flip(3))


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_changes_nothing(workers: int, images: ImageSet) -> None:
    alone = batches(configure("torch"), images)
    helped = batches(configure("torch", workers=workers), images)
    assert len(alone) == len(helped) and all(map(same, alone, helped))


@pytest.mark.parametrize("loader", LOADERS)
def test_loading_leaves_the_global_generators_alone(loader: str, images: ImageSet) -> None:
    torch_state, numpy_state = torch.get_rng_state(), pickle.dumps(np.random.get_state())
    batches(configure(loader), images)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert numpy_state == pickle.dumps(np.random.get_state())


def test_images_of_several_sizes_are_decoded_in_workers(encoded: ImageSet) -> None:
    config = configure("torch", workers=1, batch=4)
    batch = batches(config, encoded)[0]
    assert batch.labels.tolist() == [-1] * 4  # none has a label
    make = pickle.loads(pickle.dumps(ViewsOfImages(config, encoded, 0)))
    _, _, view1, *_ = make(batch.indices.numpy())
    assert torch.equal(view1.permute(0, 3, 1, 2).double(), torch.from_numpy(levels(batch.view1)))


@pytest.mark.parametrize("loader", DECODING)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_is_one_sentence_even_from_a_worker(
    loader: str, workers: int, tmp_path: Path
) -> None:
    for i in range(4):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{i}.png")
    images = load_folder(tmp_path, "train")
    whole = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"2\.png cannot be read") as caught:
        batches(configure(loader, workers, batch=4), images)
    assert "\n" not in str(caught.value)


def test_too_few_images_for_a_step_are_refused(images: ImageSet) -> None:
    with pytest.raises(UsageError, match=r"--optim\.global-batch 128 is more than the 96"):
        batches(configure(batch=128), images)


def test_a_batch_that_does_not_divide_is_refused(images: ImageSet) -> None:
    with pytest.raises(ValueError, match=r"optim\.global_batch=15"):
        batches(configure(batch=15), images, world=2)


def test_resident_images_of_several_sizes_are_refused(encoded: ImageSet) -> None:
    with pytest.raises(UsageError, match=r"--data\.loader resident .*--data\.loader torch"):
        batches(configure("resident", batch=4), encoded)


def test_another_number_of_channels_is_refused() -> None:
    digits = load(DataConfig(name="digits"), "test")
    message = r"--augment\.mean .* 3 channel\(s\).*--data\.name arrays have 1"
    with pytest.raises(UsageError, match=message):
        batches(configure(), digits)
    with pytest.raises(UsageError, match=r"--augment\.mean"):
        list(evaluation_batches(digits, AUGMENT, batch=4, device=CPU))


# ---- evaluation ------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_shows_every_image_once(world: int, workers: int, images: ImageSet) -> None:
    seen = [
        indices
        for rank in range(world)
        for _, indices in evaluation_batches(
            images, AUGMENT, batch=7, device=CPU, rank=rank, world_size=world, workers=workers
        )
    ]
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(96))


def test_evaluation_leaves_images_of_the_right_size_alone() -> None:
    digits = load(DataConfig(name="digits"), "test")
    augment = AugmentConfig(size=16, mean=(0.3,), std=(0.4,))
    views, indices = next(evaluation_batches(digits, augment, batch=5, device=CPU))
    assert digits.pixels is not None
    expected = (digits.pixels[indices.numpy()].transpose(0, 3, 1, 2) / 255 - 0.3) / 0.4
    np.testing.assert_allclose(views.numpy(), expected, atol=1e-6)
    assert views.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("size", "short"), [(16, 16), (32, 32), (64, 73), (96, 110)])
def test_evaluation_resizes_and_crops_as_torchvision(
    size: int, short: int, interpolation: str, jpeg_files: list[bytes], encoded: ImageSet
) -> None:
    augment = AugmentConfig(size=size, interpolation=interpolation)  # type: ignore[arg-type]
    theirs = Compose([Resize(short, InterpolationMode(interpolation)), CenterCrop(size)])
    for views, indices in evaluation_batches(encoded, augment, batch=3, device=CPU):
        for view, i in zip(views, indices.tolist(), strict=True):
            expected = np.asarray(theirs(Image.open(io.BytesIO(jpeg_files[i]))))
            std, mean = (np.reshape(x, (3, 1, 1)) for x in (augment.std, augment.mean))
            got = np.rint((view.numpy() * std + mean) * 255)
            np.testing.assert_array_equal(got.transpose(1, 2, 0), expected)
