"""Near-duplicates by MinHash (Broder 1997) and banded hashing, in 500 bytes per text.

Texts are sets of word 3-grams; the share of equal minimum hashes estimates their Jaccard similarity
|A ∩ B| / |A ∪ B|. What most texts begin or end with, such as an instruction, must not make them
alike: 3-grams that more than a tenth of the texts have do not count.
"""

import re
from zlib import crc32

import numpy as np
import numpy.typing as npt

SIMILAR = 0.8  # Jaccard similarity from which two texts are near-duplicates
WORDS = 3  # per shingle
# two texts of similarity 0.8 share a band with probability 1 - (1 - 0.8⁵)²⁵ = 99.995 %
BANDS, ROWS = 25, 5
# texts with an equal band that a text is compared with: bounds the time where thousands have it
NEIGHBOURS = 8
BUCKETS = 2**22  # of the counts of shingles
# a shingle counts up to this share of the texts, and up to so many texts in any case
COMMON, FEWEST = 0.1, 10
CHUNK = 2**14  # shingles hashed at a time
# of scripts without spaces each character is a word
WORD = re.compile(r"[\u2e80-\U0010ffff]|[^\W\u2e80-\U0010ffff]+")

Hashes = npt.NDArray[np.uint64]


def words(text: str) -> list[str]:
    """In lower case, without punctuation."""
    return WORD.findall(text.casefold())


def shingles(text: str) -> Hashes:
    """The distinct hashes of runs of WORDS words. A shorter text is one run; without words none."""
    codes = np.fromiter((crc32(word.encode(errors="replace")) for word in words(text)), np.uint64)
    size = max(1, len(codes) - WORDS + 1) if len(codes) else 0
    mixed = np.zeros(size, np.uint64)
    for offset in range(min(WORDS, len(codes))):
        mixed = _mix(mixed + codes[offset : offset + size])
    return np.unique(mixed)


def _mix(values: Hashes) -> Hashes:
    """SplitMix64's finalizer."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class ShingleCounts:
    """In how many texts each shingle is: never too few, rarely too many."""

    def __init__(self) -> None:
        self._counts = np.zeros(BUCKETS, np.uint32)
        self._texts = 0

    def add(self, of_text: Hashes) -> None:
        self._counts[np.unique(of_text % np.uint64(BUCKETS))] += 1
        self._texts += 1

    def distinctive(self, of_text: Hashes) -> Hashes:
        """Those that are not in many texts; all where no other is left."""
        most = max(FEWEST, COMMON * self._texts)
        rare = of_text[self._counts[of_text % np.uint64(BUCKETS)] <= most]
        return rare if len(rare) else of_text


class MinHashes:
    """Signatures of texts, in their order."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self._seeds = random.integers(0, 2**63, BANDS * ROWS, np.uint64)
        self._signatures = bytearray()

    def add(self, of_text: Hashes) -> None:
        least = np.full(len(self._seeds), np.iinfo(np.uint64).max, np.uint64)
        for start in range(0, len(of_text), CHUNK):
            hashed = _mix(of_text[start : start + CHUNK, None] ^ self._seeds)  # (shingles, hashes)
            least = np.minimum(least, hashed.min(axis=0))
        self._signatures += (least >> np.uint64(32)).astype(np.uint32).tobytes()

    def earlier_ones(self) -> dict[int, int]:
        """Index of each text that is nearly an earlier one → the earliest of these."""
        signatures = np.frombuffer(self._signatures, np.uint32).reshape(-1, BANDS * ROWS)
        earlier: dict[int, int] = {}
        for band in range(BANDS):
            keys = _keys(signatures[:, band * ROWS : (band + 1) * ROWS])
            # equal keys together, each in the order of the texts
            order = np.argsort(keys, kind="stable")
            for offset in range(1, NEIGHBOURS + 1):
                first, second = order[:-offset], order[offset:]
                same = keys[first] == keys[second]
                _add_similar(earlier, signatures, first[same], second[same])
        return earlier


def _keys(band: npt.NDArray[np.uint32]) -> Hashes:
    keys = np.zeros(len(band), np.uint64)
    for column in band.T:
        keys = _mix(keys + column)
    return keys


def _add_similar(
    earlier: dict[int, int],
    signatures: npt.NDArray[np.uint32],
    first: npt.NDArray[np.int64],
    second: npt.NDArray[np.int64],
) -> None:
    pairs = np.stack([first, second], axis=1)
    for part in np.array_split(pairs, len(pairs) // CHUNK + 1):
        alike = (signatures[part[:, 0]] == signatures[part[:, 1]]).mean(axis=1) >= SIMILAR
        for text, duplicate in part[alike].tolist():
            earlier[duplicate] = min(text, earlier.get(duplicate, text))
