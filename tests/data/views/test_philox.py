"""rdm_fast.data.views.philox against Random123's published vectors."""

import numpy as np
import pytest
from numpy.typing import NDArray

from rdm_fast.data.views.philox import philox4x32, uniforms, words

# kat_vectors of Random123: counter, key, ciphertext of philox4x32 with 10 rounds
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def parse(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers_of_random123(counter: str, key: str, expected: str) -> None:
    zeros = np.zeros(2, np.uint64)  # the answer in a batch of three, beside others
    counters = tuple(np.append(zeros, np.uint64(word)) for word in parse(counter))
    k0, k1 = parse(key)
    assert [int(word[2]) for word in philox4x32(counters, (k0, k1))] == parse(expected)


def test_every_part_of_the_counter_changes_every_word() -> None:
    def draw(
        seed: int = 1, epoch: int = 2, index: int = 3, stream: int = 1, block: int = 0
    ) -> NDArray[np.uint64]:
        drawn = words(seed, epoch, np.array([index]), stream, range(block, block + 1))
        return np.array(drawn).ravel()

    drawn = [
        draw(), draw(seed=2), draw(seed=1 + 2**32), draw(epoch=3), draw(index=4),
        draw(index=3 + 2**32), draw(stream=2), draw(block=1),
    ]  # fmt: skip
    assert len({int(word) for block in drawn for word in block}) == 4 * len(drawn)


def test_uniforms_fill_the_unit_interval_evenly() -> None:
    u = uniforms(0, 0, np.arange(5000), 1, range(3))
    assert u.shape == (5000, 12) and u.min() >= 0 and u.max() < 1
    counts = np.histogram(u, bins=100, range=(0, 1))[0]
    expected = u.size / 100
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert chi2 < 149  # 99 degrees of freedom, p = 0.001


def test_blocks_can_be_drawn_one_by_one() -> None:
    index = np.arange(7)
    one_by_one = [uniforms(9, 1, index, 2, range(block, block + 1)) for block in range(2, 5)]
    np.testing.assert_array_equal(uniforms(9, 1, index, 2, range(2, 5)), np.hstack(one_by_one))


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_that_does_not_fit_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=f"seed={seed}"):
        uniforms(seed, 0, np.arange(2), 0, range(1))
