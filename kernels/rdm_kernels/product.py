def product(A, B, *, C=None, alpha=1.0, beta=0.0, precision="tf32x3"):
    out = alpha * (A @ B)
    return out if C is None else out + beta * C
