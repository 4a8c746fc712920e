"""Scopes from facts in several wordings: they tell new facts apart, and a patched model reads keys as training did."""

from dataclasses import replace

import pytest
import torch
from configs import every_token

import unike_kernels as uk
from unike_kernels.serving import RaggedRuntime
from unike_kernels.training import (
    EditTraining,
    EncoderTraining,
    Fact,
    Sample,
    ScopeTraining,
    Triplet,
    build_memory,
    build_scope,
    extend_memory,
    extend_scope,
    prompt_keys,
    train_edit,
    with_entries,
)
from unike_kernels.training.samples import encode
from unike_kernels.training.scope import _pieces, _validated

FAST = ScopeTraining(steps=60, hidden=24, head_width=8, heads=2, subjects=8)
# What is asked of a subject, in words that the relations share, too.
RELATIONS = {
    "one": ["w20 w21 {}", "{} w22 w21", "w23 w20 {} w21"],
    "two": ["w20 w24 {}", "{} w22 w24", "w23 w20 {} w24"],
    "three": ["w20 w25 {}", "{} w22 w25", "w23 w20 {} w25"],
}


def facts(subjects=range(14), image=None):
    return [
        Fact([Sample(words.format(f"w{s}"), "", image) for words in wordings], f"w{s}", relation)
        for s in subjects
        for relation, wordings in RELATIONS.items()
    ]


def build(model, processor, of=None, training=FAST, **options):
    return build_scope(model, processor, of or facts(), training=training, progress=False, **options)


@pytest.fixture(scope="module")
def built(make_model, make_processor):
    model = make_model("llama")
    return model, build(model, make_processor())


def test_held_out_facts_are_told_apart(built):
    _, result = built
    scope = result.scope
    assert result.losses[-1] < 0.3 * result.losses[0] and len(result.losses) == 60
    assert result.reached > 0.6 and result.false_alarms <= 0.05
    assert scope.threshold <= scope.same_fact and scope.count == 42 and scope.layers == ()
    assert scope.facts.tolist() == [i for i in range(42) for _ in range(3)]
    assert scope.names[:2] == ("w20 w21 w0", "w20 w24 w0")
    assert not any(t.requires_grad for t in scope.tensors().values())
    assert f"scope {scope.id}: {result.reached:.1%} of held-out wordings" in str(result)


def tokenizer_of(*pieces):
    class Tokenizer:
        all_special_ids = (0,)

        def __len__(self):
            return len(pieces)

        def convert_ids_to_tokens(self, ids):
            return [pieces[i] for i in ids]

    return Tokenizer()


@pytest.mark.parametrize(
    ("pieces", "spelled"),
    [
        (("<s>", "Ġthe", "the", "<|im_start|>", "Ċ", "ĠĠ", None), ("", " the", "the", "", " ", "  ", "")),
        (("<s>", "▁the", "x", "<0x0A>"), ("", " the", "x", " ")),
        (("[PAD]", "the", "##x", "?", "<|end|>"), ("", " the", "x", " ?", "")),  # WordPiece
        (("<pad>", "w1", "w2"), ("", " w1", " w2")),  # whole words
    ],
)
def test_what_tokens_spell(pieces, spelled):
    assert _pieces(tokenizer_of(*pieces), 99) == spelled
    assert _pieces(tokenizer_of(*pieces), 2) == spelled[:2]  # the model has fewer


def test_facts_that_nobody_has_seen_reach_their_edit(built, processor):
    """Subjects of no fact; by the rule that the report's numbers are by."""
    model, result = built
    scope, new = result.scope, facts(range(14, 20))
    keys = prompt_keys(model, processor, scope, [w for fact in new for w in fact.wordings]).view(18, 3, -1)
    hits = alarms = 0
    for i in range(18):
        margins = keys @ keys[i, 0] - (keys @ scope.entries.T).amax(-1)
        hits += int((margins[i, 1:] > scope.threshold).sum())
        alarms += int((margins > scope.threshold).sum() - (margins[i] > scope.threshold).sum())
    assert hits > 0.6 * 36 and alarms < 0.1 * 18 * 51


