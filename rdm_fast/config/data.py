"""Which images a run reads, and how their random views are drawn."""

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from rdm_fast.config.checks import Between, Share, require, require_fields
from rdm_fast.config.flags import Alias

DataName = Literal[
    "digits",
    "cifar10",
    "cifar100",
    "stl10",
    "fashion_mnist",
    "folder",
    "webdataset",
    "arrays",
    "hf",
]
Interpolation = Literal["bilinear", "bicubic"]
CropScale = Annotated[tuple[float, float], Between(0, 1, above=True, rising=True)]
Side = Annotated[int, Between(8, 16_384)]


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """The data set and how it is read."""

    name: DataName = "digits"
    """Data set: digits is embedded, folder reads image files, webdataset image files packed in tar
    files, arrays one packed .npz file, hf a data set of Hugging Face."""
    root: str = "data"
    """Folder of the data set, in torchvision's layout; for arrays, the .npz file; for webdataset, a
    folder or pattern such as 'shards/train-{0000..0146}.tar'; for hf, a folder that
    save_to_disk made or that holds parquet files, or OWNER/NAME."""
    fraction: Annotated[float, Between(0, 1, above=True)] = 1.0
    """Share of the training images that the run sees, the same in every run; of labeled images, the
    same share of each class."""
    image_column: str = ""
    """Column of a Hugging Face data set that holds the images; empty to find it."""
    label_column: str = ""
    """Column of a Hugging Face data set that holds the labels; empty to find it."""
    download: bool = False
    """Download the data set into root if it is not there (torchvision sets only)."""
    loader: Literal["auto", "dali", "torch", "resident"] = "auto"
    """dali decodes on the GPU (or CPU threads), torch in worker processes, resident keeps pixels on
    the device; auto uses resident for small images of one size, otherwise dali on a GPU."""
    workers: Annotated[int, Between(0, 256), Alias("--workers")] = 2
    """Worker processes of the torch loader, or CPU threads of the DALI loader, on each rank."""
    timeout: Annotated[float, Between(1, 86_400)] = 300.0
    """Seconds that a worker process may take for a batch; then the run saves and ends. On several
    ranks, less than parallel.timeout: the other ranks wait meanwhile."""
    classes: str = ""
    """File that lists the classes of a folder to use, one a line; empty for all."""
    verify: Literal["header", "full"] = "header"
    """How image files are checked before training: read headers and ends, or decode all."""
    on_bad_image: Annotated[Literal["skip", "stop"], Alias("--on-bad-image")] = "skip"
    """Skip unusable image files and list them in bad_files.tsv, or stop."""
    max_bad: Annotated[Share, Alias("--max-bad")] = 0.001
    """Share of the image files that may be skipped; if more are bad, the run stops. Three may be
    bad in any case, unless this is 0."""
    white_level: Annotated[int, Between(1, 65535)] = 65535
    """Value of 16-bit grey images that is shown as white: 4095 for those of a 12-bit camera."""

    def __post_init__(self) -> None:
        require_fields("data.", self)
        require(
            not self.classes or self.name == "folder",
            f"data.classes is for image folders: with data.name={self.name}, leave it out",
        )
        require(
            self.verify == "header" or self.name in ("folder", "webdataset", "hf"),
            f"data.verify is for image files: with data.name={self.name}, leave it out",
        )
        require(
            self.white_level == 65535 or self.name in ("folder", "webdataset", "arrays", "hf"),
            f"data.white_level is for image files: with data.name={self.name}, leave it out",
        )
        for flag in ("image_column", "label_column"):
            require(
                not getattr(self, flag) or self.name == "hf",
                f"data.{flag} is for Hugging Face data sets: with data.name={self.name}, leave it "
                "out, or give data.name=hf",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewConfig:
    """How one random view of an image is drawn. Steps run in the order of these fields."""

    crop_scale: CropScale = (0.2, 1.0)
    """Area of the crop as a share of the image, drawn uniformly from this range."""
    crop_ratio: Annotated[tuple[float, float], Between(0.01, 100, rising=True)] = (3 / 4, 4 / 3)
    """Aspect ratio of the crop, drawn log-uniformly from this range."""
    rotate: Annotated[float, Between(0, 180)] = 0.0
    """Largest rotation, in degrees, either way."""
    shear: Annotated[float, Between(0, 89)] = 0.0
    """Largest horizontal shear, in degrees, either way."""
    jitter: Share = 0.0
    """Probability of color jitter: brightness, contrast, saturation and hue in random order."""
    brightness: Share = 0.4
    """Brightness factor is drawn from [1 - this, 1 + this]."""
    contrast: Share = 0.4
    """Contrast factor is drawn from [1 - this, 1 + this]."""
    saturation: Share = 0.4
    """Saturation factor is drawn from [1 - this, 1 + this]."""
    hue: Annotated[float, Between(0, 0.5)] = 0.1
    """Hue is shifted by a share of the color circle from [-this, this]."""
    grey: Share = 0.0
    """Probability of dropping the color."""
    blur: Share = 0.0
    """Probability of Gaussian blur."""
    blur_sigma: Annotated[tuple[float, float], Between(0.01, 4, rising=True)] = (0.1, 2.0)
    """Standard deviation of the blur, in pixels up to 4, drawn uniformly from this range."""
    solarize: Share = 0.0
    """Probability of inverting all pixels of 128 or more."""
    flip: Share = 0.0
    """Probability of a horizontal flip."""

    def check(self, table: str) -> None:
        """Validate all fields; `table` is their prefix in messages, such as `augment.view1.`.

        Raises:
            UsageError: a field is out of range.
        """
        require_fields(table, self)


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """The views of an image and what they have in common."""

    size: Side = 32
    """Side of either view, in pixels."""
    interpolation: Interpolation = "bilinear"
    """How the crop is resized (antialiased)."""
    mean: Annotated[tuple[float, ...], Between(0, 1)] = (0.485, 0.456, 0.406)
    """Mean of each channel, from 0 to 1, subtracted last. Its length is the channel count."""
    std: Annotated[tuple[float, ...], Between(1e-6, 1000)] = (0.229, 0.224, 0.225)
    """Standard deviation of each channel, divided by last."""
    view1: ViewConfig = field(default_factory=ViewConfig)
    view2: ViewConfig = field(default_factory=ViewConfig)
    small_views: Annotated[int, Between(0, 64)] = 0
    """Number of additional small views of an image (multi-crop), each matched with both targets.
    Only the online branch sees them; symsimsiam, which has none, refuses them."""
    small_size: Side = 96
    """Side of a small view, in pixels."""
    small_scale: CropScale = (0.05, 0.14)
    """Area of a small view's crop as a share of the image; all else is drawn as for view1."""
    small_blur: Annotated[float, Between(-1, 1)] = -1.0
    """Probability of Gaussian blur of a small view; -1 takes view1's."""

    def __post_init__(self) -> None:
        require_fields("augment.", self)
        self.view1.check("augment.view1.")
        self.view2.check("augment.view2.")
        require(
            len(self.mean) == len(self.std) and len(self.mean) in (1, 3),
            f"augment.mean has {len(self.mean)} and augment.std {len(self.std)} channels: "
            "give 1 or 3 numbers to both",
        )
        require(
            self.small_views == 0 or self.small_size <= self.size,
            f"augment.small_size={self.small_size} is more than augment.size={self.size}: "
            "give a smaller augment.small_size",
        )
        require(
            self.small_blur == -1 or self.small_blur >= 0,
            f"augment.small_blur={self.small_blur}: give a number from 0 to 1, or -1 for view1's",
        )

    @property
    def channels(self) -> int:
        return len(self.mean)

    @property
    def views(self) -> tuple[ViewConfig, ...]:
        """How each view is drawn: both views, then the small ones."""
        blur = self.view1.blur if self.small_blur == -1 else self.small_blur
        small = replace(self.view1, crop_scale=self.small_scale, blur=blur)
        return self.view1, self.view2, *[small] * self.small_views

    @property
    def sizes(self) -> tuple[int, ...]:
        """Side of each of `views`, in pixels."""
        return self.size, self.size, *[self.small_size] * self.small_views
