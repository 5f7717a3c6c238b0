"""How trainers name the tensors of their backbones.

A ResNet has torchvision's tensor names everywhere, behind a prefix that identifies the trainer:

    torchvision, timm     conv1.weight                   SimSiam       module.encoder.conv1.weight
    solo-learn, rdm-fast  backbone.conv1.weight          MoCo          module.encoder_q.conv1.weight
    MMPretrain            backbone.conv1.weight
    lightly               backbone.0.weight: an nn.Sequential of the ResNet's children

Where prefixes are the same, other tensors of the file tell the trainers apart. lightly's own
ResNet (`ResNetGenerator`) calls shortcuts `shortcut`, has no module for the ReLU after its first
convolution, and so no such ReLU in an nn.Sequential of its children.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from rdm_fast.config import Stem
from rdm_fast.errors import DataError

TORCHVISION = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
"""Positions of a torchvision ResNet's children in an nn.Sequential; the others have no weights."""
GENERATOR = {"0": "conv1", "1": "bn1", "2": "layer1", "3": "layer2", "4": "layer3", "5": "layer4"}
"""Those of lightly's ResNetGenerator, without ReLU and max-pool."""
BODY = tuple(TORCHVISION.values())
FIRST_BLOCK = "layer1.0.conv1.weight"


@dataclass(frozen=True, slots=True)
class Layout:
    """How a trainer names the tensors of its backbone.

    Attributes:
        name: of the trainer.
        prefix: of the backbone's tensors.
        children: positions in an nn.Sequential; empty for names.
        heads: prefixes of the trainer's other tensors, of which a file has one or more; empty if
            it may have any.
        stem: of its 3 x 3 first convolutions, whose padding tensors do not show; None if unknown.
    """

    name: str
    prefix: str
    children: dict[str, str] = field(default_factory=dict)
    heads: tuple[str, ...] = ()
    stem: Stem | None = None

    def rename(self, name: str) -> str | None:
        """torchvision's name of a tensor; None for one outside the backbone."""
        if not name.startswith(self.prefix):
            return None
        child, _, rest = name.removeprefix(self.prefix).partition(".")
        child = self.children.get(child, "") if self.children else child
        rest = rest.replace(".shortcut.", ".downsample.")
        return f"{child}.{rest}" if child in BODY else None

    def fits(self, tensors: dict[str, Tensor]) -> bool:
        """Whether a ResNet in this layout is among the tensors."""
        renamed = {self.rename(name) for name in tensors}
        known = not self.heads or any(name.startswith(self.heads) for name in tensors)
        return known and {"conv1.weight", FIRST_BLOCK} <= renamed


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("torchvision", ""),
        Layout("SimSiam", "module.encoder."),
        Layout("MoCo", "module.encoder_q."),
        Layout("MoCo v3", "module.base_encoder."),
        Layout("solo-learn", "backbone.", heads=("classifier.",), stem="cifar_pad2"),
        Layout("MMPretrain", "backbone.", heads=("head.", "neck."), stem="cifar"),
        Layout("plain backbone", "backbone."),
        # first: its layer3 and layer4 have the places of a torchvision ResNet's layer1 and layer2
        Layout("lightly ResNetGenerator", "backbone.", GENERATOR, stem="cifar_no_relu"),
        Layout("lightly", "backbone.", TORCHVISION),
        Layout("old solo-learn", "encoder.", heads=("classifier.",), stem="cifar_pad2"),
        Layout("plain encoder", "encoder."),
        Layout("DataParallel", "module."),
        Layout("nn.Sequential of a ResNetGenerator", "", GENERATOR, stem="cifar_no_relu"),
        Layout("nn.Sequential", "", TORCHVISION),
    )
}
"""Layouts that are recognized, the first that fits; any other prefix can be given."""


