"""CosineIndex: what it finds, how it changes, and its file."""

from __future__ import annotations

import copy
import pickle
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import unike_kernels as uk
from unike_kernels import _native, ops
from unike_kernels.artifacts import files
from unike_kernels.ops.cosine_topk import cpu

SCANS = ("int8", "float16", "bfloat16", "float32")
scans = pytest.mark.parametrize("scan", SCANS)


def assert_finds(index: uk.CosineIndex, keys: torch.Tensor, k: int = 9, queries: torch.Tensor | None = None) -> None:
    queries = torch.randn(5, keys.shape[1]) if queries is None else queries
    with ops.backend("reference"):
        expected = ops.cosine_topk(queries, keys, k)
    got = index.search(queries, k)
    assert len(index) == len(keys) and index.d == keys.shape[1]
    assert torch.equal(got[1], expected[1]) and torch.equal(got[0], expected[0])


@scans
@pytest.mark.parametrize("d", [1, 64, 70])
def test_search_is_the_operator(scan, d):
    keys = torch.randn(200, d) + 1
    assert_finds(uk.CosineIndex(keys, scan), keys)


@scans
@pytest.mark.parametrize("m", [1, 5])  # of an int8 scan: all bits of the queries at once, or the high ones first
def test_a_key_that_only_the_low_bits_of_a_query_see(scan, m):
    """Its high bits are 0 wherever the best key is not: only the bound of what they leave keeps that key."""
    signs = torch.randn(1024).sign()
    small, large = 0.49 * signs, torch.zeros(1024)
    small[0], large[0] = 0.0, 127.0
    other = torch.randn(1024)
    other -= other @ small / (small @ small) * small
    second = F.normalize(other, dim=0) + 0.09 * F.normalize(large, dim=0)
    keys = torch.stack([second, -second, small, -small])  # their mean is no direction
    assert F.cosine_similarity(large + small, keys).argmax() == 2
    assert_finds(uk.CosineIndex(keys, scan), keys, k=1, queries=(large + small).expand(m, -1))


@pytest.mark.parametrize("n", [40, 100])
def test_few_keys_and_many_queries(n):
    """There are fewer tiles of keys than threads: these share the queries."""
    keys = torch.randn(n, 64)
    assert_finds(uk.CosineIndex(keys), keys, queries=torch.randn(301, 64))


@scans
def test_no_keys(scan):
    index = uk.CosineIndex(torch.randn(0, 8), scan)
    assert len(index) == 0 and index.d == 8
    scores, ids = index.search(torch.randn(2, 8), 3)
    assert (ids == -1).all() and (scores == float("-inf")).all()
    keys = torch.randn(40, 8)
    index.add(keys)
    assert_finds(index, keys)


@scans
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_any_dtype_of_keys_and_queries(scan, dtype):
    keys, queries = torch.randn(50, 20).to(dtype), torch.randn(4, 20).to(dtype)
    index = uk.CosineIndex(keys, scan)
    expected = ops.cosine_topk(queries.float(), keys.float(), 6)
    got = index.search(queries, 6)
    assert torch.equal(got[1], expected[1])
    if dtype != torch.float64:  # whose rows are normalised before they are rounded
        assert torch.equal(got[0], expected[0])


@scans
def test_bounds_and_more_than_there_are(scan):
    keys, queries = torch.randn(50, 20), torch.randn(3, 20)
    ranges = torch.tensor([[0, 50], [7, 9], [20, 20]])
    got = uk.CosineIndex(keys, scan).search(queries, 60, ranges=ranges)
    wanted = ops.cosine_topk(queries, keys, 60, ranges=ranges)
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


