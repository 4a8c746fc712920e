"""Which edits act in a row, decided from keys: against the rule by hand."""

from types import SimpleNamespace

import pytest
import torch

from unike_kernels.nn.routing import Route, Router, Seen, behind_prompts
from unike_kernels.ops.prompt_encoder import PromptEncoder, TextBlock, Vocabulary

E, C = 8, 16


def make_router(others=None, facts=None, threshold=0.1, same_fact=1.9, own=None):
    block = TextBlock(
        torch.randn(3, E), torch.randn(3, 256), torch.randn(3), torch.randn(3, 3, 3), torch.randn(3),
        torch.randn(2, 3), torch.randn(2), torch.randn(C, E), torch.randn(C, 256),
    )  # fmt: skip
    encoder = PromptEncoder(torch.zeros(E), torch.ones(E), (block,))
    others = torch.zeros(0, C) if others is None else others
    facts = torch.arange(len(others)) if facts is None else torch.tensor(facts)
    return Router("scope", encoder, Vocabulary((" a",)), (), others, facts, threshold, same_fact, own)


def decided(router, keys, rows):
    return router.explained(router.decide(keys, rows))


def unit(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


def axis(*numbers):
    """Unit vectors along these axes."""
    return torch.eye(C)[list(numbers)]


def by_hand(key, entries, names, others, facts, threshold):
    """entries: edit -> [n, C]; names: those the row may use, None for all."""
    own = {n: float((e @ key).max()) for n, e in entries.items() if names is None or n in names}
    if not own:
        return None, None, None
    nearest = max(own, key=own.get)
    rivals = [(v, n) for n, v in own.items() if n != nearest]
    rivals += [(float(o @ key), f) for o, f in zip(others, facts, strict=True)]
    rival, other = max(rivals, key=lambda pair: pair[0]) if rivals else (0.0, None)
    return (nearest if own[nearest] - rival > threshold else None), nearest, other


@pytest.mark.parametrize("others", [0, 1, 30])
def test_rows_of_different_edits(others):
    rest, facts = unit(others, C), [i // 2 for i in range(others)]
    router, entries = make_router(rest, facts), {}
    for name, n in (("a", 3), ("b", 1), ("c", 5), ("d", 2)):
        entries[name] = unit(n, C)
        router = router.with_edits({name: entries[name]})
    rows = [None, ("a",), (), ("b", "c"), ("c", "b"), ("d",), ("a", "b", "c", "d"), ("unknown",)] * 12
    near = torch.cat([*entries.values(), rest]).repeat(9, 1)[: len(rows)]
    keys = torch.nn.functional.normalize(near + unit(len(rows), C), dim=-1)
    routes = decided(router, keys, rows)
    acted = set()
    for route, key, names in zip(routes, keys, rows, strict=True):
        wanted = by_hand(key, entries, names, rest, facts, 0.1)
        assert (route.edit, route.nearest, route.other) == wanted and route.threshold == 0.1
        if route.nearest is not None:
            assert route.score == pytest.approx(float((entries[route.nearest] @ key).max()), abs=1e-6)
            assert route.margin == pytest.approx(route.score - route.other_score)
        acted.add(route.edit)
    assert {"a", None} < acted


def test_many_rows_and_many_edits():
    """A key is decided alone: the same whatever rows are beside it."""
    rest = unit(50, C)
    router = make_router(rest, threshold=0.05)
    entries = {f"e{i}": unit(1 + i % 3, C) for i in range(60)}
    for name, own in entries.items():
        router = router.with_edits({name: own})
    near = torch.cat([own[:1] for own in entries.values()]) + 0.1 * unit(60, C)
    keys = torch.nn.functional.normalize(near, dim=-1).repeat(9, 1)
    routes = decided(router, keys, [None] * 540)
    assert routes == [*decided(router, keys[:270], [None] * 270), *decided(router, keys[270:], [None] * 270)]
    assert routes[:60] == routes[60:120]
    for route, key in zip(routes[:60], keys, strict=False):
        assert (route.edit, route.nearest, route.other) == by_hand(key, entries, None, rest, range(50), 0.05)
    assert {route.edit for route in routes} - {None}


def test_no_edits_and_no_other_facts():
    nothing = Route(None, None, 0.0, None, 0.0, 0.1)
    assert decided(make_router(), axis(0), [None]) == decided(make_router(axis(0)), axis(0), [("a",)]) == [nothing]
    assert decided(make_router(), axis(), []) == []
    router = make_router().with_edits({"a": axis(0)})
    far, near = decided(router, torch.stack([axis(1)[0], axis(0)[0]]), [None, None])
    assert (near.edit, near.other, near.other_score, near.margin) == ("a", None, 0.0, 1.0)
    assert (far.edit, far.nearest, far.margin) == (None, "a", 0.0)


def test_a_tie_is_nobodys():
    """Two edits as near, or an edit and a fact: the margin is 0. At the threshold itself no edit acts."""
    two = make_router(threshold=0.0).with_edits({"a": axis(0)}).with_edits({"b": axis(0)})
    assert [r.edit for r in decided(two, axis(0), [None])] == [None]
    assert [r.edit for r in decided(two, axis(0, 0), [("a",), ("b",)])] == ["a", "b"]
    fact = make_router(axis(0), threshold=0.0).with_edits({"a": axis(0)})
    (route,) = decided(fact, axis(0), [None])
    assert route.edit is None and route.other == 0 and route.margin == 0.0
    at = make_router(threshold=1.0).with_edits({"a": axis(0)})
    assert decided(at, axis(0), [None])[0].edit is None


def test_an_edits_own_entries_are_no_rivals():
    """All of the nearest ones may be its own; the best of another edit still counts."""
    near = torch.nn.functional.normalize(axis(0).repeat(4, 1) + 0.05 * unit(4, C), dim=-1)
    beside = torch.nn.functional.normalize(axis(0) + 0.8 * axis(1), dim=-1)
    router = make_router(threshold=0.1).with_edits({"one": near}).with_edits({"two": beside})
    (route,) = decided(router, axis(0), [None])
    assert route.edit == "one" and route.other == "two" and route.other_score == pytest.approx(float(beside[0, 0]))


def test_a_newer_edit_of_a_fact_takes_the_place():
    slightly = torch.nn.functional.normalize(axis(0) + 0.1 * axis(1), dim=-1)
    first = make_router(axis(5), same_fact=0.5).with_edits({"old": axis(0)}).with_edits({"other": axis(2)})
    router = first.with_edits({"new": slightly})
    assert router.replaced == {"old": "new"} and not first.replaced
    assert [r.edit for r in decided(router, axis(0, 0, 2), [None, ("old", "other"), None])] == ["new", "old", "other"]
    assert decided(router, axis(0), [("new", "old")])[0].edit == "new"
    newest = router.with_edits({"newest": axis(0)})
    assert newest.replaced == {"old": "new", "new": "newest"}
    assert decided(newest, axis(0), [None])[0].edit == "newest"
    assert decided(newest.without("newest"), axis(0), [None])[0].edit == "new"
    assert decided(newest, axis(0), [("old", "newest")])[0].edit == "newest"
    assert newest.without("new").replaced == {"old": "newest"}
    assert decided(newest.without("new"), axis(0), [None])[0].edit == "newest"
    assert decided(router.without("new"), axis(0), [None])[0].edit == "old"
    assert decided(router, axis(0), [None])[0].edit == "new"  # which it leaves as it was
    assert (
        make_router(axis(5)).with_edits({"old": axis(0)}).with_edits({"new": slightly}).replaced == {}
    )  # same_fact is 1.9


def test_a_fact_that_an_edit_is_about_is_no_rival():
    others = torch.cat([axis(0), torch.nn.functional.normalize(axis(0) + 0.2 * axis(1), dim=-1), axis(3)])
    router = make_router(others, [7, 7, 4], same_fact=0.5).with_edits({"a": axis(0)})
    assert router.retired == {"a": 7} and not router.replaced
    (route,) = decided(router, axis(0), [None])
    assert route.edit == "a" and route.other == 4
    both = router.with_edits({"b": axis(9)})
    assert both.retired == {"a": 7}
    assert decided(both, axis(0), [("b",)])[0].other == 7  # where a may not act, it is one
    assert both.without("a").retired == {} and decided(both.without("a"), axis(0), [None])[0].other == 7
    ambiguous = make_router(others, [7, 8, 4], same_fact=0.5).with_edits({"a": axis(0)})
    assert ambiguous.retired == {} and decided(ambiguous, axis(0), [None])[0].edit is None
    unsure = make_router(others[1:], [8, 4], same_fact=0.99).with_edits({"a": axis(0)})
    assert unsure.retired == {} and decided(unsure, axis(0), [None])[0].edit is None


def test_the_newer_edit_of_a_fact_of_the_memory():
    """It is about what the older one was about, with that one or without."""
    router = make_router(axis(0, 3), same_fact=0.5).with_edits({"a": axis(0)}).with_edits({"b": axis(0)})
    assert router.replaced == {"a": "b"} and router.retired == {"a": 0, "b": 0}
    assert [r.edit for r in decided(router, axis(0, 0, 0), [None, ("b",), ("a",)])] == ["b", "b", "a"]
    assert decided(router.without("a"), axis(0), [None])[0].edit == "b"
    assert decided(router.without("b"), axis(0), [None])[0].edit == "a"


def test_edits_that_come_together_are_as_those_that_come_one_by_one():
    rest = unit(6, C)
    near = torch.nn.functional.normalize(axis(0) + 0.1 * axis(1), dim=-1)
    edits = {"a": axis(0), "b": rest[:1], "c": near, "d": unit(2, C), "e": near}
    router = one = make_router(rest, [0, 0, 1, 1, 2, 3], same_fact=0.9)
    for name, own in edits.items():
        one = one.with_edits({name: own})
    both = router.with_edits(edits)
    assert (both.replaced, both.retired, both.names) == (one.replaced, one.retired, one.names)
    assert both.replaced == {"a": "c", "c": "e"} and torch.equal(both.entries, one.entries)
    assert both.owner.tolist() == one.owner.tolist() == [0, 1, 2, 3, 3, 4]
    keys = torch.cat([*edits.values(), rest])
    assert decided(both, keys, [None] * 12) == decided(one, keys, [None] * 12)
    assert router.with_edits({}).names == []


def test_what_was_kept_of_candidates_is_forgotten():
    router = make_router(axis(5))
    for i in range(4):
        router = router.with_edits({f"e{i}": axis(i)})
    for i in range(200):
        decided(router, axis(0), [(f"e{i % 4}", f"x{i}")])
    assert len(router._tables) <= 64
    before = decided(router, axis(0), [("e0", "e1")])
    assert decided(router.to(torch.float32), axis(0), [("e0", "e1")]) == before
    assert len(router._tables) == 1


def test_a_route_says_why():
    assert str(Route(None, None, 0.0, None, 0.0, 0.1)) == "no edit acts: the row may use none"
    assert str(Route("a", "a", 0.9, None, 0.0, 0.1)) == (
        "'a' acts: cosine with 'a' 0.900, the memory has no other facts: margin 0.900, above the threshold 0.100"
    )
    assert str(Route(None, "a", 0.9, "b", 0.85, 0.1)) == (
        "no edit acts: cosine with 'a' 0.900, edit 'b' 0.850: margin 0.050, at most the threshold 0.100"
    )
    assert str(Route("a", "a", 0.9, 12, 0.25, 0.1)) == (
        "'a' acts: cosine with 'a' 0.900, fact 12 of the memory 0.250: margin 0.650, above the threshold 0.100"
    )


def test_the_tokens_behind_prompts():
    assert behind_prompts(torch.tensor([2, -1, 3, 9]), 4).view(4, 4).tolist() == [
        [4, 4, 0, 0], [1, 1, 1, 1], [4, 4, 4, 2], [4, 4, 4, 4]
    ]  # fmt: skip


def test_facts_with_entries_of_their_own_act():
    """Where they win as an edit would, and no edit does; edits of their fact take their place."""
    own = torch.tensor([[0, 2], [2, 3], [0, 0]])
    block = make_router(axis(0, 1, 2), threshold=0.1, same_fact=0.9, own=own)
    keys = torch.cat([axis(0, 1, 2, 3), torch.nn.functional.normalize(axis(0) + axis(1), dim=-1)])
    found = block.decide(keys, [None] * 5)
    assert found.fact.tolist() == [0, 1, -1, -1, -1] and found.acts.tolist() == [-1] * 5
    routed = block._routed(found)
    assert routed.entries.tolist() == [[0, 2], [2, 3], [0, 0], [0, 0], [0, 0]] and not routed.idle()
    assert routed.with_none().entries.tolist()[5:] == [[0, 0]] and routed.idle({"a"})
    assert [r.fact for r in block.explained(found)] == [0, 1, None, None, None]
    edited = block.with_edits({"a": axis(0), "b": axis(3)})
    found = edited.decide(keys, [None, None, None, None, ("b",)])
    assert found.acts.tolist() == [0, -1, -1, 1, -1] and found.fact.tolist() == [-1, 1, -1, -1, -1]
    assert edited._routed(found).entries.tolist() == [[-1, -1], [2, 3], [0, 0], [-1, -1], [0, 0]]
    assert edited.decide(axis(0, 0), [(), ("b",)]).fact.tolist() == [0, 0]  # where a may not act
    two = make_router(torch.cat([axis(0), axis(0), axis(1)]), facts=[0, 0, 1], own=own[:2])
    assert two.decide(axis(0), [None]).fact.tolist() == [0]  # two entries of one fact are no rivals


@pytest.mark.parametrize("copies", [1, 2])
def test_a_fact_without_a_rival_must_be_near_enough(copies):
    """By the threshold alone, above and below it."""
    router = make_router(axis(0).repeat(copies, 1), facts=[0] * copies, threshold=0.5, own=torch.tensor([[0, 2]]))
    keys = torch.nn.functional.normalize(axis(0, 0, 1) + torch.tensor([[1.0], [0.3], [0.0]]) * axis(1, 1, 1), dim=-1)
    assert router.decide(keys, [None] * 3).fact.tolist() == [0, 0, -1]


def test_a_later_pass_may_have_several_rows_a_prompt():
    router = make_router(axis(1)).with_edits({"a": axis(0)})
    seen = Seen(key=axis(0, 1), ended=torch.tensor([True, True]), scope="scope")
    now = SimpleNamespace(generation=SimpleNamespace(seen=seen), selection=SimpleNamespace(edits=None))
    assert [router.routes(now, rows)[1].acts.tolist() for rows in (2, 4)] == [[0, -1], [0, 0, -1, -1]]
