"""The CUDA search, executed from the PTX that nvcc makes of it: the canonical answer, bit for bit, in one launch."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from cuda_tests import harness
from cuda_tests.harness import SCANS, search
from ptxsim import Session, machine

from unike_kernels import ops
from unike_kernels.ops.cosine_topk import cpu

pytestmark = pytest.mark.skipif(not harness.can_compile(), reason="nvcc is not installed: it compiles the kernels")


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


SCHEDULES = ("lockstep", "reversed", *(f"random:{seed}" for seed in range(3)))
USUAL = ("lockstep", "random:0")
# Both kernels in a few orders, the one of few queries with every scan; all orders of all in the slow tests.
ORDERS = [
    (
        pytest.param
        if schedule in USUAL and (m == 2 or scan == "int8") and (scan == "int8" or schedule == "random:0")
        else slow
    )(scan, m, schedule)
    for scan in SCANS
    for m in (2, 10)
    for schedule in SCHEDULES
]
each_scan = pytest.mark.parametrize("scan", SCANS)


def unit(x: torch.Tensor) -> torch.Tensor:
    return cpu.normalize_rows(x)


def check(queries, rows, k, scan="float32", *, schedule="lockstep", ranges=None, **given):
    """Ids and scores are those of the CPU, to the bit; then what else there is to look at."""
    found = search(Session(schedule), queries, rows, k, scan=scan, ranges=ranges, **given)
    scores, ids = ops.cosine_topk(queries, rows, k, normalized=True, ranges=ranges)
    assert torch.equal(found.ids, ids)
    assert torch.equal(found.scores.view(torch.int32), scores.view(torch.int32))
    return found


# One key, tiles of 64 and of 128 and their neighbours, more blocks than tiles, columns that fill no slab; one query,
# eight, the first that are many, more than half a tile of them, and two tiles.
@each_scan
@pytest.mark.parametrize(
    ("n", "d", "m", "k", "device"),
    [
        (1, 1, 1, 1, (1, 1)),
        slow(63, 17, 1, 5, (2, 1)),
        (65, 64, 8, 3, (1, 1)),
        (200, 130, 3, 7, (3, 2)),
        slow(129, 33, 9, 5, (1, 1)),
        (260, 70, 17, 4, (2, 1)),
        slow(140, 18, 64, 3, (2, 1)),
        (140, 18, 66, 3, (2, 1)),
        slow(100, 40, 145, 3, (4, 1)),
    ],
)
def test_the_canonical_answer(n, d, m, k, device, scan):
    found = check(torch.randn(m, d), unit(torch.randn(n, d)), k, scan, device=device)
    assert found.shape["many"] == (m > 8)


@pytest.mark.parametrize(("scan", "m", "schedule"), ORDERS)
def test_the_same_in_any_order_of_blocks_and_warps(scan, m, schedule):
    """Ties and duplicates: what is first decides nothing."""
    rows = unit(torch.randint(-2, 3, (50, 5)).float().repeat(3, 1))
    check(torch.randint(-2, 3, (m, 5)).float(), rows, 9, scan, schedule=schedule, device=(3, 1))


@each_scan
def test_all_keys_equal(scan):
    check(torch.randn(2, 20), unit(torch.ones(150, 20)), 7, scan, device=(2, 1))


@each_scan
def test_zero_rows_and_queries_that_are_not_finite(scan):
    rows = torch.randn(90, 24)
    rows[::7] = 0
    queries = torch.randn(5, 24)
    queries[1], queries[2, 3], queries[3, 0] = 0, torch.nan, torch.inf
    found = check(queries, unit(rows), 6, scan, device=(2, 1))
    assert (found.ids[2:4] == -1).all()


@each_scan
@pytest.mark.parametrize(("n", "k"), [(3, 5), (40, 64), slow(150, 300)])
def test_fewer_keys_than_are_wanted(n, k, scan):
    found = check(torch.randn(3, 24), unit(torch.randn(n, 24)), k, scan, device=(2, 1))
    assert (found.ids[:, n:] == -1).all()
    assert (found.scores[:, n:] == -torch.inf).all()


@pytest.mark.slow
def test_thousands_of_results():
    check(torch.randn(1, 8), unit(torch.randn(2100, 8)), 2048, "int8", device=(3, 1))


def test_no_keys():
    check(torch.randn(3, 24), torch.empty(0, 24), 2, device=(2, 1))


@each_scan
def test_each_query_in_a_range_of_its_own(scan):
    ranges = torch.tensor([[0, 150], [10, 10], [149, 150], [20, 90]])
    check(torch.randn(4, 24), unit(torch.randn(150, 24)), 5, scan, ranges=ranges, device=(2, 1))


def test_a_range_outside_the_keys_gives_nan_and_no_id():
    """It cannot be an error of the call, which the device would have to be waited for."""
    ranges = torch.tensor([[0, 30], [20, 31], [-1, 5], [9, 3]])
    session, rows = Session(), unit(torch.randn(30, 24))
    found = search(session, torch.randn(4, 24), rows, 3, ranges=ranges, device=(2, 1))
    assert (found.ids[0] >= 0).all()
    assert (found.ids[1:] == -1).all()
    assert found.scores[1:].isnan().all()


EMPTY = [0, 0]


@pytest.mark.parametrize("scan", ["int8", slow("float32"), slow("float16")])
@pytest.mark.parametrize(
    ("ranges", "read"),
    [
        pytest.param([EMPTY, [300, 300], [9, 3]], 0, id="nothing is seen"),
        pytest.param([[300, 300], [137, 138]], 1, id="one key"),
        pytest.param([[299, 300]] * 3, 1, id="the last key"),
        pytest.param([[64, 128]] * 2, 64, id="a tile"),
        pytest.param([[65, 128], [63, 64]], 65, id="beside tiles"),
        pytest.param([[250, 260], [3, 9]], 16, id="on both sides of a hole"),
        pytest.param([[-5, 40], [100, 130], [10, 301], [110, 140]], 40, id="some are no ranges"),
        pytest.param([EMPTY] * 17 + [[100, 164]] + [EMPTY] * 31 + [[163, 165]], 65, id="two of many"),
        pytest.param([EMPTY] * 128 + [[290, 300], EMPTY], 10, id="the second tile of queries"),
    ],
)
def test_keys_that_nobody_may_see_are_not_read(scan, ranges, read):
    """Blocks share what lies between the first and the last key that a query of theirs may see, and read of their parts
    no more than what lies there. Nor are queries read that see nothing."""
    n, d, k = 300, 64, 5
    queries, rows, given = torch.randn(len(ranges), d), unit(torch.randn(n, d)), torch.tensor(ranges)
    valid = (given >= 0).all(1) & (given <= n).all(1) & (given[:, 0] <= given[:, 1])
    ranges = torch.where(valid[:, None], given, 0)
    found = search(Session(), queries, rows, k, scan=scan, ranges=given, device=(4, 1))
    scores, ids = ops.cosine_topk(queries, rows, k, normalized=True, ranges=ranges)
    assert torch.equal(found.ids, ids)
    assert torch.equal(found.scores[valid].view(torch.int32), scores[valid].view(torch.int32))
    assert found.scores[~valid].isnan().all()
    loads, see = found.launch.loads, ranges[:, 0] < ranges[:, 1]
    bytes_of = {name: loads[name].bytes if name in loads else 0 for name in ("rows", "codes", "workspace.units")}
    if scan == "float32":
        assert bytes_of["rows"] - bytes_of["workspace.units"] == read * d * 4
    else:
        assert bytes_of["codes"] == read * d * (1 if scan == "int8" else 2)
        assert bytes_of["rows"] == bytes_of["workspace.units"]
    sectors = loads["queries"].unique_sectors if "queries" in loads else 0
    assert sectors == see.sum() * d * 4 / 32
    assert ("workspace.codes" in loads) == (read > 0)


def test_blocks_share_what_is_seen():
    """And nothing that only lies where an empty range does."""
    ranges = torch.tensor([[150, 154], [299, 299]])
    found = check(torch.randn(2, 64), unit(torch.randn(300, 64)), 5, ranges=ranges, device=(4, 1))
    assert found.parts["counts"].view(np.int32).tolist() == [1] * 4 + [0] * 4  # of candidates, which these are all


def test_a_block_without_keys_waits_for_those_that_have_some(monkeypatch):
    """Where it did not, the last one would have to write all results once more."""
    looks, special = Counter[machine.Block](), machine.Block.special

    def slow_clock(block: machine.Block, name: str) -> int:
        """A millisecond has passed whenever a block that has arrived looks again."""
        if name != "%globaltimer":
            return special(block, name)
        looks[block] += 1
        return max(looks[block] - 2, 0) * 1_000_000

    monkeypatch.setattr(machine.Block, "special", slow_clock)
    rows = torch.empty(300 * 2**16).as_strided((300, 24), (2**16, 1))  # many bytes, few columns
    rows.copy_(unit(torch.randn(300, 24)))
    found = check(torch.randn(2, 24), rows, 5, ranges=torch.tensor([[0, 150], [299, 300]]), device=(4, 1))
    assert found.launch.stores["ids"].bytes == found.ids.nbytes


def test_bfloat16_queries_and_rows_that_are_far_apart():
    far = torch.empty(3 * 2**30).as_strided((40, 24), (2**26 + 8, 1))  # offsets have 64 bits
    far.copy_(unit(torch.randn(40, 24)))
    check(torch.randn(3, 24).bfloat16(), far, 5, device=(2, 1))


@pytest.mark.parametrize("scan", ["float32", slow("float16"), slow("bfloat16"), "int8"])
def test_candidates_that_do_not_fit_are_resolved_on_the_way(scan):
    """Keys so much alike that no bound tells them apart: each block's list overflows, several times."""
    base = torch.randn(24)
    rows = unit(base + 1e-5 * torch.randn(700, 24))
    found = check(torch.cat([base[None], torch.randn(1, 24)]), rows, 3, scan, device=(1, 1))
    assert found.shape["capacity"] < 700 // found.shape["groups"]


