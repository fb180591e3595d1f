"""Host bookkeeping of pages: names of prefixes, sharing, copy on write, what is given up first, nothing lost in a long random life."""
import random

import pytest

from llmjax.core import ConfigError
from llmjax.decode import Pages, hashes


def test_a_name_says_the_whole_prefix_and_what_else_keys_depend_on():
    ids = list(range(40))
    names = hashes(ids, 8)
    assert len(names) == len(set(names)) == 5 and hashes(ids[:39], 8) == names[:4] and hashes(ids, 8, known=names[:3]) == names
    other = hashes([*ids[:3], 99, *ids[4:]], 8)
    assert not set(other) & set(names)                                        # every later page knows of the change
    assert hashes([*ids[:12], 99, *ids[13:]], 8)[:1] == names[:1]
    kinds = [hashes(ids, 8), hashes(ids, 8, adapter="a"), hashes(ids, 8, salt="a"), hashes(ids, 8, adapter="a", salt="b"), hashes(ids, 8, adapter="b", salt="a"),
             hashes(ids, 8, adapter=""), hashes(ids, 8, adapter="a|salt 1 b"), hashes(ids, 4)]
    assert len({name for kind in kinds for name in kind}) == 7 * 5 + 10
    assert hashes([-1, 1 << 40] * 4, 8) != hashes([1, 1 << 40] * 4, 8)


def test_prefixes_are_found_shared_and_given_up():
    pages, ids = Pages(6, 4), list(range(16))
    names = hashes(ids, 4)
    first = pages.allocate(4)
    pages.commit(first, names)
    assert pages.lookup(names[:3]) == first[:3] and pages.references[first[0]] == 2 and (pages.used, pages.free) == (4, 2)
    pages.release(first)
    pages.release(first[:3])
    assert (pages.used, pages.free, len(pages.kept)) == (0, 6, 4)             # nobody's, but found
    assert pages.lookup(hashes([*ids[:8], 7, 7, 7, 7], 4)) == first[:2]
    got = pages.allocate(3)                                                   # two empty ones, then the end of the prefix, not its middle
    assert got is not None and first[3] in got and first[2] not in got and pages.evicted == 1
    assert pages.allocate(2) is None and pages.free == 1
    pages.release(first[:2])
    assert pages.lookup(names) == first[:3] and (pages.asked, pages.found) == (3 + 3 + 4, 3 + 2 + 3)


def test_copy_on_write():
    pages = Pages(3, 4)
    mine = pages.allocate(1)
    pages.share(mine)                                                         # two samples of one prompt
    fresh = pages.writable(mine[0])
    assert fresh not in (None, mine[0]) and pages.references[mine[0]] == pages.references[fresh] == 1
    assert pages.writable(mine[0]) == mine[0]
    pages.commit(mine, hashes([1, 2, 3, 4], 4))
    assert pages.writable(mine[0]) == mine[0] and not pages.lookup(hashes([1, 2, 3, 4], 4))         # what it holds changes: nobody may find it
    pages.share(mine)
    pages.allocate(1)
    assert pages.writable(mine[0]) is None and pages.references[mine[0]] == 2


def test_mistakes_are_named():
    pages = Pages(2, 4)
    got = pages.allocate(1)
    pages.release(got)
    with pytest.raises(ValueError, match="page 0 is released twice"):
        pages.release(got)
    with pytest.raises(ValueError, match="page 1 is free"):
        pages.share([1])
    with pytest.raises(ValueError, match="commit before release"):
        pages.commit([0], hashes([1, 2, 3, 4], 4))
    with pytest.raises(ConfigError, match="count=0"):
        Pages(0)


def test_a_long_life_loses_no_page():
    """Requests with common prefixes come, fork, are preempted and end. Each page's references are counted anew, and what a name finds was written under that name."""
    rng, pages, written, running = random.Random(0), Pages(24, 4), {}, []
    for _ in range(3000):
        if running and rng.random() < 0.4:
            pages.release(running.pop(rng.randrange(len(running)))[0])
        elif running and rng.random() < 0.3:
            table, names = rng.choice(running)
            pages.share(table)
            table = list(table)
            fresh = pages.writable(table[-1])
            if fresh is None:
                pages.release(table)
            else:
                written[fresh] = None
                running.append((table[:-1] + [fresh], names[:len(table) - 1]))
        else:
            ids = [rng.randrange(2)] * 4 + [rng.randrange(3)] * 4 + [rng.randrange(9) for _ in range(rng.randrange(12))]
            names = hashes(ids, 4, adapter=rng.choice((None, "x")))
            known = pages.lookup(names)
            assert all(written[page] == name for page, name in zip(known, names))
            more = pages.allocate(-(-len(ids) // 4) - len(known))
            if more is None:
                pages.release(known)
                continue
            table = known + more
            for page, name in zip(more, [*names[len(known):], None, None]):
                written[page] = name
            pages.commit(table, names)
            running.append((table, names))
        count = [0] * 24
        for table, _ in running:
            for page in table:
                count[page] += 1
        assert count == pages.references and pages.used == sum(map(bool, count)) and len(pages.empty) + len(pages.kept) == pages.free
        assert not set(pages.empty) & set(pages.kept) and set(pages.by_name.values()) == set(pages.names)
    for table, _ in running:
        pages.release(table)
    assert pages.used == 0 and pages.evicted > 50 and pages.found > 500
    pages.clear()
    assert len(pages.empty) == 24 and not pages.by_name
