"""The native core, at every instruction set and with any number of threads: every bit is that of the oracle.

What holds for every backend is tested with all of them in ops/test_cosine_topk.py.
"""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernels import kernels_of

from unike_kernels import _native
from unike_kernels.ops.cosine_topk import cpu

# Around the 16 lanes, and larger than what one thread takes.
WIDTHS = (1, 3, 15, 16, 17, 31, 576, 1000)


@pytest.fixture
def threads():
    """Sets the number of threads; the number before comes back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.is_contiguous()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    numbers = ~expected.isnan()
    assert torch.equal(actual.signbit()[numbers], expected.signbit()[numbers])


def topk(queries, keys, k, ranges=None, packed=None):
    return cpu.Keys(keys, packed).search(queries, k, ranges)


def check_topk(queries: torch.Tensor, keys: torch.Tensor, k: int) -> None:
    check_scan(queries, keys, k, torch.float32)


def unit_rows(n: int, d: int) -> torch.Tensor:
    return cpu.normalize_rows(torch.randn(n, d))


def test_the_extension_is_there():
    assert _native.available()
    assert _native.reason() == ""
    assert _native.isa() in _native.isas()


@pytest.mark.parametrize("d", WIDTHS)
def test_normalize_rows(d):
    x = torch.randn(50, d) * torch.logspace(-30, 30, 50).unsqueeze(1)
    assert_same_bits(cpu.normalize_rows(x), oracles.normalize_rows(x))


def test_normalize_special_rows():
    tiny, huge = 1e-45, 3.4e38
    x = torch.tensor(
        [
            [0.0, -0.0, 0.0],
            [tiny, -tiny, 0.0],
            [huge, huge, -huge],
            [1.0, float("nan"), 2.0],
            [float("inf"), 0.0, 1.0],
            [0.0, 0.0, -float("inf")],
            [-0.0, 5.0, 0.0],
        ]
    )
    assert_same_bits(cpu.normalize_rows(x), oracles.normalize_rows(x))


@pytest.mark.parametrize("d", [130, 578])
def test_scores_that_are_nothing_but_rounding_errors(d):
    # Every product occurs once with either sign, so the exact score is 0: another order of additions gives other bits.
    half, order = d // 2, torch.randperm(d)
    queries = unit_rows(5, half).repeat(1, 2)[:, order]
    keys = unit_rows(64, half).repeat(1, 2) * torch.ones(d).where(torch.arange(d) < half, -1.0)
    scores, _ = topk(queries, keys[:, order], 64)
    assert scores.count_nonzero() > scores.numel() / 2
    check_topk(queries.contiguous(), keys[:, order].contiguous(), 64)


def rows_whose_quotients_are_ties(rows: int, d: int) -> torch.Tensor:
    """Rows with an element x such that x / norm is, up to the last bits of float64, a midpoint between two float32."""
    x = np.random.default_rng(0).uniform(0.5, 1, (rows, d)).astype(np.float32)
    for row in x:
        midpoint = np.float64(np.float32(np.random.default_rng(int(row[0] * 2**24)).uniform(0.51, 0.9))) + 2.0**-25
        # The squares that are missing for the norm row[0] / midpoint, shared by all others, the last ones very finely.
        rest = (np.longdouble(row[0]) / midpoint) ** 2 - np.longdouble(row[0]) ** 2
        for i in range(1, d):
            row[i] = np.sqrt(max(rest, 0) * (row[i] / (d - 4 - i) if i < d - 4 else 1 - 2**-22))
            rest -= np.longdouble(row[i]) ** 2
    return torch.from_numpy(x)[:, torch.randperm(d)].contiguous()


@pytest.mark.parametrize("d", [20, 100])
def test_normalize_rows_at_rounding_boundaries(d):
    # One wrong bit of the norm, or a reciprocal in place of the division, rounds some of the quotients the other way.
    x = rows_whose_quotients_are_ties(500, d)
    assert_same_bits(cpu.normalize_rows(x), oracles.normalize_rows(x))


def test_denormal_scores():
    check_topk(torch.randn(3, 17), torch.randn(40, 17) * 1e-41, 40)


@pytest.mark.parametrize(("m", "k"), [(0, 3), (0, 0), (3, 0)])
def test_empty_outputs(m, k):
    scores, ids = topk(unit_rows(m, 5), unit_rows(4, 5), k)
    assert scores.shape == ids.shape == (m, k)
    assert cpu.normalize_rows(torch.empty(0, 5)).shape == (0, 5)


@pytest.mark.parametrize("m", [1, 2, 3, 100])
def test_the_number_of_threads_changes_nothing(m, threads):
    # Enough work for 8 threads, over the keys for few queries and over the queries for many; ties across the parts.
    d, k = 256, 50
    n = 8 * 2**19 // (d * min(m, 8)) + 13
    queries, keys = unit_rows(m, d), unit_rows(97, d).repeat(n // 97 + 1, 1)[:n].contiguous()
    bounds = torch.randint(0, n, (m, 2)).sort(-1).values
    threads(1)
    expected = oracles.cosine_topk(queries[:3], keys, k, bounds[:3])
    single = topk(queries, keys, k, bounds)
    assert_same_bits(single[1][:3], expected[1])
    assert_same_bits(single[0][:3], expected[0])
    for count in (2, 3, 8):
        threads(count)
        several = topk(queries, keys, k, bounds)
        assert torch.equal(several[0], single[0]) and torch.equal(several[1], single[1])


def test_normalize_rows_on_several_threads(threads):
    x = torch.randn(8 * 2**19 // 1000 + 7, 1000)
    threads(1)
    single = cpu.normalize_rows(x)
    assert_same_bits(single[-9:], oracles.normalize_rows(x[-9:]))
    for count in (2, 7):
        threads(count)
        assert torch.equal(cpu.normalize_rows(x), single)


@pytest.mark.parametrize(
    ("queries", "keys", "k", "bounds"),
    [
        (torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 3), 1, None),
        (torch.zeros(2, 3, dtype=torch.float16), torch.zeros(2, 3), 1, None),
        (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bfloat16), 1, None),
        (torch.zeros(2, 3), torch.zeros(2, 4), 1, None),
        (torch.zeros(3), torch.zeros(2, 3), 1, None),
        (torch.zeros(2, 0), torch.zeros(2, 0), 1, None),
        (torch.zeros(2, 3), torch.zeros(2, 3), -1, None),
        (torch.zeros(2, 3), torch.zeros(2, 3, device="meta"), 1, None),
        (torch.zeros(2, 3), torch.zeros(2, 3), 1, torch.zeros(3, 2, dtype=torch.int64)),
        (torch.zeros(2, 3), torch.zeros(2, 3), 1, torch.zeros(2, 2, dtype=torch.int32)),
    ],
)
def test_wrong_arguments_are_errors(queries, keys, k, bounds):
    with pytest.raises(ValueError, match=r"must|columns"):
        topk(queries, keys, k, bounds)


def test_the_package_imports_without_the_extension():
    code = """
