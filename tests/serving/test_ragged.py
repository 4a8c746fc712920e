"""Steps of flat tokens, in which each request has its own edits: against each request alone."""

import random
from dataclasses import replace

import pytest
import torch
from configs import every_token
from scopes import CONFIG, PROMPTS, scoped

import unike_kernels as uk
from unike_kernels.artifacts.edit import EditLayer
from unike_kernels.serving import EditRepository, RaggedRuntime, RequestSlice, Version

D, LAYERS = 64, [2, 3]


@pytest.fixture
def versions(make_model, make_edit):
    model = make_model("llama")
    made = {name: make_edit(model, name, seed=i, layers=LAYERS, gated=i == 1) for i, name in enumerate("abcd")}
    return {name: Version(f"{name}@1", edit) for name, edit in made.items()}


def flat(versions, **kwargs):
    model = RaggedRuntime(LAYERS, D, "silu", **kwargs)
    for version in versions.values():
        model.hold(version)
    return model


def alone(x, base, edits, layer):
    """base + the neurons, by hand and token by token."""
    out = base.clone()
    for edit in edits:
        e: EditLayer = edit.layers[layer]
        o = torch.nn.functional.silu(x @ e.keys.T + e.key_bias)
        if e.up is not None:
            o = o * (x @ e.up.T + e.up_bias)
        out = out + o @ (e.values + e.beta * e.zeta)
    return out


SHARES = [
    RequestSlice(1, ("a@1",)), RequestSlice(1), RequestSlice(1, ("b@1", "a@1")),  # decoding
    RequestSlice(5, ("c@1",)), RequestSlice(4), RequestSlice(1, ("d@1",)), RequestSlice(0, ("a@1",)),
    RequestSlice(2, ("d@1", "b@1")),
]  # fmt: skip


@pytest.fixture(params=["by the dispatcher", "directly"])
def either_way(request):
    """With gradients asked for, and without, as engines call it."""
    with torch.set_grad_enabled(request.param == "by the dispatcher"):
        yield


@pytest.mark.usefixtures("either_way")
def test_each_request_gets_its_own_edits(versions):
    model = flat(versions)
    total = sum(share.tokens for share in SHARES)
    x, base = torch.randn(total + 3, D), torch.randn(total + 3, D)
    for layer in LAYERS:
        out = base.clone()
        model.begin(SHARES)
        model.ffn(layer, x, out)
        start = 0
        for share in SHARES:
            part = slice(start, start + share.tokens)
            edits = [versions[key[0]].edit for key in share.edits]
            torch.testing.assert_close(out[part], alone(x[part], base[part], edits, layer), atol=1e-5, rtol=1e-5)
            if not edits:
                assert torch.equal(out[part], base[part])
            start += share.tokens
        assert torch.equal(out[start:], base[start:])  # padding
        model.end()
        model.ffn(layer, x, out := base.clone())
        assert torch.equal(out, base)


@pytest.mark.usefixtures("either_way")
def test_no_request_depends_on_another_ones_edits(versions):
    """The same bits when the other requests' edits are taken away or replaced."""
    model = flat(versions)
    total = sum(share.tokens for share in SHARES)
    x, base = torch.randn(total, D), torch.randn(total, D)

    def run(shares):
        model.begin(shares)
        model.ffn(2, x, out := base.clone())
        return out

    mixed, start = run(SHARES), 0
    for i, share in enumerate(SHARES):
        part = slice(start, start + share.tokens)
        for others in ((), ("d@1",), ("c@1", "a@1")):
            shares = [s if i == j else replace(s, edits=others) for j, s in enumerate(SHARES)]
            assert torch.equal(run(shares)[part], mixed[part])
        start += share.tokens