@pytest.mark.parametrize(
    ("m", "n", "d", "resident", "ranges"),
    [
        (3, 300, 24, 2, None),
        (3, 300, 24, 2, [[280, 300], EMPTY, [10, 20]]),
        slow(130, 40, 4, 2, None),
        slow(130, 40, 4, 2, [EMPTY] * 129 + [[7, 9]]),
    ],
)
def test_a_block_that_others_do_not_wait_for(m, n, d, resident, ranges):
    """More blocks than fit at once: those that run give up on the others, and the last one finishes for all."""
    session = Session("reversed")
    session.resident = resident
    rows, queries = unit(torch.randn(n, d)), torch.randn(m, d)
    ranges = None if ranges is None else torch.tensor(ranges)
    found = search(session, queries, rows, 5, ranges=ranges, device=(4, 1))
    scores, ids = ops.cosine_topk(queries, rows, 5, normalized=True, ranges=ranges)
    assert found.shape["blocks"] > resident
    assert torch.equal(found.ids, ids)
    assert torch.equal(found.scores, scores)


@each_scan
def test_values_of_the_keys_that_were_found(scan):
    for dtype, width in ((torch.float32, 12), (torch.bfloat16, 5)):
        values = torch.randn(100, width).to(dtype)
        found = check(torch.randn(2, 24), unit(torch.randn(100, 24)), 4, scan, values=values, device=(2, 1))
        assert torch.equal(found.gathered, values[found.ids])
    found = check(torch.randn(2, 24), unit(torch.randn(3, 24)), 5, scan, values=torch.randn(3, 4), device=(1, 1))
    assert not found.gathered[:, 3:].any()