import sys, warnings
sys.modules["unike_kernels._C"] = None  # makes its import fail
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from unike_kernels import _native
    from unike_kernels.ops.cosine_topk import cpu
    import unike_kernels, torch
(told,) = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
assert told.startswith(_native.reason()) and "UNIKE_NATIVE=0" in told and "install GCC 11, clang 14 or later" in told
assert not _native.available()
assert "unike_kernels._C" in _native.reason()
try:
    cpu.normalize_rows(torch.zeros(1, 1))
except RuntimeError as error:
    assert str(error) == _native.reason()
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)


SCANS = (torch.float32, torch.float16, torch.bfloat16, torch.uint8)


@pytest.fixture(params=_native.isas())
def isa(request):
    with kernels_of(request.param):
        yield request.param


def pack(rows: torch.Tensor, dtype: torch.dtype, direction: torch.Tensor | None = None):
    """What the scan reads; None for float32, which reads the rows."""
    if dtype == torch.float32:
        return None
    n, d = rows.shape
    if direction is None:
        direction = cpu.normalize_rows(rows.mean(0, keepdim=True))[0] if n else torch.zeros(d)
    codes, bounds = torch.empty(n, cpu.code_width(dtype, d), dtype=dtype), torch.empty(n, cpu.KEY_BOUNDS)
    cpu.pack_keys(rows, direction, codes, bounds)
    return codes, bounds, direction


