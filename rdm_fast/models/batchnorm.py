"""Batch norm over the global batch, on GPUs and CPUs, and control of its running statistics.

torch's SyncBatchNorm runs on GPUs only. `CpuSyncBatchNorm` is the same function on CPUs; over the
rows i of all ranks:

    y_i  = (x_i - m) r w + b          m = mean_i x_i,  v = mean_i (x_i - m)^2,  r = (v + eps)^-1/2
    dx_i = (dy_i - mean_j dy_j - h_i mean_j (dy_j h_j)) r w          h_i = (x_i - m) r

(Ioffe & Szegedy, arXiv:1502.03167). Forward is one gather of every rank's mean, variance and
count; backward is one all-reduce of the two sums, because the gradient flows through m and v too.
No other collective of this project lies in the autograd graph.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rdm_fast.runtime.distributed import gather_rows, world_size


def synchronize(module: nn.Module, device: torch.device) -> nn.Module:
    """Make every batch norm in a module use the statistics of the global batch.

    Args:
        module: changed in place; parameters, buffers and their names stay as they are.
        device: where it will run: torch's SyncBatchNorm on CUDA, `CpuSyncBatchNorm` elsewhere.
            Of timm's batch norms, the activation inside is kept.

    Returns:
        The module; a new one only if it is a batch norm itself.
    """
    if device.type == "cuda":
        if any(isinstance(norm, _BatchNorm) and norm._modules for norm in module.modules()):
            from timm.layers.norm_act import convert_sync_batchnorm  # torch's drops the modules

            return convert_sync_batchnorm(module)
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    if isinstance(module, _BatchNorm):
        return CpuSyncBatchNorm.take_over(module)
    for name, child in module.named_children():
        setattr(module, name, synchronize(child, device))
    return module


def norms_of(module: nn.Module) -> list[_BatchNorm]:
    """Every batch norm in a module that keeps running statistics, in the order of its modules."""
    norms = [each for each in module.modules() if isinstance(each, _BatchNorm)]
    return [norm for norm in norms if norm.running_mean is not None]


@torch.no_grad()
def copy_statistics(source: nn.Module, to: nn.Module) -> None:
    """Give the batch norms of a module the running statistics of another of its architecture."""
    for ours, theirs in zip(norms_of(to), norms_of(source), strict=True):
        for name, buffer in ours.named_buffers(recurse=False):
            buffer.copy_(theirs.get_buffer(name))


@contextmanager
def recomputed_statistics(module: nn.Module) -> Iterator[None]:
    """Within, batch norms normalize by the batch, as in training; on exit, each holds the mean and
    the variance of all values that it was given on any rank.

    The averages are cumulative and in float64, weighted by the number of values, so they do not
    depend on which rank saw which batch. Every rank must enter; all ranks together must show the
    module at least two values for each channel.
    """
    norms = norms_of(module)
    kept = [(norm.training, norm.momentum) for norm in norms]
    moments: dict[nn.Module, Tensor] = {}

    @torch.no_grad()
    def add(norm: nn.Module, inputs: tuple[Tensor], _: Tensor) -> None:
        assert isinstance(norm, _BatchNorm)
        assert norm.running_mean is not None and norm.running_var is not None
        n = inputs[0].numel() // norm.num_features
        mean, var = norm.running_mean.double(), norm.running_var.double() * ((n - 1) / n)
        batch = torch.cat([mean, var, mean.new_tensor([n])])
        moments[norm] = _merged(torch.stack([moments[norm], batch]))

    for norm in norms:
        assert norm.running_mean is not None
        moments[norm] = norm.running_mean.new_zeros(2 * norm.num_features + 1).double()
        norm.train().momentum = 1.0  # the running statistics are those of the last batch
    hooks = [norm.register_forward_hook(add) for norm in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for norm, (training, momentum) in zip(norms, kept, strict=True):
            norm.train(training).momentum = momentum
    for norm in norms:
        mean, var, n = _split(_merged(gather_rows(moments[norm].view(1, 1, -1))[0]))
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var * (n / (n - 1)))


@contextmanager
def frozen_running_statistics(module: nn.Module) -> Iterator[None]:
    """Restore every batch norm's running mean, variance and count of batches on exit.

    Backward may run inside the context or after it.
    """
    buffers = [buffer for norm in norms_of(module) for buffer in norm.buffers(recurse=False)]
    kept = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, old in zip(buffers, kept, strict=True):
            # .data hides the change from autograd, which saved the buffer with the forward although
            # a backward in training mode never reads it
            buffer.data.copy_(old)


def join_buffers(module: nn.Module) -> list[Tensor]:
    """Store all buffers of a module in one flat tensor per dtype, to be copied at once.

    The buffers remain the same tensor objects and become views of the flat tensors, which are
    returned.
    """
    joined = []
    buffers = list(module.buffers())
    for dtype in sorted({buffer.dtype for buffer in buffers}, key=str):
        of_dtype = [buffer for buffer in buffers if buffer.dtype == dtype]
        flat = torch.cat([buffer.flatten() for buffer in of_dtype])
        for buffer, values in zip(of_dtype, flat.split([b.numel() for b in of_dtype]), strict=True):
            buffer.data = values.view(buffer.shape)
        joined.append(flat)
    return joined


class CpuSyncBatchNorm(_BatchNorm):
    """Batch norm over the rows of all ranks; with one rank, or in eval mode, plain batch norm.

    Statistics are float32 (float64 for float64 inputs), also under autocast; the output has the
    input's dtype. Ranks may hold different numbers of rows, at least one each.
    """

    @classmethod
    def take_over(cls, norm: _BatchNorm) -> "CpuSyncBatchNorm":
        """A synchronized batch norm that shares the parameters, buffers and modules of `norm`."""
        twin = cls(
            norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
        )
        twin.weight, twin.bias = norm.weight, norm.bias
        twin.running_mean, twin.running_var = norm.running_mean, norm.running_var
        twin.num_batches_tracked = norm.num_batches_tracked
        for name, child in norm.named_children():
            twin.add_module(name, child)
        return twin.train(norm.training)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batch norm needs rows and channels [B, C, ...], got {input.shape}")

    def forward(self, input: Tensor) -> Tensor:
        """input: [B, C, ...], any memory format. Returns the same shape, dtype and format.

        Modules inside are applied to the result, in order: dropout and activation in timm's.
        """
        y = self._normalize(input)
        for child in self.children():
            y = child(y)
        return y

    def _normalize(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        uses_batch = self.training or self.running_mean is None
        if not uses_batch or world_size() == 1:
            return super().forward(input)
        mean, var, count = _global_statistics(input)
        if self.training:
            self._remember(mean, var * (count / (count - 1)))
        y: Tensor = _Normalize.apply(input, self.weight, self.bias, mean, var, count, self.eps)
        return y

    @torch.no_grad()
    def _remember(self, mean: Tensor, unbiased_var: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        # momentum=None is torch's cumulative average
        share = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(unbiased_var.to(self.running_var.dtype), share)


@torch.no_grad()
def _global_statistics(x: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean [C], biased variance [C] and number of values per channel, over all ranks.

    Ranks exchange means and variances, which are merged about the global mean in rank order (Chan,
    Golub & LeVeque 1979): sums of squares would cancel where the mean is large.
    """
    x, axes, shape = _accurate(x), _axes(x), _shape(x)
    mean = x.mean(axes)
    var = (x - mean.view(shape)).square().mean(axes)
    own = torch.cat([mean, var, mean.new_tensor([x.numel() / x.shape[1]])])
    mean, var, total = _split(_merged(gather_rows(own.view(1, 1, -1))[0]))
    return mean, var, float(total)


