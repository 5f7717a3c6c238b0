"""DALI's part of a view as a graph: decode, crop, resize; on a GPU or the CPU.

Nothing is drawn here. Windows come in through `fn.external_source`, and are cut out before they are
resized: DALI's own `random_resized_crop` lets pixels outside the window shine through its border.
An image is decoded once for all its views.

Importing this module needs DALI.
"""

from collections.abc import Callable, Sequence
from typing import Any

from nvidia.dali import fn, pipeline_def, types

from rdm_fast.config import Interpolation
from rdm_fast.data.images.sets import Pixels

Node = Any
"""A batch of tensors that the graph will hold (DALI's DataNode)."""
Source = Callable[[], list[Any]]
"""Returns a step's images, then a corner and sides of each view's windows; at the end it raises
StopIteration. It must take no arguments: DALI would fill a first one."""

INTERPOLATION = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}


def pipeline_of_crops(
    source: Source,
    sizes: Sequence[int],
    interpolation: Interpolation,
    *,
    batch: int,
    threads: int,
    device_id: int | None,
    encoded: bool,
) -> Any:
    """A pipeline whose outputs are the views' resized windows, uint8 [B, S, S, C] each.

    Args:
        source: the input.
        sizes: S of each view.
        interpolation: antialiased.
        batch: B.
        threads: of the CPU.
        device_id: of the GPU; None for the CPU.
        encoded: images come as the bytes of a file, not as pixels [H, W, C].
    """
    on_gpu, n = device_id is not None, 2 * len(sizes)

    def graph() -> tuple[Node, ...]:
        image, *windows = fn.external_source(
            source=source,
            num_outputs=1 + n,
            dtype=[types.UINT8, *[types.INT32] * n],
            ndim=[1 if encoded else 3, *[1] * n],
            layout=["" if encoded else "HWC", *[""] * n],
        )
        if encoded:
            image = decoded(image, on_gpu)
        elif on_gpu:
            image = image.gpu()
        return tuple(
            resized(image, corner, sides, size, interpolation)
            for corner, sides, size in zip(windows[::2], windows[1::2], sizes, strict=True)
        )

    # exec_dynamic: its outputs stay ours
    return pipeline_def(
        graph,
        batch_size=batch,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=2,
        exec_dynamic=True,
    )()


def decode_alone(file: Pixels, device_id: int | None) -> None:
    """Decode one encoded image, [n] bytes, on a GPU, or on the CPU if there is None.

    Raises:
        RuntimeError: DALI cannot.
    """

    def graph() -> Node:
        encoded = fn.external_source(source=lambda: [file], dtype=types.UINT8, ndim=1)
        return decoded(encoded, device_id is not None)

    pipeline_def(graph, batch_size=1, num_threads=1, device_id=device_id)().run()


def decoded(encoded: Node, on_gpu: bool) -> Node:
    """The pixels of files, [H, W, 3], not turned by EXIF."""
    device = "mixed" if on_gpu else "cpu"
    return fn.decoders.image(encoded, device=device, adjust_orientation=False)


def resized(image: Node, corner: Node, sides: Node, S: int, interpolation: Interpolation) -> Node:
    """Windows of images, [S, S, C]: top and left `corner`, height and width `sides`."""
    window = fn.slice(image, corner, sides, axis_names="HW")
    return fn.resize(window, size=(S, S), interp_type=INTERPOLATION[interpolation], antialias=True)
