"""rdm_fast.data.images.index: what is inspected again, what is trusted, and where it is kept."""

import os
import pickle
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from rdm_fast.config import DataConfig
from rdm_fast.data.images import index, tables
from rdm_fast.data.images.decode import ImageSize, inspect_image
from rdm_fast.data.images.folder import load_folder
from rdm_fast.data.images.index import FileEntry, Index
from rdm_fast.data.images.tables import NAME
from rdm_fast.runtime import atomic_files
from tests.data.files import encode, put

NAMES = ["a/0.png", "a/ü\n.png", "b/\udcff.png", "b/1.png", "c.gif"]
SAVED = f"{NAME}.npz"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, name in enumerate(NAMES):
        put(tmp_path / "data" / name, encode(Image.new("RGB", (5 + i, 9 - i), (i, 0, 0))))
    return tmp_path / "data"


class Inspected(list[str]):
    """Names of the files that were inspected, in any order; `before(path)` runs first."""

    full: bool | None = None

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.before: Callable[[Path], object] = lambda path: None
        monkeypatch.setattr(index, "inspect_image", self.inspect)

    def inspect(self, path: Path, *, full: bool) -> ImageSize | str:
        self.before(path)
        self.append(path.name)
        self.full = full
        return inspect_image(path, full=full)

    def take(self) -> list[str]:
        names = sorted(self)
        self.clear()
        return names


@pytest.fixture
def inspected(monkeypatch: pytest.MonkeyPatch) -> Inspected:
    return Inspected(monkeypatch)


def build(folder: Path, names: list[str] = NAMES, *, full: bool = False, part: str = "") -> Index:
    status = [(folder / name).stat() for name in names]
    files = [FileEntry(n, s.st_size, s.st_mtime_ns) for n, s in zip(names, status, strict=True)]
    return index.build(folder, files, full=full, part=part)


def same(a: Index, b: Index) -> bool:
    return np.array_equal(a.rows, b.rows)


def rewrite(path: Path, data: bytes | None = None, later_ns: int = 0) -> None:
    """Write a file (or leave it) and set its time of change."""
    status = path.stat()
    if data is not None:
        path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + later_ns))


def test_a_second_start_opens_no_file(folder: Path, inspected: Inspected) -> None:
    first = build(folder)
    assert inspected.take() == sorted(Path(name).name for name in NAMES)
    assert first.sizes.tolist() == [[9 - i, 5 + i] for i in range(5)] and first.usable.all()
    second = build(folder)
    assert not inspected and same(first, second)


def test_only_changed_files_are_inspected_again(folder: Path, inspected: Inspected) -> None:
    build(folder)
    inspected.clear()
    Image.new("RGB", (40, 30)).save(folder / "new.png")
    rewrite(folder / "b/1.png", (folder / "new.png").read_bytes())  # another size, the same time
    rewrite(folder / "a/0.png", later_ns=1)
    again = build(folder)
    assert inspected.take() == ["0.png", "1.png"]
    assert again.sizes[3].tolist() == [30, 40] and again.sizes[0].tolist() == [9, 5]
    again = build(folder, ["new.png", "b/1.png", "a/0.png"])  # files come, go and change places
    assert inspected.take() == ["new.png"]
    assert again.sizes.tolist() == [[30, 40], [30, 40], [9, 5]]


def test_full_verification_needs_more_than_headers(folder: Path, inspected: Inspected) -> None:
    build(folder)
    assert build(folder, full=True).rows["decoded"].all() and len(inspected.take()) == 10
    build(folder, full=True)
    build(folder)
    assert not inspected


def test_bad_files_are_not_cached(folder: Path, inspected: Inspected) -> None:
    path = folder / "b/1.png"
    sound = path.read_bytes()
    rewrite(path, bytes(len(sound)))
    for _ in range(2):
        first = build(folder)
        assert first.usable.tolist() == [True, True, True, False, True]
        assert [bad.path for bad in first.bad] == [str(path)]
    assert inspected.count("1.png") == 2 and len(inspected) == 6
    rewrite(path, sound)
    assert build(folder).usable.all()


def test_a_folder_that_cannot_be_written_has_its_index_in_the_users_cache(
    folder: Path, own_cache: Path, inspected: Inspected, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / SAVED).mkdir()  # in the way, also for the superuser
    first = build(folder)
    assert [path.suffix for path in (own_cache / "rdm-fast").iterdir()] == [".npz"]
    assert same(first, build(folder)) and len(inspected) == 5
    assert capsys.readouterr().out == ""


