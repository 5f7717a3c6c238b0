"""rdm_fast.data.views.philox against Random123's published vectors."""

import numpy as np
import pytest
from scipy.stats import chisquare

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
    plain = {"seed": 1, "epoch": 2, "index": 3, "stream": 1, "block": 0}
    high = {"seed": 1 + 2**32, "index": 3 + 2**32}
    changes = [{}, *({name: plain[name] + 1} for name in plain), *({n: high[n]} for n in high)]
    drawn: set[int] = set()
    for change in changes:
        seed, epoch, index, stream, block = (plain | change).values()
        found = words(seed, epoch, np.array([index]), stream, range(block, block + 1))
        drawn |= {int(word) for word in np.ravel(found)}
    assert len(drawn) == 4 * len(changes) == 32


def test_uniforms_fill_the_unit_interval_evenly() -> None:
    u = uniforms(0, 0, np.arange(5000), 1, range(3))
    assert u.shape == (5000, 12) and u.min() >= 0 and u.max() < 1
    assert chisquare(np.histogram(u, bins=100, range=(0, 1))[0]).pvalue > 0.001


def test_blocks_can_be_drawn_one_by_one() -> None:
    index = np.arange(7)
    one_by_one = [uniforms(9, 1, index, 2, range(block, block + 1)) for block in range(2, 5)]
    np.testing.assert_array_equal(uniforms(9, 1, index, 2, range(2, 5)), np.hstack(one_by_one))


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_that_does_not_fit_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=f"seed={seed}"):
        uniforms(seed, 0, np.arange(2), 0, range(1))