@scans
@given(seed=st.integers(0, 2**31), steps=st.lists(st.integers(-9, 60), min_size=1, max_size=8))
def test_any_sequence_of_additions_and_removals(scan, seed, steps):
    g = torch.Generator().manual_seed(seed)
    keys = torch.randn(30, 12, generator=g)
    index = uk.CosineIndex(keys, scan)
    for step in steps:
        if step >= 0:
            more = torch.randn(step, 12, generator=g) + step
            index.add(more)
            keys = torch.cat([keys, more])
        else:
            gone = torch.randint(0, len(keys), (-step,), generator=g) if len(keys) else torch.empty(0).long()
            index.remove(gone if step % 2 else gone.tolist())
            keep = torch.ones(len(keys), dtype=torch.bool)
            keep[gone] = False
            keys = keys[keep]
        assert_finds(index, keys, queries=torch.randn(3, 12, generator=g))


def test_additions_do_not_copy_everything_each_time():
    index = uk.CosineIndex(torch.randn(100, 16), "float32")
    places = set()
    for _ in range(200):
        index.add(torch.randn(1, 16))
        places.add(index._keys.data_ptr())
    assert len(places) <= 3


def test_a_failed_addition_changes_nothing():
    keys = torch.randn(30, 12)
    index = uk.CosineIndex(keys)
    bad = torch.randn(5, 12)
    bad[3, 4] = float("nan")
    for wrong, error, message in (
        (bad, ValueError, "keys: expected finite values, row 3"),
        (torch.randn(5, 11), ValueError, r"keys: expected 12 columns, got float32\[5, 11\]"),
        (torch.randn(12), ValueError, "keys: expected shape"),
        (torch.ones(2, 12).int(), TypeError, "keys: expected float32"),
        ([[1.0] * 12], TypeError, "keys: expected a tensor or an array of numpy, got list"),
        (torch.empty(2, 12, device="meta"), ValueError, "keys: expected them on the CPU, got meta"),
    ):
        with pytest.raises(error, match=message):
            index.add(wrong)
        assert_finds(index, keys)
    for wrong in ([30], [-1], torch.tensor([3, 99])):
        with pytest.raises(IndexError, match=r"ids: expected 0 to 29, got (30|-1|99)"):
            index.remove(wrong)
        assert_finds(index, keys)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"scan": "int4"}, ValueError, "scan: expected one of int8, float16, bfloat16, float32; got 'int4'"),
        ({"scan": "float32", "exact": False}, ValueError, "exact: expected True with scan='float32'"),
        ({"keys": torch.zeros(2, 65537)}, ValueError, "keys: expected at most 65536 columns for scan='int8'"),
        ({"keys": torch.full((2, 3), float("inf"))}, ValueError, "keys: expected finite values, row 0"),
    ],
)
def test_wrong_arguments_are_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        uk.CosineIndex(**{"keys": torch.randn(5, 4)} | arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"queries": torch.zeros(2, 5)}, ValueError, r"queries: expected shape \[\*, 4\], got float32\[2, 5\]"),
        ({"queries": torch.zeros(1, 2, 4)}, ValueError, "queries: expected shape"),
        ({"queries": [[0.0] * 4]}, TypeError, "queries: expected a tensor or an array of numpy, got list"),
        ({"queries": torch.zeros(2, 4).int()}, TypeError, "queries: expected float32"),
        ({"queries": torch.zeros(2, 4, device="meta")}, ValueError, "expected device"),
        ({"k": 0}, ValueError, "k: expected an integer of at least 1, got 0"),
        ({"ranges": torch.tensor([[0, 1]])}, ValueError, r"ranges: expected shape \[2, 2\]"),
        ({"ranges": torch.tensor([[0, 6]] * 2)}, ValueError, "ranges.*0 <= start <= stop <= n"),
    ],
)
@pytest.mark.parametrize("exact", [True, False])
def test_wrong_searches_are_errors(arguments, error, message, exact):
    index = uk.CosineIndex(torch.randn(5, 4), exact=exact)
    with pytest.raises(error, match=message):
        index.search(**{"queries": torch.zeros(2, 4), "k": 2} | arguments)


