"""Train a backbone: `python train.py [RECIPE] [--field value ...]`, alone or under torchrun."""

from rdm_fast.__main__ import train

if __name__ == "__main__":
    train()
