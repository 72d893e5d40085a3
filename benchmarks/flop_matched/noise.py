"""The noises of the paper's robustness study (arXiv 2412.09871, section 6.1), applied to held-out text.

All work on characters, so that text stays UTF-8, and depend on the text alone.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable

RATE = 0.1  # of characters dropped
REPEATED = 0.2  # of characters repeated, up to MOST_COPIES of each
MOST_COPIES = 4
SEED = 0  # with the text it decides which characters


def antspeak(text: str, rng: random.Random) -> str:
    """Upper case, with a space between any two characters."""
    return " ".join(text.upper())


def drop(text: str, rng: random.Random) -> str:
    """One character in ten left out; never all."""
    return "".join(c for c in text if rng.random() >= RATE) or text[:1]


def repeat(text: str, rng: random.Random) -> str:
    """One character in five written two to four times."""
    return "".join(c * rng.randint(2, MOST_COPIES) if rng.random() < REPEATED else c for c in text)


def random_case(text: str, rng: random.Random) -> str:
    """Every character in upper or in lower case, by a coin."""
    return "".join(c.upper() if rng.random() < 0.5 else c.lower() for c in text)


def upper_case(text: str, rng: random.Random) -> str:
    return text.upper()


NOISES: dict[str, Callable[[str, random.Random], str]] = {
    "antspeak": antspeak,
    "drop": drop,
    "repeat": repeat,
    "random case": random_case,
    "upper case": upper_case,
}


def noised(document: bytes, noise: str) -> bytes:
    """`document` (UTF-8) under the noise of that name; not empty unless it was.

    Raises:
        ValueError: there is no such noise.
    """
    if noise not in NOISES:
        raise ValueError(f"noised: noise: expected one of {', '.join(map(repr, NOISES))}, got {noise!r}")
    digest = hashlib.sha256(document + f"{noise} {SEED}".encode()).digest()
    return NOISES[noise](document.decode(), random.Random(digest)).encode()
