"""A small file that claims to be huge is refused before it is unpacked, within 300 MB of memory."""

import io
import json
import os
import pickle
import resource
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from rdm_fast.data.images.arrays import load_arrays
from rdm_fast.data.images.decode import inspect_image
from rdm_fast.data.images.folder import read_classes
from rdm_fast.data.images.tar_members import list_shard
from rdm_fast.errors import DataError, UserError
from rdm_fast.models.pretrained import load_backbone, read_backbone
from rdm_fast.models.weight_files import read_tables
from rdm_fast.run import checkpoint
from rdm_fast.run.folder import read_config
from tests.faults.test_checkpoint_faults import snapshot, torch_file, vouch
from tests.forks import Forked

ROOM = 300 << 10  # KiB, as getrusage counts
HUGE = 1 << 40
ZEROS = bytes(1 << 20)


def deflated(path: Path, name: str, header: bytes, megabytes: int) -> None:
    """A zip file with one member of zeros, which are a hundredth of their size there."""
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as members,
        members.open(name, "w", force_zip64=True) as member,
    ):
        member.write(header)
        for _ in range(megabytes):
            member.write(ZEROS)


def npy_header(shape: tuple[int, ...], kind: str = "|u1") -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"shape": shape, "fortran_order": False, "descr": kind}
    )
    return stream.getvalue()


def deflated_weights(path: Path) -> None:
    """A file of torch.save with a storage of 400 MB of zeros."""
    source = zipfile.ZipFile(io.BytesIO(torch_file({"w": torch.ones(4)})))
    deflated(path, "archive/data/0", b"", 400)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as members:
        for name in source.namelist():
            if not name.endswith("data/0"):
                members.writestr(name, source.read(name))


def legacy_weights(path: Path) -> None:
    """torch's old format, whose storages have the size that the pickle says."""
    path.write_bytes(torch_file({"w": torch.ones(5)}, _use_new_zipfile_serialization=False).replace(
        b"K\x05", b"\x8a\x06" + HUGE.to_bytes(6, "little")
    ))  # fmt: skip


def hollow_weights(path: Path) -> None:
    """One number that claims to be many."""
    torch.save({"conv1.weight": torch.zeros(()).expand(HUGE)}, path)


def claiming_weights(path: Path) -> None:
    path.write_bytes(
        torch_file({"w": torch.ones(5)}).replace(b"K\x05t", b"\x8a\x06\0\0\0\0\0\x01t")
    )


def overlapping_weights(path: Path) -> None:
    """Many entries of the directory for the same bytes."""
    with zipfile.ZipFile(path, "w") as members:
        members.writestr("archive/data.pkl", bytes(1 << 20))
        first = members.infolist()[0]
        for i in range(999):
            again = zipfile.ZipInfo(f"archive/data/{i}")
            again.file_size, again.compress_size, again.CRC = (
                first.file_size, first.compress_size, first.CRC
            )  # fmt: skip
            again.header_offset = first.header_offset
            members.filelist.append(again)
        members._didModify = True  # type: ignore[attr-defined]


def safetensors_header(path: Path) -> None:
    header = json.dumps({"__metadata__": {"a": " " * (1 << 25)}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def safetensors_claim(path: Path) -> None:
    whole = save({"w": torch.ones(4)})
    path.write_bytes(whole.replace(b"[4]", b"[4000000000000]"))


def npz_deflated(path: Path) -> None:
    deflated(path, "train_images.npy", npy_header((400, 1024, 1024, 1)), 400)


def npz_claim(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as members:
        members.writestr("train_images.npy", npy_header((HUGE, 1, 1, 1)) + bytes(9))


def npz_objects(path: Path) -> None:
    np.savez(path, train_images=np.array([{}], dtype=object))


def npz_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"a": 1}))


def plain_npy(path: Path) -> None:
    path.write_bytes(npy_header((HUGE,)))


def tar_of(path: Path, kind: bytes, size: int, hole: int) -> None:
    header = tarfile.TarInfo("a.jpg")
    header.type, header.size = kind, size
    path.write_bytes(header.tobuf())
    os.truncate(path, hole)


def tar_member(path: Path) -> None:
    tar_of(path, tarfile.REGTYPE, HUGE, 4096)


def tar_long_name(path: Path) -> None:
    tar_of(path, tarfile.GNUTYPE_LONGNAME, 1 << 30, 2 << 30)


def tar_attributes(path: Path) -> None:
    tar_of(path, tarfile.XHDTYPE, 1 << 30, 2 << 30)