def test_the_same_bits_for_the_same_seed(built, processor):
    model, result = built
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = build(model, processor)
    assert torch.equal(torch.get_rng_state(), before)
    assert again.losses == result.losses and again.scope.header() == result.scope.header()
    assert all(torch.equal(t, result.scope.tensors()[name]) for name, t in again.scope.tensors().items())
    other = build(model, processor, training=ScopeTraining(**{**vars(FAST), "seed": 1, "steps": 2}))
    assert other.losses[0] != result.losses[0]


def test_what_is_wrong(make_model, make_edit, processor):
    model, few = make_model("opt"), facts(range(1))
    with pytest.raises(ValueError, match="facts: expected at least three, got 2"):
        build(model, processor, few[:2])
    with pytest.raises(ValueError, match=r"facts\[2\].wordings: expected at least two, got 1"):
        build(model, processor, [*few[:2], Fact(few[2].wordings[:1])])
    with pytest.raises(ValueError, match="layers"):
        build(model, processor, layers=[6])
    wrong = {"steps": 0, "tau": -1.0, "blocks": 0, "wordings": 1, "held_out": 1.0, "false_alarms": -0.1}
    for field, value in wrong.items():
        with pytest.raises(ValueError, match=f"ScopeTraining.{field}: expected"):
            ScopeTraining(**{field: value})
    scope = build(model, processor, training=ScopeTraining(**{**vars(FAST), "steps": 1})).scope
    edit = make_edit(model, "a")
    with pytest.raises(ValueError, match="prompts: expected at least one"):
        prompt_keys(model, processor, scope, [])
    with uk.patched(model, [edit]):
        for call in (
            lambda: build(model, processor),
            lambda: prompt_keys(model, processor, scope, [Sample("w1", "")]),
            lambda: with_entries(model, processor, edit, scope, [Sample("w1", "")]),
            lambda: extend_scope(model, processor, scope, few),
        ):
            with pytest.raises(uk.PatchError, match="the model is patched"):
                call()


