"""rdm_kernels.views.op: the kernels against their definition, and properties of both.

tests/data/views compares both with torchvision and Pillow. Here levels must be equal but for
rounding ties: at most 0.1 % of them may differ.
"""

from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rdm_kernels import augment_views, pack_views
from rdm_kernels.views import definition as views
from rdm_kernels.views.definition import COLUMNS, PIXELS
from rdm_kernels.views.op import MAX_SIZE, MAX_TAPS, augment_views_op, augment_views_triton
from tests.kernels.common import DEVICE
from tests.spies import nothing_waits, refused

STILL: dict[str, Any] = {
    **dict.fromkeys(COLUMNS, 0),
    **{"brightness": 1, "contrast": 1, "saturation": 1, "order": 0b11100100},
}  # leaves the whole image alone, once it has a window


def photograph(N: int, C: int, H: int, W: int, seed: int = 0) -> Tensor:
    """Smooth colors with some grain, uint8 [N, C, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    soft = torch.randint(0, 256, (N, C, 4, 4), generator=generator).float()
    image = torch.nn.functional.interpolate(soft, (H, W), mode="bilinear")
    image += 6 * torch.randn(N, C, H, W, generator=generator)
    return image.round().clamp(0, 255).to(torch.uint8).to(DEVICE)


def any_views(n: int, N: int, H: int, W: int, seed: int = 0, **fixed: Any) -> Tensor:
    """n views of N images, every step on about half of them."""
    rng = np.random.default_rng(seed)

    def some(low: float, high: float, otherwise: float) -> Any:
        return np.where(rng.random(n) < 0.5, rng.uniform(low, high, n), otherwise)

    height, width = rng.integers(1, H + 1, n), rng.integers(1, W + 1, n)
    orders = [sum(int(o) << 2 * i for i, o in enumerate(rng.permutation(4))) for _ in range(n)]
    columns = {
        "image": rng.integers(0, N, n),
        "top": [rng.integers(0, H - h + 1) for h in height],
        "left": [rng.integers(0, W - w + 1) for w in width],
        "height": height,
        "width": width,
        "order": orders,
        "grey": rng.random(n) < 0.3,
        "solarize": rng.random(n) < 0.3,
        "flip": rng.random(n) < 0.5,
        "angle": some(-30, 30, 0),
        "shear": some(-15, 15, 0),
        "brightness": some(0.4, 1.6, 1),
        "contrast": some(0.4, 1.6, 1),
        "saturation": some(0.4, 1.6, 1),
        "hue": some(-0.5, 0.5, 0),
        "sigma": some(0.1, 2, 0),
    }
    return pack_views(columns | {name: np.full(n, value) for name, value in fixed.items()})


def options(C: int, **changes: Any) -> dict[str, Any]:
    standard = {
        "size": 16, "interpolation": "bilinear", "taps": 3, "mean": [0.5, 0.4, 0.3][:C],
        "std": [0.2, 0.3, 0.25][:C], "dtype": torch.uint8,
    }  # fmt: skip
    return standard | changes


def levels_apart(images: Tensor, table: Tensor, **changes: Any) -> Tensor:
    """How far the kernels' levels are from the definition's."""
    chosen = options(images.shape[1], **changes)
    table = table.to(DEVICE)
    expected = augment_views_op(images.cpu(), table.cpu(), *chosen.values())
    found = augment_views_triton(images, table, *chosen.values())
    assert found.shape == expected.shape and found.dtype == expected.dtype
    return (found.cpu().double() - expected.double()).abs()


def ties_only(off: Tensor) -> bool:
    """At most 0.1 % of levels, and of few levels one; by 1, but later steps may enlarge that."""
    return int((off > 0).sum()) <= max(1, off.numel() // 1000) and bool((off <= 32).all())


# ---- images that have the size of a view ------------------------------------------------------


def test_whole_images_of_a_views_size_are_not_resized(monkeypatch: pytest.MonkeyPatch) -> None:
    images, windows = photograph(6, 3, 16, 16), {"top": 0, "left": 0, "height": 16, "width": 16}
    table, chosen = any_views(6, 6, 16, 16, **windows), options(3)
    larger = torch.nn.functional.pad(images.cpu(), (0, 0, 0, 1))  # of which the windows are a part
    resized = augment_views(larger, table, **chosen)
    assert ties_only(levels_apart(images, table))
    asked: list[Any] = []
    monkeypatch.setattr(views, "resampling_taps", lambda *of: asked.append(of))
    assert torch.equal(augment_views(images.cpu(), table, **chosen), resized) and not asked
    for side in ("height", "width"):
        smaller = table.clone()
        smaller[COLUMNS.index(side), 5] = 15
        with pytest.raises(AttributeError):  # None has no matrices
            augment_views(images.cpu(), smaller, **chosen)
    assert len(asked) == 4


# ---- the kernels are the definition ------------------------------------------------------------


@settings(max_examples=6)
@given(
    C=st.sampled_from([1, 3]),
    size=st.sampled_from([8, 13, 16, 31, 32, 33]),
    H=st.integers(3, 40),
    W=st.integers(3, 40),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
    taps=st.sampled_from([1, 3, 5, 15]),
    seed=st.integers(0, 2**31),
)
def test_kernels_give_the_definitions_levels(
    C: int, size: int, H: int, W: int, interpolation: str, taps: int, seed: int
) -> None:
    images = photograph(2, C, H, W, seed)
    table = any_views(2, 2, H, W, seed)
    assert ties_only(levels_apart(images, table, size=size, interpolation=interpolation, taps=taps))


def test_every_order_of_the_jitter() -> None:
    codes = [sum(o << 2 * i for i, o in enumerate(order)) for order in permutations(range(4))]
    factors = {"brightness": 1.3, "contrast": 0.6, "saturation": 1.4, "hue": -0.08}
    still = STILL | {"height": 8, "width": 8} | factors
    columns = {name: [value] * len(codes) for name, value in still.items()}
    table = pack_views(columns | {"order": codes, "image": range(len(codes))})
    assert ties_only(levels_apart(photograph(len(codes), 3, 8, 8), table, size=8))


UPRIGHT = {"angle": 0, "shear": 0}
BLURRED, ALL = (
    UPRIGHT | {"sigma": [0.7, 6.0]},
    UPRIGHT | {"height": 60, "width": 50, "top": 0, "left": 0},
)


@pytest.mark.parametrize(
    ("fixed", "options"),
    [
        *((BLURRED, {"size": 40, "taps": taps}) for taps in (3, 23, MAX_TAPS)),
        *((ALL, {"size": 12, "interpolation": name}) for name in ("bilinear", "bicubic")),
        (ALL | {"contrast": 0.3}, {"size": 48}),
    ],
)
def test_a_step_sees_pixels_of_all_tiles_and_borders(fixed: Any, options: dict[str, Any]) -> None:
    """A blur, a large image that is shrunk, and the mean of contrast."""
    images = photograph(1, 1, 60, 50)
    images[:, :, 40:] //= 2
    assert ties_only(levels_apart(images, any_views(2, 1, 60, 50, **fixed), **options))


@pytest.mark.parametrize(
    ("C", "dtype"),
    [(3, torch.float32), (3, torch.bfloat16), (3, torch.float16), (1, torch.bfloat16)],
)
def test_views_are_levels_normalized_in_every_dtype(C: int, dtype: torch.dtype) -> None:
    images, table = photograph(1, C, 20, 18), any_views(1, 1, 20, 18).to(DEVICE)
    chosen = options(C)
    levels = augment_views_triton(images, table, *chosen.values())
    views = augment_views_triton(images, table, *(chosen | {"dtype": dtype}).values())
    mean, std = (
        torch.tensor(chosen[name], device=DEVICE)[:, None, None] for name in ("mean", "std")
    )
    expected = (levels.double() / 255 - mean) / std
    # of order 5: three operations in float32, then half a unit in the last place of the dtype
    tolerance = 2e-6 + 5 * torch.finfo(dtype).eps / 2
    torch.testing.assert_close(views.double(), expected, atol=tolerance, rtol=0)
    assert views.dtype == dtype and views.is_contiguous(memory_format=torch.channels_last)


def test_images_that_are_not_contiguous_are_read_as_they_look() -> None:
    pixels = photograph(2, 3, 20, 18).permute(0, 2, 3, 1).contiguous()
    images = pixels.permute(0, 3, 1, 2)
    table, chosen = any_views(4, 2, 20, 18).to(DEVICE), options(3).values()
    strided = torch.cat([table, table], dim=1)[:, ::2]
    expected = augment_views_triton(images.contiguous(), strided.contiguous(), *chosen)
    assert torch.equal(augment_views_triton(images, strided, *chosen), expected)


# ---- properties of both -------------------------------------------------------------------------

BODIES = pytest.mark.parametrize(
    "body", [augment_views_op, augment_views_triton], ids=["definition", "kernel"]
)


@BODIES
def test_a_view_depends_on_its_own_row_only(body: Any) -> None:
    images, table = photograph(3, 3, 20, 18), any_views(3, 3, 20, 18).to(DEVICE)
    together = body(images, table, *options(3).values())
    for i in range(3):
        alone = body(images, table[:, i : i + 1], *options(3).values())
        assert torch.equal(alone[0], together[i])


@BODIES
def test_rotation_leaves_a_flat_image_flat_and_is_black_outside(body: Any) -> None:
    images = torch.tensor([77, 151, 254], dtype=torch.uint8, device=DEVICE)
    images = images[:, None, None, None].expand(3, 1, 16, 16)
    columns = STILL | {"height": 16, "width": 16}
    columns = {name: [value] * 3 for name, value in columns.items()}
    table = pack_views(columns | {"image": range(3), "angle": [10, 25, -7], "shear": [5, 0, 9]})
    views = body(images, table.to(DEVICE), *options(1).values())
    for view, image in zip(views, images, strict=True):
        assert view.unique().tolist() == [0, int(image[0, 0, 0])]


@BODIES
def test_no_views_are_an_empty_batch(body: Any) -> None:
    found = body(photograph(1, 3, 16, 16), any_views(0, 1, 16, 16).to(DEVICE), *options(3).values())
    assert found.shape == (0, 3, 16, 16)


def test_views_are_the_same_however_many_are_made_together() -> None:
    images, together = photograph(4, 1, 8, 8), PIXELS // 8**2
    table, chosen = any_views(2 * together, 4, 8, 8), options(1, size=8)
    views = augment_views(images.cpu(), table, **chosen)
    tail = augment_views(images.cpu(), table[:, -10:], **chosen)
    assert torch.equal(views[-10:], tail)


def test_op_is_registered_correctly() -> None:
    images, table = photograph(2, 3, 20, 18), any_views(4, 2, 20, 18).to(DEVICE)
    chosen = options(3, dtype=torch.bfloat16)
    torch.library.opcheck(augment_views_op, (images, table, *chosen.values()))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"images": torch.zeros(2, 16, 16, 3, dtype=torch.uint8)}, "(2, 16, 16, 3)"),
        ({"images": torch.zeros(2, 3, 16, 16)}, "torch.float32"),
        ({"table": torch.zeros(5, 2, dtype=torch.int32)}, "(5, 2)"),
        ({"interpolation": "nearest"}, "'nearest'"),
        ({"dtype": torch.float64}, "torch.float64"),
        ({"taps": 4}, "taps=4"),
        ({"taps": 33}, "taps=33"),
        ({"mean": [0.5]}, "1 means"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_argument_that_does_not_fit_is_named(change: dict[str, Any], named: str) -> None:
    images, table = torch.zeros(2, 3, 16, 16, dtype=torch.uint8), any_views(2, 2, 16, 16)
    with refused(ValueError, named):
        augment_views(**({"images": images, "table": table} | options(3) | change))


@pytest.mark.parametrize("change", [{"size": MAX_SIZE + 1}, {"size": 64, "taps": MAX_TAPS + 2}])
def test_the_kernels_refuse_too_large_views_and_blurs(change: dict[str, Any]) -> None:
    images, table = photograph(1, 3, 8, 8), any_views(1, 1, 8, 8).to(DEVICE)
    with pytest.raises(ValueError, match=f"size={change['size']}, taps="):
        augment_views_triton(images, table, *options(3, **change).values())


# ---- on a GPU ----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("side", "size", "taps"), [(32, 32, 3), (96, 96, 9), (512, 224, 23)])
@pytest.mark.parametrize("C", [1, 3])
def test_a_gpu_gives_the_levels_of_the_cpu(C: int, side: int, size: int, taps: int) -> None:
    images = photograph(8, C, side, side)
    table = any_views(32, 8, side, side)
    for interpolation in ("bilinear", "bicubic"):
        chosen = {"size": size, "taps": taps, "interpolation": interpolation}
        assert ties_only(levels_apart(images, table, **chosen))


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu() -> None:
    images, table = photograph(4, 3, 32, 32), any_views(16, 4, 32, 32).to(DEVICE)
    chosen = options(3, dtype=torch.bfloat16)
    first = augment_views(images, table, **chosen)  # compiles
    with nothing_waits():
        again = augment_views(images, table, **chosen)
    assert torch.equal(first, again)
