"""A random scope for a tiny model, in which some prompts are those of edits, and its keys by hand."""

from __future__ import annotations

from dataclasses import replace

import torch
from configs import every_token

import unike_kernels as uk
from unike_kernels.artifacts import fingerprint
from unike_kernels.backbones import find_decoder
from unike_kernels.ops.prompt_encoder import PromptEncoder, StateBlock, TextBlock, Vocabulary

CONFIG = every_token(scope="memory", k=3)
LAYERS = (2, 3)
PROMPTS = torch.tensor([[5, 6, 7, 8, 9], [9, 3, 4, 11, 12], [20, 21, 22, 23, 24]])


def inputs_of(model, layers, ids):
    """Layer -> what comes to it, as the unpatched model computes it."""
    found, modules = {}, find_decoder(model).layers

    def note(i):
        def hook(module, args, kwargs):
            found[i] = args[0] if args else kwargs["hidden_states"]

        return modules[i].module.register_forward_pre_hook(hook, with_kwargs=True)

    handles = [note(i) for i in layers]
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return found


PIECES = ("", "", "", *(f" {chr(97 + i % 26)}{i}" for i in range(3, 20)), *(f"x{i}" for i in range(20, 44)))


def make_encoder(model, layers, prompts=PROMPTS):
    """A random one, centred for this model."""
    g, embedding = torch.Generator().manual_seed(0), model.get_input_embeddings()
    e, h, heads, c = embedding.embedding_dim, 6, 2, 8

    def draw(*shape):
        return torch.randn(*shape, generator=g) / max(shape[-1] if len(shape) < 3 else shape[1] * shape[2], 1) ** 0.5

    def block():
        return TextBlock(
            draw(h, e), draw(h, 256), draw(h), draw(h, h, 3), draw(h), draw(heads, h) * 3, draw(heads),
            draw(c, e), draw(c, 256),
        )  # fmt: skip

    states = None
    if layers:
        found, d = inputs_of(model, layers, prompts), model.config.hidden_size
        means = torch.stack([found[i][:, -1].mean(0) for i in layers])
        states = StateBlock(means, draw(12, d * len(layers)), draw(12), draw(c, 12), draw(c))
    weight = embedding.weight.detach()
    return PromptEncoder(weight.mean(0), weight.std(0), (block(), block()), states)


def keys_of(model, encoder, layers, ids):
    """Enc_key by hand, prompt by prompt."""
    found, vocabulary = inputs_of(model, layers, ids) if layers else {}, Vocabulary(PIECES)
    unit = lambda t: t / t.norm(dim=-1, keepdim=True)  # noqa: E731
    gelu = torch.nn.functional.gelu
    keys = []
    for row, own in enumerate(ids):
        with torch.no_grad():
            x = model.get_input_embeddings()(own)
        x = unit((x - encoder.mean) / encoder.spread) * x.shape[-1] ** 0.5
        s, parts = vocabulary.spelled(own[None])[0], []
        for b in encoder.blocks:
            before = torch.nn.functional.pad(x @ b.token.T + s @ b.word.T + b.bias, (0, 0, 1, 1))
            around = [sum(b.conv[:, :, j] @ before[t + j] for j in range(3)) + b.conv_bias for t in range(len(own))]
            h = gelu(before[1:-1] + gelu(torch.stack(around)))
            weights = (h @ b.query.T + b.query_bias).softmax(0)
            values = (x @ b.token_value.T + s @ b.word_value.T).view(len(own), len(b.query), -1)
            parts.append(unit(torch.einsum("th,thc->hc", weights, values).flatten()))
        if layers:
            last = encoder.states
            states = torch.stack([found[i][row, -1] for i in layers]) - last.means
            states = (unit(states) * states.shape[-1] ** 0.5).flatten()
            parts.append(unit(last.w2 @ gelu(last.w1 @ states + last.b1) + last.b2))
        keys.append(torch.cat(parts) / len(parts) ** 0.5)
    return torch.stack(keys)


def scoped(model, make_edit, layers=(), prompts=PROMPTS, threshold=0.01):
    """A memory of a scope alone whose other fact is the third prompt, and edits "a" and "b" of the first two."""
    encoder = make_encoder(model, layers, prompts)
    keys = keys_of(model, encoder, layers, prompts)
    scope = uk.Scope(encoder, PIECES, layers, keys[2:], torch.tensor([0]), threshold, 0.02, 1.9, ("third",))
    memory = uk.MemoryBank({}, CONFIG, fingerprint(model), scope=scope)

    def edit(name, row):
        made = make_edit(model, name, config=CONFIG, seed=row, layers=(3, 4))
        return replace(made, entries=keys[row : row + 1], scope_id=scope.id)

    return memory, [edit("a", 0), edit("b", 1)]
