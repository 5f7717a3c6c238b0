"""Models of timm in files of any trainer: found by the names of their tensors, loaded strictly.

Tensors do not say which model they are: the file notes it, as those of rdm-fast do, or
`--arch timm/NAME` does.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rdm_fast.config import TIMM, ModelConfig
from rdm_fast.errors import DataError
from rdm_fast.models.layouts import find_by_names
from rdm_fast.models.timm_models import create_timm
from rdm_fast.models.weight_files import Tables, load_strict, require_fit

PATCHES, POSITIONS = "patch_embed.proj.weight", "pos_embed"
"""Tensors of a ViT: [D, C, P, P] for patches of P pixels, and [1, n, D] for n tokens."""


@dataclass(frozen=True, slots=True)
class PretrainedTimm:
    """A model of timm read from a file; its methods are those of PretrainedBackbone.

    Attributes:
        path: the file.
        tables: its tensors, as `read_tables` returns them.
        prefix: of the names of the model's tensors; found if None.
        backbone: timm/NAME.
        notes: what the file notes of it.
    """

    path: Path
    tables: Tables
    prefix: str | None
    backbone: str
    notes: dict[str, Any]
    stem_source: str = field(default="", init=False)

    @property
    def settings(self) -> dict[str, Any]:
        """Those of ModelConfig that build it. Patches are noted, or as large as in the tensors."""
        stem = ModelConfig(backbone=self.backbone).stem
        layers = {"stem": stem, "patch_size": self._patch_size(), "frozen_patch": False}
        return {"backbone": self.backbone, **layers}

    @property
    def channels(self) -> int:
        return int(self._input_size[0])

    @property
    def sizes(self) -> tuple[int, ...]:
        return (int(self._input_size[1]),)

    @property
    def _input_size(self) -> Sequence[int]:
        return self.notes.get("input_size", (3, 224, 224))

    def _patch_size(self) -> int:
        if "patch_size" in self.notes:
            return int(self.notes["patch_size"])
        tensors = (item for table in self.tables.values() for item in table.items())
        found = (t.shape[-1] for name, t in tensors if name.endswith(PATCHES) and t.dim() == 4)
        return next(found, 0)

    def require(
        self, model: ModelConfig, channels: int, sizes: Sequence[int], stem_flag: str = ""
    ) -> None:
        """Refuse a model that is another, or whose tensors have other shapes than the file's.

        The model is not allocated: a note may name one that is larger than the file.

        Args:
            model, channels, sizes: as for `PretrainedBackbone.require`.
            stem_flag: not used.

        Raises:
            DataError: it does not fit.
        """
        noted = str(self.notes.get("backbone", ""))
        if noted.startswith(TIMM) and noted != model.backbone:
            raise DataError(
                f"{self.path} is a {noted} and the model a {model.backbone}: use --arch {noted}"
            )
        with torch.device("meta"):
            module = create_timm(model, channels, sizes)
        own, given = module.state_dict(), self._tensors(module)[0]
        if PATCHES in own and PATCHES in given:
            self._require_patches(own[PATCHES].shape, given[PATCHES].shape)
        if POSITIONS in own and POSITIONS in given and PATCHES in own:
            patch = own[PATCHES].shape[-1]
            self._require_positions(own[POSITIONS], given[POSITIONS], patch, sizes[0])
        require_fit(own, given, self._what)

    def _require_patches(self, own: torch.Size, given: torch.Size) -> None:
        if own[2:] != given[2:]:
            raise DataError(
                f"{self.path} has patches of {given[-1]} pixels and the model of {own[-1]}: use "
                f"--patch-size {given[-1]}, or --model.patch-size with --init"
            )
        if own[1] != given[1]:
            raise DataError(
                f"{self.path} is a backbone for images of {given[1]} channel(s), and these have "
                f"{own[1]}: use images like those it was trained on"
            )

    def _require_positions(self, own: Tensor, given: Tensor, patch: int, size: int) -> None:
        if own.dim() == given.dim() == 3 and own.shape[::2] == given.shape[::2]:
            tokens = given.shape[1] - (own.shape[1] - (size // patch) ** 2)
            side = patch * math.isqrt(max(tokens, 0))
            if own.shape != given.shape:
                raise DataError(
                    f"{self.path} has positional embeddings for images of {side} pixels, and "
                    f"these have {size}: use images of that size (augment.size of the recipe)"
                )

    def stem_note(self, stem: str, flag: str) -> str:
        """Nothing: a model of timm has its own first layers."""
        return ""

    def load_into(self, module: nn.Module) -> str:
        """Fill a model of timm; returns a sentence on what was loaded.

        Raises:
            DataError: a tensor is missing, unknown or of another shape; all are counted.
        """
        state, said = self._tensors(module)
        count = load_strict(module, state, self._what)
        layout = "rdm-fast" if self.notes else "timm"
        return f"{self.path}: {layout} layout, loaded {count} of {count} tensors{said}"

    @property
    def _what(self) -> str:
        return f"{self.path} (read as a {self.backbone})"

    def _tensors(self, module: nn.Module) -> tuple[dict[str, Tensor], str]:
        """The file's tensors of a model, by its names, and a text on what else is in the file.

        Left out are the classifier and what lies beside the model.
        """
        own = module.state_dict()
        found = find_by_names(self.path, self.tables, self.prefix, own)
        start = found.layout.prefix
        under = {n.removeprefix(start): t for n, t in found.tensors.items() if n.startswith(start)}
        classifier = getattr(module, "pretrained_cfg", {}).get("classifier") or ()
        heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
        outside = tuple(f"{head}." for head in heads)
        parts = {name.partition(".")[0] for name in own}
        state = {
            name: tensor
            for name, tensor in under.items()
            if name in own or (name.partition(".")[0] in parts and not name.startswith(outside))
        }
        ignored = Counter(
            name.removeprefix(start).partition(".")[0]
            for name in found.tensors
            if name.removeprefix(start) not in state
        )
        said = f"; {found.said}" if found.said else ""
        if ignored:
            each = ", ".join(f"{name} {count}" for name, count in ignored.items())
            said += f"; ignored {ignored.total()}: {each}"
        return state, said