TRANSPARENT = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Modules that torch.compile, FSDP and checkpointing put between others, at any depth."""
WRAPPERS = (
    *("module.", "model.", "net.", "network.", "student.", "online_encoder.", "online_network."),
    *("online.", "encoder_q.", "base_encoder.", "backbone.", "encoder.", "teacher.", "ema."),
    *("teacher_backbone.", "student_backbone."),  # lightly's DINO, which evaluates its teacher
)
"""Modules around a backbone that are peeled off, in any nesting; the first of several is taken."""
USUAL = ("", "state_dict", "model")
"""Tables that need no mention."""
NESTING, MOST_CHAINS = 6, 100


@dataclass(frozen=True, slots=True)
class Found:
    """Where a file has its backbone.

    Attributes:
        layout: the names of its tensors; the prefix includes all wrappers.
        tensors: of the table that it is in, without the names of transparent modules.
        said: what was peeled off, and where else the file has a backbone; empty if nothing was.
    """

    layout: Layout
    tensors: dict[str, Tensor]
    said: str = ""


def find_layout(path: Path, tables: dict[str, dict[str, Tensor]], prefix: str | None) -> Found:
    """The backbone in a file.

    Args:
        path: of the file, for messages.
        tables: tensors by name, in one table or more, by the keys that lead to them.
        prefix: of the backbone's tensors, which may begin with such keys; found if None.

    Raises:
        DataError: no ResNet is there under a known prefix, or under the given one.
    """
    plain = {place: _without_transparent(tensors) for place, tensors in tables.items()}
    found: dict[tuple[str, str], Layout] = {}
    for place, tensors in plain.items():
        for layout in _candidates(place, tensors, prefix):
            if layout.fits(tensors):
                found.setdefault((place, layout.prefix), layout)
    if not found:
        most = max(plain.values(), key=len, default={})
        raise DataError(_no_layout(path, most, prefix))
    (place, _), layout = next(iter(found.items()))
    return Found(layout, plain[place], _said(place, layout, tables, [*found][1:]))


def find_by_names(
    path: Path, tables: dict[str, dict[str, Tensor]], prefix: str | None, own: dict[str, Tensor]
) -> Found:
    """The place in a file with most of a model's tensors, by name and shape; the first of several.

    Args:
        path, tables, prefix: as for `find_layout`.
        own: the model's tensors.

    Raises:
        DataError: none is there.
    """
    plain = {place: _without_transparent(tensors) for place, tensors in tables.items()}
    shared: dict[tuple[str, str], int] = {}
    for place, tensors in plain.items():
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        prefixes = _chains(tensors) if prefix is None else _asked(place, prefix)
        for each in prefixes:
            count = sum(shapes.get(each + name) == t.shape for name, t in own.items())
            if count:
                shared[place, each] = count
    if not shared:
        where = "under a known prefix" if prefix is None else f"under --prefix {prefix}"
        raise DataError(
            f"{path} has no tensor of this model {where}: check --arch, or name the prefix of its "
            "tensors with --prefix"
        )
    most = max(shared.values())
    (place, found), *others = (key for key, count in shared.items() if count == most)
    layout = Layout("timm", found)
    return Found(layout, plain[place], _said(place, layout, tables, others))


def _asked(place: str, prefix: str) -> list[str]:
    """A given prefix, which may begin with the keys that lead to a table."""
    asked = TRANSPARENT.sub("", prefix)
    return list(dict.fromkeys((asked, asked.removeprefix(f"{place}."))))


def _without_transparent(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {TRANSPARENT.sub("", name): tensor for name, tensor in tensors.items()}


def _candidates(place: str, tensors: dict[str, Tensor], prefix: str | None) -> Iterator[Layout]:
    """Layouts to try on a table, the likeliest first."""
    if prefix is None:
        for chain in _chains(tensors):
            for layout in LAYOUTS.values():
                heads = tuple(chain + head for head in layout.heads)
                yield replace(layout, prefix=chain + layout.prefix, heads=heads)
        return
    for inner in _asked(place, prefix):
        yield from (layout for layout in LAYOUTS.values() if layout.prefix == inner)
        name = f"--prefix {prefix}"
        yield Layout(name, inner)
        yield Layout(name, inner, GENERATOR, stem="cifar_no_relu")
        yield Layout(name, inner, TORCHVISION)


def _chains(tensors: dict[str, Tensor]) -> list[str]:
    """Every nesting of wrappers around tensors, the shallowest first."""
    chains = level = [""]
    for _ in range(NESTING):
        level = [
            chain + wrapper
            for chain in level
            for wrapper in WRAPPERS
            if len(chains) < MOST_CHAINS
            and any(name.startswith(chain + wrapper) for name in tensors)
        ]
        chains = (chains + level)[:MOST_CHAINS]
    return chains


def _said(
    place: str, layout: Layout, tables: dict[str, dict[str, Tensor]], others: list[tuple[str, str]]
) -> str:
    """What was chosen among several, or taken from inside something else."""
    peeled = {match[1] for name in tables[place] for match in TRANSPARENT.finditer(name)}
    known = layout.prefix in {each.prefix for each in LAYOUTS.values()} and not peeled
    parts = []
    if place not in USUAL or not known:
        parts.append(f"found under {_joined(place, layout.prefix)!r}")
    if peeled:
        parts.append(f"{' and '.join(sorted(peeled))} left out of the names")
    elsewhere = list(dict.fromkeys(
        _joined(*other) for other in others if _is_another(other, (place, layout.prefix))
    ))  # fmt: skip
    if elsewhere:
        parts.append(f"also there: {', '.join(map(repr, elsewhere))}, which --prefix chooses")
    return "; ".join(parts)


def _joined(place: str, prefix: str) -> str:
    """A prefix that distinguishes tables."""
    return prefix if place in USUAL else f"{place}.{prefix}"


def _is_another(one: tuple[str, str], taken: tuple[str, str]) -> bool:
    return _joined(*one) != _joined(*taken)


def _no_layout(path: Path, tensors: dict[str, Tensor], prefix: str | None) -> str:
    found = f"{path}: none of its {len(tensors)} tensors is a ResNet's under a known prefix"
    if prefix is not None:
        under = sum(name.startswith(prefix) for name in tensors)
        found = (
            f"{path}: {under} of its {len(tensors)} tensors begin with --prefix {prefix}, and no "
            "ResNet is among them"
        )
    known = ", ".join(f"{layout.name} {layout.prefix!r}" for layout in LAYOUTS.values())
    of_timm = "; a model of timm needs --arch timm/NAME"
    return f"{found}{_elsewhere(tensors)}; known prefixes: {known}{of_timm}"


def _elsewhere(tensors: dict[str, Tensor]) -> str:
    """The prefix of a ResNet that is there and the most similar layout; else two tensor names."""
    for ending, is_sequential in ((FIRST_BLOCK, False), ("4.0.conv1.weight", True)):
        for name in tensors:
            if name == ending or name.endswith("." + ending):
                prefix = name.removesuffix(ending)
                count = sum(name.startswith(prefix) for name in tensors)
                near = max(
                    (each for each in LAYOUTS.values() if bool(each.children) == is_sequential),
                    key=lambda layout: _common_ending(layout.prefix, prefix),
                )
                return (
                    f", but {count} begin with {prefix!r} and are (nearest layout: {near.name}, "
                    f"{near.prefix!r}): use --prefix {prefix!r}"
                )
    return f" (they are {', '.join(list(tensors)[:2])}, ...)" if tensors else ""


def _common_ending(one: str, other: str) -> int:
    """Parts, from the last one, that two prefixes share."""
    pairs = zip(reversed(one.split(".")), reversed(other.split(".")), strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
