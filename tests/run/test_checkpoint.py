"""Checkpoints: the bytes on the disk, damage to them, and which of them are kept."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rdm_fast.errors import DataError, InputMissing
from rdm_fast.run import checkpoint
from rdm_fast.run.checkpoint import FILES, MANIFEST, Snapshot


def snapshot(step: int) -> Snapshot:
    return Snapshot(
        step=step,
        model={"weight": torch.full((5, 3), float(step)), "count": torch.tensor(step)},
        optim={"weight/momentum_buffer": torch.arange(15.0).view(5, 3)},
        extra={"rng": torch.arange(16, dtype=torch.uint8)},
        state={"epoch": 1, "note": "é", "schedule": [0.1, 2e-5]},
    )


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.iterdir())


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


# ---- what is saved is what is loaded ---------------------------------------------------------


def test_tensors_of_every_dtype_and_layout_come_back_bit_for_bit(tmp_path: Path) -> None:
    values = torch.randn(4, 6, 3, 3)
    tensors = {
        **{str(t): values.to(t) for t in (torch.float64, torch.float32, torch.bfloat16)},
        "half": values.half(),
        "bytes": torch.randint(0, 255, (9,), dtype=torch.uint8),
        "flags": torch.tensor([True, False]),
        "counter": torch.tensor(2**40 + 1),
        "empty": torch.empty(0, 3),
        "special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "channels_last": values.to(memory_format=torch.channels_last),
        "transposed": values.transpose(0, 1),
        "expanded": torch.randn(1, 7).expand(5, 7),
        "a view": values[1:3],
        "the same view": values[1:3],
    }
    parameter = nn.Parameter(values)
    saved = Snapshot(3, {**tensors, "parameter": parameter}, {}, tensors, {})
    loaded = checkpoint.load(checkpoint.save(tmp_path, saved, keep=2))
    assert loaded.model.keys() == saved.model.keys() and loaded.extra.keys() == tensors.keys()
    for name, tensor in tensors.items():
        for found in (loaded.model[name], loaded.extra[name]):
            assert found.dtype == tensor.dtype and found.shape == tensor.shape, name
            assert bits(found) == bits(tensor), name
    assert not loaded.model["parameter"].requires_grad


def test_plain_values_come_back_equal_to_the_last_digit(tmp_path: Path) -> None:
    state = {"lr": 0.1 + 0.2, "tiny": 5e-324, "n": 2**63, "none": None, "on": True, "text": "ä\n"}
    loaded = checkpoint.load(
        checkpoint.save(tmp_path, Snapshot(12345, {}, {}, {}, {"all": state}), keep=2)
    )
    assert loaded.state == {"all": state} and loaded.step == 12345


def test_counters_of_earlier_checkpoints_become_the_state_of_their_parts(tmp_path: Path) -> None:
    loose = {"skipped": 3, "skipped_in_a_row": 2, "collapsed_in_a_row": 1}
    loaded = checkpoint.load(checkpoint.save(tmp_path, Snapshot(1, {}, {}, {}, loose), keep=2))
    parts = {"skipped": {"total": 3, "in_a_row": 2}, "collapse_guard": {"low": 1}}
    assert loaded.state == parts


def test_a_state_that_json_cannot_hold_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    with pytest.raises(ValueError):
        checkpoint.save(tmp_path, Snapshot(1, {}, {}, {}, {"loss": float("nan")}), keep=2)
    assert list(tmp_path.iterdir()) == []


def test_a_loaded_checkpoint_survives_the_deletion_of_its_files(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, snapshot(4), keep=2)
    loaded = checkpoint.load(path)
    for file in path.iterdir():
        file.write_bytes(b"")  # a mapped file would fault here
    assert loaded.model["weight"].sum() == 60


# ---- damage ----------------------------------------------------------------------------------


def assert_damaged(path: Path, name: str = "") -> None:
    with pytest.raises(DataError) as found:
        checkpoint.verify(path)
    assert path.name in str(found.value) and name in str(found.value)


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_every_flipped_bit_and_every_truncation_is_found_and_the_file_named(
    name: str, tmp_path: Path
) -> None:
    path = checkpoint.save(tmp_path, snapshot(1), keep=2)
    file, draw = path / name, random.Random(0)
    whole = file.read_bytes()
    damaged = [whole[:length] for length in range(len(whole))] + [whole + b"\0"]
    for _ in range(200):
        at, bit = draw.randrange(len(whole)), draw.randrange(8)
        damaged.append(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
    for content in damaged:
        file.write_bytes(content)
        assert_damaged(path, name)
    file.unlink()
    assert_damaged(path, name)
    file.write_bytes(whole)
    checkpoint.verify(path)


def test_a_manifest_cannot_list_other_files_than_a_checkpoints(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, snapshot(1), keep=2)
    files = json.loads((path / MANIFEST).read_text())["files"]
    without = {name: entry for name, entry in files.items() if name != "optim.safetensors"}
    beyond = {**files, "../../secret": files["state.json"]}
    for forged in (without, beyond, {}, {name: None for name in files}, []):
        (path / MANIFEST).write_text(checkpoint._manifest(forged))  # type: ignore[arg-type]
        assert_damaged(path)


@pytest.mark.parametrize("text", ["", "[]", "3", "null", "{}", '{"files": 1}', "[" * 100_000])
def test_a_manifest_of_another_kind_is_a_data_error(tmp_path: Path, text: str) -> None:
    path = checkpoint.save(tmp_path, snapshot(1), keep=2)
    (path / MANIFEST).write_text(text)
    assert_damaged(path, MANIFEST)


def test_newest_skips_damaged_checkpoints_with_one_warning_each(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        checkpoint.save(tmp_path, snapshot(step), keep=4)
    os.truncate(tmp_path / "step-00000040" / "model.safetensors", 7)
    (tmp_path / "step-00000030" / MANIFEST).unlink()
    warnings: list[str] = []
    assert checkpoint.newest(tmp_path, warnings.append) == tmp_path / "step-00000020"
    assert len(warnings) == 2
    assert "step-00000040" in warnings[0] and "model.safetensors" in warnings[0]
    assert "step-00000030" in warnings[1] and MANIFEST in warnings[1]


def test_newest_of_nothing_is_none(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "not there", pytest.fail) is None
    assert checkpoint.newest(tmp_path, pytest.fail, sweep=True) is None


def test_only_a_sweep_deletes_what_a_killed_save_left(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, snapshot(1), keep=2)
    (tmp_path / ".tmp-123-2").mkdir()
    (tmp_path / ".tmp-123-2" / "model.safetensors").write_bytes(b"half")
    checkpoint.newest(tmp_path, pytest.fail)
    assert (tmp_path / ".tmp-123-2").exists()
    newest = checkpoint.newest(tmp_path, pytest.fail, sweep=True)
    assert list(tmp_path.iterdir()) == [newest]


@pytest.mark.parametrize("name", ["step-00000009", "run.pth"])
def test_a_path_that_is_no_checkpoint_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputMissing) as missing:
        checkpoint.load(tmp_path / name)
    assert name in str(missing.value)
    (tmp_path / name).write_bytes(b"\x80\x02")
    assert_damaged(tmp_path / name)


# ---- what is kept ----------------------------------------------------------------------------


def test_the_newest_are_kept_and_never_fewer_than_two(tmp_path: Path) -> None:
    for step in range(1, 6):
        checkpoint.save(tmp_path, snapshot(step), keep=3)
        assert steps(tmp_path) == list(range(max(1, step - 2), step + 1))
    with pytest.raises(ValueError):
        checkpoint.save(tmp_path, snapshot(6), keep=1)


def test_a_damaged_checkpoint_does_not_count_among_the_kept(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, snapshot(step), keep=2)
    os.truncate(tmp_path / "step-00000002" / "state.json", 1)
    checkpoint.save(tmp_path, snapshot(3), keep=2)
    assert steps(tmp_path) == [1, 2, 3]  # deleting 1 would leave one sound checkpoint
    checkpoint.save(tmp_path, snapshot(4), keep=2)
    assert steps(tmp_path) == [3, 4]


def test_a_save_replaces_a_given_up_future(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        checkpoint.save(tmp_path, snapshot(step), keep=3)
    checkpoint.save(tmp_path, snapshot(15), keep=3)
    assert steps(tmp_path) == [10, 15]


def test_a_step_can_be_saved_again_and_the_second_is_loaded(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        again = Snapshot(7, {"weight": torch.tensor([value])}, {}, {}, {})
        path = checkpoint.save(tmp_path, again, keep=2)
        assert checkpoint.load(path).model["weight"] == value
    assert steps(tmp_path) == [7]


def test_a_kill_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, snapshot(7), keep=2)
    path.rename(aside := tmp_path / "step-00000007.old")
    found = checkpoint.newest(tmp_path, pytest.fail, sweep=True)
    assert found == aside and checkpoint.load(found).step == 7
    checkpoint.save(tmp_path, snapshot(7), keep=2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000007"]


def test_a_deletion_that_fails_does_not_fail_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, target: Path) -> Path:
        if path.name.startswith("step-"):
            raise PermissionError("busy")
        return rename(path, target)

    rename = Path.rename
    for step in (1, 2):
        checkpoint.save(tmp_path, snapshot(step), keep=2)
    monkeypatch.setattr(Path, "rename", refuse)
    checkpoint.save(tmp_path, snapshot(3), keep=2)
    assert steps(tmp_path) == [1, 2, 3]


def test_a_copied_checkpoint_is_as_good_as_the_original(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path / "a", snapshot(8), keep=2)
    shutil.copytree(path, tmp_path / "elsewhere")
    assert checkpoint.load(tmp_path / "elsewhere").step == 8
