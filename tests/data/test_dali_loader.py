"""The DALI loader in use: threads, faults in files, and training as with the torch loader."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from rdm_fast.config import Config
from rdm_fast.data import Batch, ImageSet, build_loader
from rdm_fast.data.dali import DaliLoader
from rdm_fast.data.folder import load_folder
from rdm_fast.data.images import EncodedImages, PixelImages
from rdm_fast.data.subset import Subset
from rdm_fast.errors import DataError, Unavailable
from tests.data.conftest import natural
from tests.data.dali_here import needs_dali
from tests.data.test_loader import batches, configure, same
from tests.runs import metrics, run
from tests.tiny import tiny

pytestmark = needs_dali
Pixels = NDArray[np.uint8]
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight JPEG files."""
    for i in range(8):
        Image.fromarray(natural(1, 64, 80, seed=i)[0]).save(tmp_path / f"{i}.jpg")
    return tmp_path


def epochs(config: Config, images: ImageSet, n: int = 1) -> list[Batch]:
    loader = build_loader(config, images, rank=0, world_size=1, device=CPU)
    assert isinstance(loader, DaliLoader)
    return [batch for epoch in range(n) for batch in loader.epoch(epoch)]


def test_twice_is_the_same_with_any_number_of_threads(folder: Path) -> None:
    images = load_folder(folder, "train")
    once = epochs(configure("dali", workers=1, batch=4), images, n=2)
    for threads in (0, 2, 4):
        again = epochs(configure("dali", workers=threads, batch=4), images, n=2)
        assert len(once) == len(again) == 4 and all(map(same, once, again))


def test_a_batch_stays_as_it_was_while_others_are_made(folder: Path) -> None:
    """DALI's buffers are handed over without a copy."""
    made = build_loader(
        configure("dali", batch=4), load_folder(folder, "train"), rank=0, world_size=1, device=CPU
    )
    first = next(iter(made.epoch(0)))
    before = first.view1.clone()
    for epoch in range(4):
        list(made.epoch(epoch))
    assert torch.equal(first.view1, before)


def test_decoded_and_encoded_images_give_the_same_views(folder: Path) -> None:
    images = load_folder(folder, "train")
    pixels = PixelImages(np.stack([images.read(i) for i in range(8)]), None, [])
    config = configure("dali", batch=4)
    assert all(map(same, epochs(config, images), epochs(config, pixels)))


def test_a_subset_is_read_in_its_own_order(folder: Path) -> None:
    images = load_folder(folder, "train")
    chosen = Subset(images, np.array([6, 1, 4, 3]))
    config = configure("dali", batch=4)
    expected = batches(replace(config, data=replace(config.data, loader="torch")), chosen)
    (made,) = epochs(config, chosen)
    assert torch.equal(made.indices, expected[0].indices)
    assert (made.view1 - expected[0].view1).abs().mean() < 0.02  # a level is about 0.017


# ---- faults ----------------------------------------------------------------------------------


def told(folder: Path, spoil: str, content: bytes | None) -> str:
    """What the loader says when a file changes after the data set was opened."""
    images = load_folder(folder, "train")
    if content is None:
        (folder / spoil).unlink()
    else:
        (folder / spoil).write_bytes(content)
    with pytest.raises(DataError) as caught:
        epochs(configure("dali", batch=4), images)
    assert "\n" not in str(caught.value) and caught.value.code == 65
    return str(caught.value)


def test_a_file_that_vanishes_is_named(folder: Path) -> None:
    assert "5.jpg cannot be read as an image (no such file" in told(folder, "5.jpg", None)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.95])
def test_a_truncated_file_is_named(folder: Path, share: float) -> None:
    whole = (folder / "5.jpg").read_bytes()
    assert "5.jpg cannot be read as an image" in told(
        folder, "5.jpg", whole[: int(share * len(whole))]
    )


def test_a_file_that_becomes_another_image_is_named(folder: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    message = told(folder, "5.jpg", buffer.getvalue())
    assert "5.jpg has changed: it is 8 x 8 pixels, not 64 x 80" in message


def test_a_file_that_only_pillow_decodes_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None is known: here Pillow's answer is made up."""
    images = load_folder(folder, "train")
    (folder / "5.jpg").write_bytes(b"\xff\xd8 no JPEG")
    monkeypatch.setattr(images, "read", lambda i: np.zeros((64, 80, 3), np.uint8))
    with pytest.raises(DataError, match=r"5\.jpg cannot be decoded by DALI \(.*\): repair it"):
        epochs(configure("dali", batch=4), images)


def test_packed_images_are_named_by_number(folder: Path) -> None:
    files = [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]
    data = np.frombuffer(b"".join(files), np.uint8).copy()
    offsets = np.cumsum([0, *map(len, files)])
    images = EncodedImages(data, offsets, None, [], "some.npz")
    data[offsets[3] : offsets[4]] = 0
    with pytest.raises(DataError, match=r"image 3 of some\.npz cannot be read"):
        epochs(configure("dali", batch=4), images)


def test_after_a_fault_the_loader_works_again(folder: Path) -> None:
    images = load_folder(folder, "train")
    whole = (folder / "5.jpg").read_bytes()
    loader = build_loader(configure("dali", batch=4), images, rank=0, world_size=1, device=CPU)
    expected = list(loader.epoch(1))
    (folder / "5.jpg").write_bytes(whole[:-100])
    with pytest.raises(DataError):
        list(loader.epoch(0))
    (folder / "5.jpg").write_bytes(whole)
    assert all(map(same, expected, loader.epoch(1)))


def test_any_other_failure_of_dali_is_one_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = DaliLoader(
        configure("dali", batch=4), load_folder(folder, "train"), rank=0, world_size=1, device=CPU
    )

    class Broken:
        def run(self) -> None:
            raise RuntimeError("Critical error in pipeline:\nencountered:\n\nout of memory\n")

    assert loader._idle is not None
    loader._idle = (Broken(), loader._idle[1])
    with pytest.raises(Unavailable, match=r"\(out of memory\): use --data\.loader torch$"):
        list(loader.epoch(0))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_sentence(folder: Path) -> None:
    """The graph for a GPU is put together; only there can it be built and run."""
    images = load_folder(folder, "train")
    with pytest.raises(Unavailable, match=r"DALI cannot work on cuda:0 \(.*CUDA is not available"):
        DaliLoader(
            configure("dali", batch=4), images, rank=0, world_size=1, device=torch.device("cuda:0")
        )


# ---- training --------------------------------------------------------------------------------


def losses(path: Path, loader: str, seed: int = 0) -> NDArray[np.float64]:
    config = tiny("digits_simsiam")
    data = replace(config.data, loader=loader, workers=1)  # type: ignore[arg-type]
    config = replace(config, data=data, seed=seed, log=replace(config.log, every=1))
    run(path, config)
    return np.array([line["loss"] for line in metrics(path) if "loss" in line])


def test_training_with_dali_follows_training_with_torch(tmp_path: Path) -> None:
    """Pixels rounded another way move the loss by a twentieth of what another seed does while the
    weights are equal, and by a quarter after some steps, which enlarge any difference. (Twice with
    DALI there is none.)"""
    dali, again = (losses(tmp_path / name, "dali") for name in ("dali", "again"))
    torch_, other = (losses(tmp_path / str(seed), "torch", seed) for seed in (0, 1))
    assert len(dali) == 8 and (dali == again).all()
    off, seeds = np.abs(dali - torch_), np.abs(other - torch_)
    assert off[:2].max() < seeds[:2].max() / 20  # the first learning rate is 0
    assert off.max() < seeds.max() / 4