def test_without_rows_the_codes_decide():
    """The scores are near those of the rows, and not theirs; codes in another order are keys in another order."""
    rows, queries, order = unit(torch.randn(60, 24)), torch.randn(2, 24), torch.randperm(60)
    packed = ops.pack_keys(rows, "int8")
    moved = packed._replace(codes=packed.codes[order], error_bounds=packed.error_bounds[order])
    one, other = (
        search(Session(), queries, rows, 4, scan="int8", packed=keys, exact=False, device=(2, 1))
        for keys in (packed, moved)
    )
    assert torch.equal(order[other.ids], one.ids) and torch.equal(other.scores, one.scores)
    exact = torch.gather(unit(queries) @ rows.T, 1, one.ids)
    assert not torch.equal(one.scores, exact)
    torch.testing.assert_close(one.scores, exact, rtol=0, atol=0.01)
    best = ops.cosine_topk(queries, rows, 4, normalized=True)[0]
    torch.testing.assert_close(one.scores, best, rtol=0, atol=0.01)


def test_the_state_is_right_for_the_next_launch():
    state = None
    for n, m, ranges in ((150, 2, None), (90, 20, None), (200, 2, torch.tensor([EMPTY, [3, 4]])), (300, 1, None)):
        rows = unit(torch.randn(n, 24))
        found = check(torch.randn(m, 24), rows, 5, "int8", ranges=ranges, device=(2, 1), state=state)
        state = found.state
        assert not state.view(np.int32)[[0, 1, 2, 3, 5]].any()  # all but how often blocks have met


