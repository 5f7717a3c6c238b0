"""Who sees what: image order and augmentation, as functions of seed, epoch, index and view."""
