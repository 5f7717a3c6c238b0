"""Training: the loop and its state, one optimizer step in its forms, and a supervised run."""