def test_stages_of_a_pipeline_have_what_they_compute(make_model, make_edit, make_memory):
    """Their own layers' neurons and tables alone, and together the bits of one that has all layers."""
    model = make_model("llama")
    memory = make_memory(model, every_token(k=7, values="out", alpha=0.4), layers=LAYERS)
    held = [Version(f"{i}@1", make_edit(model, i, memory, seed=n, layers=LAYERS)) for n, i in enumerate("ab")]
    whole, first, second = (RaggedRuntime(LAYERS, D, "silu", memory, own=own) for own in (None, [0, 1, 2], [3, 4]))
    shares = [RequestSlice(3, ("a@1",)), RequestSlice(2, memory=False), RequestSlice(4, ("b@1", "a@1"))]
    x, base = torch.randn(2, 9, D)
    for runtime in (whole, first, second):
        for version in held:
            runtime.hold(version)
        runtime.begin(shares)
    for layer, stage, other in ((2, first, second), (3, second, first)):
        assert stage.layers == stage.remembering == stage.bank.layers == [layer]
        for compute in ("ffn", "attention"):
            wanted, found, left = base.clone(), base.clone(), base.clone()
            for runtime, out in ((whole, wanted), (stage, found), (other, left)):
                getattr(runtime, compute)(layer, x, out)
            assert torch.equal(found, wanted) and torch.equal(left, base) and not torch.equal(wanted, base)
    assert first.bank.nbytes + second.bank.nbytes == whole.bank.nbytes
    first.bank.remove("a@1")
    assert "a@1" not in first.bank and "b@1" in first.bank


@pytest.mark.parametrize("values", ["pre", "out", "context"])
@pytest.mark.parametrize("scale", [None, "cosine"])
def test_the_memory_shifts_as_in_a_patched_model(make_model, make_memory, values, scale):
    model = make_model("llama")
    memory = make_memory(model, every_token(k=7, values=values, scale=scale, tau=0.3), layers=LAYERS)
    ids, seen = torch.arange(4, 12)[None], []
    with uk.patched(model, memory=memory):
        attention = model.model.layers[2].self_attn
        handle = attention.register_forward_hook(
            lambda _, args, kwargs, out: seen.append((kwargs["hidden_states"][0], out[0][0])), with_kwargs=True
        )
        model(input_ids=ids)
        handle.remove()
    handle = attention.register_forward_hook(lambda *args: seen.append(args[-1][0][0]))
    model(input_ids=ids)
    handle.remove()
    (hidden, wanted), out = seen[0], seen[1].detach().clone()
    runtime = RaggedRuntime(LAYERS, D, "silu", memory)
    runtime.begin([RequestSlice(5), RequestSlice(3)])
    runtime.attention(2, hidden, out)
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(out, seen[1], atol=1e-3)


@pytest.mark.parametrize("tokens", ["all", "answer"])
def test_the_memory_shifts_whom_it_may(make_model, make_memory, versions, tokens):
    memory = make_memory(make_model("llama"), every_token(k=7, values="out", tokens=tokens, alpha=0.4), layers=LAYERS)
    model = RaggedRuntime(LAYERS, D, "silu", memory)
    shares = [
        RequestSlice(1), RequestSlice(1, memory=False), RequestSlice(6, prompt=4),
        RequestSlice(3, prompt=9), RequestSlice(2, prompt=1, memory=False)
    ]  # fmt: skip
    hidden, base = torch.randn(15, D), torch.randn(15, D)

    def run(shares):
        model.begin(shares)
        model.attention(2, hidden, out := base.clone())
        return out

    everybody = run([RequestSlice(13)])
    out = run(shares)
    shifted = [0, *range(2, 8), *range(8, 11)] if tokens == "all" else [0, 6, 7]
    for token in range(15):
        if token in shifted:
            assert torch.equal(out[token], everybody[token])
            assert not torch.equal(out[token], base[token])
        else:
            assert torch.equal(out[token], base[token])
    assert torch.equal(run([RequestSlice(13, memory=False)]), base)
    model.attention(5, hidden, out := base.clone())  # a layer without a memory
    assert torch.equal(out, base)


def test_the_oldest_edits_that_nobody_needs_make_room(versions):
    model = RaggedRuntime(LAYERS, D, "silu", resident=3)
    for name in "abc":
        model.hold(versions[name])
    model.hold(versions["d"], needed=["a@1"])
    assert set(model.bank) == {"a@1", "c@1", "d@1"}
    model.hold(versions["b"], needed=["a@1", "c@1", "d@1"])  # all are needed: more than usual stay
    assert set(model.bank) == {"a@1", "b@1", "c@1", "d@1"}