def test_what_held_out_prompts_tell():
    """Those that share a subject or a relation; facts of which neither is known are nobody's, unless all are."""
    sample = Sample("w1", "")
    of = [Fact([sample], "s", "r"), Fact([sample], "s", "q"), Fact([sample]), Fact([sample]), Fact([sample], "t", "r")]
    keys = torch.nn.functional.normalize(torch.randn(11, 8), dim=-1)
    numbers, taught = torch.arange(11) // 2 % 5, torch.arange(11) == 10
    right, wrong, alike = _validated(keys, numbers, taught, of)
    rival = keys[:10] @ keys[10]
    pairs = [(i, j) for i in range(10) for j in range(10) if i != j]
    margin = {(i, j): keys[i] @ keys[j] - rival[i] for i, j in pairs}
    own = [margin[i, j] for i, j in pairs if i // 2 == j // 2]
    near = [margin[i, j] for i, j in pairs if {i // 2, j // 2} in ({0, 1}, {0, 4})]
    torch.testing.assert_close(right, torch.stack(own))
    torch.testing.assert_close(wrong, torch.stack(near))
    assert alike == pytest.approx(
        max(float(keys[i] @ keys[j]) for i in range(10) for j in range(11) if i // 2 != j // 2)
    )
    unnamed = _validated(keys, numbers, taught, [Fact([sample])] * 5)[1]
    torch.testing.assert_close(unnamed, torch.stack([margin[i, j] for i, j in pairs if i // 2 != j // 2]))


def test_few_facts_have_nothing_held_out(make_model, processor):
    """Nothing is known of such a scope: no edit of it is refused as a false alarm."""
    result = build(make_model("opt"), processor, facts(range(1)), ScopeTraining(**{**vars(FAST), "steps": 2}))
    scope = result.scope
    assert (scope.threshold, scope.same_fact, result.reached, result.false_alarms) == (0.0, 1 - 1e-5, 0.0, 0.0)


@pytest.mark.parametrize(
    ("kind", "given", "layers"),
    [("llama", None, ()), ("llama", [2, 4], (2, 4)), ("blip2-opt", None, (1, 2)), ("blip2-llama", [], ())],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_patched_model_computes_the_same_keys(make_model, make_processor, make_edit, kind, given, layers, side):
    """In a pass over prompts of different lengths."""
    model, processor = make_model(kind), make_processor(side)
    image = torch.rand(16, 16) if kind.startswith("blip2") else None
    brief = ScopeTraining(**{**vars(FAST), "steps": 3})
    result = build(model, processor, facts(range(6), image), brief, layers=given)
    scope = result.scope
    assert scope.layers == layers and (scope.encoder.states is None) == (not layers)
    images = [None if image is None else torch.rand(16, 16) for _ in range(4)]
    prompts = ["w20 w21 w3", "w7 w22 w24", "w23 w20 w9 w25 w1 w2", "w5"]
    samples = [Sample(p, "", i) for p, i in zip(prompts, images, strict=True)]
    keys = prompt_keys(model, processor, scope, samples, batch_size=2)
    assert keys.shape == (4, scope.encoder.width) and not keys.requires_grad
    torch.testing.assert_close(keys.norm(dim=-1), torch.ones(4))
    config = uk.Config(scope="memory")
    plain = [make_edit(model, prompt, config=config, layers=(4, 5)) for prompt in prompts]
    edits = [with_entries(model, processor, edit, scope, [s]) for edit, s in zip(plain, samples, strict=True)]
    torch.testing.assert_close(keys, torch.cat([edit.entries for edit in edits]), rtol=0, atol=2e-6)  # each alone
    batch = encode(processor, samples)
    with uk.patched(model, edits, result.memory(model)), uk.explain(model) as trace, torch.no_grad():
        model(**batch.inputs)
    for prompt, route in zip(prompts, trace.routes[0], strict=True):
        assert route.nearest == prompt and route.score == pytest.approx(1, abs=2e-6)


def test_entries_and_further_facts(built, make_edit, processor):
    model, result = built
    scope, edit = result.scope, make_edit(model, "a", config=uk.Config(scope="memory"))
    samples = [Sample("w20 w21 w15", ""), Sample("w15 w22 w21", "")]
    own = with_entries(model, processor, edit, scope, samples)
    assert own.entries.shape == (2, scope.encoder.width) and own.scope_id == scope.id and edit.entries is None
    assert own.layers == edit.layers
    further = facts(range(14, 16))
    more = extend_scope(model, processor, scope, further)
    assert more.id == scope.id and more.count == 48 and scope.count == 42
    assert more.names == (*scope.names, *(fact.name for fact in further)) and more.threshold == scope.threshold
    assert more.facts[-18:].tolist() == [42 + i for i in range(6) for _ in range(3)]
    torch.testing.assert_close(more.entries[-9], own.entries[0], rtol=0, atol=1e-5)  # "w20 w21 w15" again


# --- edits ----------------------------------------------------------------------------------------------------------

REQUEST = Sample("w20 w21 w15", "w30 w31")
EDIT = EditTraining(neurons=4, lr=5e-2, steps=60)


@torch.no_grad()
def said(model, processor, prompt, words=2):
    ids = processor([prompt], padding=True)
    out = model.generate(**ids, max_new_tokens=words, min_new_tokens=words, do_sample=False)
    return processor.decode(out[0, ids["input_ids"].shape[1] :])


@torch.no_grad()
def logits(model, processor, prompt):
    return model(**processor([prompt], padding=True)).logits


def test_an_edit_with_a_scope(built, processor):
    model, result = built
    memory, base = result.memory(model), said(model, processor, REQUEST.prompt)
    assert memory.config == uk.Config(scope="memory") and memory.notes == {"facts": "42"} and not memory.layers
    others = ["w20 w24 w15", "w20 w21 w14", "w3 w4 w5"]
    before = {p: logits(model, processor, p) for p in others}
    keep = [Sample("w20 w24 w15", "w8"), Sample("w1 w2", "w9")]
    made = train_edit(model, processor, REQUEST, memory, id="first", training=EDIT, preserve=keep, progress=False)
    edit = made.edit
    assert made.reached and edit.memory_id is None and edit.scope_id == memory.scope.id
    assert edit.config.scope == "memory" and edit.notes["prompt"] == REQUEST.prompt
    assert torch.equal(edit.entries, prompt_keys(model, processor, memory.scope, [REQUEST]))
    second = train_edit(
        model, processor, Sample("w20 w21 w16", "w33 w34"), memory, id="second", previous=[edit], protect=[REQUEST],
        training=EDIT, progress=False,
    ).edit  # fmt: skip
    with uk.patched(model, [edit, second], memory) as report:
        assert said(model, processor, REQUEST.prompt) == "w30 w31" != base
        assert said(model, processor, "w20 w21 w16") == "w33 w34"
        for prompt in others:
            with uk.explain(model) as trace:
                assert torch.equal(logits(model, processor, prompt), before[prompt])
            assert trace.routes[0][0].edit is None
    assert "an edit acts where its entry wins against 42 other facts" in str(report) and report.facts == 42


def test_an_edit_with_a_scope_and_tables(built, make_memory, processor):
    """What it was trained with is the memory of tables, as ever."""
    model, result = built
    tables = make_memory(model)
    config = every_token(k=7, values="pre", scope="memory")
    memory = uk.MemoryBank(tables.layers, config, tables.base_model, scope=result.scope)
    made = train_edit(model, processor, REQUEST, memory, training=EDIT, progress=False)
    assert made.reached and made.edit.memory_id == memory.id == tables.id and sorted(made.edit.layers) == [2, 3, 4, 5]
    with uk.patched(model, [made.edit], memory):
        assert said(model, processor, REQUEST.prompt) == "w30 w31"


def test_a_function_of_the_users_own(make_model, processor, make_edit, tmp_path):
    """Which knows the words that matter makes the keys in the place of an encoder."""
    model, seen = make_model("llama"), []
    matter = {processor.tokenizer.convert_tokens_to_ids(f"w{s}") for s in (*range(20), 21, 24, 25)}

    def key(prompts):
        seen.extend(prompts)
        found = torch.zeros(len(prompts), 44)
        for row, ids in enumerate(prompts):
            found[row, ids] = 0.1
            found[row, [i for i in ids if i in matter]] = 1
        return found.double()

    result = build(model, processor, key=key)
    scope = result.scope
    assert result.reached == 1 and scope.encoder is None and scope.width == 44 and len(scope.samples) == 8
    assert not result.losses and scope.key is key and not scope.pieces
    trained = train_edit(model, processor, REQUEST, result.memory(model), training=EDIT, progress=False)
    result.memory(model).save(path := tmp_path / "m.safetensors")
    memory = uk.MemoryBank.load(path)
    with pytest.raises(ValueError, match=r"give it: memory\.with_key"):
        uk.patch(model, [trained.edit], memory)
    assert not uk.is_patched(model)
    seen.clear()
    with uk.patched(model, [trained.edit], memory.with_key(key)):
        before = len(seen)
        assert said(model, processor, REQUEST.prompt) == "w30 w31"
        with uk.explain(model) as trace:
            logits(model, processor, "w20 w21 w14")
        assert trace.routes[0][0].edit is None and before == 8
    ids = processor([REQUEST.prompt], padding=True)["input_ids"][0].tolist()
    assert ids in seen
    with pytest.raises(ValueError, match="layers: expected none where a key is given"):
        build(model, processor, key=key, layers=[2])
    with pytest.raises(ValueError, match="key: expected prompts without images"):
        build(model, processor, facts(image=torch.rand(16, 16)), key=key)
    with pytest.raises(ValueError, match="key: expected keys of one width"):
        build(model, processor, key=lambda prompts: torch.ones(len(prompts), 1 + len(prompts)), batch_size=100)


def test_a_memory_that_edits_by_itself(built, processor, tmp_path):
    """In a row whose prompt asks for a triplet's fact its entries act alone; other rows are the unedited model's."""
    model, result = built
    phrases = [("w20 w21 w15", "w30 w31"), ("w20 w21 w17", "w32"), ("w20 w21 w18", "w33"), ("w20 w24 w19", "w34 w35")]
    triplets = [Triplet(prompt, answer, "w1") for prompt, answer in phrases]
    config = every_token(
        k=4, values="context", scope="memory", tokens="answer", scale="cosine", norm="none", alpha=1.0
    )  # fmt: skip
    brief = EncoderTraining(steps=2)
    options = {"config": config, "layers": [1, 2, 3, 4, 5], "training": brief, "progress": False}
    memory = build_memory(model, processor, triplets[:3], scope=result.scope, **options).memory
    assert memory.scope.own[-3:].tolist() == [[0, 2], [2, 3], [3, 4]] and not memory.scope.own[:-3].any()
    assert memory.scope.count == 45 and memory.scope.names[-1] == "w20 w21 w18"
    more = extend_memory(model, processor, memory, triplets[2:], progress=False)
    assert more.scope.own[-4:].tolist() == [[0, 2], [2, 3], [4, 5], [5, 7]]  # of two of one fact the newer
    silent = extend_memory(model, processor, memory, triplets[2:], keep_texts=False, progress=False)
    assert silent.texts == (*memory.texts, "", "", "") and more.texts == (*memory.texts, *more.texts[-3:])
    assert (silent.scope.names[-1], more.scope.names[-1]) == ("", "w20 w24 w19")
    more.save(path := tmp_path / "m.safetensors")
    more = uk.MemoryBank.load(path)
    base = {prompt: logits(model, processor, prompt) for prompt, _ in [*phrases, ("w3 w4 w5", "")]}
    wanted = {}
    for prompt, (start, end) in zip(base, [(0, 2), (2, 3), (4, 5), (5, 7)], strict=False):
        alone = {
            i: replace(m, index=m.index[start:end], keys=m.keys[start:end], values=m.values[start:end])
            for i, m in more.layers.items()
        }
        with uk.patched(
            model, [], replace(more, layers=alone, config=replace(config, scope="all"), scope=None, texts=None)
        ):
            wanted[prompt] = logits(model, processor, prompt)
    acted = 0
    with uk.patched(model, [], more):
        for number, prompt in enumerate(base):
            with uk.explain(model) as trace:
                found = logits(model, processor, prompt)
            (route,) = trace.routes[0]
            assert route.fact in (None, 42 + number)
            torch.testing.assert_close(found, base[prompt] if route.fact is None else wanted[prompt])
            assert torch.equal(found[:, :-1], base[prompt][:, :-1])
            if route.fact is None:
                assert torch.equal(found, base[prompt])
            else:
                acted += 1
                assert not torch.allclose(found, base[prompt], atol=1e-2) and "acts, and no edit" in str(route)
    assert acted >= 2
    trained = train_edit(model, processor, REQUEST, more, training=EDIT, progress=False)
    with uk.patched(model, [trained.edit], more), uk.explain(model) as trace:
        assert said(model, processor, REQUEST.prompt) == "w30 w31"
    assert {(route.edit, route.fact) for routes in trace.routes for route in routes} == {(trained.edit.id, None)}
    with pytest.raises(ValueError, match="memory: its entries act by themselves"):
        RaggedRuntime([2], 64, "silu", more)