@pytest.mark.parametrize("scan", SCANS[:3])
def test_without_the_rows_it_is_smaller_and_nearly_the_same(scan):
    keys = torch.randn(300, 64)
    exact, small = uk.CosineIndex(keys, scan), uk.CosineIndex(keys, scan, exact=False)
    codes = 64 if scan == "int8" else 128
    assert small.nbytes == 300 * (codes + 16) + 64 * 4
    assert exact.nbytes == small.nbytes + 300 * 64 * 4
    assert "exact=False" in repr(small) and "300 keys, d=64, scan='" in repr(exact)
    queries = torch.randn(4, 64)
    scores, ids = small.search(queries, 300)
    wanted = exact.search(queries, 300)[0]
    assert (scores - wanted).abs().max() < (0.02 if scan == "int8" else 0.005)
    assert torch.equal(ids.sort(-1).values, torch.arange(300).expand(4, 300))
    small.add(keys[:7])
    small.remove([0])
    assert len(small) == 306


@pytest.mark.parametrize("m", [1, 40])
def test_without_the_rows_the_best_of_all_estimates_are_found(m):
    keys = torch.randn(64) + 0.05 * torch.randn(3000, 64)  # as close as the codes can tell
    index = uk.CosineIndex(keys, exact=False)
    queries = keys[:m] + 0.01 * torch.randn(m, 64)
    scores, ids = index.search(queries, 3000)
    for _ in range(5):  # whichever thread comes first
        best = index.search(queries, 20)
        assert torch.equal(best[0], scores[:, :20]) and torch.equal(best[1], ids[:, :20])


@scans
@pytest.mark.parametrize("mmap", [False, True])
def test_a_file_gives_the_same_index(scan, mmap, tmp_path):
    keys = torch.randn(90, 20)
    index = uk.CosineIndex(keys[:50], scan)
    index.add(keys[50:])
    index.save(tmp_path / "index.safetensors")
    loaded = uk.CosineIndex.load(tmp_path / "index.safetensors", mmap=mmap)
    assert (loaded.scan, loaded.exact, loaded.nbytes) == (index.scan, True, index.nbytes)
    assert_finds(loaded, keys)
    more = torch.randn(4, 20)
    loaded.add(more)  # into memory: the file stays as it is
    assert_finds(loaded, torch.cat([keys, more]))
    assert_finds(uk.CosineIndex.load(tmp_path / "index.safetensors"), keys)
    assert [p.name for p in tmp_path.iterdir()] == ["index.safetensors"]


def test_a_file_of_codes_alone(tmp_path):
    keys, queries = torch.randn(90, 20), torch.randn(3, 20)
    index = uk.CosineIndex(keys, exact=False)
    index.save(tmp_path / "i")
    loaded = uk.CosineIndex.load(tmp_path / "i")
    assert not loaded.exact
    assert all(torch.equal(a, b) for a, b in zip(loaded.search(queries, 9), index.search(queries, 9), strict=True))


def test_a_mapped_file_stays_on_the_disk(tmp_path):
    """Loading reads next to nothing of the tables; a search reads the codes and a few rows."""
    path = tmp_path / "index.safetensors"
    index = uk.CosineIndex(torch.randn(20_000, 512))
    index.save(path)

    def resident() -> int:
        """Bytes of the file that are in this process's memory."""
        own, kilobytes = False, 0
        with open("/proc/self/smaps") as file:
            for line in file:
                if "-" in line.split()[0]:  # the head of a mapping
                    own = line.rstrip().endswith(str(path))
                elif own and line.startswith("Rss:"):
                    kilobytes += int(line.split()[1])
        return 1024 * kilobytes

    loaded = uk.CosineIndex.load(path, mmap=True)
    assert resident() < index.nbytes / 20
    assert loaded.search(torch.randn(1, 512), 3)[1].shape == (1, 3)
    assert 20_000 * 512 <= resident() < index.nbytes / 2