class Recording(Session):
    """Keeps what it launches last."""

    def launch(self, *args, **kwargs):
        self.again = lambda: super(Recording, self).launch(*args, **kwargs)
        return self.again()


@pytest.mark.parametrize("m", [2, 10])
def test_a_recorded_launch_is_executed_again(m):
    """As a graph replays it: other queries in the same memory, a state that nothing zeroes, a workspace of anything."""
    session, rows, queries = Recording("random:0"), unit(torch.randn(150, 24)), torch.randn(m, 24)
    found = search(session, queries, rows, 5, scan="int8", device=(3, 1))
    before = found.ids.clone()
    for _ in range(3):
        queries.copy_(torch.randn(m, 24))
        for written in (*found.parts.values(), found.scores, found.ids):
            session.poison(written)
        session.again()
        scores, ids = ops.cosine_topk(queries, rows, 5, normalized=True)
        assert torch.equal(found.ids, ids) and torch.equal(found.scores, scores)
    assert not torch.equal(found.ids, before)


@pytest.mark.parametrize(("scan", "size"), [("float32", 4), ("float16", 2), ("int8", 1)])
@pytest.mark.parametrize(("m", "most"), [(1, 1.02), slow(8, 1.02), (16, 1.05), slow(64, 1.05)])
def test_keys_are_read_once(scan, size, m, most):
    n, d = 512, 256
    found = check(torch.randn(m, d), unit(torch.randn(n, d)), 5, scan, device=(4, 1))
    loads = found.launch.loads
    rescored = loads["workspace.units"].bytes  # which are read for nothing else
    assert rescored <= 32 * m * d * 4  # of few keys
    if scan == "float32":
        assert loads["rows"].bytes - rescored == n * d * 4
        assert loads["rows"].sectors <= most * (n * d * 4 + rescored) / 32 + 32 * m
    else:
        assert loads["rows"].bytes == rescored
        assert loads["codes"].sectors <= most * n * d * size / 32


def test_as_many_blocks_as_multiprocessors():
    """At the size of the paper's memory on an H100."""
    shape = harness.shape_of(n=15_000, d=4096, m=1, k=40, scan="int8", device=(132, 2))
    assert shape["blocks"] >= 132


@pytest.mark.parametrize(("m", "d"), [(1, 8232), (2, 2101), (10, 1028), slow(10, 601)])
def test_rows_longer_than_what_is_multiplied_at_a_time(m, d):
    check(torch.randn(m, d), unit(torch.randn(30, d)), 4, "int8", device=(2, 1))


def test_many_queries_scan_rows_instead_of_int8_codes():
    float32, float16, int8 = (harness.SCANS[scan] for scan in ("float32", "float16", "int8"))
    assert harness.scan_of(8) == int8
    assert harness.scan_of(9) == float32
    assert harness.scan_of(9, scan="float16") == float16
    assert {harness.scan_of(9, rows=0), harness.scan_of(9, rows=72), harness.scan_of(9, stride=66)} == {int8}


@each_scan
@pytest.mark.parametrize("spread", [slow(1e-6), 1e-4])
def test_clumped_rows(scan, spread):
    """What the rows have in common is taken out; what is left to tell them apart is as small as rounding."""
    base = torch.randn(1, 64)
    rows = unit(base + spread * torch.randn(300, 64))
    queries = torch.cat([base, base + spread * torch.randn(2, 64), torch.randn(1, 64)])
    check(queries, rows, 7, scan, device=(2, 1))


def test_scores_that_round_to_a_negative_zero():
    queries, rows = torch.tensor([[1e-30, 1.0, 0.0]]), torch.tensor([[-1e-30, 0.0, 1.0], [0.0, 0.0, 1.0]])
    found = check(queries, rows, 2)
    assert found.ids.tolist() == [[0, 1]]
    assert not found.scores.signbit().any()