def check_scan(queries, rows, k, dtype, ranges=None, direction=None) -> None:
    scores, ids = topk(queries, rows, k, ranges, pack(rows, dtype, direction))
    expected = oracles.cosine_topk(queries, rows, k, ranges)
    assert_same_bits(ids, expected[1])
    assert_same_bits(scores, expected[0])


scans = pytest.mark.parametrize("scan", SCANS, ids=str)


@scans
@pytest.mark.parametrize("m", [1, 2, 3, 4, 9, 40])
@pytest.mark.parametrize("d", [1, 17, 64, 65, 300])
def test_every_scan_gives_the_definition(isa, scan, m, d):
    check_scan(torch.randn(m, d), unit_rows(700, d), 11, scan)


@scans
def test_rows_of_more_than_one_chunk(isa, scan):
    check_scan(torch.randn(9, 5000), unit_rows(130, 5000), 7, scan)


@scans
@pytest.mark.parametrize("spread", [1e-6, 1e-4, 3e-4, 1e-3, 0.3])
def test_clumped_rows(isa, scan, spread):
    """Scores that lie closer together than sums in float32 can tell, than codes can, and neither."""
    base = torch.randn(400)
    rows = cpu.normalize_rows(base + spread * torch.randn(900, 400))
    queries = torch.cat([torch.randn(3, 400) + 0.1 * base, base + spread * torch.randn(10, 400)])
    check_scan(queries, rows, 40, scan)


@scans
def test_more_queries_than_a_block(isa, scan):
    check_scan(torch.randn(600, 20), unit_rows(90, 20), 7, scan)
    check_scan(torch.randn(300, 20), unit_rows(20, 20), 30, scan)


@scans
@pytest.mark.parametrize("direction", ["zero", "other", "long row"])
def test_any_direction_will_do(isa, scan, direction):
    rows = cpu.normalize_rows(torch.randn(300, 90) + 1)
    of = {"zero": torch.zeros(90), "other": unit_rows(1, 90)[0], "long row": rows[7]}[direction]
    check_scan(torch.randn(5, 90) + 1, rows, 20, scan, direction=of)


@scans
def test_outliers_of_a_row_cost_the_codes_their_precision_only(isa, scan):
    raw = torch.randn(400, 128)
    raw[:, 5] += 300 * torch.randn(400)
    check_scan(torch.randn(6, 128), cpu.normalize_rows(raw), 30, scan)


@scans
def test_equal_rows_and_rows_of_zeros(isa, scan):
    rows = unit_rows(5, 70).repeat(40, 1)
    rows[::7] = 0.0
    check_scan(torch.cat([rows[1:4], -rows[1:4], torch.zeros(1, 70)]), rows, 60, scan)
    check_scan(torch.randn(3, 70), torch.zeros(100, 70), 9, scan)


@scans
def test_ranges_of_every_scan(isa, scan):
    ranges = torch.tensor([[0, 300], [0, 0], [300, 300], [120, 121], [5, 200], [299, 300], [63, 65], [64, 128]])
    check_scan(torch.randn(8, 33), unit_rows(300, 33), 25, scan, ranges)


