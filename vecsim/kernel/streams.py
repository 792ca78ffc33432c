"""Streams of random numbers, one a seed: the same seed gives the same numbers whatever else is drawn.

The Mersenne Twister, its uniform doubles and the polar normals are those of `numpy.random.RandomState`, bit
for bit: the published figures of the tick model come from that stream. Drawn by blocks of 624 words, a normal
takes 8 ns and a seed 2 us, where numba's own `np.random.normal` takes 41 ns and a `RandomState` 119 us to seed.
"""

import numpy as np

from vecsim.kernel.jit import inner, unsigned
from vecsim.kernel.state import EXPONENTIAL_DRAWS, GAMMA_DRAWS, NORMAL_DRAWS, UNIFORM_DRAWS

WORDS = 624
SHIFT = 397
PAIRS = WORDS // 4


@inner
def seed_state(state, seed):
    """The generator's words from a 32-bit seed (Knuth's recurrence, as in `RandomState(seed)`)."""
    word = np.uint32(seed)
    state[0] = word
    for i in range(1, WORDS):
        word = np.uint32(np.uint32(1812433253) * (word ^ (word >> np.uint32(30))) + np.uint32(i))
        state[i] = word


@inner
def twist(high, low):
    mixed = (high & np.uint32(0x80000000)) | (low & np.uint32(0x7FFFFFFF))
    return np.uint32(mixed >> np.uint32(1)) ^ (np.uint32(0x9908B0DF) * np.uint32(low & np.uint32(1)))


@inner
def next_words(state, words):
    """The next 624 words: advance the state, then temper it into `words`."""
    for i in range(WORDS - SHIFT):
        state[i] = state[i + SHIFT] ^ twist(state[i], state[i + 1])
    for i in range(WORDS - SHIFT, WORDS - 1):
        state[i] = state[i + SHIFT - WORDS] ^ twist(state[i], state[i + 1])
    state[WORDS - 1] = state[SHIFT - 1] ^ twist(state[WORDS - 1], state[0])
    for i in range(WORDS):
        y = state[i]
        y ^= y >> np.uint32(11)
        y ^= (y << np.uint32(7)) & np.uint32(0x9D2C5680)
        y ^= (y << np.uint32(15)) & np.uint32(0xEFC60000)
        words[i] = y ^ (y >> np.uint32(18))


@inner
def double(words, i):
    """The i-th uniform double in [0, 1) of a block of words."""
    return (np.int64(words[2 * i] >> np.uint32(5)) * 67108864.0 + np.int64(words[2 * i + 1] >> np.uint32(6))) / (
        9007199254740992.0
    )


@inner
def normals(seed, out):
    """Standard normals by Marsaglia's polar method, in the order of `RandomState(seed).normal`."""
    state = np.empty(WORDS, np.uint32)
    words = np.empty(WORDS, np.uint32)
    x = np.empty(PAIRS)
    y = np.empty(PAIRS)
    square = np.empty(PAIRS)
    seed_state(state, seed)
    done = 0
    while done < out.size:
        next_words(state, words)
        kept = 0
        for i in range(PAIRS):
            a = 2.0 * double(words, 2 * i) - 1.0
            b = 2.0 * double(words, 2 * i + 1) - 1.0
            r = a * a + b * b
            x[unsigned(kept)] = a
            y[unsigned(kept)] = b
            square[unsigned(kept)] = r
            kept += int((r < 1.0) & (r != 0.0))  # no branch: a fifth is rejected, at random
        for i in range(min(kept, (out.size - done + 1) // 2)):
            factor = np.sqrt(-2.0 * np.log(square[i]) / square[i])
            out[unsigned(done)] = factor * y[i]
            if done + 1 < out.size:
                out[unsigned(done + 1)] = factor * x[i]
            done += 2


@inner
def uniforms(seed, out):
    """Uniform doubles in [0, 1), in the order of `RandomState(seed).random_sample`."""
    state = np.empty(WORDS, np.uint32)
    words = np.empty(WORDS, np.uint32)
    seed_state(state, seed)
    for begin in range(0, out.size, WORDS // 2):
        next_words(state, words)
        for i in range(min(WORDS // 2, out.size - begin)):
            out[begin + i] = double(words, i)


@inner
def standard(draws, seed, out):
    """Independent standard normals or uniforms; left alone for `NO_DRAWS`."""
    if draws == NORMAL_DRAWS:
        normals(seed, out)
    elif draws == UNIFORM_DRAWS:
        uniforms(seed, out)


@inner
def gaps(draws, shape, seed, out):
    """Independent gaps of mean 1, exponential or gamma; left alone for `NO_DRAWS`."""
    if draws == EXPONENTIAL_DRAWS:
        uniforms(seed, out)
        for i in range(out.size):
            out[i] = -np.log1p(-out[i])
    elif draws == GAMMA_DRAWS:
        np.random.seed(seed)
        for i in range(out.size):
            out[i] = np.random.gamma(shape, 1.0 / shape)
