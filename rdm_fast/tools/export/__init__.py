"""A run's backbone for other programs: `rdm export RUN --to torchvision`.

`targets` lists the programs, `write` writes the files. `rdm_fast.models.pretrained` reads them.
"""