@scans
@pytest.mark.parametrize("m", [15, 16, 17, 33, 130])
def test_many_queries_of_which_some_see_little_or_nothing(isa, scan, m):
    queries, rows = torch.randn(m, 70), unit_rows(330, 70)
    queries[[0, m // 2]] = float("nan")
    check_scan(queries, rows, 25, scan)
    starts = torch.randint(0, 331, (m,))
    starts[: 2 * m // 3] = 0  # the first keys are seen by most, the last ones by few
    stops = torch.where(torch.arange(m) % 5 == 0, 330, torch.maximum(starts, torch.tensor(150)))
    check_scan(queries, rows, 25, scan, torch.stack([starts, stops], 1))


@scans
def test_more_wanted_than_a_thread_keeps(isa, scan):
    check_scan(torch.randn(2, 40), unit_rows(3000, 40), 1500, scan)


def adversarial_rows(d: int, units: torch.Tensor) -> torch.Tensor:
    """Rows of `units` in steps of an int8 code: the first column sets the scale."""
    return cpu.normalize_rows(torch.cat([torch.full((len(units), 1), 127.0), units], 1))


def test_codes_that_hide_the_best_keys(isa):
    """The best keys have all that they are better by in the residual, the others have none: only the bound tells."""
    d, k = 300, 20
    query = torch.cat([torch.zeros(1), torch.randn(d)]).unsqueeze(0)
    sign = query[:, 1:].sign()
    decoys = torch.randint(-9, 10, (400, d)).float()
    decoys = decoys + (decoys * sign < 5) * sign  # so that they score well
    hidden = decoys[:k] + 0.49 * sign
    order = torch.randperm(400 + k)
    rows = adversarial_rows(d, torch.cat([hidden, decoys]))[order]
    packed = pack(rows, torch.uint8, torch.zeros(d + 1))
    check_scan(query, rows, k, torch.uint8, direction=torch.zeros(d + 1))
    best = topk(query, rows, k)[1]
    # The same with a bound of nothing would lose them: the data is as bad as it should be.
    codes, bounds, direction = packed
    blind = bounds.clone()
    blind[:, 2:] = 0.0
    lost = topk(query, rows, k, None, (codes, blind, direction))[1]
    assert not torch.equal(lost.sort().values, best.sort().values)


def test_codes_that_flatter_the_others(isa):
    """The codes of the first rows promise more than these hold: their estimates are no threshold for the last ones."""
    d, k = 300, 20
    query = torch.cat([torch.zeros(1), torch.randn(d)]).unsqueeze(0)
    sign = query[:, 1:].sign()
    units = 3 * sign + torch.randint(-3, 4, (400, d))
    flattered = units - 0.49 * sign  # rounded back to units
    best = units[:k] - torch.where(torch.rand(k, d) < 0.3, sign, 0.0)  # between what those are and what they seem
    rows = adversarial_rows(d, torch.cat([flattered, best]))
    check_scan(query, rows, k, torch.uint8, direction=torch.zeros(d + 1))
    found = topk(query, rows, k)[1]
    assert (found >= 400).any()
    codes, bounds, direction = pack(rows, torch.uint8, torch.zeros(d + 1))
    estimates = topk(query, None, 420, None, (codes, bounds, direction))[1]
    assert (estimates[0, :k] < 400).all()  # the flattered ones come first by their codes


@pytest.mark.parametrize("many", [True, False])
def test_a_query_that_its_codes_misjudge(isa, many):
    """Its high codes, which many queries are scanned with at first, or all codes see nothing along the best keys."""
    d, k = 300, 24  # the best keys are part of a whole tile
    part = 0.49 if many else 0.49 / 254  # of a step: rounded away
    signs = torch.where(torch.randperm(d) < 2 * d // 3, 1.0, -1.0)  # the sum of the codes is not that of others
    query = torch.cat([torch.tensor([127.0]), part * signs]).unsqueeze(0)
    flipped = torch.where(torch.rand(k, d) < 0.1, -signs, signs)
    toward = torch.cat([torch.zeros(k, 1), flipped], 1)
    others = torch.cat([torch.full((1000, 1), 0.95 * part), torch.randn(1000, d).sign()], 1)  # half as good
    rows = cpu.normalize_rows(torch.cat([others, toward]))
    queries = torch.cat([query, torch.randn(8, d + 1)]) if many else query
    check_scan(queries, rows, k, torch.uint8, direction=torch.zeros(d + 1))
    assert (topk(query, rows, k)[1] >= 1000).all()


def test_a_query_that_bfloat16_misjudges(isa):
    """A scan that rounds the query to bfloat16 sees nothing of what it has along the best keys."""
    half, k = 126, 20
    balanced = torch.tensor([1.0, -1.0]).repeat(half)
    part = 0.49 * 2**-7  # of a step of bfloat16 from 1.5: rounded away in both directions
    query = torch.cat([torch.tensor([9 / 64]), 1.5 + part * balanced]).unsqueeze(0)
    others = torch.stack([balanced[torch.randperm(2 * half)] for _ in range(1000)])
    first = torch.tensor([2.0]).repeat(1000 + k, 1)
    first[1000:] *= -1  # what the codes see speaks against the best
    rows = torch.cat([first, torch.cat([others, balanced.repeat(k, 1)])], 1)
    rows = cpu.normalize_rows(rows)  # sixteenths, as they are in bfloat16
    check_scan(query, rows, k, torch.bfloat16, direction=torch.zeros(2 * half + 1))
    assert (topk(query, rows, k)[1] >= 1000).all()


def test_codes_that_lie_along_the_direction(isa):
    """The rounding of the keys has a part along the common direction, which is nearly all that the query has."""
    d, k = 102, 20
    inner = torch.cat([torch.full((60,), 0.4), torch.full((40,), -0.6)])  # of sum 0; their codes 0 and -1 are not

    def rows_of(count, units, share):
        shuffled = torch.stack([units[torch.randperm(d - 2)] for _ in range(count)])
        return share + torch.cat([torch.tensor([[127.0, -127.0]]).expand(count, 2), shuffled], 1)

    rows = cpu.normalize_rows(torch.cat([rows_of(1000, inner, 39.8), rows_of(k, -inner, 40.0)]))
    direction = cpu.normalize_rows(torch.ones(1, d))[0]
    query = torch.ones(1, d)
    check_scan(query, rows, k, torch.uint8, direction=direction)
    assert (topk(query, rows, k)[1] >= 1000).all()


def test_scores_that_differ_by_their_rounding(isa):
    """Rows and queries that their codes hold exactly: of the bounds only the slack for rounded arithmetic is left."""
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        rows = adversarial_rows(6, torch.randint(-9, 10, (4000, 6), generator=g).float())
        query = torch.cat([torch.tensor([[127.0]]), torch.randint(-9, 10, (1, 6), generator=g).float()], 1)
        check_scan(query, rows, 10, torch.uint8, direction=torch.zeros(7))


@given(
    m=st.integers(1, 12),
    n=st.integers(0, 200),
    d=st.integers(1, 150),
    k=st.integers(1, 60),
    kind=st.sampled_from(["grid", "normal", "clumped", "outliers"]),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_every_scan_of_anything(m, n, d, k, kind, seed, data):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(m + n, d, generator=g)
    if kind == "grid":
        x = torch.randint(-2, 3, (m + n, d), generator=g).float()
    elif kind == "clumped":
        x = torch.randn(d, generator=g) + 10.0 ** data.draw(st.integers(-7, 0)) * x
    elif kind == "outliers":
        x[torch.rand(m + n, d, generator=g) < 0.02] *= 1000
    rows = cpu.normalize_rows(x[m:])
    bounds = torch.randint(0, n + 1, (m, 2), generator=g).sort(-1).values if data.draw(st.booleans()) else None
    scan, level = data.draw(st.sampled_from(SCANS)), data.draw(st.sampled_from(_native.isas()))
    with kernels_of(level):
        check_scan(x[:m], rows, k, scan, bounds)


@scans
def test_bfloat16_queries_are_taken_as_they_are(isa, scan):
    queries, rows = torch.randn(7, 50).bfloat16(), unit_rows(200, 50)
    packed = pack(rows, scan)
    narrow, wide = topk(queries[:, ::1], rows, 9, None, packed), topk(queries.float(), rows, 9, None, packed)
    assert torch.equal(narrow[0], wide[0]) and torch.equal(narrow[1], wide[1])


@pytest.mark.parametrize("scan", SCANS[1:], ids=str)
def test_codes_alone_give_scores_within_their_bounds(isa, scan):
    rows, queries = unit_rows(500, 200), unit_rows(6, 200)
    packed = pack(rows, scan)
    scores, ids = topk(queries, None, 500, None, packed)
    error = packed[1][:, 2].max() + 2e-5
    exact = (queries.double() @ rows.double().T).gather(1, ids)
    assert (scores.double() - exact).abs().max() <= error
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    assert torch.equal(ids.sort(-1).values, torch.arange(500).expand(6, 500))


@pytest.mark.parametrize("count", [2, 3, 8])
@scans
def test_threads_change_nothing_in_any_scan(scan, count, threads):
    queries, rows = torch.randn(70, 256), unit_rows(3000, 256)
    packed = pack(rows, scan)
    threads(1)
    single = topk(queries, rows, 40, None, packed), topk(queries[:2], rows, 40, None, packed)
    threads(count)
    several = topk(queries, rows, 40, None, packed), topk(queries[:2], rows, 40, None, packed)
    for one, other in zip(single, several, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@pytest.mark.skipif(sys.platform != "linux", reason="protects a page by Linux's number")
def test_nothing_behind_the_last_key_is_read():
    """The codes end where a page begins that nobody may read."""
    code = """
import ctypes, mmap, torch
from unike_kernels import _native
from unike_kernels.ops.cosine_topk import cpu
rows, page = cpu.normalize_rows(torch.randn(100, 50)), mmap.PAGESIZE
room = mmap.mmap(-1, 3 * page)
at = ctypes.addressof(ctypes.c_char.from_buffer(room))
assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(at + 2 * page), page, 0) == 0
codes = torch.frombuffer(room, dtype=torch.uint8, offset=2 * page - 100 * 64, count=100 * 64).view(100, 64)
bounds, direction = torch.empty(100, cpu.KEY_BOUNDS), torch.zeros(50)
cpu.pack_keys(rows, direction, codes, bounds)
for level in _native.isas():
    _native.set_isa(level)
    for m in (1, 2, 5, 20, 70):
        queries = torch.randn(m, 50)
        expected = cpu.Keys(rows, None).search(queries, 9)
        found = cpu.Keys(rows, (codes, bounds, direction)).search(queries, 9)
        assert all(map(torch.equal, found, expected)), (level, m)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_child_process_searches_too():
    """After a fork the threads of OpenMP are gone; torch's own parallel operators would wait for them for ever."""
    code = """
import os, torch
from unike_kernels import _native
from unike_kernels.ops.cosine_topk import cpu
torch.set_num_threads(2)
queries, rows = torch.randn(64, 256), cpu.normalize_rows(torch.randn(5000, 256))
search = lambda: cpu.Keys(rows, None).search(queries, 9)[1]
before = search()
torch.randn(1 << 20).add_(1)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(search(), before) else 1)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert status == 0, status
assert torch.equal(search(), before)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_threads_are_those_of_torch():
    code = """
import os, torch
from unike_kernels import _native
from unike_kernels.ops.cosine_topk import cpu
torch.set_num_threads(2)
tasks = lambda: len(os.listdir("/proc/self/task"))
alone = tasks()
torch.randn(1 << 20).add_(1)
after_torch = tasks()
queries, rows = torch.randn(64, 256), cpu.normalize_rows(torch.randn(5000, 256))
cpu.Keys(rows, None).search(queries, 9)
assert after_torch > alone
assert tasks() == after_torch, (alone, after_torch, tasks())
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_wrong_codes_are_errors():
    rows = unit_rows(20, 70)
    codes, bounds, direction = pack(rows, torch.uint8)
    for wrong in (
        (codes[:19], bounds, direction),
        (codes[:, :64].contiguous(), bounds, direction),
        (codes.float(), bounds, direction),
        (codes, bounds[:, :3].contiguous(), direction),
        (codes, bounds.T.contiguous().T, direction),
        (codes, bounds, direction[:69]),
        (codes, bounds, direction.double()),
    ):
        with pytest.raises(ValueError, match=r"(codes|bounds|direction) must be"):
            topk(rows[:1], rows, 3, None, wrong)
    with pytest.raises(ValueError, match="keys or packed must be given"):
        cpu.Keys(None, None)
    with pytest.raises(ValueError, match="at most 65536 columns"):
        cpu.pack_keys(torch.zeros(1, 65537), torch.zeros(65537), torch.empty(1, 65537, dtype=torch.uint8), bounds)


@pytest.mark.slow
def test_a_million_keys():
    g = torch.Generator().manual_seed(0)
    rows = cpu.normalize_rows(torch.randn(1_000_000, 64, generator=g))
    queries = torch.randn(5, 64, generator=g)
    expected = oracles.cosine_topk(queries, rows, 1024)
    for scan in SCANS:
        scores, ids = topk(queries, rows, 1024, None, pack(rows, scan))
        assert_same_bits(ids, expected[1])
        assert_same_bits(scores, expected[0])
