"""rdm_fast.data.images.index: what is looked at again, what is believed, and where it is kept."""

import os
import pickle
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from rdm_fast.config import DataConfig
from rdm_fast.data.images import index
from rdm_fast.data.images.decode import Header
from rdm_fast.data.images.folder import load_folder
from rdm_fast.data.images.index import NAME, Found, Index, build
from rdm_fast.data.images.sets import FileImages
from rdm_fast.runtime import atomic_files

NAMES = ["a/0.png", "a/ü\n.png", "b/\udcff.png", "b/1.png", "c.gif"]
SAVED = f"{NAME}.npz"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, name in enumerate(NAMES):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (5 + i, 9 - i), (i, 0, 0)).save(path)
    return tmp_path / "data"


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were opened, in any order."""
    names: list[str] = []

    def counted(path: Path, *, full: bool) -> Header | str:
        names.append(path.name)
        return look(path, full=full)

    look = index.look
    monkeypatch.setattr(index, "look", counted)
    return names


def found(folder: Path, names: list[str] = NAMES) -> list[Found]:
    status = [(folder / name).stat() for name in names]
    return [Found(name, s.st_size, s.st_mtime_ns) for name, s in zip(names, status, strict=True)]


def same(a: Index, b: Index) -> bool:
    kinds = [[i.kind_names[kind] for kind in i.kinds[i.usable]] for i in (a, b)]
    fields = ("usable", "decoded", "sizes")
    return kinds[0] == kinds[1] and all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in fields
    )


def test_a_second_start_opens_no_file_and_finds_the_same(folder: Path, looked: list[str]) -> None:
    first = build(folder, found(folder), full=False)
    assert sorted(looked) == sorted(Path(name).name for name in NAMES)
    assert first.sizes.tolist() == [[9 - i, 5 + i] for i in range(5)]
    assert first.kind_names[first.kinds[4]] == "GIF P" and first.usable.all()
    looked.clear()
    second = build(folder, found(folder), full=False)
    assert looked == [] and same(first, second)


def test_a_changed_file_alone_is_looked_at_again(folder: Path, looked: list[str]) -> None:
    build(folder, found(folder), full=False)
    looked.clear()
    Image.new("RGB", (40, 30)).save(folder / "b/1.png")
    status = (folder / "a/0.png").stat()
    os.utime(folder / "a/0.png", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    again = build(folder, found(folder), full=False)
    assert sorted(looked) == ["0.png", "1.png"]
    assert again.sizes[3].tolist() == [30, 40] and again.sizes[0].tolist() == [9, 5]


def test_a_file_of_another_size_has_changed_whatever_its_time_says(
    folder: Path, looked: list[str]
) -> None:
    build(folder, found(folder), full=False)
    looked.clear()
    status = (folder / "b/1.png").stat()
    Image.new("RGB", (40, 30)).save(folder / "b/1.png")
    os.utime(folder / "b/1.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    again = build(folder, found(folder), full=False)
    assert looked == ["1.png"] and again.sizes[3].tolist() == [30, 40]


def test_files_may_come_go_and_change_places(folder: Path, looked: list[str]) -> None:
    build(folder, found(folder), full=False)
    looked.clear()
    Image.new("L", (3, 2)).save(folder / "new.png")
    names = ["new.png", "b/1.png", "a/0.png"]
    again = build(folder, found(folder, names), full=False)
    assert looked == ["new.png"] and again.sizes.tolist() == [[2, 3], [6, 8], [9, 5]]
    assert [again.kind_names[kind] for kind in again.kinds] == ["PNG L", "PNG RGB", "PNG RGB"]


def test_headers_do_not_do_for_full_verification_but_the_other_way_round(
    folder: Path, looked: list[str]
) -> None:
    build(folder, found(folder), full=False)
    assert build(folder, found(folder), full=True).decoded.all() and len(looked) == 10
    looked.clear()
    build(folder, found(folder), full=True)
    build(folder, found(folder), full=False)
    assert looked == []


def test_bad_files_are_not_remembered(folder: Path, looked: list[str]) -> None:
    status = (folder / "b/1.png").stat()
    sound = (folder / "b/1.png").read_bytes()
    (folder / "b/1.png").write_bytes(bytes(len(sound)))
    os.utime(folder / "b/1.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    for _ in range(2):
        first = build(folder, found(folder), full=False)
        assert first.usable.tolist() == [True, True, True, False, True]
        ((path, reason),) = first.bad
        assert path == str(folder / "b/1.png") and "not an image" in reason
    assert looked.count("1.png") == 2 and len(looked) == 6
    (folder / "b/1.png").write_bytes(sound)
    os.utime(folder / "b/1.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert build(folder, found(folder), full=False).usable.all()


def test_a_folder_that_cannot_be_written_has_its_index_in_the_user_s_cache(
    folder: Path, own_cache: Path, looked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / SAVED).mkdir()  # in the way, also for the superuser
    first = build(folder, found(folder), full=False)
    assert [path.suffix for path in (own_cache / "rdm-fast").iterdir()] == [".npz"]
    assert same(first, build(folder, found(folder), full=False)) and len(looked) == 5
    assert capsys.readouterr().out == ""


def test_where_nothing_can_be_written_every_start_looks_again_and_says_so(
    folder: Path, looked: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def refuse(path: Path, content: str | bytes) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(atomic_files, "replace", refuse)
    monkeypatch.setattr(index.tempfile, "gettempdir", lambda: "/proc/nowhere")
    for _ in range(2):
        assert build(folder, found(folder), full=False).usable.all()
    assert len(looked) == 10
    assert capsys.readouterr().out.count("is not saved") == 2


def test_a_selection_has_a_saved_index_of_its_own(folder: Path, looked: list[str]) -> None:
    build(folder, found(folder), full=False)
    build(folder, found(folder, NAMES[:2]), full=False, part="12ab")
    os.utime(folder / "a/0.png", (1, 1))
    build(folder, found(folder, NAMES[:2]), full=False, part="12ab")
    looked.clear()
    build(folder, found(folder), full=False)
    assert looked == ["0.png"]


# ---- what is believed ------------------------------------------------------------------------


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_a_damaged_index_is_never_believed(where: float, bit: int, cut: bool, folder: Path) -> None:
    (folder / SAVED).unlink(missing_ok=True)
    expected = build(folder, found(folder), full=False)
    data = bytearray((folder / SAVED).read_bytes())
    at = int(where * len(data))
    if cut:
        del data[at:]
    else:
        data[at] ^= 1 << bit
    (folder / SAVED).write_bytes(data)
    assert same(build(folder, found(folder), full=False), expected)


def rewritten(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], None]:
    """A well-formed file whose arrays were changed."""

    def write(path: Path) -> None:
        with np.load(path) as saved:
            arrays = dict(saved)
        change(arrays)
        np.savez(path, **arrays)

    return write


def deflated(path: Path) -> None:
    with np.load(path) as saved:
        arrays = dict(saved)
    np.savez_compressed(path, **arrays, more=np.zeros(1 << 22, np.uint8))


def of_another_kind(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as members:
        members.writestr("sizes.npy", "no array")


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("evil"),)


HOSTILE = {
    "no size": rewritten(lambda a: a.update(sizes=a["sizes"] * 0)),
    "negative size": rewritten(lambda a: a.update(sizes=-a["sizes"])),
    "huge size": rewritten(lambda a: a.update(sizes=a["sizes"] << 40)),
    "too few sizes": rewritten(lambda a: a.update(sizes=a["sizes"][:2])),
    "kind without a name": rewritten(lambda a: a.update(kinds=a["kinds"] + 9)),
    "ends beyond the end": rewritten(lambda a: a["ends"].__setitem__(-1, 10**9)),
    "falling ends": rewritten(lambda a: a["ends"].__setitem__(2, 0)),
    "other format": rewritten(lambda a: a.update(format=np.array(99))),
    "an array is missing": rewritten(lambda a: a.pop("kinds")),
    "sizes are text": rewritten(lambda a: a.update(sizes=a["sizes"].astype(np.str_))),
    "pickled": lambda path: path.write_bytes(pickle.dumps(Evil())),
    "pickled array": rewritten(lambda a: a.update(sizes=np.array([Evil()], object))),
    "deflated": deflated,
    "not of ours": of_another_kind,
    "empty": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("spoil", HOSTILE.values(), ids=HOSTILE)
def test_an_index_from_a_stranger_is_checked(
    spoil: Callable[[Path], None], folder: Path, looked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    expected = build(folder, found(folder), full=False)
    spoil(folder / SAVED)
    looked.clear()
    assert same(build(folder, found(folder), full=False), expected)
    assert len(looked) == 5 and not Path("evil").exists()


def test_an_index_that_unpacks_to_more_than_it_is_is_not_unpacked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(folder, found(folder), full=False)
    deflated(folder / SAVED)
    unpacked: list[Path] = []
    monkeypatch.setattr(index.np, "load", lambda path, **_: unpacked.append(path))
    assert build(folder, found(folder), full=False).usable.all() and unpacked == []


# ---- several processes, long looks -----------------------------------------------------------


def test_of_several_at_once_one_looks(
    folder: Path, looked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = index.look

    def slow(path: Path, *, full: bool) -> Header | str:
        time.sleep(0.2)
        return counted(path, full=full)

    monkeypatch.setattr(index, "look", slow)
    results: list[Index] = []
    threads = [
        threading.Thread(target=lambda: results.append(build(folder, found(folder), full=True)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(looked) == 5 and all(same(result, results[0]) for result in results)


def test_a_long_look_tells_how_far_it_is_and_saves_on_the_way(
    folder: Path, looked: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(index, "AT_ONCE", 2)
    monkeypatch.setattr(index, "TELL_EVERY", 0.0)
    monkeypatch.setattr(index, "SAVE_EVERY", 0.0)
    counted = index.look

    def killed(path: Path, *, full: bool) -> Header | str:
        if path.name == "c.gif":
            raise KeyboardInterrupt
        return counted(path, full=full)

    monkeypatch.setattr(index, "look", killed)
    with pytest.raises(KeyboardInterrupt):
        build(folder, found(folder), full=False)
    assert "looked at 2 of 5 files" in capsys.readouterr().out
    monkeypatch.setattr(index, "look", counted)
    looked.clear()
    assert build(folder, found(folder), full=False).usable.all() and looked == ["c.gif"]


# ---- through the folder ----------------------------------------------------------------------


def test_the_saved_index_is_no_image_and_moves_with_its_folder(
    folder: Path, tmp_path: Path, looked: list[str]
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (folder / "c.gif").unlink()
    folder.rename(root / "train")
    first = load_folder(root, "train")
    assert (root / "train" / SAVED).is_file() and len(first) == 4
    root.rename(tmp_path / "moved")
    looked.clear()
    second = load_folder(tmp_path / "moved", "train")
    assert isinstance(second, FileImages) and looked == [] and second.digest == first.digest
    assert [second.kind(i) for i in range(4)] == ["PNG RGB"] * 4


def test_full_verification_is_what_the_setting_asks_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def noted(path: Path, *, full: bool) -> Header | str:
        asked.append(full)
        return Header(1, 1, "PNG L")

    monkeypatch.setattr(index, "look", noted)
    for verify in ("header", "full"):
        load_folder(folder, "train", DataConfig(name="folder", verify=verify))  # type: ignore[arg-type]
    assert asked == [False, True]  # of c.gif; class folders in the root itself are no classes
