"""The loader that decodes, crops and resizes with NVIDIA DALI: on the GPU, or on a CPU's threads.

DALI only carries out the parameters that `sampler` drew (`dali_graph`); order, sharding and
resuming are ours, so checkpoints need no state of DALI. Reading runs some steps ahead of DALI
(`dali_input`), and DALI two steps ahead of the trainer. Once all crops of a batch have one size,
the op of the resident loader, `augment_views`, does the rest of a view (distortion and color): on a
GPU in three launches for both views. A graph of DALI's operators takes hundreds, since each image
has its own order of them.

DALI stops at a file that it cannot decode; the loader then starts it again at the same step,
without that file.
"""

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from rdm_fast.config import AugmentConfig, Config
from rdm_fast.data.images.sets import ImageSet
from rdm_fast.data.loaders.batch import Batch, Indices, Loader, to_device
from rdm_fast.data.loaders.dali_input import Source, file_for_dali
from rdm_fast.data.views.augment import view_table, views_of_table
from rdm_fast.data.views.sampler import ViewParameters
from rdm_fast.errors import DataError, Unavailable
from rdm_fast.runtime.precision import dtype_of_views

QUEUE = 2  # steps that DALI works ahead


class Pipeline(NamedTuple):
    """A built DALI pipeline and its input."""

    dali: Any
    source: Source


class DaliLoader(Loader):
    """Images decoded by DALI, with `data.workers` CPU threads a rank; on the GPU if that is the
    device.

    Raises:
        Unavailable: DALI is not installed, or cannot work on this device.
    """

    name: ClassVar[str] = "dali"

    def __init__(
        self, config: Config, images: ImageSet, *, rank: int, world_size: int, device: torch.device
    ) -> None:
        super().__init__(config, images, rank=rank, world_size=world_size, device=device)
        self._local_batch = config.optim.local_batch(world_size)
        self._by_pillow: set[int] = set()
        self._graph = import_graph()
        self._idle: Pipeline | None = self._build()

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        steps, augment = self._steps(epoch, start_step), self.config.augment
        if not steps:
            return
        dtype = dtype_of_views(self.config.precision, self.device)
        pipeline, self._idle = self._idle or self._build(), None
        pipeline.source.plan(epoch, steps)
        for done, asked in enumerate(steps):
            while (crops := self._run(pipeline, steps[done:])) is None:
                pipeline = self._build()
                pipeline.source.plan(epoch, steps[done:])
            indices, drawn = pipeline.source.fed.popleft()
            self._unreadable.note(asked, indices)
            large = finished(crops[:2], drawn[:2], augment, augment.size, dtype)
            small = finished(crops[2:], drawn[2:], augment, augment.small_size, dtype)
            yield self._batch(large + small, indices)
        pipeline.dali.reset()
        self._idle = pipeline  # one left in mid-epoch is not used again

    def _run(self, pipeline: Pipeline, steps: list[Indices]) -> list[Tensor] | None:
        """The resized windows of all views of the first of these steps, uint8 [b, S, S, C] each.

        None if DALI failed to decode a file, after which it cannot go on: a new pipeline gets that
        file as pixels, or the next image in its place.
        """
        try:
            if self.device.type == "cuda":
                outputs = pipeline.dali.run(torch.cuda.current_stream(self.device))
            else:
                outputs = pipeline.dali.run()
        except StopIteration:
            error = pipeline.source.error
            assert error is not None  # else there were more steps than planned
            raise error from None
        except RuntimeError as failure:
            found = self._undecodable(steps[:QUEUE])
            if not found:
                raise Unavailable(
                    f"DALI failed ({_line(failure)}): use --data.loader torch"
                ) from None
            self._by_pillow |= found
            return None
        return [from_dlpack(crops.as_tensor()) for crops in outputs]

    def _undecodable(self, steps: list[Indices]) -> set[int]:
        """Files of these steps that DALI cannot decode."""
        if self.images.pixels is not None:
            return set()
        asked = set(np.concatenate(steps).tolist())
        return {i for i in asked - self._by_pillow if not self._decodes(i)}

    def _decodes(self, i: int) -> bool:
        try:
            self._graph.decode_alone(file_for_dali(self.images, i), self._device_id())
            self.images.read(i)
        except (RuntimeError, DataError):
            return False
        return True

    def _build(self) -> Pipeline:
        config = self.config
        source = Source(config, self.images, self._by_pillow)
        try:
            dali = self._graph.pipeline_of_crops(
                source,
                config.augment.sizes,
                config.augment.interpolation,
                batch=self._local_batch,
                threads=max(1, config.data.workers),
                device_id=self._device_id(),
                encoded=self.images.pixels is None,
            )
            dali.build()
        except RuntimeError as error:
            raise Unavailable(
                f"DALI cannot work on {self.device} ({_line(error)}): use --data.loader torch"
            ) from error
        return Pipeline(dali, source)

    def _device_id(self) -> int | None:
        """The number of the GPU; None for the CPU."""
        if self.device.type != "cuda":
            return None
        index: int | None = self.device.index
        return torch.cuda.current_device() if index is None else index


def finished(
    crops: Sequence[Tensor],
    drawn: Sequence[ViewParameters],
    augment: AugmentConfig,
    size: int,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """Views of one size, from windows that are cut out and resized.

    Args:
        crops: of each view, uint8 [b, size, size, C].
        drawn: of each view.
        augment, dtype: as in `augment.views_of_table`.

    Returns:
        Each view, [b, C, size, size] in that dtype, channels_last.
    """
    if not crops:
        return ()
    images = torch.cat([*crops]).permute(0, 3, 1, 2)
    places = np.arange(len(images)).reshape(len(crops), -1)
    table = view_table([p.of_resized_windows(size) for p in drawn], places)
    table = to_device(table, images.device)
    return views_of_table(images, table, augment, dtype, size).chunk(len(crops))


def import_graph() -> ModuleType:
    """`dali_graph`, which needs DALI.

    Raises:
        Unavailable: it is not installed, or cannot be loaded; the message has the line to install.
    """
    try:
        from rdm_fast.data.loaders import dali_graph
    except (ImportError, OSError) as error:
        raise Unavailable(
            f"--data.loader dali needs NVIDIA DALI ({_line(error)}): {install_line()}, or use "
            "--data.loader torch"
        ) from error
    return dali_graph


def install_line() -> str:
    """How to install the DALI that fits this torch's CUDA."""
    cuda = "120" if str(torch.version.cuda).startswith("12.") else "130"
    return f"pip install 'nvidia-dali-cuda{cuda}>=2.4,<3'"


def _line(error: Exception) -> str:
    """The cause, in one line: DALI's messages have many, with places in its source."""
    text = str(error).partition("encountered:")[2] or str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
