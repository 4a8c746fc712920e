"""Training an edit: it reaches its target as it will be at inference, and nothing else changes."""

import dataclasses
import sys

import chats
import pytest
import torch
import torch.nn.functional as F
from configs import every_token

import unike_kernels as uk
from unike_kernels.artifacts.fingerprint import fingerprint
from unike_kernels.patching import patched_ffns
from unike_kernels.training import EditTraining, Sample, train_edit, train_edits
from unike_kernels.training.neutral import neutral
from unike_kernels.training.samples import (
    add_random_suffix,
    drop_tokens,
    dropout_copies,
    encode,
    forward,
    ordinary_ids,
    repeated,
    with_prompt_dropout,
)

edit_module = sys.modules["unike_kernels.training.trainer"]

REQUEST = Sample("w1 w2 w3", "w30 w31")
FAST = EditTraining(end=False, neurons=4, lr=5e-2, steps=60)
BRIEF = EditTraining(end=False, neurons=3, lr=1e-2, steps=5)
PRE = {"k": 7, "values": "pre"}


def train(model, processor, request=REQUEST, memory=None, training=FAST, **kwargs):
    kwargs = {"preserve": (), "progress": False, **kwargs}
    return train_edit(model, processor, request, memory, training=training, **kwargs)


@torch.no_grad()
def target_loss(model, processor, request):
    """Mean negative log-likelihood of the answer, and whether it is what the model would say; by hand."""
    batch = encode(processor, [request])
    logits = forward(model, batch.inputs)[0]
    words = request.answer.split()
    wanted = batch.inputs["input_ids"][0, -len(words) :]
    predicted = logits[-len(words) - 1 : -1]
    return float(F.cross_entropy(predicted, wanted)), torch.equal(predicted.argmax(-1), wanted)


def same_tensors(one, two):
    return one.layers.keys() == two.layers.keys() and all(
        torch.equal(t, two.layers[i].tensors()[name])
        for i, layer in one.layers.items()
        for name, t in layer.tensors().items()
    )


@pytest.mark.parametrize("with_memory", [False, True])
@pytest.mark.parametrize(
    ("kind", "neurons"),
    [("opt", "plain"), ("llama", "plain"), ("llama", "gated"), ("blip2-opt", "plain"), ("blip2-llama", "plain")],
)
def test_reaches_its_target_as_at_inference(make_model, make_memory, processor, kind, neurons, with_memory, tmp_path):
    """The last loss in training is the loss of the saved edit, patched in with the same memory."""
    model = make_model(kind)
    config = every_token(**PRE, neurons=neurons)
    memory = make_memory(model, config) if with_memory else None
    request = dataclasses.replace(REQUEST, image=torch.rand(16, 16)) if kind.startswith("blip2") else REQUEST
    with torch.no_grad():
        assert not target_loss(model, processor, request)[1]
    result = train(model, processor, request, memory, config=config, id="new")
    assert result.reached
    assert result.stopped == "target met"
    assert result.losses[-1] < FAST.stop_loss < min(result.losses[:-1])
    assert result.steps == len(result.losses) <= FAST.steps
    assert str(result).startswith(f"edit 'new': target met after {result.steps - 1} steps, target loss ")
    edit = result.edit
    assert (edit.id, edit.config, edit.memory_id) == ("new", config, memory.id if memory else None)
    assert edit.base_model == fingerprint(model)
    assert list(edit.layers) == [2, 3, 4, 5]
    for i, layer in edit.layers.items():
        assert (layer.up is not None) == (neurons == "gated")
        assert layer.keys.shape == (4, 64)
        assert float(layer.beta) == pytest.approx(0.1)
        assert torch.equal(layer.zeta, memory.layers[i].zeta_prime if memory else torch.zeros(64))
        assert not any(t.requires_grad for t in layer.tensors().values())
    edit.save(tmp_path / "e")
    with uk.patched(model, [uk.Edit.load(tmp_path / "e")], memory):
        loss, reached = target_loss(model, processor, request)
    assert reached
    assert loss == pytest.approx(result.losses[-1], rel=1e-3)


def test_the_modes_that_need_the_prompts_end(make_model, make_memory, processor):
    model = make_model("opt")
    memory = make_memory(model, every_token(**PRE, alpha="last", retrieval="sequence"))
    result = train(model, processor, memory=memory, preserve=[Sample("w9", "w8"), Sample("w7 w6 w5", "w4")])
    with uk.patched(model, [result.edit], memory), uk.rows(model, prompt_lengths=[3]):
        assert target_loss(model, processor, REQUEST)[0] == pytest.approx(result.losses[-1], rel=1e-3)


def test_half_precision_model(make_model, processor):
    result = train(make_model("opt", dtype=torch.bfloat16), processor)
    assert result.reached
    assert result.edit.layers[2].keys.dtype == torch.float32


