"""Random numbers that privacy rests on: a cryptographic keystream by default, a seeded generator on request.

Noise and sampling each have a source of their own. The secure key is fresh at every process start and never stored; a
seeded source is indexed by the charged step, so that no noise is ever added to two different sums.
"""

from __future__ import annotations

import hashlib
import math
import os
from typing import Protocol

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

_BLOCK = 2**16


class Source(Protocol):
    """Independent random numbers for one purpose."""

    def at(self, step: int) -> Source:
        """The source for charged step `step`: the same one, or for a seeded source the stream of that step."""
        ...

    def normal_(self, out: Tensor) -> Tensor:
        """Fill a float tensor with independent standard normals."""
        ...

    def coins(self, count: int, probability: float) -> Tensor:
        """[count] booleans, each true with at most (and within 2^-53 of) the given probability."""
        ...

    def integers(self, count: int, high: int) -> Tensor:
        """[count] int64, uniform on 0..high-1."""
        ...

    def permutation(self, count: int) -> Tensor:
        """[count] int64: a uniformly random order of 0..count-1."""
        ...


class SecureSource:
    """AES-256 in counter mode (the `cryptography` package), keyed by the operating system.

    Guarantee: the numbers are indistinguishable from uniform for anyone without the key, which never leaves this object.
    """

    def __init__(self) -> None:
        cipher = Cipher(algorithms.AES256(os.urandom(32)), modes.CTR(os.urandom(16)))
        self._stream = cipher.encryptor()
        self._scratch: _Scratch | None = None

    def at(self, step: int) -> SecureSource:
        return self

    def normal_(self, out: Tensor) -> Tensor:
        # In blocks: the numbers on the way stay in the cache, and take no memory of the size of a model.
        flat = out.view(-1)
        for first in range(0, flat.numel(), _BLOCK):
            part = flat[first : first + _BLOCK]
            if part.is_cpu:
                self._fill(part)
            else:
                part.copy_(self._fill(torch.empty(len(part), dtype=part.dtype)))
        return out

    def _fill(self, out: Tensor) -> Tensor:
        # Box-Muller. The logarithm is always of 53 bits and in double precision: tails reach 8.5 sigma. What follows is as wide
        # as `out`: in single precision it moves a number by 4e-7 of the radius at most, as rounding the noised sum does.
        self._scratch = self._scratch or _Scratch()
        narrow = out.dtype != torch.float64
        count = out.numel()
        pairs = (count + 1) // 2
        words, halves = self._scratch.words, self._scratch.words.view(torch.int32)
        self._stream.update_into(self._scratch.zeros[: (12 if narrow else 16) * pairs], self._scratch.raw)
        # A word is within [-2^63, 2^63], so that this is within [2^-53, 1], and exactly that after rounding.
        uniform = self._scratch.uniform[:pairs].copy_(words[:pairs]).mul_(2.0**-64).add_(0.5 + 2.0**-53)
        squared = uniform.log_().mul_(-2)
        radius = squared.float().sqrt_() if narrow else squared.sqrt_()
        angle = (halves[2 * pairs : 3 * pairs] if narrow else words[pairs : 2 * pairs]).to(radius.dtype)
        angle.mul_(math.pi * (2.0**-31 if narrow else 2.0**-63))
        rest = count - pairs
        torch.mul(angle.cos(), radius, out=out[:pairs])
        torch.mul(angle[:rest].sin_(), radius[:rest], out=out[pairs:])
        return out

    def coins(self, count: int, probability: float) -> Tensor:
        return _below(self._words(count), probability)

    def integers(self, count: int, high: int) -> Tensor:
        # Rejection: words above the largest multiple of `high` are drawn again, so that every value is equally likely.
        limit = (2**53 // high) * high
        found = torch.empty(0, dtype=torch.int64)
        while len(found) < count:
            words = self._words(count)
            found = torch.cat([found, words[words < limit] % high])
        return found[:count]

    def permutation(self, count: int) -> Tensor:
        return _order(self, count)

    def _words(self, count: int) -> Tensor:
        """[count] int64, uniform on 0..2^53-1."""
        if count == 0:
            return torch.empty(0, dtype=torch.int64)
        raw = bytearray(self._stream.update(bytes(8 * count)))
        return torch.frombuffer(raw, dtype=torch.int64) >> 11 & (2**53 - 1)

    def _uniforms(self, count: int) -> Tensor:
        """[count] float64, uniform on the multiples of 2^-53 in [0, 1)."""
        return self._words(count).to(torch.float64).mul_(2.0**-53)


class _Scratch:
    """Memory for a block of normals, used again and again. The first words are for radii, the others for angles."""

    def __init__(self) -> None:
        self.zeros = memoryview(bytes(8 * _BLOCK))
        self.raw = bytearray(8 * _BLOCK + 15)  # the cipher asks for room for one block more
        self.words = torch.frombuffer(self.raw, dtype=torch.int64, count=_BLOCK)
        self.uniform = torch.empty(_BLOCK // 2, dtype=torch.float64)


class SeededSource:
    """torch's generator, one stream for each (seed, purpose, charged step): fast and reproducible.

    Guarantee: only while the seed stays secret; the certificate says so.
    """

    def __init__(self, seed: int, purpose: str, step: int = 0) -> None:
        self._seed = seed
        self._purpose = purpose
        mixed = hashlib.sha256(f"{purpose}:{seed}:{step}".encode()).digest()
        self._generator = torch.Generator().manual_seed(int.from_bytes(mixed[:8], "little", signed=True))

    def at(self, step: int) -> SeededSource:
        return SeededSource(self._seed, self._purpose, step)

    def normal_(self, out: Tensor) -> Tensor:
        return out.copy_(torch.randn(out.numel(), generator=self._generator))

    def coins(self, count: int, probability: float) -> Tensor:
        return _below(torch.randint(2**53, (count,), generator=self._generator), probability)

    def integers(self, count: int, high: int) -> Tensor:
        return torch.randint(high, (count,), generator=self._generator)

    def permutation(self, count: int) -> Tensor:
        return _order(self, count)


def _order(source: Source, count: int) -> Tensor:
    # Sorted by independent keys. Where two keys are equal, all are drawn again: every order is then equally likely.
    while True:
        keys, order = source.integers(count, 2**53).sort()
        if not bool((keys[1:] == keys[:-1]).any()):
            return order


def _below(words: Tensor, probability: float) -> Tensor:
    # Rounded down: a unit is sampled with at most the probability that is accounted for.
    return words < math.floor(probability * 2**53)


def source(seed: int | None, purpose: str) -> Source:
    """A secure source, or where a seed is given a seeded one."""
    return SecureSource() if seed is None else SeededSource(seed, purpose)