@pytest.mark.parametrize("requests", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_soak(requests, make_model, make_edit, tmp_path):
    """Many requests while edits come, are replaced and go: every row of every step, and nothing piles up."""
    base, layer, rng = make_edit(make_model("llama"), "x", layers=[2]), 2, random.Random(0)
    folder, model = EditRepository(tmp_path), RaggedRuntime([2], D, "silu", resident=16)
    g = torch.Generator().manual_seed(0)
    numbers, present = iter(range(10**6)), set()

    def change():
        id = f"e{rng.randrange(12)}"
        if id in present and rng.random() < 0.3:
            present.remove(id)
            (tmp_path / f"{id}.safetensors").unlink()
            return
        present.add(id)
        new = replace(base.layers[2], keys=torch.randn(5, D, generator=g), values=torch.randn(5, D, generator=g))
        edit = replace(base, id=id, layers={2: new}, notes={"number": str(next(numbers))})
        edit.save(tmp_path / f"{id}.safetensors")

    for _ in range(8):
        change()
    running, asked, ended, sizes = [], 0, 0, []
    while asked < requests or running:
        while len(running) < 64 and asked < requests:
            if rng.random() < 0.05:
                change()
            chosen = [folder.get(id) for id in rng.sample(sorted(present), min(rng.randrange(3), len(present)))]
            running.append([chosen, rng.randrange(1, 4)])  # its versions, and the steps until it ends
            asked += 1
        rng.shuffle(running)
        needed = [version.key for versions, _ in running for version in versions]
        for versions, _ in running:
            for version in versions:
                model.hold(version, needed)
        shares = [RequestSlice(rng.choice((1, 1, 1, 3)), tuple(v.key for v in versions)) for versions, _ in running]
        total = sum(share.tokens for share in shares)
        x, before = torch.randn(total, D, generator=g), torch.randn(total, D, generator=g)
        model.begin(shares)
        model.ffn(layer, x, out := before.clone())
        start = 0
        for (versions, _), share in zip(running, shares, strict=True):
            part = slice(start, start + share.tokens)
            expected = alone(x[part], before[part], [v.edit for v in versions], layer)
            torch.testing.assert_close(out[part], expected, atol=1e-4, rtol=1e-4)
            start += share.tokens
        for request in running:
            request[1] = 0 if rng.random() < 0.05 else request[1] - 1  # now and then one is cancelled
        ended += sum(left == 0 for _, left in running)
        running = [request for request in running if request[1]]
        sizes.append(model.bank.nbytes)
    assert ended == requests
    assert len(model.bank) <= 64 * 2
    assert max(sizes[len(sizes) // 2 :]) <= max(sizes[: len(sizes) // 2])
    assert len(folder._held) <= 12 + 64 * 2


@pytest.mark.parametrize(
    "config", [{"alpha": "last"}, {"retrieval": "sequence"}, {"tokens": "text"}, {"values": "projected"}]
)
def test_memories_that_flat_tokens_cannot_serve(make_model, make_memory, config):
    memory = make_memory(make_model("llama"), every_token(k=7, **{"values": "pre", **config}), layers=LAYERS)
    with pytest.raises(ValueError, match="memory: an engine of flat tokens serves"):
        RaggedRuntime(LAYERS, D, "silu", memory)


def test_edits_that_do_not_fit(versions, make_model, make_memory, make_edit):
    model = flat(versions)
    model.check(versions["a"].edit)
    with pytest.raises(uk.MismatchError, match="the bank has no layers"):
        model.check(make_edit(make_model("llama"), "x"))
    with pytest.raises(uk.MismatchError, match="it is for relu FFNs"):
        model.check(make_edit(make_model("opt"), "x", layers=LAYERS))
    memory = make_memory(make_model("llama"), layers=LAYERS)
    with pytest.raises(uk.MismatchError, match=f"'a': it was trained with the memory None, this one is {memory.id}"):
        RaggedRuntime(LAYERS, D, "silu", memory).check(versions["a"].edit)
    model.begin([RequestSlice(1, ("z@1",))])
    with pytest.raises(uk.PatchError, match="unknown edit ids"):
        model.ffn(2, torch.zeros(1, D), torch.zeros(1, D))


class Opposite(uk.CosineIndex):
    """A retriever that finds other entries."""

    def search(self, queries, k, ranges=None):
        return super().search(-queries, k, ranges)


@pytest.mark.parametrize("kind", ["exact", "approximate", "given"])
def test_a_memory_is_searched_as_in_a_patched_model(make_model, make_memory, kind):
    """With the same bits, whatever searches it."""
    model = make_model("llama")
    memory = make_memory(model, every_token(k=7, values="out", alpha=0.4), layers=LAYERS, entries=200)
    exactly, retriever = RaggedRuntime(LAYERS, D, "silu", memory), Opposite if kind == "given" else None
    if kind == "approximate":
        pytest.importorskip("faiss")
        memory = replace(memory, search=uk.ANNConfig(lists=50, probes=1))
    layer, seen = model.model.layers[2], {}

    def keep(module, args, kwargs, output):
        seen.setdefault("hidden", kwargs["hidden_states"][0])
        seen.setdefault("outs", []).append(output[0][0].clone())

    layer.self_attn.register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(input_ids=torch.arange(5, 14)[None])
        with uk.patched(model, memory=memory, retriever=retriever):
            model(input_ids=torch.arange(5, 14)[None])
    base, shifted = seen["outs"]

    def shift(flat):
        flat.begin([RequestSlice(4), RequestSlice(5)])
        flat.attention(2, seen["hidden"], out := base.clone())
        return out

    found = shift(RaggedRuntime(LAYERS, D, "silu", memory, retriever=retriever))
    assert torch.equal(found, shifted) and not torch.equal(found, base)
    assert torch.equal(found, shift(exactly)) == (kind == "exact")


def test_a_layer_that_gets_a_part_of_the_step(versions, make_model, make_memory):
    """As ranks of an engine may: whose tokens they are is not known."""
    memory = make_memory(make_model("llama"), every_token(k=7, values="out"), layers=LAYERS)
    model = flat(versions, memory=memory)
    model.begin([RequestSlice(3, ("a@1",)), RequestSlice(2)])
    for run in (model.ffn, model.attention):
        with pytest.raises(RuntimeError, match="the step holds 5 tokens, a layer got 4 of them"):
            run(2, torch.zeros(4, D), torch.zeros(4, D))


# --- scopes ---------------------------------------------------------------------------------------------------------

DEEP = [3, 4]  # the layers of the edits of `scoped`


@pytest.fixture
def scope(make_model, make_edit):
    """A runtime, the model's embedding, and versions "a@1" and "b@1" of the edits of the first two prompts."""
    model = make_model("llama")
    memory, edits = scoped(model, make_edit)
    runtime = RaggedRuntime(DEEP, D, "silu", memory)
    versions = [Version(f"{edit.id}@1", edit) for edit in edits]
    for version in versions:
        runtime.check(version.edit)
        runtime.hold(version)
    return runtime, model.get_input_embeddings(), versions


def test_the_prompts_text_decides(scope):
    """As in a patched model: see tests/patching/test_scope.py for the rule."""
    runtime, embed, (a, b) = scope
    decided = [runtime.decide(prompt, [a, b], embed) for prompt in PROMPTS.tolist()]
    assert decided == [(a,), (b,), ()]
    assert runtime.decide(PROMPTS[1].tolist(), [b, a], embed) == (b,)
    assert runtime.decide(PROMPTS[0].tolist(), [], embed) == ()
    assert runtime.decide(PROMPTS[2].tolist(), [a], embed) == ()
    assert runtime.decide(PROMPTS[0].tolist(), [a], embed) == (a,)
    newer = Version("a@2", replace(a.edit, entries=b.edit.entries))  # another version of the same name
    assert runtime.decide(PROMPTS[0].tolist(), [newer], embed) != (newer,)
    assert runtime.decide(PROMPTS[1].tolist(), [newer], embed) == (newer,)


def test_few_sets_of_edits_are_kept(scope, monkeypatch):
    runtime, embed, (a, _) = scope
    monkeypatch.setattr("unike_kernels.serving.ragged._ROUTERS", 2)
    for i in range(5):
        found = runtime.decide(PROMPTS[0].tolist(), [Version(f"{i}", a.edit)], embed)
        assert [version.key for version in found] == [str(i)] and len(runtime._routers) <= 2


def test_without_a_scope_all_edits_act(versions, make_model, make_memory):
    embed = make_model("llama").get_input_embeddings()
    for memory in (None, make_memory(make_model("llama"), layers=LAYERS)):
        runtime = RaggedRuntime(LAYERS, D, "silu", memory)
        assert runtime.decide([5, 6], list(versions.values()), embed) == tuple(versions.values())


@pytest.mark.usefixtures("either_way")
def test_a_prompt_is_edited_from_its_last_token_on(scope):
    runtime, _, versions = scope
    edits = {version.key: version.edit for version in versions}
    shares = [
        RequestSlice(5, ("a@1",), prompt=4), RequestSlice(3, ("b@1",), prompt=9), RequestSlice(1, ("a@1",)),
        RequestSlice(4, (), prompt=3), RequestSlice(4, ("b@1",), prompt=1), RequestSlice(2, ("a@1",), prompt=2),
    ]  # fmt: skip
    total = sum(share.tokens for share in shares)
    x, base = torch.randn(total + 2, D), torch.randn(total + 2, D)
    runtime.begin(shares)
    runtime.ffn(3, x, out := base.clone())
    start = 0
    for share in shares:
        first, end = start + min(share.prompt, share.tokens), start + share.tokens
        acting = [edits[key] for key in share.edits]
        assert torch.equal(out[start : first if acting else end], base[start : first if acting else end])
        wanted = alone(x[first:end], base[first:end], acting, 3)
        torch.testing.assert_close(out[first:end], wanted, atol=1e-5, rtol=1e-5)
        assert first == end or not acting or not torch.allclose(out[first:end], base[first:end], atol=1e-2)
        start = end
    assert torch.equal(out[start:], base[start:])
    runtime.begin([replace(share, prompt=0) for share in shares])
    runtime.ffn(3, x, whole := base.clone())
    assert not torch.equal(whole[0], base[0])


@pytest.mark.parametrize("tokens", ["all", "answer"])
def test_the_memory_shifts_where_an_edit_acts(make_model, make_edit, make_memory, tokens):
    model = make_model("llama")
    of_scope, edits = scoped(model, make_edit)
    config = replace(CONFIG, values="out", tokens=tokens, alpha=0.4)
    tables = make_memory(model, replace(config, scope="all"))
    memory = replace(tables, config=config, scope=of_scope.scope)
    runtime = RaggedRuntime([2, 3, 4, 5], D, "silu", memory)
    for edit in edits:
        with pytest.raises(uk.MismatchError, match=f"it was trained with the memory None, this one is {memory.id}"):
            runtime.check(edit)
        runtime.check(replace(edit, config=config, memory_id=memory.id))
    everywhere = RaggedRuntime([2, 3, 4, 5], D, "silu", tables)
    hidden, base = torch.randn(12, D), torch.randn(12, D)
    everywhere.begin([RequestSlice(12)])
    everywhere.attention(2, hidden, shifted := base.clone())
    runtime.begin([
        RequestSlice(5, ("a@1",), prompt=4), RequestSlice(2), RequestSlice(1, ("b@1",)),
        RequestSlice(2, ("a@1",), memory=False), RequestSlice(2, ("b@1",), prompt=7),
    ])  # fmt: skip
    runtime.attention(2, hidden, out := base.clone())
    for token in range(12):
        assert torch.equal(out[token], (shifted if token in (4, 7) else base)[token])
    assert not torch.equal(shifted[4], base[4])
    runtime.begin([RequestSlice(12)])
    runtime.attention(2, hidden, out := base.clone())
    assert torch.equal(out, base)


def test_scopes_and_edits_that_flat_tokens_cannot_serve(make_model, make_edit):
    model = make_model("llama")
    memory, _ = scoped(model, make_edit, (2, 3))
    with pytest.raises(ValueError, match=r"serves a scope of the text alone; this one reads layers \[2, 3\], too"):
        RaggedRuntime(DEEP, D, "silu", memory)
    memory, (a, _) = scoped(model, make_edit)
    runtime = RaggedRuntime(DEEP, D, "silu", memory)
    with pytest.raises(uk.MismatchError, match="'a': it has no entries, by which the memory decides"):
        runtime.check(replace(a, entries=None, scope_id=None))
    with pytest.raises(uk.MismatchError, match="'a': it has entries of another scope"):
        runtime.check(replace(a, scope_id="another"))