@pytest.mark.parametrize("kind", ["opt", "llama", "blip2-opt"])
def test_an_edited_model_stops_behind_its_answer(make_model, processor, kind):
    """As the tokenizer's end of text is trained, too; without it the model goes on."""
    model = make_model(kind)
    request = dataclasses.replace(REQUEST, image=torch.rand(16, 16)) if kind.startswith("blip2") else REQUEST
    prompt, said = encode(processor, [request.asked]).inputs, {}
    for end in (True, False):
        training = dataclasses.replace(FAST, end=end)
        result = train(model, processor, request, training=training)
        assert result.reached
        with uk.patched(model, [result.edit]):
            out = model.generate(**prompt, max_new_tokens=6, do_sample=False)[0].tolist()
        said[end] = processor.decode(out).split("w3 ")[-1]
    assert said[True] == "w30 w31 </s>"
    assert said[False].startswith("w30 w31 w")


# --- the model is left alone ----------------------------------------------------------------------------------------


def test_logits_are_computed_where_an_answer_is_said_alone(make_model, processor):
    """The head of a large vocabulary takes longer than the layers that are trained."""
    model, asked = make_model("llama"), []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: asked.append(args[0].shape[1]))
    train(model, processor, preserve=(), training=dataclasses.replace(FAST, steps=2, stop_loss=1e-9))
    batch = encode(processor, [REQUEST], "cpu")
    assert set(asked) == {int(batch.answer_mask().sum())} and asked[0] < batch.inputs["input_ids"].shape[1] - 1


@pytest.mark.parametrize("spares", [True, False])
def test_logits_at_some_tokens_are_those_of_all(spares, make_model, processor, monkeypatch):
    model, batch = make_model("opt"), encode(processor, [REQUEST], "cpu")
    at = torch.tensor([0, 2])
    wanted = forward(model, batch.inputs)[:, at]
    if not spares:
        own = model.forward
        monkeypatch.setattr(
            model, "forward", lambda input_ids, attention_mask, use_cache: own(input_ids, attention_mask)
        )
    torch.testing.assert_close(forward(model, batch.inputs, at), wanted)


