"""Philox4x32-10: random numbers as a function of where they are used.

A counter-based generator encrypts a 128-bit counter with a 64-bit key; the ciphertext is the
random number. The key is the run's seed and the counter (index, epoch, stream, block), so any
number can be drawn without those before it: checkpoints need no state, and nothing depends on how
images are spread over ranks and workers.

Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

ROUNDS = 10
MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
WEYL = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) - 1, added to the key every round
MASK = 0xFFFFFFFF
LOW, HIGH = np.uint64(MASK), np.uint64(32)  # the low word is x & LOW, the high one x >> HIGH
BLOCK_BITS = 16


def philox4x32(
    counter: tuple[Words, Words, Words, Words], key: tuple[int, int]
) -> tuple[Words, Words, Words, Words]:
    """Encrypt counters.

    Args:
        counter: four words below 2**32 each, as uint64 arrays that broadcast together.
        key: two words below 2**32.

    Returns:
        Four words below 2**32, as uint64 arrays.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        low, high = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1 = (high >> HIGH) ^ c1 ^ np.uint64(k0), high & LOW
        c2, c3 = (low >> HIGH) ^ c3 ^ np.uint64(k1), low & LOW
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def words(
    seed: int, epoch: int, index: NDArray[np.int64], stream: int, blocks: range
) -> tuple[Words, Words, Words, Words]:
    """Random 32-bit words of some images.

    Args:
        seed: of the run, below 2**64.
        epoch: below 2**32.
        index: of the images, [n], any non-negative 64-bit integers.
        stream: the purpose of the words; streams are independent.
        blocks: which blocks of four words.

    Returns:
        Four arrays [n, len(blocks)] of words, as uint64.

    Raises:
        ValueError: the seed or epoch does not fit.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed}: give a number from 0 to 2**64 - 1")
    if not 0 <= epoch < 2**32:
        raise ValueError(f"epoch {epoch} does not fit in 32 bits")
    position = index.astype(np.uint64)[:, None]
    place = np.arange(blocks.start, blocks.stop, blocks.step, dtype=np.uint64)
    place = (place | np.uint64(stream << BLOCK_BITS))[None, :]
    counter = (position & LOW, position >> HIGH, np.full((1, 1), epoch, np.uint64), place)
    return philox4x32(counter, (seed & MASK, seed >> 32))


def uniforms(
    seed: int, epoch: int, index: NDArray[np.int64], stream: int, blocks: range
) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), multiples of 2**-32; arguments as in `words`.

    Returns:
        [n, 4 * len(blocks)] float64.
    """
    drawn = np.stack(words(seed, epoch, index, stream, blocks), axis=-1)  # [n, blocks, 4]
    return drawn.reshape(len(index), -1).astype(np.float64) * 2.0**-32
