"""Random numbers that privacy rests on: a cryptographic keystream, whose key is the system's, or on request a seed's.

Noise and sampling each have a source of their own. The secure key is fresh in every process, forked ones too, and never stored; a
seeded key belongs to the plan and the charged step, so that no noise is ever added to two different sums of a training.
"""

from __future__ import annotations

import hashlib
import math
import os
import weakref
from typing import Protocol

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

_BLOCK = 2**16
_FEW = 2**32
"""Whole numbers below this one have fewer than 32 digits."""


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


_secure: weakref.WeakSet[SecureSource] = weakref.WeakSet()


def _renew_in_child() -> None:
    """A forked process has a copy of every key: with it, it would add its parent's noise to sums of its own."""
    for source in list(_secure):
        source.renew()


os.register_at_fork(after_in_child=_renew_in_child)


class SecureSource:
    """AES-256 in counter mode (the `cryptography` package), keyed by the operating system.

    Guarantee: the numbers are indistinguishable from uniform for anyone without the key, which never leaves this object.
    """

    def __init__(self) -> None:
        self.renew()
        _secure.add(self)

    def renew(self) -> None:
        """Take a new key."""
        self._begin(os.urandom(32), os.urandom(16))

    def _begin(self, key: bytes, nonce: bytes) -> None:
        self._stream = Cipher(algorithms.AES256(key), modes.CTR(nonce)).encryptor()
        self._scratch: _Scratch | None = None

    def at(self, step: int) -> Source:
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
        # Box-Muller in double precision, with a direction of 63 bits and a radius of as many digits as a double has: a normal
        # number lies on no lattice that is coarser than doubles are (`noise` rounds its sum to a much coarser one).
        self._scratch = self._scratch or _Scratch()
        count = out.numel()
        pairs = (count + 1) // 2
        words = self._scratch.words
        self._stream.update_into(self._scratch.zeros[: 16 * pairs], self._scratch.raw)
        radius = self._minus_twice_log(words[:pairs]).sqrt_()
        angle = words[pairs : 2 * pairs].to(torch.float64).mul_(math.pi * 2.0**-63)
        rest = count - pairs
        torch.mul(angle.cos(), radius, out=out[:pairs])
        torch.mul(angle[:rest].sin_(), radius[:rest], out=out[pairs:])
        return out

    def _minus_twice_log(self, words: Tensor) -> Tensor:
        """-2 log u of u uniform on (0, 1], from words of 64 random bits."""
        assert self._scratch is not None
        whole = torch.bitwise_and(words, 2**63 - 1, out=words)
        uniform = self._scratch.uniform[: len(words)].copy_(whole).add_(0.5)
        if int(whole.min()) < _FEW:
            # Far tails, once in 2^31 numbers: there are too few whole numbers so near to zero. They get digits behind the point.
            few = (whole < _FEW).nonzero().flatten()
            uniform[few] = whole[few] + self._uniforms(len(few)) + 2.0**-54
        return uniform.mul_(2.0**-63).log_().mul_(-2)

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


class SeededSource(SecureSource):
    """The same keystream with a key of its own for each (seed, plan, purpose, charged step): reproducible.

    plan: the digest of the plan, so that two plans with one seed have nothing in common.

    Guarantee: only while the seed stays secret and serves no other training of the same plan; the certificate says so.
    """

    def __init__(self, seed: int, purpose: str, plan: str = "", step: int = 0) -> None:
        self._seed, self._purpose, self._plan = seed, purpose, plan
        self._begin(hashlib.sha256(f"{plan}:{purpose}:{seed}:{step}".encode()).digest(), bytes(16))

    def at(self, step: int) -> SeededSource:
        return SeededSource(self._seed, self._purpose, self._plan, step)


def _order(source: Source, count: int) -> Tensor:
    # Sorted by independent keys. Where two keys are equal, all are drawn again: every order is then equally likely.
    while True:
        keys, order = source.integers(count, 2**53).sort()
        if not bool((keys[1:] == keys[:-1]).any()):
            return order


def _below(words: Tensor, probability: float) -> Tensor:
    # Rounded down: a unit is sampled with at most the probability that is accounted for.
    return words < math.floor(probability * 2**53)


def source(seed: int | None, purpose: str, plan: str) -> Source:
    """A secure source, or where a seed is given a seeded one, of the plan with that digest."""
    return SecureSource() if seed is None else SeededSource(seed, purpose, plan)