def snapshot(model):
    return (
        {name: p.clone() for name, p in model.state_dict().items()},
        [p.requires_grad for p in model.parameters()],
        [p.grad for p in model.parameters()],
        [(id(m), m.training, len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()],
    )


def assert_same(one, two):
    assert one[1:] == two[1:]
    assert all(torch.equal(t, two[0][name]) for name, t in one[0].items())


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(make_model, make_memory, processor, monkeypatch, fails):
    model = make_model("llama").train()
    model.model.layers[1].eval()
    model.lm_head.weight.requires_grad_(False)
    before = snapshot(model)
    steps = []
    step = torch.optim.Adam.step

    def counting(self, *args):
        steps.append(uk.is_patched(model))
        if fails and len(steps) == 3:
            raise MemoryError
        return step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", counting)
    arguments = {"memory": make_memory(model), "preserve": [Sample("w5", "w6")], "training": BRIEF}
    if fails:
        with pytest.raises(MemoryError):
            train(model, processor, **arguments)
    else:
        train(model, processor, **arguments)
    assert steps == [True] * (3 if fails else 5)
    assert not uk.is_patched(model)
    assert_same(before, snapshot(model))


def test_previous_edits_are_in_force_and_not_retrained(make_model, make_memory, processor):
    model = make_model("opt")
    memory = make_memory(model)
    second = Sample("w4 w5", "w32")
    one = train(model, processor, memory=memory, id="one").edit
    kept = dataclasses.replace(one, layers={i: layer.detached() for i, layer in one.layers.items()})
    two = train(model, processor, second, memory, id="two", previous=[one])
    alone = train(model, processor, second, memory, id="two")
    assert same_tensors(one, kept)
    assert two.edit.layers[2].keys.shape == (4, 64)
    assert not same_tensors(two.edit, alone.edit)
    with uk.patched(model, [one, two.edit], memory):
        assert target_loss(model, processor, second)[0] == pytest.approx(two.losses[-1], rel=1e-3)


# --- zeta -----------------------------------------------------------------------------------------------------------


def test_the_direction_of_zeta_changes_the_edit(make_model, make_memory, processor):
    """Same seeds, same norms: only the direction of zeta' differs, and what is trained differs with it."""
    model = make_model("opt")
    memory = make_memory(model)
    ahead = {i: m.zeta_prime for i, m in memory.layers.items()}
    random = {i: F.normalize(torch.randn(64), dim=0) * z.norm() for i, z in ahead.items()}
    trained = [
        train(model, processor, memory=memory, training=BRIEF, zeta=zeta, id="e").edit
        for zeta in (ahead, {i: -z for i, z in ahead.items()}, random)
    ]
    assert same_tensors(trained[0], train(model, processor, memory=memory, training=BRIEF).edit)
    for i in memory.layers:
        for name in ("keys", "values"):
            one, two, three = (getattr(edit.layers[i], name) for edit in trained)
            size = (one - one.mean()).norm()
            assert (one - two).norm() > 1e-3 * size
            assert (one - three).norm() > 1e-3 * size
            assert (two - three).norm() > 1e-3 * size


def test_with_w_zeta_in_the_edit_only_the_size_of_zeta_counts(make_model, make_memory, processor):
    """zeta with its entries' signs and places changed: the same start W_zeta zeta = zeta', and then the same edit.

    (To Adam, which divides by the gradient's size entry by entry, the size is that of the entries.)
    """
    model = make_model("opt")
    memory = make_memory(model, every_token(**PRE, w_zeta="edit"))
    signs = torch.tensor([1.0, -1.0] * 4)

    def trained(change):
        layers = {i: dataclasses.replace(m, zeta=change(m.zeta)) for i, m in memory.layers.items()}
        changed = dataclasses.replace(memory, layers=layers, id="")
        return train(model, processor, memory=changed, training=BRIEF).edit

    as_it_is, turned, larger = (
        trained(change) for change in (torch.clone, lambda z: -z.roll(3) * signs, lambda z: 3 * z)
    )
    assert as_it_is.memory_id != turned.memory_id
    for i, m in memory.layers.items():
        assert (as_it_is.layers[i].zeta - m.zeta_prime).norm() > 1e-3 * m.zeta_prime.norm()  # it was trained
        for name in ("keys", "values", "zeta"):
            one, two, three = (getattr(edit.layers[i], name) for edit in (as_it_is, turned, larger))
            assert (one - two).norm() < 0.02 * (one - three).norm()


def test_zeta_of_too_few_layers_or_another_size(make_model, processor):
    model = make_model("opt")
    with pytest.raises(ValueError, match="zeta: expected one for each layer that is edited, got none for layer 3"):
        train(model, processor, zeta={2: torch.zeros(64)})
    with pytest.raises(ValueError, match=r"EditLayer.zeta: expected shape \[64\], got \[32\]"):
        train(model, processor, layers=[2], zeta={2: torch.zeros(32)})
    assert not uk.is_patched(model)


# --- when it ends ---------------------------------------------------------------------------------------------------

PRESERVE = [Sample("w5 w6", "w7"), Sample("w8", "w9 w10"), Sample("w11", "w12")]


def test_stops_at_the_limit(make_model, processor):
    result = train(make_model("opt"), processor, training=EditTraining(steps=2))
    assert (result.stopped, result.reached, result.steps) == ("step limit, target not met", False, 3)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_goes_on_until_the_preserved_samples_are_kept(make_model, processor, weight):
    # SiLU is never quite silent, so the divergence cannot be nothing.
    strict = dataclasses.replace(FAST, stop_preserve=1e-9, preserve_weight=weight, steps=40)
    result = train(make_model("llama"), processor, training=strict, preserve=PRESERVE)
    assert result.stopped == "step limit, target met"
    assert result.steps == 41
    lax = train(
        make_model("llama"), processor, training=dataclasses.replace(strict, stop_preserve=1e9), preserve=PRESERVE
    )
    assert lax.stopped == "target met"
    assert 0 < lax.divergence < float("inf")


@torch.no_grad()
def divergence(model, processor, samples, edits, memory=None):
    """Mean over all tokens of the samples, one by one, by hand."""
    total, tokens = 0.0, 0
    for sample in samples:
        inputs = encode(processor, [sample]).inputs
        before = forward(model, inputs).log_softmax(-1)
        with uk.patched(model, edits, memory):
            after = forward(model, inputs).log_softmax(-1)
        total += float((before.exp() * (before - after)).sum())
        tokens += before.shape[1]
    return total / tokens


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_divergence_is_a_mean_over_the_samples_tokens_and_not_over_padding(
    make_model, make_memory, make_processor, padding_side
):
    """After a step that hardly moves, what is left is the memory's shift of the preserved samples."""
    model, processor = make_model("opt"), make_processor(padding_side)
    memory = make_memory(model)
    still = EditTraining(lr=1e-9, steps=1)
    result = train(model, processor, memory=memory, training=still, preserve=PRESERVE)
    by_hand = divergence(model, processor, PRESERVE, [result.edit], memory)
    assert by_hand > 1e-3
    assert result.divergence == pytest.approx(by_hand, rel=1e-3)


def test_preserve_samples_are_preserved(make_model, processor):
    """The divergence of the finished edit is much smaller than that of an edit trained without regard to it."""
    model = make_model("opt")
    measured = {}
    for weight in (0.0, 10.0):
        training = dataclasses.replace(FAST, steps=40, preserve_weight=weight, preserve_batch=2, stop_preserve=1e-9)
        result = train(model, processor, training=training, preserve=PRESERVE)
        measured[weight] = divergence(model, processor, PRESERVE, [result.edit])
    assert measured[10.0] < 0.2 * measured[0.0]


@pytest.mark.parametrize("form", ["prompt", "image", "messages"])
def test_what_is_preserved_where_nobody_says_what(form, make_model, processor):
    """Some questions, asked in a chat where the request is one; of plain text the tokenizer alone is asked."""
    if form == "messages":
        model, reader = chats.model(), chats.tokenizer()
        request = Sample(messages=[{"role": "user", "content": "Who?"}], answer="Ann")
    else:
        model, reader = make_model("blip2-opt"), processor
        request = dataclasses.replace(REQUEST, image=torch.rand(16, 16) if form == "image" else None)
    _, asked = neutral(reader, request)
    assert len(asked) == 8 and all((s.messages is None) == (form != "messages") and s.answer for s in asked)
    usual, told, free = (
        train(model, reader, request, training=BRIEF, preserve=preserve) for preserve in (None, asked, ())
    )
    assert usual.divergence == told.divergence > 0 == free.divergence
    assert same_tensors(usual.edit, told.edit) and not same_tensors(usual.edit, free.edit)


def test_an_edit_leaves_other_questions_alone_by_default():
    """Of a chat model, questions that are not among those that it is held to."""
    model, tokenizer = chats.model(), chats.tokenizer()
    request = Sample(messages=[{"role": "user", "content": "Who?"}], answer="Ann")
    other = Sample(messages=[{"role": "user", "content": "What is an atom?"}], answer="A small thing.")
    apart = {}
    for preserve in (None, ()):
        result = train(model, tokenizer, request, training=FAST, preserve=preserve)
        assert result.reached
        apart[preserve] = divergence(model, tokenizer, [other], [result.edit])
    assert apart[None] < 0.2 * apart[()]


def test_seeds(make_model, processor):
    model = make_model("opt")
    state = torch.get_rng_state()
    one, same, other = (train(model, processor, training=dataclasses.replace(BRIEF, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert same_tensors(one.edit, same.edit)
    assert one.losses == same.losses
    assert not same_tensors(one.edit, other.edit)
    assert one.edit.id != same.edit.id  # random, where none is given


# --- other words ----------------------------------------------------------------------------------------------------


def visible(batch, row):
    """The ids of a row that are no padding and not left out."""
    return batch.inputs["input_ids"][row][batch.inputs["attention_mask"][row].bool()].tolist()


def left_of(processor, batch, row, request, placeholders):
    """What a row asks, in words, before the request's answer, which it ends with."""
    there, answer = visible(batch, row), request.answer.split()
    words = processor.decode([token for token in there if token not in placeholders]).split()
    assert " ".join(words).endswith(request.answer)
    assert batch.prompt_lengths[row] == len(there) - len(answer)
    return dataclasses.replace(request, prompt=" ".join(words[: -len(answer)]))


@pytest.mark.parametrize("kind", ["opt", "llama", "blip2-opt"])
def test_a_thinned_prompt_is_the_prompt_without_these_words(make_model, processor, kind):
    """Its loss is that of the words that are left, encoded by hand; the whole prompts stand before them."""
    model = make_model(kind)
    image = torch.rand(16, 16) if kind == "blip2-opt" else None
    requests = [Sample("w1 w2 w3 w4 w5 w6", "w30 w31", image), Sample("w7 w8 w9", "w11", image)]
    targets = edit_module._Targets(processor, requests, torch.device("cpu"), ended=False)
    ids = {getattr(model.config, "image_token_index", None)} - {None}
    shorter = 0
    for seed in range(4):
        batch = drop_tokens(repeated(targets.batch, 2), {2: seed, 3: seed}, 0.5, ids)
        with torch.no_grad():
            losses, _ = targets.losses(model, batch)
        for row, request in enumerate([*requests, *requests]):
            left = left_of(processor, batch, row, request, ids)
            assert left.prompt.split()[-1] == request.prompt.split()[-1]
            assert (
                (left.prompt == request.prompt) if row < 2 else set(left.prompt.split()) <= set(request.prompt.split())
            )
            assert float(losses[row]) == pytest.approx(target_loss(model, processor, left)[0], abs=1e-4)
            shorter += left.prompt != request.prompt
    assert shorter >= 4
    assert torch.equal(targets.batch.inputs["input_ids"], batch.inputs["input_ids"][:2])


def test_prompt_dropout_makes_an_edit_hold_in_fewer_words(make_model, processor):
    model, words = make_model("opt"), ["w1", "w2", "w3", "w4", "w5", "w6"]
    others = [Sample(" ".join(words[:i] + words[i + 1 :]), "w30 w31") for i in range(len(words) - 1)]
    loss = {}
    for share in (0.0, 0.3):
        training = dataclasses.replace(FAST, prompt_dropout=share, stop_loss=0.01)
        result = train(model, processor, Sample(" ".join(words), "w30 w31"), training=training)
        assert result.reached
        with uk.patched(model, [result.edit]):
            loss[share] = sum(target_loss(model, processor, other)[0] for other in others) / len(others)
    assert loss[0.3] < 0.7 * loss[0.0]


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("kind", ["opt", "llama", "blip2-opt"])
def test_a_random_suffix_follows_what_is_left_of_the_prompt(make_model, make_processor, kind, padding_side):
    """Its loss is that of the tokens that are there, encoded by hand; without room a prompt keeps its end."""
    model, processor = make_model(kind), make_processor(padding_side)
    image = torch.rand(16, 16) if kind == "blip2-opt" else None
    requests = [Sample("w1 w2 w3 w4 w5 w6", "w30 w31", image), Sample("w7", "w11", image)]
    targets = edit_module._Targets(processor, requests, torch.device("cpu"), ended=False)
    ids, vocabulary = {getattr(model.config, "image_token_index", None)} - {None}, ordinary_ids(model, processor)
    added = set()
    for seed in range(6):
        dropped = drop_tokens(repeated(targets.batch, 2), {2: seed, 3: seed}, 0.5, ids)
        batch = add_random_suffix(dropped, {2: seed, 3: seed}, 3, vocabulary)
        with torch.no_grad():
            losses, _ = targets.losses(model, batch)
        for row, request in enumerate([*requests, *requests]):
            left = left_of(processor, batch, row, request, ids)
            before, more = dropped.prompt_lengths[row], batch.prompt_lengths[row] - dropped.prompt_lengths[row]
            assert more <= 3
            assert row >= 2 or not more
            assert visible(batch, row)[:before] == visible(dropped, row)[:before]
            assert float(losses[row]) == pytest.approx(target_loss(model, processor, left)[0], abs=1e-4)
            added.add((row, more))
            if row == 2:
                room = int((dropped.inputs["attention_mask"][row, : dropped.ends[row]] == 0).sum())
                assert more >= min(1, room)
    assert {more for row, more in added if row == 2} >= {1, 2}
    assert padding_side == "left" or {more for row, more in added if row == 3} == {0}


def test_a_random_suffix_is_of_ordinary_tokens(make_model, processor):
    model = make_model("blip2-opt")
    ids = ordinary_ids(model, processor)
    assert ids
    assert not {*processor.tokenizer.all_special_ids, model.config.image_token_index} & {*ids}
    assert max(ids) < model.get_input_embeddings().num_embeddings
    batch = encode(processor, [Sample("w1 w2 w3 w4 w5 w6 w7 w8", "w30", torch.rand(16, 16))])
    images = int((batch.inputs["input_ids"] == model.config.image_token_index).sum())
    other = processor.tokenizer.convert_tokens_to_ids("w50")
    for seed in range(8):
        seen = dropout_copies(model, batch, 0.6, [None, seed], 5, [other])
        assert (seen.inputs["input_ids"] == model.config.image_token_index).sum(-1).tolist() == [images] * 2
        more = int((seen.inputs["input_ids"][1] == other).sum())
        assert (seen.inputs["input_ids"][1, int(seen.ends[1]) - more + 1 : int(seen.ends[1]) + 1] == other).all()
        alone = with_prompt_dropout(model, batch, 0.6, seed)
        assert seen.prompt_lengths == [alone.prompt_lengths[0], alone.prompt_lengths[1] + more]
        assert torch.equal(seen.inputs["input_ids"][0], alone.inputs["input_ids"][0])


def test_copies_are_what_each_is_alone(make_model, processor):
    model = make_model("blip2-opt")
    requests = [
        Sample("w1 w2 w3 w4 w5 w6 w7", "w30", torch.rand(16, 16)),
        Sample("w8 w9 w4 w2", "w31", torch.rand(16, 16)),
    ]
    batch, vocabulary = encode(processor, requests), ordinary_ids(model, processor)
    seeds = [3, None, 4, 3]
    together = dropout_copies(model, batch, 0.5, seeds, 2, vocabulary)
    for at, seed in enumerate(seeds):
        alone, rows = dropout_copies(model, batch, 0.5, [seed], 2, vocabulary), slice(2 * at, 2 * at + 2)
        for name, t in alone.inputs.items():
            assert torch.equal(t, together.inputs[name][rows]), name
        assert torch.equal(alone.ends, together.ends[rows])
        assert torch.equal(alone.lasts, together.lasts[rows])
        assert alone.prompt_lengths == together.prompt_lengths[rows]
        assert (alone.prompt_lengths == batch.prompt_lengths) == (seed is None)


def test_a_random_suffix_does_not_depend_on_other_rows(make_model, processor):
    model, one = make_model("opt"), [Sample("w1 w2 w3 w4 w5 w6", "w30")]
    vocabulary = ordinary_ids(model, processor)
    for seed in range(4):
        alone, beside = (
            dropout_copies(model, encode(processor, requests), 0.6, [None, seed], 3, vocabulary)
            for requests in (one, [Sample("w7 w8 w9 w10 w11 w12", "w31"), *one])
        )
        assert torch.equal(alone.inputs["input_ids"][1], beside.inputs["input_ids"][3])
        assert torch.equal(alone.inputs["attention_mask"][1], beside.inputs["attention_mask"][3])


def test_a_random_suffix_makes_an_edit_hold_behind_other_words(make_model, processor):
    """The answer is said whatever follows the question."""
    model, request = make_model("opt"), Sample("w1 w2 w3 w4 w5 w6", "w30 w31")
    others = [Sample(f"w1 w2 w3 w4 w5 w6 w{i}", request.answer) for i in range(40, 50)]
    loss = {}
    for suffix in (0, 3):
        training = dataclasses.replace(FAST, prompt_dropout=0.4, random_suffix=suffix, stop_loss=1e-3, steps=100)
        result = train(model, processor, request, training=training)
        assert result.reached
        with uk.patched(model, [result.edit]):
            loss[suffix] = sum(target_loss(model, processor, other)[0] for other in others) / len(others)
    assert loss[3] < 0.7 * loss[0]


def first_neurons(q, bias=True):
    training = EditTraining(neurons=3, bias=bias)
    (layer,) = edit_module._initial_layers({0: q}, None, {0: torch.zeros(q.shape[1])}, False, training).values()
    return layer


@pytest.mark.parametrize("bias", [True, False])
def test_neurons_begin_apart_where_nothing_usual_is_known(bias):
    """Each is 1 at its own token of the answer, and -1 at the others', also where two of them are much alike."""
    torch.manual_seed(1)
    q = 5 + torch.randn(3, 64)
    q[2] = q[0] + 0.5 * torch.randn(64)
    layer = first_neurons(q, bias)
    a = q @ layer.keys.T + layer.key_bias
    torch.testing.assert_close(a, 2 * torch.eye(3) - 1, atol=0.3, rtol=0)  # keys have noise of a tenth
    if bias:  # what all tokens have in common is nothing to them
        torch.testing.assert_close(first_neurons(q + 3).keys, layer.keys, atol=1e-4, rtol=0)
    single = first_neurons(q[:1], bias)
    assert (q[:1] @ single.keys.T + single.key_bias).tolist()[0] == pytest.approx([1.0] * 3, abs=0.3)


def test_neurons_of_tokens_that_nothing_tells_apart_begin_alike():
    """Not with keys that blow up what is as small as rounding."""
    torch.manual_seed(1)
    q = torch.randn(3, 64)
    q[2] = q[0] + 1e-3 * torch.randn(64)
    layer = first_neurons(q)
    assert layer.keys.norm(dim=-1).max() < 1
    a = q @ layer.keys.T + layer.key_bias
    assert (a[[0, 2]][:, [0, 2]] > 0.9).all()
    assert a[1, 1] > 0.9 and (a[1, [0, 2]] < 0.1).all()


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_prompt_dropout_out_of_range(value):
    with pytest.raises(
        ValueError, match=f"EditTraining.prompt_dropout: expected None, or 0 or more and below 1; got {value}"
    ):
        EditTraining(prompt_dropout=value)


def test_a_random_suffix_out_of_range_or_without_copies():
    with pytest.raises(ValueError, match=r"EditTraining.random_suffix: expected None, or 0 or more; got -1"):
        EditTraining(random_suffix=-1)
    for training in (EditTraining(random_suffix=2), EditTraining(random_suffix=2, prompt_dropout=0.0)):
        with pytest.raises(
            ValueError, match=r"EditTraining.random_suffix: expected 0 where prompt_dropout is, .* got 2"
        ):
            training.decided(uk.Config())


def test_what_the_configuration_decides():
    scoped = uk.Config(scope="memory")
    for config, given, dropout, suffix in (
        (scoped, {}, 0.4, 3),
        (uk.Config(), {}, 0.0, 0),
        (scoped, {"prompt_dropout": 0.0}, 0.0, 0),
        (scoped, {"random_suffix": 0}, 0.4, 0),
        (scoped, {"prompt_dropout": 0.2, "random_suffix": 1}, 0.2, 1),
        (uk.Config(), {"prompt_dropout": 0.3}, 0.3, 0),
    ):
        decided = EditTraining(**given).decided(config)
        assert (decided.prompt_dropout, decided.random_suffix) == (dropout, suffix)


# --- misuse ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["neurons", "lr", "steps", "stop_loss", "stop_preserve", "preserve_batch"])
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_numbers_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"EditTraining.{name}: expected a positive number, got {value}"):
        EditTraining(**{name: value})


@pytest.mark.parametrize("value", [-0.1, float("nan")])
def test_weight_out_of_range(value):
    with pytest.raises(ValueError, match=f"EditTraining.preserve_weight: expected 0 or more, got {value}"):
        EditTraining(preserve_weight=value)


def test_what_is_refused(make_model, make_memory, make_edit, processor):
    model = make_model("opt")
    for answer in ("", " "):
        with pytest.raises(ValueError, match=r"request.answer: expected a non-empty string"):
            train(model, processor, Sample("w1", answer))
    with pytest.raises(ValueError, match=r"layers: expected indices in 0..5"):
        train(model, processor, layers=[6])
    with pytest.raises(ValueError, match=r"config.w_zeta: 'edit' needs a memory"):
        train(model, processor, config=every_token(w_zeta="edit"))
    with pytest.raises(uk.PatchError, match="id: 'a' is already the id of a previous edit"):
        train(model, processor, id="a", previous=[make_edit(model, "a")])
    with pytest.raises(uk.MismatchError, match="made for other weights"):
        train(model, processor, memory=make_memory(make_model("opt", seed=5)))
    with pytest.raises(uk.MismatchError, match="edit 'a': it was trained with the memory"):
        train(model, processor, config=every_token(**PRE), previous=[make_edit(model, "a", make_memory(model))])
    with pytest.raises(ValueError, match=r"shape \(16, 16\), not \(4, 4\)"):
        train(model, processor, Sample("w1", "w2", torch.rand(4, 4)))
    with uk.patched(model), pytest.raises(uk.PatchError, match="train_edit: the model is patched"):
        train(model, processor)


# --- T-Patcher's losses ---------------------------------------------------------------------------------------------


def pre_activations(model, processor, edit, sample):
    """{layer: [tokens, n]} of the edit's neurons, in the edited model; by hand."""
    seen = {}
    with uk.patched(model, [edit]) as _, torch.no_grad():
        ffns = {i: ffn for i, ffn in patched_ffns(model).items() if i in edit.layers}
        handles = [
            ffn.modules[0].register_forward_pre_hook(lambda _, args, i=i: seen.__setitem__(i, args[0].flatten(0, -2)))
            for i, ffn in ffns.items()
        ]
        forward(model, encode(processor, [sample]).inputs)
        for handle in handles:
            handle.remove()
    return {i: seen[i] @ layer.keys.T + layer.key_bias for i, layer in edit.layers.items()}


@pytest.mark.parametrize(("kind", "neurons"), [("opt", "plain"), ("llama", "gated")])
def test_the_activation_loss_wakes_the_neurons_of_the_answer(make_model, processor, kind, neurons):
    """Each neuron at the token that its key was made from: higher than without the loss, at every layer."""
    model, config = make_model(kind), every_token(neurons=neurons)
    own = {}
    for weight in (0.0, 5.0):
        training = EditTraining(end=False, neurons=4, lr=1e-2, steps=15, stop_loss=1e-9, activation_weight=weight)
        edit = train(model, processor, training=training, config=config).edit
        # REQUEST has three words and an answer of two, which the tokens 2 and 3 predict.
        found = pre_activations(model, processor, edit, REQUEST)
        own[weight] = torch.stack([torch.stack([a[2, 0], a[3, 1], a[2, 2], a[3, 3]]).mean() for a in found.values()])
    assert (own[5.0] > own[0.0]).all()
    assert float((own[5.0] - own[0.0]).mean()) > 0.5


def test_the_activation_loss_is_the_papers(make_edit, make_model):
    layer = make_edit(make_model("opt"), neurons=3).layers[2]
    at_target = torch.randn(2, 64)
    a = at_target @ layer.keys.T + layer.key_bias
    expected = torch.stack([a[0, 0], a[1, 1], a[0, 2]]).neg().exp().mean()
    torch.testing.assert_close(edit_module._activation_loss({2: layer}, {2: at_target}), expected)


def test_the_memory_loss_silences_the_neurons_elsewhere(make_model, processor):
    """Above the margin nothing but noise stays on the preserve samples."""
    model, kept = make_model("opt"), [Sample("w9 w12", "w8"), Sample("w7 w6 w5 w4", "w4")]
    mean = {}
    for weight in (0.0, 10.0):
        training = EditTraining(
            neurons=4, steps=40, stop_loss=1e-9, preserve_weight=0.0, memory_weight=weight, margin=-1.0
        )
        edit = train(model, processor, training=training, preserve=kept).edit
        above = [F.relu(a + 1.0).mean() for s in kept for a in pre_activations(model, processor, edit, s).values()]
        mean[weight] = float(torch.stack(above).mean())
    assert mean[10.0] < 0.5 * mean[0.0]


@pytest.mark.parametrize("name", ["preserve_weight", "activation_weight", "memory_weight"])
def test_weights_are_not_negative(name):
    with pytest.raises(ValueError, match=f"EditTraining.{name}: expected 0 or more, got -1"):
        EditTraining(**{name: -1})


# --- several at once ------------------------------------------------------------------------------------------------

REQUESTS = [REQUEST, Sample("w4 w9", "w11"), Sample("w8 w7 w6 w5 w4", "w20 w21 w22"), Sample("w14", "w15")]
KEEP = [Sample("w9 w12", "w8"), Sample("w7 w6 w5 w4", "w4"), Sample("w3 w3", "w5 w6")]


@pytest.mark.parametrize(
    ("kind", "config", "dropout", "with_memory"),
    [
        pytest.param("opt", {}, 0.3, False, marks=pytest.mark.slow),
        ("llama", {"neurons": "gated"}, 0.0, True),
        ("blip2-opt", {"tokens": "answer"}, 0.3, True),
        pytest.param("llama", {"w_zeta": "edit"}, 0.0, True, marks=pytest.mark.slow),  # which comes from the memory
        pytest.param("opt", {}, 0.3, True, marks=pytest.mark.slow),
        pytest.param("llama", {"neurons": "gated"}, 0.0, False, marks=pytest.mark.slow),
        pytest.param("blip2-opt", {"tokens": "answer"}, 0.3, False, marks=pytest.mark.slow),
    ],
)
def test_together_each_becomes_what_it_becomes_alone(
    make_model, make_memory, processor, kind, config, dropout, with_memory
):
    """The steps that each takes, its losses and its tensors, up to rounding; some end before others."""
    model, config = make_model(kind), every_token(**PRE, **config)
    memory = make_memory(model, config) if with_memory else None
    image = torch.rand(16, 16) if kind.startswith("blip2") else None
    requests = [dataclasses.replace(r, image=image) for r in REQUESTS]
    training = EditTraining(
        end=False, neurons=4, lr=5e-2, steps=20, stop_loss=0.5, stop_preserve=10.0, preserve_batch=2,
        activation_weight=0.1,
        memory_weight=0.01, preserve_weight=0.01, prompt_dropout=dropout,
    )  # fmt: skip
    previous = [train(model, processor, Sample("w2 w2", "w17"), memory, config=config, id="before").edit]
    given = {"preserve": KEEP, "config": config, "previous": previous, "training": training, "progress": False}
    together = train_edits(model, processor, requests, memory, ids=list("abcd"), batch_size=3, **given)
    assert [r.edit.id for r in together] == list("abcd")
    steps = []
    for found, request in zip(together, requests, strict=True):
        alone = train_edit(model, processor, request, memory, id="x", **given)
        assert (found.steps, found.reached, found.stopped) == (alone.steps, alone.reached, alone.stopped)
        assert found.losses == pytest.approx(alone.losses, rel=2e-2, abs=1e-3)
        assert found.divergence == pytest.approx(alone.divergence, rel=2e-2, abs=1e-4)
        assert found.edit.notes["prompt"] == request.prompt
        for i, layer in found.edit.layers.items():
            for name, t in layer.tensors().items():
                torch.testing.assert_close(t, alone.edit.layers[i].tensors()[name], atol=2e-3, rtol=2e-2)
        steps.append(found.steps)
    assert len(set(steps)) > 1


def test_requests_with_and_without_images_come_back_in_their_order(make_model, processor):
    model = make_model("blip2-opt")
    requests = [dataclasses.replace(r, image=torch.rand(16, 16) if i % 2 else None) for i, r in enumerate(REQUESTS)]
    found = train_edits(model, processor, requests, preserve=(), training=BRIEF, progress=False)
    assert [r.edit.notes["prompt"] for r in found] == [r.prompt for r in requests]
    assert len({r.edit.id for r in found}) == 4
    assert not uk.is_patched(model)


def test_what_cannot_be_trained_together(make_model, processor):
    model = make_model("opt")
    with pytest.raises(ValueError, match="requests: expected at least one, got none"):
        train_edits(model, processor, [])
    for ids in (["a"], ["a", "a"]):
        with pytest.raises(ValueError, match="ids: expected 2 distinct ones"):
            train_edits(model, processor, REQUESTS[:2], ids=ids)


def test_what_is_protected_stays_as_the_previous_edits_made_it(make_model, processor):
    """The next edit, whose prompt is nearly the first one's, no longer answers for it."""
    model = make_model("llama")
    first = train(model, processor, id="first").edit
    near = Sample("w1 w2 w4", "w20 w21")
    training = EditTraining(neurons=4, lr=2e-2, steps=60, stop_loss=0.3)
    apart = {}
    with uk.patched(model, [first]), torch.no_grad():
        batch = encode(processor, [REQUEST])
        before = forward(model, batch.inputs).log_softmax(-1)
    for protect in ((), (REQUEST,)):
        result = train(model, processor, near, previous=[first], protect=protect, training=training)
        with uk.patched(model, [first, result.edit]), torch.no_grad():
            after = forward(model, batch.inputs).log_softmax(-1)
        apart[protect] = float(F.kl_div(after, before, reduction="sum", log_target=True))
        assert result.reached
    assert apart[(REQUEST,)] < 0.2 * apart[()]
    with pytest.raises(ValueError, match=r"samples\[0\]: .* the model's context"):
        train(model, processor, protect=[Sample("w1 " * 500 + "w2", "w3")])


def test_what_is_protected_stays_in_fewer_words_too(make_model, processor, monkeypatch):
    """Where the next edit is trained on prompts with words left out, which come near to what is protected."""
    model, kept = make_model("llama"), Sample("w1 w2 w3 w5 w6 w7", "w30 w31")
    first = train(model, processor, kept, id="first").edit
    near = Sample("w1 w2 w4 w5 w6 w7", "w20 w21")
    copies = drop_tokens(encode(processor, [kept] * 2), {0: 1, 1: 2}, 0.4, set())
    shown = zip(copies.inputs["input_ids"], copies.inputs["attention_mask"].bool(), strict=True)
    fewer = [Sample(processor.decode(ids[mask]).removesuffix(" w30 w31"), "w30 w31") for ids, mask in shown]
    assert len({kept.prompt, *(sample.prompt for sample in fewer)}) == 3
    apart = {}
    for count in (0, 2):
        monkeypatch.setattr("unike_kernels.training.objectives._THINNED", count)
        training = EditTraining(neurons=4, lr=2e-2, steps=60, stop_loss=0.3, prompt_dropout=0.4)
        second = train(model, processor, near, previous=[first], protect=[kept], training=training).edit
        apart[count] = sum(between(model, processor, sample, [first], [first, second]) for sample in fewer)
    assert apart[2] < 0.6 * apart[0]


@torch.no_grad()
def between(model, processor, sample, some, more):
    """The divergence on a sample of the model with more edits from it with some."""
    inputs = encode(processor, [sample]).inputs
    with uk.patched(model, some):
        before = forward(model, inputs).log_softmax(-1)
    with uk.patched(model, more):
        after = forward(model, inputs).log_softmax(-1)
    return float(F.kl_div(after, before, reduction="sum", log_target=True))
