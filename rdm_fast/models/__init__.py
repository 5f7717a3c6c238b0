"""Networks: backbones, heads, batch norm, and weights from other trainers."""
