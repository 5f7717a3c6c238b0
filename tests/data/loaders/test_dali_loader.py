"""The DALI loader in use: its buffers, subsets, and faults in files."""

import gc
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from rdm_fast.config import Config
from rdm_fast.data import Batch
from rdm_fast.data.images.sets import FileImages, PixelImages, Subset
from rdm_fast.data.loaders.dali_loader import DaliLoader, Pipeline
from rdm_fast.data.loaders.workers import in_workers
from rdm_fast.errors import DataError, Unavailable
from rdm_fast.runtime.precision import dtype_of_views
from rdm_fast.tools.preview import levels_of
from tests import forks
from tests.data.files import good_images, packed, png, read_folder, rows
from tests.data.loaders.dali_here import needs_dali
from tests.data.loaders.test_build import batches, build, configure, same
from tests.tiny import command

pytestmark = needs_dali


@pytest.fixture
def images(tmp_path: Path) -> FileImages:
    """Eight JPEG files."""
    return read_folder(good_images(tmp_path / "data"))


def dali(batch: int = 4, loader: str = "dali", **data: object) -> Config:
    config = configure(loader, batch=batch)
    return replace(config, data=replace(config.data, **data))


def shown(batches: list[Batch]) -> list[int]:
    return [i for batch in batches for i in batch.indices.tolist()]


def test_a_batch_stays_as_it_was_while_others_are_made(images: FileImages) -> None:
    """DALI's buffers are handed over without a copy."""
    made = build(dali(), images)
    first = next(made.epoch(0))
    before = first.view1.clone()
    for epoch in range(4):
        list(made.epoch(epoch))
    assert torch.equal(first.view1, before)


def test_decoded_and_encoded_images_give_the_same_views(images: FileImages) -> None:
    pixels = PixelImages(np.stack([images.read(i) for i in range(8)]), images.labels, [])
    assert all(map(same, batches(dali(), images), batches(dali(), pixels)))


def test_a_subset_is_read_in_its_own_order(images: FileImages) -> None:
    chosen = Subset(images, np.array([6, 1, 4, 3]))
    (expected,), (made,) = batches(dali(loader="torch"), chosen), batches(dali(), chosen)
    assert torch.equal(made.indices, expected.indices)
    assert torch.equal(made.labels, expected.labels)
    assert (made.view1 - expected.view1).abs().mean() < 0.02  # a level is about 0.017


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_gpu_shows_what_pillow_shows(precision: str, images: FileImages) -> None:
    """nvJPEG is a level or two from libjpeg, and an edge of 4 levels is sooner crossed."""
    config = replace(dali(), precision=precision)
    made = build(config, images, device=torch.device("cuda"))
    expected = batches(dali(loader="torch"), images)
    for there, here in zip(made.epoch(0), expected, strict=True):
        assert there.view1.dtype == dtype_of_views(precision, there.view1.device)
        assert there.view1.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(there.indices, here.indices)
        pairs = zip(levels_of(there, config.augment), levels_of(here, config.augment), strict=True)
        off = [np.abs(a.astype(float) - b) for a, b in pairs]
        assert np.mean(np.concatenate([view.ravel() for view in off]) > 4) <= 0.015
        assert max(view.mean(axis=(1, 2, 3)).max() for view in off) <= 2.5


def collect_garbage(indices: NDArray[np.int64]) -> tuple[torch.Tensor, ...]:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(20)  # ends a worker that waits for ever
    gc.collect()
    signal.alarm(0)
    return (torch.from_numpy(indices),)


def test_a_forked_worker_does_not_wait_for_a_dropped_pipelines_threads(images: FileImages) -> None:
    gc.disable()
    try:
        loader = build(dali(), images)
        list(loader.epoch(0))
        cycle: list[object] = [loader]
        cycle.append(cycle)
        del loader, cycle
        ((made,),) = in_workers(collect_garbage, [np.arange(3)], 1, torch.device("cpu"))
    finally:
        gc.enable()
    assert made.tolist() == [0, 1, 2]


