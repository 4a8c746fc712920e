"""The exact answer, and that nothing else passes for it."""

import pytest
import torch
from unike_bench.cases import truth
from unike_bench.cases.truth import Truth

from unike_kernels import ops
from unike_kernels.ops.cosine_topk import reference

K = 5


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """So that a few keys make several."""
    monkeypatch.setattr(truth, "_CHUNK", 16)
    monkeypatch.setattr(truth, "_QUERIES", 4)


def unit_rows(queries=20, keys=50):
    """Queries, and keys each twice, so that ties are everywhere."""
    rows = reference.normalize_rows(torch.randn(keys // 2, 24).repeat(2, 1))
    return reference.normalize_rows(torch.randn(queries, 24)), rows


def answer(unit, rows):
    """The truth, and what the definition says."""
    scores, ids = reference.cosine_topk(unit, rows, K, normalized=True)
    return Truth(rows, unit, K), scores, ids


def test_is_the_best_in_float64():
    unit, rows = unit_rows()
    found, scores, _ = answer(unit, rows)
    torch.testing.assert_close(found.scores.float(), scores)
    behind = (unit.double() @ rows.double().T).sort(1, descending=True).values[:, K]
    torch.testing.assert_close(found.next, behind)


@pytest.mark.parametrize("queries", [1, 8, 20])
def test_the_canonical_answer_passes(queries):
    found, scores, ids = answer(*unit_rows(queries))
    found.check_exact(scores, ids)
    assert found.check_peer(ids.flip(1)) == found.recall(ids) > 0.4  # another one of a pair is no worse


def test_no_more_keys_than_asked_for():
    unit, rows = unit_rows(3, keys=6)
    found, scores, ids = answer(unit, rows[:K])
    found.check_exact(scores, ids)
    assert found.next.tolist() == [float("-inf")] * 3


def swap_tie(scores, ids):
    ids[0, 0], ids[0, 1] = ids[0, 1].clone(), ids[0, 0].clone()


def swap_ranks(scores, ids):
    ids[0, 1], ids[0, 2] = ids[0, 2].clone(), ids[0, 1].clone()


def other_key(scores, ids):
    ids[0, K - 1] = next(i for i in range(25) if i not in ids[0] and i + 25 not in ids[0])


def last_bit(scores, ids):
    scores[0, 0] = torch.nextafter(scores[0, 0], torch.tensor(2.0))


def far_score(scores, ids):
    scores[-1, 0] += 1e-5


def twice(scores, ids):
    ids[0, 1] = ids[0, 0]


def none(scores, ids):
    ids[0, 0] = -1


def beyond(scores, ids):
    ids[0, 0] = 50


@pytest.mark.parametrize("spoil", [swap_tie, swap_ranks, other_key, last_bit, far_score, twice, none, beyond])
def test_any_other_answer_is_caught(spoil):
    found, scores, ids = answer(*unit_rows(8))
    assert scores[0, 0] == scores[0, 1]
    spoil(scores, ids)
    with pytest.raises(AssertionError):
        found.check_exact(scores, ids)


@pytest.mark.parametrize("spoil", [other_key, twice, none, beyond])
def test_a_peers_wrong_ids_are_caught(spoil):
    found, scores, ids = answer(*unit_rows())
    spoil(scores, ids)
    with pytest.raises(AssertionError):
        found.check_peer(ids)


def test_recall():
    rows = ops.normalize_rows(torch.randn(30, 8))
    found = Truth(rows, rows[:2], K)
    ids = found.ids.clone()
    others = [[i for i in range(30) if i not in row] for row in ids.tolist()]
    ids[0, :2] = torch.tensor(others[0][:2])
    ids[1, 0] = others[1][0]
    assert found.recall(ids) == pytest.approx(0.7)
    with pytest.raises(AssertionError, match=r"expected ids \[2, 5\], got \[2, 4\]"):
        found.recall(ids[:, :4])
