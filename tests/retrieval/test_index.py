"""What indexes share: arrays of numpy, ids of the caller's, filters, thresholds; against faiss and the definition."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import unike_kernels as uk
from unike_kernels import ops
from unike_kernels.artifacts import files

KEYS, QUERIES = (
    np.random.default_rng(seed).standard_normal((n, 24)).astype("float32") for seed, n in ((0, 300), (1, 5))
)
IDS = np.random.default_rng(2).permutation(10**12 + np.arange(300) * 7)
MAKE = {
    "int8": lambda keys, ids=None: uk.CosineIndex(keys, ids=ids),
    "float32": lambda keys, ids=None: uk.CosineIndex(keys, "float32", ids=ids),
    "ivf": lambda keys, ids=None: uk.ApproximateIndex(keys, uk.ANNConfig(lists=20, probes=20), ids=ids),
    "hnsw": lambda keys, ids=None: uk.ApproximateIndex(keys, uk.ANNConfig("hnsw", breadth=500), ids=ids),
}


@pytest.fixture(params=MAKE)
def make(request):
    if request.param in ("ivf", "hnsw"):
        pytest.importorskip("faiss")
    return MAKE[request.param]


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def of_faiss(ids=IDS):
    faiss = pytest.importorskip("faiss")
    index = faiss.IndexIDMap2(faiss.IndexFlatIP(24))
    index.add_with_ids(unit(KEYS), ids)
    return faiss, index


def defined(keys, queries, k, positions):
    """The best of the keys at some positions: by the operator's definition, over those keys alone."""
    with ops.backend("reference"):
        scores, found = ops.cosine_topk(torch.from_numpy(queries), torch.from_numpy(keys[positions]), k)
    return scores.numpy(), np.where(found >= 0, np.append(positions, -1)[found.numpy()], -1)


def test_arrays_in_and_out(make):
    index = make(KEYS)
    assert (index.ntotal, len(index), index.d) == (300, 300, 24)
    scores, ids = index.search(QUERIES, 7)
    assert (type(scores), scores.dtype, type(ids), ids.dtype) == (np.ndarray, np.float32, np.ndarray, np.int64)
    of_tensors = make(torch.from_numpy(KEYS)).search(torch.from_numpy(QUERIES), 7)
    assert all(isinstance(t, torch.Tensor) for t in of_tensors)
    assert np.array_equal(of_tensors[0], scores) and np.array_equal(of_tensors[1], ids)
    _, index_of_faiss = of_faiss(np.arange(300))
    assert np.array_equal(index_of_faiss.search(unit(QUERIES), 7)[1], ids)
    ranges = np.array([[0, 300], [3, 9], [5, 5], [0, 1], [299, 300]])
    assert np.array_equal(
        index.search(QUERIES, 7, ranges)[1], index.search(torch.tensor(QUERIES), 7, torch.tensor(ranges))[1]
    )


def test_one_query(make):
    index = make(KEYS, IDS)
    for query in (QUERIES[2], torch.from_numpy(QUERIES[2])):
        scores, ids = index.search(query, 4)
        assert type(ids) is type(query) and ids.shape == scores.shape == (4,)
        assert np.array_equal(ids, index.search(QUERIES, 4)[1][2])
        lims, scores, ids = index.range_search(query, float(scores[3]))
        assert lims.tolist() == [0, 3] and ids.shape == scores.shape == (3,)