def test_if_nothing_can_be_written_every_start_inspects_again_and_says_so(
    folder: Path, inspected: Inspected, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def refuse(path: Path, content: str | bytes) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(atomic_files, "replace", refuse)
    monkeypatch.setattr(tables.tempfile, "gettempdir", lambda: "/proc/nowhere")
    for _ in range(2):
        assert build(folder).usable.all()
    assert len(inspected) == 10
    assert capsys.readouterr().out.count("note: ") == 2


def test_a_selection_has_a_saved_index_of_its_own(folder: Path, inspected: Inspected) -> None:
    build(folder)
    build(folder, NAMES[:2], part="12ab")
    os.utime(folder / "a/0.png", (1, 1))
    build(folder, NAMES[:2], part="12ab")
    inspected.clear()
    build(folder)
    assert inspected == ["0.png"]


# ---- what is trusted -------------------------------------------------------------------------


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_a_damaged_index_is_not_trusted(where: float, bit: int, cut: bool, folder: Path) -> None:
    (folder / SAVED).unlink(missing_ok=True)
    expected = build(folder)
    data = bytearray((folder / SAVED).read_bytes())
    at = int(where * len(data))
    if cut:
        del data[at:]
    else:
        data[at] ^= 1 << bit
    (folder / SAVED).write_bytes(data)
    assert same(build(folder), expected)


Arrays = dict[str, np.ndarray]


def rewritten(change: Callable[[Arrays], object]) -> Callable[[Path], None]:
    """A well-formed file whose arrays were changed."""

    def write(path: Path) -> None:
        with np.load(path) as saved:
            arrays = dict(saved)
        change(arrays)
        np.savez(path, **arrays)

    return write


def with_sides(height: int, width: int) -> Callable[[Path], None]:
    def change(arrays: Arrays) -> None:
        arrays["rows"]["height"][1], arrays["rows"]["width"][1] = height, width

    return rewritten(change)


def deflated(path: Path) -> None:
    with np.load(path) as saved:
        np.savez_compressed(path, **saved, more=np.zeros(1 << 22, np.uint8))


def without_arrays(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as members:
        members.writestr("rows.npy", "no array")


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("evil"),)


HOSTILE = {
    "no height": with_sides(0, 5),
    "negative width": with_sides(5, -5),
    "huge height": with_sides(1 << 40, 5),
    "too many pixels": with_sides(20_000, 20_000),
    "product that overflows": with_sides(1 << 32, 1 << 32),
    "too few rows": rewritten(lambda a: a.update(rows=a["rows"][:2])),
    "too few names": rewritten(lambda a: a.update(names=a["names"][:9])),
    "other stamp": rewritten(lambda a: a.update(stamp=np.array("99"))),
    "an array is missing": rewritten(lambda a: a.pop("names")),
    "rows without fields": rewritten(lambda a: a.update(rows=np.ones((5, 5), np.int64))),
    "pickled": lambda path: path.write_bytes(pickle.dumps(Evil())),
    "pickled array": rewritten(lambda a: a.update(rows=np.array([Evil()], object))),
    "deflated": deflated,
    "no arrays": without_arrays,
    "empty": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("spoil", HOSTILE.values(), ids=HOSTILE)
def test_an_index_from_a_stranger_is_checked(
    spoil: Callable[[Path], None], folder: Path, inspected: Inspected,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(folder)
    expected = build(folder)
    spoil(folder / SAVED)
    inspected.clear()
    assert same(build(folder), expected)
    assert len(inspected) == 5 and not Path("evil").exists()


def test_a_compressed_index_is_not_unpacked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(folder)
    deflated(folder / SAVED)
    unpacked: list[Path] = []
    monkeypatch.setattr(tables.np, "load", lambda path, **_: unpacked.append(path))
    assert build(folder).usable.all() and unpacked == []


# ---- several processes, long inspections -----------------------------------------------------


def test_of_several_at_once_one_inspects(folder: Path, inspected: Inspected) -> None:
    inspected.before = lambda path: time.sleep(0.1)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: build(folder, full=True), range(4)))
    assert len(inspected) == 5 and all(same(result, results[0]) for result in results)


def test_a_long_inspection_reports_progress_and_saves_on_the_way(
    folder: Path, inspected: Inspected, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def interrupted(path: Path) -> None:
        if path.name == "c.gif":
            raise KeyboardInterrupt

    for name, value in (("CHUNK", 2), ("REPORT_EVERY", 0.0), ("SAVE_EVERY", 0.0)):
        monkeypatch.setattr(index, name, value)
    inspected.before = interrupted
    with pytest.raises(KeyboardInterrupt):
        build(folder)
    assert "2 of 5 files" in capsys.readouterr().out
    inspected.before = lambda path: None
    inspected.clear()
    assert build(folder).usable.all() and inspected == ["c.gif"]


# ---- through the folder ----------------------------------------------------------------------


def test_the_index_moves_with_a_folder(folder: Path, tmp_path: Path, inspected: Inspected) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (folder / "c.gif").unlink()
    folder.rename(root / "train")
    first = load_folder(root, "train")
    assert (root / "train" / SAVED).is_file() and len(first) == 4
    root.rename(tmp_path / "moved")
    inspected.clear()
    second = load_folder(tmp_path / "moved", "train")
    assert not inspected and second.digest == first.digest


@pytest.mark.parametrize("verify", ["header", "full"])
def test_a_setting_asks_for_verification(verify: str, folder: Path, inspected: Inspected) -> None:
    load_folder(folder, "train", DataConfig(name="folder", verify=verify))
    assert inspected.full == (verify == "full")
