"""Near-duplicates by MinHash against the exact Jaccard similarity."""

import random

import numpy as np

from pipeline.data.quality.near_duplicates import SIMILAR, MinHashes, ShingleCounts, shingles

WORDS = [f"word{n}" for n in range(5000)]


def similarity(one: str, other: str) -> float:
    a, b = (set(shingles(text).tolist()) for text in (one, other))
    return len(a & b) / len(a | b)


def earlier(*texts: str) -> dict[int, int]:
    hashes, counts = MinHashes(), ShingleCounts()
    sets = [shingles(text) for text in texts]
    for each in sets:
        counts.add(each)
    for each in sets:
        hashes.add(counts.distinctive(each))
    return hashes.earlier_ones()


def test_pairs_far_above_the_threshold_are_found_and_pairs_far_below_are_not() -> None:
    chance = random.Random(0)
    texts, expected = list[str](), dict[int, bool]()
    for changed in (1, 2, 40, 60):
        for _ in range(20):
            words = chance.choices(WORDS, k=120)
            other = list(words)
            for place in range(0, 120, 120 // changed):
                other[place] = "other"
            texts += [" ".join(words), " ".join(other)]
            expected[len(texts) - 1] = similarity(*texts[-2:]) > SIMILAR
    found = earlier(*texts)
    assert set(expected.values()) == {True, False}
    assert found == {n: n - 1 for n, is_near in expected.items() if is_near}


def test_the_estimate_is_the_jaccard_similarity() -> None:
    words = random.Random(1).choices(WORDS, k=400)
    one, other = " ".join(words), " ".join(words[100:] + words[:50])
    hashes = MinHashes()
    for text in (one, other):
        hashes.add(shingles(text))
    first, second = np.frombuffer(hashes._signatures, np.uint32).reshape(2, -1)
    assert abs((first == second).mean() - similarity(one, other)) < 0.15


def test_case_and_punctuation_do_not_count_and_short_texts_are_whole() -> None:
    assert earlier("The euro is new!", "the  EURO is new", "Yes.", "yes", "No") == {1: 0, 3: 2}
    assert earlier("これは新しい本です", "これは新しい本です。", "それは古い車でした") == {1: 0}


def test_what_most_texts_share_does_not_make_them_alike() -> None:
    instruction = " ".join(WORDS[:300])
    texts = [f"{instruction} {' '.join(WORDS[300 + 9 * n : 309 + 9 * n])}" for n in range(50)]
    assert earlier(*texts) == {} and earlier(*texts, texts[7]) == {50: 7}


def test_thousands_of_equal_texts_take_no_quadratic_time() -> None:
    assert earlier(*["the same text again and again"] * 3000).keys() == set(range(1, 3000))


def test_a_text_longer_than_a_chunk_is_hashed_as_a_whole() -> None:
    text = " ".join(f"{n}" for n in range(40_000))
    assert earlier(text, f"{text} and more") == {1: 0}
