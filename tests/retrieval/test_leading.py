"""Leading directions: where they are found, and that a search by them finds what any search does."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import unike_kernels as uk
from unike_kernels import _native
from unike_kernels.ops.cosine_topk import cpu, leading, normalize_rows, pack_keys

pytestmark = pytest.mark.skipif(not _native.available(), reason="needs the native extension")
D, FEWEST = 192, 1500


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(leading, "FEWEST", FEWEST)


def near_a_space(n: int, seed: int = 0, tail: float = 0.02) -> torch.Tensor:
    """[n, D]: most of each in 40 dimensions that all share, something of all others, and of one direction."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(99))).Q
    size = torch.full((D,), tail)
    size[:40] = 1.0
    return (torch.randn(n, D, generator=generator) * size) @ axes + 0.1


def assert_the_same(index: uk.CosineIndex, keys: torch.Tensor, k: int = 17, most: int = 9) -> None:
    queries, plain = near_a_space(most, seed=7), uk.CosineIndex(keys, "float32")
    for m in range(1, most + 1):
        for ranges in (None, torch.tensor([[i * 100, len(keys) - i * 61] for i in range(m)])):
            got, expected = index.search(queries[:m], k, ranges=ranges), plain.search(queries[:m], k, ranges=ranges)
            assert torch.equal(got[1], expected[1]) and torch.equal(got[0], expected[0])


@pytest.fixture(scope="module")
def keys() -> torch.Tensor:
    return near_a_space(FEWEST + 30)


def test_keys_near_a_space_are_led(keys):
    assert uk.CosineIndex(keys)._leading is not None
    for other in (torch.randn(FEWEST, D), keys[: FEWEST - 1], keys[:, :64]):  # isotropic, few, narrow
        assert uk.CosineIndex(other)._leading is None
    assert uk.CosineIndex(keys, "bfloat16")._leading is uk.CosineIndex(keys, exact=False)._leading is None


def test_directions_are_at_right_angles(keys):
    for common in (True, False):
        rows = normalize_rows(keys - (0 if common else keys.mean(0)))
        direction = F.normalize(rows.mean(0), dim=0) if common else torch.zeros(D)
        found = leading.leading_directions(rows, direction)
        assert found is not None and torch.equal(found[0], direction)
        off = found.double() @ found.double().T - torch.eye(len(found))
        assert off[0 if common else 1 :, 0 if common else 1 :].norm() <= 2**-19 and off[0, 1:].norm() <= 2**-19


def test_what_is_found_is_the_same(keys):
    index = uk.CosineIndex(keys)
    assert_the_same(index, keys)
    assert_the_same(index, keys, k=len(keys) + 3, most=2)
    queries = torch.stack([torch.zeros(D), torch.full((D,), float("nan")), keys[3]])
    got, expected = index.search(queries, 5), uk.CosineIndex(keys, "float32").search(queries, 5)
    assert torch.equal(got[1], expected[1]) and torch.equal(got[0], expected[0])


@pytest.mark.parametrize("m", [1, 5])  # with all bits of the queries, with the high ones
def test_a_key_that_only_its_tail_tells(keys, m):
    """It is nowhere in the leading directions, where hundreds of others are closer to the query."""
    index = uk.CosineIndex(keys)
    assert index._leading is not None
    inside = index._leading.directions.double()
    outside = torch.randn(D, dtype=torch.float64)
    outside -= inside.T @ torch.linalg.solve(inside @ inside.T, inside @ outside)
    outside /= outside.norm()
    some = F.normalize(keys[0].double(), dim=0)
    query = (0.7 * some + 0.714 * outside).float()
    index.add(outside.float().unsqueeze(0))
    assert index._leading is not None
    found = index.search(query.expand(m, -1), 1)[1]
    both = torch.cat([keys, outside.float().unsqueeze(0)]).double()
    assert int(F.cosine_similarity(both, query.double().unsqueeze(0)).argmax()) == len(keys)
    assert found.tolist() == [[len(keys)]] * m


def directed(keys: torch.Tensor, directions: torch.Tensor) -> cpu.Keys:
    """Keys, float32 [n, d], with directions [1 + p, d] that nobody has chosen for them."""
    rows = normalize_rows(keys)
    packed = pack_keys(rows, "int8", directions[0].contiguous())
    assert packed is not None
    return cpu.Keys(rows, packed, leading.pack_leading(rows, directions))


@pytest.mark.parametrize("tail", [0.05, 0.1, 0.2, 0.4])
def test_directions_that_leave_much(tail):
    """Of a run of several tiles more keys are looked at again than a tile has."""
    keys, queries = near_a_space(FEWEST, tail=tail), near_a_space(3, 1, tail)
    axes = leading._principal(keys, torch.zeros(D), 64).float()
    index, threads = directed(keys, axes), torch.get_num_threads()
    torch.set_num_threads(1)  # which then has longer runs
    try:
        got, expected = index.search(queries, 5), uk.CosineIndex(keys, "float32").search(queries, 5)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(got[1], expected[1]) and torch.equal(got[0], expected[0])


def test_a_key_whose_codes_are_all_too_small():
    """By its codes it is below another key, whose codes are exact: only the bound of what they leave keeps it."""
    axes = torch.cat([torch.zeros(1, 64), torch.eye(64)])
    query = torch.ones(1, 64)
    exact, best = torch.ones(64), torch.full((64,), 20.49)
    exact[:5], best[0] = -1.0, 127.0
    others = torch.randn(FEWEST, 64)
    keys = torch.cat([others, exact.unsqueeze(0), best.unsqueeze(0)])
    cosines = F.cosine_similarity(keys.double(), query.double())
    rounded = F.cosine_similarity(best.floor().double(), query.double()) * best.floor().norm() / best.norm()
    assert cosines.argsort(descending=True)[:2].tolist() == [FEWEST + 1, FEWEST] and rounded < cosines[FEWEST]
    assert directed(keys, axes).search(query, 1)[1].tolist() == [[FEWEST + 1]]


def test_keys_come_and_go(keys):
    index, all_keys = uk.CosineIndex(keys), keys
    for count in (1, 33, 300, 1000):  # within a tile, into the next one, beyond the room, within the new one
        more = near_a_space(count, seed=count)
        index.add(more)
        all_keys = torch.cat([all_keys, more])
        assert index._leading is not None
        assert_the_same(index, all_keys, most=3)
    gone = torch.arange(0, len(all_keys), 3)
    index.remove(gone)
    keep = torch.ones(len(all_keys), dtype=torch.bool)
    keep[gone] = False
    assert index._leading is not None
    assert_the_same(index, all_keys[keep], most=3)
    assert_the_same(copy.deepcopy(index), all_keys[keep], most=3)


def test_an_index_that_grows_is_led_in_the_end(keys):
    index = uk.CosineIndex(D)
    for part in keys.split(300):
        index.add(part)
    index.add(near_a_space(len(keys), seed=3))
    assert index._leading is not None
    assert_the_same(index, torch.cat([keys, near_a_space(len(keys), seed=3)]), most=2)


def test_a_mapped_file_is_not_read_for_them(keys, tmp_path):
    index = uk.CosineIndex(keys)
    index.save(tmp_path / "keys.safetensors")
    assert uk.CosineIndex.load(tmp_path / "keys.safetensors")._leading is not None
    mapped = uk.CosineIndex.load(tmp_path / "keys.safetensors", mmap=True)
    assert mapped._leading is None
    assert_the_same(mapped, keys, most=2)