# ---- faults ----------------------------------------------------------------------------------


def test_a_file_for_pillow_alone(images: FileImages, monkeypatch: pytest.MonkeyPatch) -> None:
    """None is common: here Pillow's answer is made up, for an image of the last step."""
    before = batches(dali(), images)
    odd = shown(before)[-1]
    file, read = images.file, images.read
    black = np.zeros((64, 80, 3), np.uint8)
    no_jpeg = np.frombuffer(b"\xff\xd8 no JPEG", np.uint8)
    monkeypatch.setattr(images, "file", lambda i: no_jpeg if i == odd else file(i))
    monkeypatch.setattr(images, "read", lambda i: black if i == odd else read(i))
    loader = build(dali(), images)
    for _ in range(2):  # the second time it is known
        after = list(loader.epoch(0))
        assert shown(after) == shown(before)
        for old, new in zip(before, after, strict=True):
            for row, i in enumerate(new.indices.tolist()):
                dark = bool((new.view1[row] == new.view1[row, :, :1, :1]).all())
                assert dark if i == odd else torch.equal(old.view1[row], new.view1[row])


def test_packed_images_are_replaced(images: FileImages, capfd: pytest.CaptureFixture[str]) -> None:
    files = [images.file(i).tobytes() for i in range(8)]
    some = packed(files)
    some.file(3)[:] = 0
    assert sorted(shown(batches(dali(max_bad=0.5), some))) == [0, 1, 2, 4, 4, 5, 6, 7]
    assert "image 3 of some.npz" in capfd.readouterr().out


def test_a_bad_file_stops_the_run_at_its_step_until_repaired(images: FileImages) -> None:
    """Though DALI is some steps ahead then."""
    loader = build(dali(batch=2, on_bad_image="stop"), images)
    expected = list(loader.epoch(0))
    path = images.path(shown(expected)[4])
    whole = path.read_bytes()
    for content in (b"", png(80, 64, 8, 2, b"not packed")):  # no header; a good one
        path.write_bytes(content)
        seen = []
        with pytest.raises(DataError, match=path.name):
            for batch in loader.epoch(0):
                seen.append(batch)
        assert len(seen) == 2 and all(map(same, seen, expected))
        path.write_bytes(whole)
        assert all(map(same, expected, loader.epoch(0)))


def test_any_other_failure_of_dali_is_one_sentence(images: FileImages) -> None:
    loader = build(dali(), images)
    assert isinstance(loader, DaliLoader) and loader._idle is not None

    class Broken:
        def run(self) -> None:
            raise RuntimeError("Critical error in pipeline:\nencountered:\n\nout of memory\n")

    loader._idle = Pipeline(Broken(), loader._idle.source)
    with pytest.raises(Unavailable, match=r"\(out of memory\): use --data\.loader torch$"):
        list(loader.epoch(0))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_one_sentence(images: FileImages) -> None:
    """The graph for a GPU is put together; only there can it be built and run."""
    with pytest.raises(Unavailable, match=r"cuda:0 .*--data\.loader torch$") as caught:
        build(dali(), images, device=torch.device("cuda:0"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("loader", ["dali", "torch"])
def test_train_py_leaves_out_bad_files(loader: str, images: FileImages, tmp_path: Path) -> None:
    images.path(5).write_bytes(png(80, 64, 8, 2, b"not packed"))
    data = f"--data.name folder --data.root {tmp_path / 'data'} --data.max-bad 0.2"
    view = "--augment.size 16 --augment.mean 0.5 0.5 0.5 --augment.std 0.5 0.5 0.5"
    flags = f"{data} --data.loader {loader} --data.workers 1 {view} --optim.global-batch 4"
    words = command(f"{flags} --device cpu --out run", "digits_simsiam")
    done = forks.call("train.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"loader {loader}" in done.stdout and "Traceback" not in done.stderr
    assert done.stdout.count("5.jpg cannot be read") == 1
    ((path, _),) = rows(tmp_path / "run/bad_files.tsv")
    assert path == str(images.path(5))
