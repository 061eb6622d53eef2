"""The cache knows its bytes, and drops what was used least recently."""

from dataclasses import dataclass

from pal.serve.lru import ByteLRU


@dataclass(frozen=True)
class Value:
    nbytes: int = 1


def test_what_was_used_least_recently_is_dropped():
    cache = ByteLRU(3)
    for key in "abc":
        cache.put(key, Value())
    assert cache.get("a", Value) is not None
    cache.put("d", Value())
    assert {key for key in "abcd" if cache.get(key, Value) is not None} == {"a", "c", "d"}


def test_a_value_that_is_kept_again_counts_once():
    cache = ByteLRU(3)
    for nbytes in (2, 1, 1, 1):
        cache.put("a", Value(nbytes))
    assert (cache.nbytes, len(cache)) == (1, 1)
    cache.put("b", Value(2))
    assert cache.get("a", Value) is not None
    cache.put("a", Value(4))  # larger than the cache
    assert cache.get("a", Value) is None and cache.nbytes == 2
