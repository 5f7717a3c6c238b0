"""A run's backbone for other programs: `rdm export RUN --to torchvision`.

`targets` names them, `write` writes the files. `rdm_fast.models.pretrained` is the way back.
"""
