"""rdm_fast.evaluation.features: every image once, in place, on one rank and on three."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rdm_fast.evaluation.features import cached_features, extract, gather_features
from tests.ranks import run_ranks

N, D_EMB = 10, 6
IMAGES = torch.randn(N, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Batches = list[tuple[Tensor, Tensor]]


def make_backbone() -> nn.Sequential:
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Conv2d(3, D_EMB, 3), nn.BatchNorm2d(D_EMB), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    ).append(nn.Flatten())
    backbone(torch.randn(16, 3, 8, 8) + 1)  # gives the batch norm statistics of its own
    return backbone


def batches(*shares: list[int]) -> Batches:
    return [(IMAGES[share], torch.tensor(share, dtype=torch.int64)) for share in shares]


def expected() -> Tensor:
    """The definition: the backbone in evaluation mode, image by image."""
    backbone = make_backbone().eval()
    with torch.no_grad():
        return torch.cat([backbone(image[None]) for image in IMAGES])


def test_row_i_is_the_embedding_of_image_i_in_evaluation_mode() -> None:
    found = extract(make_backbone(), batches([9, 2, 4], [0, 1, 3, 5], [8, 7, 6]), N)
    torch.testing.assert_close(found, expected())  # batches of other sizes may round differently
    assert found.dtype == torch.float32 and not found.requires_grad


def test_nothing_in_the_backbone_changes() -> None:
    backbone = make_backbone()
    backbone.train()
    backbone[1].eval()  # a frozen batch norm in a model that trains
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    extract(backbone, batches(list(range(N))), N)
    assert [module.training for module in backbone] == [True, False, True, True, True]
    assert backbone.training
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_training_flags_are_restored_after_an_error_too() -> None:
    def broken() -> Iterator[tuple[Tensor, Tensor]]:
        yield batches([0, 1])[0]
        raise OSError

    backbone = make_backbone().train()
    with pytest.raises(OSError):
        extract(backbone, broken(), N)
    assert all(module.training for module in backbone.modules())


def test_bf16_is_autocast_and_comes_back_as_float32() -> None:
    backbone, seen = make_backbone(), []
    backbone[0].register_forward_hook(lambda _, __, activation: seen.append(activation.dtype))
    found = extract(backbone, batches(list(range(N))), N, precision="bf16")
    assert seen == [torch.bfloat16] and found.dtype == torch.float32
    # bfloat16 rounds by 2^-9 relative, here some five times in a row on values up to 4
    torch.testing.assert_close(found, expected(), atol=5 * 4 * 2**-9, rtol=0)


@pytest.mark.parametrize(
    ("shares", "missing", "repeated"),
    [
        ([[0, 1, 2, 3, 4, 5, 6, 7]], 2, 0),
        ([list(range(N)), [3]], 0, 1),
        ([[0, 1, 1, 3, 4, 5, 6, 7, 8, 9]], 1, 1),
        ([[]], N, 0),
        ([], N, 0),
    ],
    ids=["missing", "again", "twice in a batch", "empty batch", "none"],
)
def test_an_image_missing_or_repeated_is_an_error(
    shares: list[list[int]], missing: int, repeated: int
) -> None:
    with pytest.raises(ValueError) as error:
        extract(make_backbone(), batches(*shares), N)
    assert f"{missing} were missing and {repeated} came" in str(error.value)


def test_batches_that_are_not_of_this_data_set_are_errors() -> None:
    whole = batches(list(range(N)))
    for backbone, wrong, n in (
        (make_backbone(), whole, N - 1),
        (make_backbone(), [(IMAGES, torch.arange(-1, N - 1))], N),
        (make_backbone(), [(IMAGES, torch.arange(N - 1))], N),
        (make_backbone()[:-1], whole, N),
    ):
        with pytest.raises(ValueError):
            extract(backbone, wrong, n)


# ---- ranks -------------------------------------------------------------------------------------

SHARES: list[Batches] = [batches([9, 2, 4], [0, 1, 3, 5]), batches([8, 7, 6]), []]


def _on_a_rank(out: Path) -> dict[str, Tensor | str | int]:
    rank, calls = dist.get_rank(), 0

    def compute() -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        return extract(make_backbone(), SHARES[rank], N), torch.arange(N)

    # A cache folder of its own for rank 2, as on a node that does not share the first one's disk.
    path = out / f"disk{rank // 2}" / "cache.safetensors"
    features, _ = cached_features(path, {"a": 1}, compute)
    cached_features(path, {"a": 1}, compute)
    try:
        extract(make_backbone(), [*SHARES[rank], *batches([rank])], N)
        refused = "nothing"
    except ValueError as error:
        refused = str(error)
    return {"features": features, "calls": calls, "refused": refused}


def test_three_ranks_with_unequal_shares_all_have_every_image(tmp_path: Path) -> None:
    alone = extract(make_backbone(), [batch for share in SHARES for batch in share], N)
    for found in run_ranks(3, _on_a_rank, tmp_path, tmp_path=tmp_path):
        torch.testing.assert_close(found["features"], alone)
        assert found["calls"] == 2  # rank 2 has no file, so nobody may skip the collectives
        assert "0 were missing and 3 came" in found["refused"]
    assert not (tmp_path / "disk1").exists()


def test_large_matrices_travel_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[int] = []
    monkeypatch.setattr("rdm_fast.evaluation.features.ROWS", 4)
    monkeypatch.setattr("rdm_fast.evaluation.features.world_size", lambda: 2)
    monkeypatch.setattr("rdm_fast.evaluation.features.all_reduce_max", lambda value, _: value)
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: parts.append(len(tensor)))
    features = torch.randn(N, D_EMB)
    assert torch.equal(gather_features(features, torch.ones(N, dtype=torch.int64)), features)
    assert parts == [4, 4, 2] * 2  # the counts, then the rows


# ---- cache -------------------------------------------------------------------------------------


class Compute:
    """Embeddings that are different at every call."""

    calls = 0

    def __call__(self) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return torch.full((4, 3), float(self.calls)), torch.arange(4)


def test_the_cache_returns_what_was_computed_for_the_same_key_only(tmp_path: Path) -> None:
    path, compute = tmp_path / "new" / "train.safetensors", Compute()
    key: dict[str, object] = {"checkpoint": "ab", "size": 32, "split": "train"}
    first, labels = cached_features(path, key, compute)
    turned = dict(reversed(key.items()))
    again, same_labels = cached_features(path, turned, compute)
    assert compute.calls == 1
    assert torch.equal(again, first) and torch.equal(same_labels, labels)
    for changed in ({"checkpoint": "cd"}, {"size": 64}, {"split": "test"}, {"precision": "bf16"}):
        calls = compute.calls
        other, _ = cached_features(path, key | changed, compute)
        assert compute.calls == calls + 1 and float(other[0, 0]) == compute.calls
    assert os.listdir(path.parent) == ["train.safetensors"]


@pytest.mark.parametrize("size", [0, 5, 100], ids=["empty", "no header", "cut off"])
def test_a_damaged_cache_is_computed_again(
    size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, compute = tmp_path / "train.safetensors", Compute()
    cached_features(path, {}, compute)
    path.write_bytes(path.read_bytes()[:size])
    features, _ = cached_features(path, {}, compute)
    assert float(features[0, 0]) == 2
    assert str(path) in capsys.readouterr().out
    cached_features(path, {}, compute)
    assert compute.calls == 2


def test_a_file_of_another_kind_is_replaced(tmp_path: Path) -> None:
    path, compute = tmp_path / "train.safetensors", Compute()
    save_file({"weight": torch.zeros(2)}, path)
    cached_features(path, {}, compute)
    assert compute.calls == 1
    assert set(load_file(path)) == {"features", "labels"}


def test_a_write_that_fails_half_way_leaves_the_old_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, compute = tmp_path / "train.safetensors", Compute()
    cached_features(path, {}, compute)

    def full_disk(_: object, target: Path, *__: object) -> None:
        target.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("rdm_fast.evaluation.features.save_file", full_disk)
    features, _ = cached_features(path, {"another": "key"}, compute)
    assert float(features[0, 0]) == 2
    assert os.listdir(tmp_path) == ["train.safetensors"]
    assert float(cached_features(path, {}, compute)[0][0, 0]) == 1


def test_a_cache_that_cannot_be_written_is_a_note_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    path = tmp_path / "file" / "train.safetensors"
    features, _ = cached_features(path, {}, Compute())
    assert float(features[0, 0]) == 1
    assert str(path) in capsys.readouterr().out
