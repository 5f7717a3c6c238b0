"""The DALI loader in use: threads, and faults in files."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rdm_fast.config import Config, Precision
from rdm_fast.data import Batch, ImageSet, build_loader
from rdm_fast.data.images.folder import load_folder
from rdm_fast.data.images.sets import EncodedImages, PixelImages, Subset
from rdm_fast.data.loaders.dali_loader import DaliLoader
from rdm_fast.errors import DataError, Unavailable
from rdm_fast.runtime.precision import dtype_of_views
from rdm_fast.tools.preview import levels_of
from tests.data.conftest import natural
from tests.data.files import png
from tests.data.loaders.dali_here import needs_dali
from tests.data.loaders.test_build import batches, configure, same
from tests.tiny import command

pytestmark = needs_dali
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[3]


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


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_gpu_shows_what_pillow_shows(precision: Precision, folder: Path) -> None:
    """nvJPEG is a level or two from libjpeg, and an edge of 4 levels is sooner crossed."""
    images, config = load_folder(folder, "train"), configure("dali", batch=4)
    config = replace(config, precision=precision)
    made = build_loader(config, images, rank=0, world_size=1, device=torch.device("cuda"))
    expected = batches(replace(config, data=replace(config.data, loader="torch")), images)
    for there, here in zip(made.epoch(0), expected, strict=True):
        assert there.view1.dtype == dtype_of_views(precision, there.view1.device)
        assert there.view1.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(there.indices, here.indices)
        pairs = zip(levels_of(there, config.augment), levels_of(here, config.augment), strict=True)
        off = [np.abs(a.astype(float) - b) for a, b in pairs]
        assert np.mean(np.concatenate([view.ravel() for view in off]) > 4) <= 0.015
        assert max(view.mean(axis=(1, 2, 3)).max() for view in off) <= 2.5


# ---- faults ----------------------------------------------------------------------------------


def dali(batch: int = 4, **data: object) -> Config:
    config = configure("dali", batch=batch)
    return replace(config, data=replace(config.data, **data))  # type: ignore[arg-type]


def shown(batches: list[Batch]) -> list[int]:
    return [i for batch in batches for i in batch.indices.tolist()]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.95])
def test_a_truncated_file_is_replaced_as_by_the_torch_loader(folder: Path, share: float) -> None:
    images = load_folder(folder, "train")
    whole = (folder / "5.jpg").read_bytes()
    (folder / "5.jpg").write_bytes(whole[: int(share * len(whole))])
    config = dali(max_bad=0.5)
    expected = batches(replace(config, data=replace(config.data, loader="torch")), images)
    assert shown(epochs(config, images)) == shown(expected)
    assert sorted(shown(expected)) == [0, 1, 2, 3, 4, 6, 6, 7]


def test_a_file_that_only_pillow_decodes_comes_as_pillow_s_pixels(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None is common: here Pillow's answer is made up."""
    images = load_folder(folder, "train")
    before = epochs(configure("dali", batch=4), images, n=2)
    file, read = images.file, images.read
    black = np.zeros((64, 80, 3), np.uint8)
    no_jpeg = np.frombuffer(b"\xff\xd8 no JPEG", np.uint8)
    monkeypatch.setattr(images, "file", lambda i: no_jpeg if i == 5 else file(i))
    monkeypatch.setattr(images, "read", lambda i: black if i == 5 else read(i))
    after = epochs(configure("dali", batch=4), images, n=2)
    assert shown(after) == shown(before)
    for old, new in zip(before, after, strict=True):
        for row, i in enumerate(new.indices.tolist()):
            dark = bool((new.view1[row] == new.view1[row, :, :1, :1]).all())
            assert dark if i == 5 else torch.equal(old.view1[row], new.view1[row])


def test_packed_images_are_replaced_and_named_by_number(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    files = [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]
    data = np.frombuffer(b"".join(files), np.uint8).copy()
    offsets = np.cumsum([0, *map(len, files)])
    images = EncodedImages(data, offsets, None, [], "some.npz")
    data[offsets[3] : offsets[4]] = 0
    assert sorted(shown(epochs(dali(max_bad=0.5), images))) == [
        0, 1, 2, 4, 4, 5, 6, 7,
    ]  # fmt: skip
    assert "image 3 of some.npz cannot be read" in capfd.readouterr().out


def test_a_file_told_to_stop_at_stops_at_its_own_step(folder: Path) -> None:
    """Though DALI is some steps ahead then."""
    images = load_folder(folder, "train")
    config = dali(batch=2, on_bad_image="stop")
    order = shown(epochs(config, images))
    for content in (b"", png(80, 64, 8, 2, b"not packed")):  # no header; a good one
        (folder / f"{order[4]}.jpg").write_bytes(content)
        loader = build_loader(config, images, rank=0, world_size=1, device=CPU)
        seen = []
        with pytest.raises(DataError, match=rf"{order[4]}\.jpg cannot be read"):
            for batch in loader.epoch(0):
                seen.append(batch)
        assert shown(seen) == order[:4]


def test_after_a_fault_the_loader_works_again(folder: Path) -> None:
    images = load_folder(folder, "train")
    whole = (folder / "5.jpg").read_bytes()
    config = dali(on_bad_image="stop")
    loader = build_loader(config, images, rank=0, world_size=1, device=CPU)
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


@pytest.mark.parametrize("loader", ["dali", "torch"])
def test_train_py_goes_on_without_a_file_that_cannot_be_decoded(
    loader: str, folder: Path, tmp_path: Path
) -> None:
    (folder / "5.jpg").write_bytes(png(80, 64, 8, 2, b"not packed"))
    out = tmp_path / "run"
    data = f"--data.name folder --data.root {folder} --data.max-bad 0.2 --data.workers 1"
    view = "--augment.size 16 --augment.mean 0.5 0.5 0.5 --augment.std 0.5 0.5 0.5"
    flags = f"{data} --data.loader {loader} {view} --optim.global-batch 4 --device cpu --out {out}"
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *command(flags, "digits_simsiam")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"loader {loader}" in done.stdout and "Traceback" not in done.stderr
    assert done.stdout.count("5.jpg cannot be read as an image") == 1
    assert "the next image takes its place" in done.stdout
    header, row = (out / "bad_files.tsv").read_text().splitlines()
    assert header == "path\treason" and row.startswith(f"{folder / '5.jpg'}\tcannot be read")
