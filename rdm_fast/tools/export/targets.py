"""For whom a backbone can be exported. Nothing here imports torch."""

from typing import Literal

Target = Literal["torchvision", "timm", "safetensors", "simsiam", "solo", "hf"]

TARGETS: dict[Target, str] = {
    "torchvision": "safetensors with torchvision's names",
    "timm": "safetensors with timm's names",
    "safetensors": "backbone and projector with the names they have here, any backbone",
    "simsiam": ".pth as SimSiam's main_lincls.py reads it",
    "solo": ".ckpt as solo-learn's main_linear.py reads it",
    "hf": "folder for the Hugging Face hub, which timm loads",
}
"""What is written for each."""
