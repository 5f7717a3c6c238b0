"""Random views of images on the device, both views of a batch in one call."""
