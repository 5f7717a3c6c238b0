"""A linear classifier that trains during a run, on the embeddings of its training steps.

It reads the backbone's outputs, detached, and trains by SGD with the gradient in closed form. It
adds nothing to the run's autograd graph, parameters or random state, so the run's weights are
bitwise the same with and without it.

    dL/dW = (softmax(e W^T + b) - onehot(y))^T e / n,    over the labeled rows e of all ranks
"""

from collections import deque

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from rdm_fast.config import Config
from rdm_fast.data import ImageSet
from rdm_fast.errors import DataError
from rdm_fast.evaluation.probe import LinearClassifier
from rdm_fast.runtime.distributed import world_size

LR, MOMENTUM = 0.1, 0.9
"""As the released code's online classifier, at the peak of the run's schedule."""
VIEWS = 2
"""Of each image that it trains on: small views follow them in a step, and are left out."""


class OnlineProbe:
    """The online classifier of a run; without log.probe or labels it does nothing."""

    def __init__(
        self, config: Config, images: ImageSet, backbone: nn.Module, device: torch.device
    ) -> None:
        """Record the outputs of `backbone`, which is in training mode during steps only."""
        self.config, self.device = config, device
        self.classes = len(images.classes) if images.labels is not None else 0
        self.is_on = config.log.probe and self.classes > 0
        self._tensors: dict[str, Tensor] = {}
        # All views of every accumulated part. Earlier outputs, such as warm-up's, are dropped.
        self._views = len(config.augment.views)
        self._seen: deque[Tensor] = deque(maxlen=self._views * config.optim.accumulate)
        if self.is_on:
            backbone.register_forward_hook(self._listen)

    def _listen(self, module: nn.Module, _inputs: object, embedding: Tensor) -> None:
        if module.training:
            self._seen.append(embedding.detach())

    def _start(self, d_emb: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.config.seed)
        weight = torch.empty(self.classes, d_emb).normal_(std=0.01, generator=generator)
        first = {"weight": weight, "bias": torch.zeros(self.classes)}
        rest = {f"{name}_momentum": torch.zeros_like(tensor) for name, tensor in first.items()}
        return {name: tensor.to(self.device) for name, tensor in (first | rest).items()}

    @torch.no_grad()
    def update(self, labels: Tensor, lr: float, skipped: Tensor) -> None:
        """Train on the embeddings of the last step.

        Args:
            labels: of this rank's images, [b] int64, -1 for no label.
            lr: the run's learning rate in that step; the probe follows its schedule.
            skipped: 0-d, on the device, not zero if the step was skipped; then the probe skips it
                too, without waiting for the device.
        """
        if not self.is_on:
            return
        parts = labels.chunk(self.config.optim.accumulate)
        large = [each for i, each in enumerate(self._seen) if i % self._views < VIEWS]
        embedding = torch.cat(large).float()  # [VIEWS b, d_emb]
        self._seen.clear()
        target = torch.cat([part for part in parts for _ in range(VIEWS)])
        if not self._tensors:
            self._tensors = self._start(embedding.shape[1])
        t = self._tensors
        counts = (target >= 0).float()[:, None]  # selecting rows would wait for the device
        with torch.autocast(self.device.type, enabled=False):
            shares = F.linear(embedding, t["weight"], t["bias"]).softmax(dim=1)
            error = (shares - F.one_hot(target.clamp_min(0), self.classes)) * counts
            gradient = torch.cat([error.mT @ embedding, error.sum(dim=0)[:, None]], dim=1)
        total = counts.sum()
        if world_size() > 1:
            dist.all_reduce(gradient)
            dist.all_reduce(total)
        gradient /= total.clamp_min(1)
        rate = LR * lr / self.config.optim.lr if self.config.optim.lr else 0.0
        for name, change in (("weight", gradient[:, :-1]), ("bias", gradient[:, -1])):
            momentum = t[f"{name}_momentum"]
            momentum.copy_(torch.where(skipped == 0, MOMENTUM * momentum + change, momentum))
            t[name].sub_(torch.where(skipped == 0, rate * momentum, 0))

    @property
    def classifier(self) -> LinearClassifier | None:
        """The current classifier, on the CPU; None before the first step or without a probe."""
        if not self._tensors:
            return None
        return LinearClassifier(self._tensors["weight"].cpu(), self._tensors["bias"].cpu())

    # ---- resuming exactly --------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Its tensors; none before the first step."""
        return dict(self._tensors)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict`; without log.probe, do nothing.

        Raises:
            DataError: a tensor is missing, or not of this probe's shape and finite.
        """
        if not self.is_on:
            return
        for name, wanted in self._start(self._width(state)).items():
            found = state.get(name, torch.empty(0, dtype=torch.int8))
            alike = (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
            if not (alike and bool(found.isfinite().all())):
                raise DataError(
                    f"the checkpoint's probe/{name} in extra.safetensors is not finite numbers of "
                    f"shape {list(wanted.shape)}: use an older checkpoint, or leave out log.probe"
                )
        self._tensors = {name: tensor.to(self.device) for name, tensor in state.items()}

    @staticmethod
    def _width(state: dict[str, Tensor]) -> int:
        """Numbers of an embedding."""
        weight = state.get("weight")
        return weight.shape[-1] if weight is not None and weight.ndim == 2 else 0