def tar_sparse(path: Path) -> None:
    """Version 1.0 of GNU's sparse format: the map stands before the data, and does not end."""
    attributes = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.realsize": str(HUGE),
    }
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("a.jpg")
        member.pax_headers, member.size = attributes, 512
        tar.addfile(member, io.BytesIO(b"9999999\n" + b"1" * 504))


def png(path: Path) -> None:
    """An image of 65,000 x 65,000 pixels in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    size = struct.pack(">IIBBBBB", 65000, 65000, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1 << 22), 9)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", data))


def png_text(path: Path) -> None:
    """Texts beside an image that unpack to 4 GB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 26), 9))
    size = struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + text * 64)


def large_list(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 31)


def laughs(path: Path) -> None:
    path.mkdir()
    lines = ["a: &a0 [x, x]", *(f"b{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40))]
    (path / "config.yaml").write_text("\n".join(lines))


def long_state(path: Path) -> None:
    """A checkpoint whose state.json is a hole, with the right digest."""
    made = checkpoint.save(path, snapshot(1), keep=2)
    os.truncate(made / "state.json", 400 << 20)
    vouch(made)


def inspect(path: Path) -> None:
    found = inspect_image(path, full=True)
    assert isinstance(found, str)
    raise DataError(f"{path}: {found}")


CASES: list[tuple[Callable[[Path], None], str, Callable[[Path], object]]] = [
    (deflated_weights, "x.pth", read_backbone),
    (legacy_weights, "x.pth", read_backbone),
    (hollow_weights, "x.pth", read_tables),
    (claiming_weights, "x.pth", read_backbone),
    (overlapping_weights, "x.pth", load_backbone),
    (safetensors_header, "x.safetensors", read_tables),
    (safetensors_claim, "x.safetensors", read_backbone),
    (npz_deflated, "x.npz", lambda path: load_arrays(path, "train")),
    (npz_claim, "x.npz", lambda path: load_arrays(path, "train")),
    (npz_objects, "x.npz", lambda path: load_arrays(path, "train")),
    (npz_pickle, "x.npz", lambda path: load_arrays(path, "train")),
    (plain_npy, "x.npz", lambda path: load_arrays(path, "train")),
    (tar_member, "x.tar", list_shard),
    (tar_long_name, "x.tar", list_shard),
    (tar_attributes, "x.tar", list_shard),
    (tar_sparse, "x.tar", list_shard),
    (png, "x.png", inspect),
    (png_text, "x.png", inspect),
    (large_list, "x.txt", read_classes),
    (laughs, "run", read_config),
    (long_state, "run", lambda path: checkpoint.load(path / "step-00000001")),
]


def load(read: int, path: Path) -> None:
    """Read a file; print the code, the memory that it took, and the message."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        CASES[read][2](path)
        code, text = 0, ""
    except UserError as error:
        code, text = error.code, str(error)
    took = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps([code, took, text]))


@pytest.mark.parametrize("case", range(len(CASES)), ids=[case[0].__name__ for case in CASES])
def test_a_bomb_is_refused_in_little_memory(case: int, tmp_path: Path) -> None:
    make, name, _ = CASES[case]
    path = tmp_path / name
    make(path)
    out = tmp_path / "out"
    process = Forked(load, case, path, out=out, err=tmp_path / "err")
    assert process.wait() == 0, (tmp_path / "err").read_text()
    code, took, text = json.loads(out.read_text().splitlines()[-1])
    assert code == 65 and str(path) in text and took < ROOM, (code, took, text)
    assert "allow_pickle" not in text and "unsafely" not in text and len(text) < 600


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_refused_pickle_is_named_in_every_protocol(protocol: int, tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "x.pth").write_bytes(pickle.dumps({"a": Runs()}, protocol=protocol))
    with pytest.raises(DataError) as error:
        read_backbone(tmp_path / "x.pth")
    assert "posix.mkdir" in str(error.value) and not (tmp_path / "ran").exists()


def test_compressed_arrays_of_real_images_are_read(tmp_path: Path) -> None:
    """The bound is for bombs: pictures with much background compress well, too."""
    pixels = np.zeros((50, 32, 32, 1), np.uint8)
    pixels[:, 8:24, 8:24] = np.arange(50, dtype=np.uint8)[:, None, None, None]
    np.savez_compressed(
        tmp_path / "x.npz", train_images=pixels, train_label=np.zeros(50, int), classes=["a"]
    )
    assert len(load_arrays(tmp_path / "x.npz", "train")) == 50
