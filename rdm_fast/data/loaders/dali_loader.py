"""The loader that decodes, crops and resizes with NVIDIA DALI: on the GPU, or on a CPU's threads.

DALI carries out what `sampler` drew (`dali_graph`) and nothing else: order, sharding and resuming
are ours, so no state of DALI goes into a checkpoint. Reading runs some steps ahead of DALI
(`dali_input`), and DALI two steps ahead of the trainer. What is left of a view once all crops of a
batch have one size, distortion and color, is the op of the resident loader, `augment_views`:
three launches for both views on a GPU, where a graph of DALI's operators takes hundreds, since
each image has its own order of them.

DALI stops at a file that it cannot decode; it is then started again at the same step, without that
file.
"""

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from rdm_fast.config import AugmentConfig, Config
from rdm_fast.data.images.bad_files import LostImages
from rdm_fast.data.images.sets import ImageSet
from rdm_fast.data.loaders.batch import Batch, labels_of, to_device
from rdm_fast.data.loaders.dali_input import Source, file_for_dali
from rdm_fast.data.views.augment import view_table, views_of_table
from rdm_fast.data.views.sampler import ViewParameters
from rdm_fast.errors import DataError, Unavailable
from rdm_fast.runtime.precision import dtype_of_views

QUEUE = 2  # steps that DALI works ahead
SHOWN = 200  # characters of an error of DALI's
_Fed = tuple[Any, Source]
"""A pipeline and what feeds it."""


class DaliLoader:
    """Images decoded by DALI, with `data.workers` CPU threads a rank; on the GPU if that is the
    device.

    Raises:
        Unavailable: DALI is not installed, or cannot work on this device.
    """

    name: ClassVar[str] = "dali"

    def __init__(
        self, config: Config, images: ImageSet, *, rank: int, world_size: int, device: torch.device
    ) -> None:
        self.config, self.images, self.device = config, images, device
        self._rank, self._world_size = rank, world_size
        self._lost = LostImages(images, config.data)
        self._by_pillow: set[int] = set()
        self._graph = import_graph()
        self._idle: _Fed | None = self._build()
        self.steps_per_epoch = len(images) // config.optim.global_batch

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        if start_step >= self.steps_per_epoch:
            return
        fed, self._idle = self._idle or self._build(), None
        fed[1].plan(epoch, start_step)
        for step in range(start_step, self.steps_per_epoch):
            while (crops := self._run(fed, step)) is None:
                fed = self._build()
                fed[1].plan(epoch, step)
            indices, drawn = fed[1].fed(step)
            self._lost.note(fed[1].asked(step), indices)
            augment = self.config.augment
            dtype = dtype_of_views(self.config.precision, self.device)
            view1, view2 = finished(crops[:2], drawn[:2], augment, augment.size, dtype)
            small = finished(crops[2:], drawn[2:], augment, augment.small_size, dtype)
            labels = to_device(labels_of(self.images, indices), self.device)
            yield Batch(view1, view2, labels, torch.from_numpy(indices), small)
        fed[0].reset()
        self._idle = fed  # one left in mid-epoch is not used again

    def _run(self, fed: _Fed, step: int) -> list[Tensor] | None:
        """The resized windows of all views of the next step, uint8 [b, S, S, C] each.

        None if DALI failed to decode a file, after which it does not go on: with a new pipeline
        that file comes as pixels, or the next image in its place.
        """
        pipeline, source = fed
        try:
            if self.device.type == "cuda":
                outputs = pipeline.run(torch.cuda.current_stream(self.device))
            else:
                outputs = pipeline.run()
        except StopIteration:
            refusal = source.refusal()
            assert refusal is not None  # else there were more steps than planned
            raise refusal from None
        except RuntimeError as error:
            found = self._undecodable(source, step)
            if not found:
                raise Unavailable(
                    f"DALI failed at step {step} of an epoch ({_line(error)}): use "
                    "--data.loader torch"
                ) from None
            self._by_pillow |= found
            return None
        return [from_dlpack(crops.as_tensor()) for crops in outputs]

    def _undecodable(self, source: Source, step: int) -> set[int]:
        """Files of this step, or of one that DALI was already at, that it cannot decode."""
        if self.images.pixels is not None:
            return set()
        ahead = range(step, min(step + QUEUE, self.steps_per_epoch))
        asked = {i for later in ahead for i in source.asked(later).tolist()}
        return {i for i in asked - self._by_pillow if not self._decodes(i)}

    def _decodes(self, i: int) -> bool:
        try:
            on_gpu = self.device.type == "cuda"
            self._graph.decode_alone(
                file_for_dali(self.images, i), _device_id(self.device) if on_gpu else None
            )
            self.images.read(i)
        except (RuntimeError, DataError):
            return False
        return True

    def _build(self) -> _Fed:
        config, device = self.config, self.device
        source = Source(config, self.images, self._rank, self._world_size, self._by_pillow)
        on_gpu = device.type == "cuda"
        try:
            pipeline = self._graph.pipeline_of_crops(
                source,
                config.augment.sizes,
                config.augment.interpolation,
                batch=source.local_batch,
                threads=max(1, config.data.workers),
                device_id=_device_id(device) if on_gpu else None,
                encoded=self.images.pixels is None,
            )
            pipeline.build()
        except RuntimeError as error:
            raise Unavailable(
                f"DALI cannot work on {device} ({_line(error)}): use --data.loader torch"
            ) from error
        return pipeline, source


def finished(
    crops: Sequence[Tensor],
    drawn: Sequence[ViewParameters],
    augment: AugmentConfig,
    size: int,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """Views of one size, of which the windows are cut out and resized.

    Args:
        crops: of each view, uint8 [b, size, size, C].
        drawn: of each view.
        augment, dtype: as in `augment.views_of_table`.

    Returns:
        Of each view, [b, C, size, size] in that dtype, channels_last.
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


def _device_id(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _line(error: Exception) -> str:
    """What went wrong, in one line: DALI's messages have many, some of which say where in ours."""
    told = str(error).partition("encountered:")[2] or str(error)
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    return lines[0][:SHOWN].rstrip(".") if lines else type(error).__name__