def rewrite(path, change) -> None:
    """Applies `change` to header and tensors of a file; its checksums fit."""
    header, tensors = files.load(path, "index")
    tensors = {name: t.clone() for name, t in tensors.items()}
    change(header, tensors)
    files.save(path, "index", header, tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, t: h.pop("d"), "the header lacks 'd'"),
        (lambda h, t: h.update(scan="int4"), "for a scan of 'int4'"),
        (lambda h, t: h.update(keys=-1), "no index of -1 keys"),
        (lambda h, t: h.update(keys=29), "expected the tensors"),
        (lambda h, t: h.update(other=1), "unexpected header fields: other"),
        (lambda h, t: t.clear(), "expected the tensors"),
        (lambda h, t: t.pop("bounds"), "expected the tensors"),
        (lambda h, t: t.update(more=torch.zeros(1)), "expected the tensors"),
        (lambda h, t: t.update(codes=t["codes"][:, :32].contiguous()), "expected the tensors"),
        (lambda h, t: t.update(rows=t["rows"].double()), "expected the tensors"),
        (lambda h, t: t["rows"].fill_(float("nan")), "tensor 'rows' holds NaN or infinity"),
    ],
)
@pytest.mark.parametrize("mmap", [False, True])
def test_a_wrong_file_is_an_error(change, message, mmap, tmp_path):
    uk.CosineIndex(torch.randn(30, 20)).save(tmp_path / "i")
    rewrite(tmp_path / "i", change)
    if mmap and "NaN" in message:
        return  # its contents are trusted
    with pytest.raises(uk.ArtifactError, match=message):
        uk.CosineIndex.load(tmp_path / "i", mmap=mmap)


def test_a_file_with_other_contents_than_it_says_is_an_error(tmp_path):
    path = tmp_path / "i"
    uk.CosineIndex(torch.randn(30, 20)).save(path)
    header, tensors = files.load(path, "index")
    content = path.read_bytes()
    path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    with pytest.raises(uk.ArtifactError, match="tensor 'codes' does not agree with its checksum"):
        uk.CosineIndex.load(path)
    # Files of version 1 had an id in the place of checksums.
    files.save(path, "index", header | {"id": files.digest(tensors)}, tensors)
    assert len(uk.CosineIndex.load(path)) == 30
    files.save(path, "index", header | {"id": files.digest(tensors)}, {**tensors, "codes": tensors["codes"] + 1})
    with pytest.raises(uk.ArtifactError, match="its contents have the id"):
        uk.CosineIndex.load(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(uk.ArtifactError, match="not a complete safetensors file"):
        uk.CosineIndex.load(path)
    files.save(path, "memory", {}, {})
    with pytest.raises(uk.ArtifactError, match=r"expected the format unike\.index, got 'unike\.memory'"):
        uk.CosineIndex.load(path)
    with pytest.raises(FileNotFoundError):
        uk.CosineIndex.load(tmp_path / "none")


def test_without_the_extension_it_searches_by_the_definition(monkeypatch, tmp_path):
    keys, queries = torch.randn(40, 12), torch.randn(3, 12)
    packed = uk.CosineIndex(keys)
    packed.save(tmp_path / "packed")
    uk.CosineIndex(keys, exact=False).save(tmp_path / "small")
    expected = packed.search(queries, 5)
    monkeypatch.setattr(_native, "_C", None)
    monkeypatch.setattr(_native, "_REASON", "not built")
    index = uk.CosineIndex(keys)
    index.save(tmp_path / "plain")
    for each in (index, uk.CosineIndex.load(tmp_path / "packed"), uk.CosineIndex.load(tmp_path / "plain")):
        got = each.search(queries, 5)
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
        each.add(keys[:3])
        each.remove([40, 41, 42])
        assert torch.equal(each.search(queries, 5)[1], expected[1])
    with pytest.raises(ValueError, match="exact: expected True where nothing can be packed: not built"):
        uk.CosineIndex(keys, exact=False)
    with pytest.raises(uk.ArtifactError, match="codes without rows, which nothing can search"):
        uk.CosineIndex.load(tmp_path / "small")
    monkeypatch.undo()
    loaded = uk.CosineIndex.load(tmp_path / "plain")  # packed now
    assert loaded.nbytes == packed.nbytes and torch.equal(loaded.search(queries, 5)[1], expected[1])


def test_a_forced_backend_is_obeyed(monkeypatch):
    index, queries = uk.CosineIndex(torch.randn(40, 12)), torch.randn(3, 12)
    expected = index.search(queries, 5)
    monkeypatch.setattr(cpu.Keys, "search", None)
    with ops.backend("reference"):
        got = index.search(queries, 5)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda index: pickle.loads(pickle.dumps(index))])