@pytest.mark.parametrize(
    "odd",
    [
        lambda x: np.asfortranarray(x), lambda x: x[::-1][::-1], lambda x: np.repeat(x, 2, 1)[:, ::2],
        lambda x: x.astype(">f4"), lambda x: x.astype("float64"), lambda x: x.view(np.matrix),
        lambda x: np.frombuffer(x.tobytes(), "f4").reshape(x.shape),
    ],
)  # fmt: skip
def test_arrays_of_any_layout(odd):
    want = uk.CosineIndex(KEYS).search(QUERIES, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = uk.CosineIndex(odd(KEYS)).search(odd(QUERIES), 5)
    assert np.array_equal(got[1], want[1])


def test_an_index_of_no_keys_yet():
    index = uk.CosineIndex(24)
    assert (index.d, index.ntotal) == (24, 0)
    assert index.search(QUERIES, 2)[1].tolist() == [[-1, -1]] * 5
    assert index.range_search(QUERIES, -1)[0].tolist() == [0] * 6
    index.add(KEYS, IDS)
    assert np.array_equal(index.search(QUERIES, 9)[1], uk.CosineIndex(KEYS, ids=IDS).search(QUERIES, 9)[1])
    for wrong in (0, -3):
        with pytest.raises(ValueError, match=f"keys: expected an integer of at least 1, got {wrong}"):
            uk.CosineIndex(wrong)


def test_ids_as_faiss_has_them(make):
    index, (_, other) = make(KEYS, IDS), of_faiss()
    scores, ids = index.search(QUERIES, 310)
    wanted, found = other.search(unit(QUERIES), 310)
    assert np.array_equal(ids, found) and np.allclose(scores[:, :300], wanted[:, :300], atol=1e-5)
    assert torch.equal(index.ids, torch.from_numpy(IDS)) and torch.equal(make(KEYS).ids, torch.arange(300))
    for i in (int(IDS[0]), IDS[177]):
        assert np.allclose(index.reconstruct(i), other.reconstruct(int(i)), atol=1e-6)
    assert np.allclose(make(KEYS).reconstruct(3), unit(KEYS)[3], atol=1e-6)
    for wrong in (3, -1):
        with pytest.raises(IndexError, match=f"id: expected that of a key, got {wrong}"):
            index.reconstruct(wrong)
    with pytest.raises(TypeError, match="float"):
        index.reconstruct(3.0)


@given(seed=st.integers(0, 2**31), steps=st.lists(st.integers(-30, 40), min_size=1, max_size=6))
def test_ids_survive_any_sequence_of_additions_and_removals(seed, steps):
    rng = np.random.default_rng(seed)
    index, there = uk.CosineIndex(8), {}
    for step in steps:
        if step >= 0:
            keys = rng.standard_normal((step, 8)).astype("float32")
            ids = np.array([i for i in rng.permutation(300) if i not in there][:step], dtype=np.int64)
            index.add(keys, ids)
            there |= dict(zip(ids.tolist(), keys, strict=True))
        else:
            gone = [i for i in rng.permutation(300).tolist() if i in there][:-step]
            index.remove(gone)
            there = {i: key for i, key in there.items() if i not in gone}
        names, keys = np.array([*there], dtype=np.int64), np.array([*there.values()], dtype="float32").reshape(-1, 8)
        queries = rng.standard_normal((3, 8)).astype("float32")
        scores, found = defined(keys, queries, 9, np.arange(len(keys)))
        got = index.search(queries, 9)
        assert np.array_equal(got[0], scores)
        assert np.array_equal(got[1], np.where(found >= 0, np.append(names, -1)[found], -1))


def test_wrong_ids_change_nothing():
    index, more = uk.CosineIndex(KEYS, ids=IDS), KEYS[:2]
    for ids, error, message in (
        (None, ValueError, "ids: expected one for each key, as the keys before these have ids of their own"),
        ([1], ValueError, "ids: expected one for each of the 2 keys, got 1"),
        ([4, 4], ValueError, "ids: expected each once, got 4 twice"),
        ([4, IDS[9]], ValueError, f"ids: expected ids that no key has yet, got {IDS[9]}"),
        ([4, -1], ValueError, "ids: expected integers of at least 0, as -1 stands for no key; got -1"),
        ([0.5, 1.0], TypeError, "ids: expected integers"),
        (np.array([True, False]), TypeError, "ids: expected integers"),
    ):
        with pytest.raises(error, match=message):
            index.add(more, ids)
        assert np.array_equal(index.search(QUERIES, 9)[1], uk.CosineIndex(KEYS, ids=IDS).search(QUERIES, 9)[1])
    with pytest.raises(ValueError, match="keys: expected finite values"):
        index.add(np.full((1, 24), np.nan, "float32"), [5])
    with pytest.raises(IndexError, match="ids: expected those of keys, got 5"):
        index.remove([IDS[3], 5])
    assert index.ntotal == 300
    with pytest.raises(ValueError, match="ids: expected None, as the keys before these have none of their own"):
        uk.CosineIndex(KEYS).add(more, [1000, 1001])
    with pytest.raises(ValueError, match="ids: expected one for each of the 300 keys, got 2"):
        uk.CosineIndex(KEYS, ids=[1, 2])


SETS = {
    "none": np.array([], dtype=np.int64), "one": np.array([211]), "fewer than k": np.array([2, 250, 7]),
    "side by side": np.arange(40, 90), "some": np.random.default_rng(3).permutation(300)[:60], "all": np.arange(300),
}  # fmt: skip


@pytest.mark.parametrize("chosen", SETS.values(), ids=SETS)
def test_only_allowed_keys(make, chosen):
    """As many as k where so many are allowed, and the best: by ids in any order, by a mask, with ids of one's own."""
    scores, positions = defined(KEYS, QUERIES, 8, np.sort(chosen))
    mask = np.isin(np.arange(300), chosen)
    for ids, allowed in (
        (None, chosen), (None, [*chosen.tolist(), 300, -1, 10**15]), (None, mask), (None, torch.from_numpy(mask)),
        (IDS, IDS[chosen]), (IDS, torch.from_numpy(np.append(IDS[chosen], 3))), (IDS, mask),
    ):  # fmt: skip
        got = make(KEYS, ids).search(QUERIES, 8, allowed=allowed)
        wanted = positions if ids is None else np.where(positions >= 0, np.append(ids, -1)[positions], -1)
        assert np.array_equal(got[1], wanted)
        assert np.allclose(got[0], scores, atol=1e-5)
        if isinstance(make(KEYS[:1]), uk.CosineIndex):
            assert np.array_equal(got[0], scores)  # the bits


def test_an_approximate_search_finds_as_many_as_are_allowed():
    """Though the lists that it reads hold none of them."""
    pytest.importorskip("faiss")
    for how in (uk.ANNConfig(lists=50, probes=1), uk.ANNConfig("hnsw", breadth=1, links=4)):
        index, allowed = uk.ApproximateIndex(KEYS, how), [5, 90, 200, 299]
        assert np.sort(index.search(QUERIES, 4, allowed=allowed)[1]).tolist() == [allowed] * 5
        ranges = np.array([[10, 14]] * 5)
        assert np.sort(index.search(QUERIES, 4, ranges)[1]).tolist() == [[10, 11, 12, 13]] * 5


def test_without_the_rows_allowed_keys_have_the_scores_of_the_scan():
    index = uk.CosineIndex(KEYS, exact=False)
    scores, ids = index.search(QUERIES, 300)
    chosen = np.arange(1, 300, 3)
    got = index.search(QUERIES, 100, allowed=chosen)
    for query in range(5):
        inside = np.isin(ids[query], chosen)
        assert np.array_equal(got[0][query], scores[query][inside])
    with pytest.raises(ValueError, match="reconstruct: expected an index with rows"):
        index.reconstruct(0)


def test_wrong_filters(make):
    index = make(KEYS)
    for allowed, error, message in (
        (np.ones(299, bool), ValueError, r"allowed: expected shape \[300\], got bool\[299\]"),
        ([0.5], TypeError, "allowed: expected integers"),
    ):
        with pytest.raises(error, match=message):
            index.search(QUERIES, 3, allowed=allowed)
    with pytest.raises(ValueError, match="allowed: expected None where ranges are given"):
        index.search(QUERIES, 3, np.array([[0, 3]] * 5), allowed=[1])


@pytest.mark.parametrize("threshold", [-2, -0.5, 0.0, 0.3, 0.999, 5.0])
def test_all_above_a_threshold_as_faiss_finds_them(make, threshold):
    faiss, other = of_faiss()
    queries = np.concatenate([QUERIES, KEYS[:3], np.full((1, 24), np.nan, "float32")])
    lims, scores, ids = make(KEYS, IDS).range_search(queries, threshold)
    assert (lims.dtype, scores.dtype, ids.dtype) == (np.int64, np.float32, np.int64)
    wanted = other.range_search(unit(queries[:8]), threshold)
    assert np.array_equal(lims[:-1], wanted[0]) and lims[-1] == lims[-2]
    for m, (start, stop) in enumerate(itertools.pairwise(lims[:-1])):
        assert set(ids[start:stop]) == set(wanted[2][start:stop]), m
        assert (np.diff(scores[start:stop]) <= 0).all() and (scores[start:stop] > threshold).all()
    chosen = IDS[::7]
    lims, _, ids = make(KEYS, IDS).range_search(queries[:8], threshold, allowed=chosen)
    parameters = faiss.SearchParameters(sel=faiss.IDSelectorBatch(chosen))
    wanted = other.range_search(unit(queries[:8]), threshold, params=parameters)
    assert np.array_equal(lims, wanted[0]) and set(ids) == set(wanted[2])


def test_a_score_at_the_threshold_is_not_above_it():
    index, queries = uk.CosineIndex(KEYS), torch.from_numpy(QUERIES)
    scores, ids = index.search(queries, 200)
    threshold = float(scores[0, 149])  # behind the first two searches
    lims, above, found = index.range_search(queries[:1], threshold)
    assert lims.tolist() == [0, 149]
    assert torch.equal(found, ids[0, :149]) and torch.equal(above, scores[0, :149])
    assert index.range_search(queries[:0], 0.5)[0].tolist() == [0]
    for wrong in (float("nan"), "0.5", None):
        with pytest.raises(ValueError, match="threshold: expected a number, got"):
            index.range_search(queries, wrong)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda index: pickle.loads(pickle.dumps(index))])
