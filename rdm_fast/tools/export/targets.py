"""The programs that a backbone can be exported to. Nothing here imports torch."""

from typing import Literal

Target = Literal["torchvision", "timm", "safetensors", "simsiam", "solo", "hf"]

TARGETS: dict[Target, str] = {
    "torchvision": "safetensors with torchvision's names",
    "timm": "safetensors with timm's names",
    "safetensors": "backbone and projector with rdm-fast's names, any backbone",
    "simsiam": ".pth for SimSiam's main_lincls.py",
    "solo": ".ckpt for solo-learn's main_linear.py",
    "hf": "folder for the Hugging Face hub, which timm loads",
}
"""The format for each."""