def _merged(moments: Tensor) -> Tensor:
    """Of the union of k sets: from their means, biased variances and counts, [k, 2 C + 1]."""
    means, variances, counts = _split(moments)
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    var = (counts * (variances + (means - mean).square())).sum(0) / total
    return torch.cat([mean, var, total[None]])


def _split(moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    C = moments.shape[-1] // 2
    mean, var, count = moments.split([C, C, 1], dim=-1)
    return mean, var, count


class _Normalize(torch.autograd.Function):
    """y from x and the global statistics; backward includes their dependence on every rank's x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        count: float,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt())
        ctx.count = count
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, r = ctx.saved_tensors
        axes, shape = _axes(x), _shape(x)
        h = (_accurate(x) - mean.view(shape)) * r.view(shape)
        dy = _accurate(dy)
        db, dw = dy.sum(axes), (dy * h).sum(axes)  # over this rank's rows, as every gradient is
        sums = torch.stack([db, dw])
        dist.all_reduce(sums)
        mean_dy, mean_dy_h = (sums / ctx.count).view(2, *shape)
        scale = r if weight is None else r * weight
        dx = (dy - mean_dy - h * mean_dy_h) * scale.view(shape)
        affine = (None, None) if weight is None else (dw.to(weight.dtype), db.to(weight.dtype))
        return dx.to(x.dtype), *affine, None, None, None, None


def _accurate(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _axes(x: Tensor) -> list[int]:
    """Every axis but the channels'."""
    return [0, *range(2, x.dim())]


def _shape(x: Tensor) -> list[int]:
    """Shape in which a vector over channels broadcasts against x."""
    return [1, -1, *[1] * (x.dim() - 2)]
