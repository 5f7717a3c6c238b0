"""`rdm doctor`: what this machine has, where the time of a step goes, and which flag to try."""