@pytest.mark.parametrize("make", [dict(), dict(scan="bfloat16"), dict(scan="float32"), dict(exact=False)])
def test_a_copy_is_an_index_of_its_own(copied, make):
    keys, queries = torch.randn(40, 12), torch.randn(3, 12)
    index = uk.CosineIndex(keys[:30], **make)
    index.add(keys[30:])  # there is room behind them now
    index.add(keys[:1])
    before = index.search(queries, 5)
    other = copied(index)
    assert (repr(other), other.nbytes) == (repr(index), index.nbytes)
    index.remove(range(20))
    for got, wanted in zip(other.search(queries, 5), before, strict=True):
        assert torch.equal(got, wanted)
    other.add(keys[:1])
    assert (len(other), len(index)) == (42, 21)


def test_a_pickle_holds_no_room_for_keys_to_come():
    index = uk.CosineIndex(torch.randn(2000, 64))
    index.add(torch.randn(1, 64))
    assert len(pickle.dumps(index)) < index.nbytes + 10_000


def test_what_are_no_ids():
    index = uk.CosineIndex(torch.randn(8, 16))
    mask = torch.tensor([0, 0, 0, 1, 0, 0, 0, 1]).bool()
    for wrong in (mask, mask.tolist(), mask.numpy(), [1.9], torch.tensor([1.0]), [True]):
        with pytest.raises(TypeError, match="ids: expected integers, got"):
            index.remove(wrong)
    assert len(index) == 8
    index.remove(mask.nonzero())
    index.remove([])
    index.remove(np.array([0], dtype=np.uint8))
    index.remove(range(1))
    assert len(index) == 4
    queries = torch.randn(2, 16)
    assert torch.equal(index.search(queries, np.int64(3))[1], index.search(queries, 3)[1])
    for wrong in (True, 2.0, 0, "3", np.float64(2)):
        with pytest.raises(ValueError, match="k: expected an integer of at least 1"):
            index.search(queries, wrong)


def test_what_torch_has_put_off_is_computed():
    """A view that is marked as negated, and negated only when somebody reads it by torch's own means."""
    z = torch.complex(torch.randn(20, 32), torch.randn(20, 32))
    lazy = z.conj().imag
    assert lazy.is_neg()
    index, plain = uk.CosineIndex(lazy), lazy.clone()
    assert not plain.is_neg()
    assert torch.equal(index.search(lazy[:3], 4)[0], uk.CosineIndex(plain).search(plain[:3], 4)[0])
    index.add(lazy)
    assert torch.equal(index.search(plain[:1], 2)[1], torch.tensor([[0, 20]]))


def test_a_search_is_interrupted():
    """By a signal while it goes on, which it would for seconds; the index is as before."""

    class AlarmError(Exception):
        pass

    def ring(*_):
        raise AlarmError

    index, queries = uk.CosineIndex(torch.randn(20_000, 64)), torch.randn(200_000, 64)
    wanted = index.search(queries[:3], 5)
    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(AlarmError):
            index.search(queries, 5)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert all(map(torch.equal, index.search(queries[:3], 5), wanted))