def test_a_copy_has_the_ids(make, copied):
    index = make(KEYS, IDS)
    other = copied(index)
    assert np.array_equal(other.search(QUERIES, 5)[1], index.search(QUERIES, 5)[1])
    assert np.array_equal(other.ids, IDS)


@pytest.mark.parametrize("mmap", [False, True])
def test_a_file_has_the_ids(tmp_path, mmap):
    index = uk.CosineIndex(KEYS[:200], ids=IDS[:200])
    index.add(KEYS[200:], IDS[200:])
    assert index.nbytes == uk.CosineIndex(KEYS).nbytes + 300 * 8
    index.save(tmp_path / "i")
    loaded = uk.CosineIndex.load(tmp_path / "i", mmap=mmap)
    assert np.array_equal(loaded.search(QUERIES, 50)[1], index.search(QUERIES, 50)[1])
    loaded.remove(IDS[:150])
    loaded.add(KEYS[:1], IDS[:1])
    assert loaded.ids.tolist() == [*IDS[150:], IDS[0]]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.arange(2), "expected the tensors"),
        (torch.arange(3).int(), "expected the tensors"),
        (torch.tensor([4, 5, 4]), "ids: expected each once, got 4 twice"),
        (torch.tensor([4, 5, -7]), "ids: expected integers of at least 0, .* got -7"),
    ],
)
def test_a_file_of_wrong_ids(tmp_path, wrong, message):
    uk.CosineIndex(KEYS[:3], ids=[1, 2, 3]).save(tmp_path / "i")
    header, tensors = files.load(tmp_path / "i", "index")
    files.save(tmp_path / "i", "index", header, tensors | {"ids": wrong})
    with pytest.raises(uk.ArtifactError, match=message):
        uk.CosineIndex.load(tmp_path / "i")
