"""rdm_fast.evaluation.features: every image once, in place, on one rank and on three."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rdm_fast.evaluation import features
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


WHOLE = batches(list(range(N)))


def expected() -> Tensor:
    """The definition: the backbone in evaluation mode, image by image."""
    backbone = make_backbone().eval()
    with torch.no_grad():
        return torch.cat([backbone(image[None]) for image in IMAGES])


def test_row_i_is_the_embedding_of_image_i_and_the_backbone_does_not_change() -> None:
    backbone = make_backbone().train()
    backbone[1].eval()  # a frozen batch norm in a model that trains
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    found = extract(backbone, batches([9, 2, 4], [0, 1, 3, 5], [8, 7, 6]), N)
    torch.testing.assert_close(found, expected())  # batches of other sizes may round differently
    assert found.dtype == torch.float32 and not found.requires_grad
    with pytest.raises(ValueError):  # after an error the flags are restored too
        extract(backbone, batches([0, 1]), N)
    flags = [backbone.training, *(module.training for module in backbone)]
    assert flags == [True, True, False, True, True, True]
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_bf16_is_autocast_and_comes_back_as_float32() -> None:
    backbone, seen = make_backbone(), []
    backbone[0].register_forward_hook(lambda _, __, activation: seen.append(activation.dtype))
    found = extract(backbone, WHOLE, N, precision="bf16")
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
    wrong_indices = [(IMAGES, torch.arange(-1, N - 1))], [(IMAGES, torch.arange(N - 1))]
    cases = [(make_backbone(), wrong, N) for wrong in wrong_indices]
    for backbone, wrong, n in (
        *cases, (make_backbone(), WHOLE, N - 1), (make_backbone()[:-1], WHOLE, N)
    ):  # fmt: skip
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
    found, _ = cached_features(path, {"a": 1}, compute)
    cached_features(path, {"a": 1}, compute)
    with pytest.raises(ValueError) as error:
        extract(make_backbone(), [*SHARES[rank], *batches([rank])], N)
    return {"features": found, "calls": calls, "error": str(error.value)}


def test_three_ranks_with_unequal_shares_all_have_every_image(tmp_path: Path) -> None:
    alone = extract(make_backbone(), [batch for share in SHARES for batch in share], N)
    for found in run_ranks(3, _on_a_rank, tmp_path, tmp_path=tmp_path):
        torch.testing.assert_close(found["features"], alone)
        assert found["calls"] == 2  # rank 2 has no file, so nobody may skip the collectives
        assert "0 were missing and 3 came" in found["error"]
    assert not (tmp_path / "disk1").exists()


def test_large_matrices_travel_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[int] = []
    monkeypatch.setattr(features, "ROWS", 4)
    monkeypatch.setattr(features, "world_size", lambda: 2)
    monkeypatch.setattr(features, "all_reduce_max", lambda value, _: value)
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: parts.append(len(tensor)))
    rows = torch.randn(N, D_EMB)
    assert torch.equal(gather_features(rows, torch.ones(N, dtype=torch.int64)), rows)
    assert parts == [4, 4, 2] * 2  # the counts, then the rows


# ---- cache -------------------------------------------------------------------------------------


class Cache:
    """`cached_features` of one file; what is computed is the number of the computation."""

    def __init__(self, path: Path, whole: int = 4) -> None:
        self.path, self.whole, self.calls = path, whole, 0

    def __call__(self, **key: object) -> int:
        rows, labels = cached_features(self.path, key, self._compute, self.whole)
        assert torch.equal(labels, torch.arange(4)) and rows.shape == (4, 3)
        return int(rows[0, 0])

    def _compute(self) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return torch.full((4, 3), float(self.calls)), torch.arange(4)


def test_the_cache_returns_only_what_was_computed_for_the_same_key(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "new" / "train.safetensors")
    assert [cache(size=32, split="train"), cache(split="train", size=32)] == [1, 1]
    changes: list[dict[str, Any]] = [{"size": 64}, {"split": "test"}, {"precision": "bf16"}]
    keys = [{"size": 32, "split": "train"} | change for change in changes]
    assert [cache(**key) for key in keys] == [2, 3, 4]
    assert list(cache.path.parent.iterdir()) == [cache.path]


def test_embeddings_of_a_part_of_the_images_are_not_cached(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "train.safetensors", whole=5)
    assert [cache(), cache()] == [1, 2] and not cache.path.exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:5]),
        lambda path: path.write_bytes(path.read_bytes()[:100]),
        lambda path: save_file({"weight": torch.zeros(2)}, path),
    ],
    ids=["empty", "no header", "cut off", "another kind"],
)
def test_an_unusable_cache_is_replaced(damage: Callable[[Path], None], tmp_path: Path) -> None:
    cache = Cache(tmp_path / "train.safetensors")
    cache()
    damage(cache.path)
    assert [cache(), cache()] == [2, 2]
    assert set(load_file(cache.path)) == {"features", "labels"}


def test_a_cache_that_cannot_be_written_is_a_note_and_the_old_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = Cache(tmp_path / "train.safetensors")
    cache()

    def full_disk(_: object, target: Path, *__: object) -> None:
        target.write_bytes(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(features, "save_file", full_disk)
        assert cache(another="key") == 2
    assert list(tmp_path.iterdir()) == [cache.path] and cache() == 1
    blocked = Cache(cache.path / "inside a file")
    assert blocked() == 1
    assert str(blocked.path) in capsys.readouterr().out
