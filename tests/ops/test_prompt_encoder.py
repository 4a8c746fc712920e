"""The key of a prompt: what its words are, how these are spelled, and what is read, against the same by hand."""

import pytest
import torch
from kernels import kernels_of

from unike_kernels import _native
from unike_kernels.ops import backend
from unike_kernels.ops.prompt_encoder import (
    SPELLING,
    PreparedEncoder,
    PromptEncoder,
    StateBlock,
    Text,
    TextBlock,
    Vocabulary,
    encode_prompts,
)
from unike_kernels.ops.prompt_encoder import spelling as spellings

PIECES = (
    " Par",
    "is",
    " paris",
    "?",
    " in",
    " 19",
    "84",
    "",
    "Par",
    " ",
    "'s",
    " 東京",
    "-",
    " x2",
    "é",
    " " + 30 * "A",
)


TEXTS = [
    ([0, 1], ["paris", "paris"]),
    ([8, 1], ["paris", "paris"]),  # at the start of a line
    ([2, 4, 0, 1, 3], ["paris", "in", "paris", "paris", "?"]),
    ([0, 1, 10, 4], ["paris", "paris", "'s", "in"]),  # a sign begins a word, and ends one
    ([0, 12, 8, 1], ["par", "-", "paris", "paris"]),
    ([5, 6], ["1984", "1984"]),
    ([4, 6, 13], ["in84", "in84", "x2"]),
    ([7, 0, 7, 1], ["", "par", "", "is"]),  # chat markers
    ([9, 8, 1], ["", "paris", "paris"]),
    ([99, 1, 2**40, -1], ["", "is", "", ""]),
    ([11], ["東京"]),
    ([8, 14], ["paré", "paré"]),
    ([3, 3], ["?", "?"]),
    ([15, 1], ["a" * 24 + "is"] * 2),  # of a token, so many characters count
    ([6, 6, 1, 6], ["8484is84"] * 4),
]


def signs(run):
    """Random, [256], for a run of characters, as the files depend on them: hashed and mixed in plain Python."""
    wrap = 2**64 - 1
    mixed = lambda x: (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & wrap  # noqa: E731
    h = 0
    for c in run:
        h = (h * 1_000_003 + c + 1) & wrap
    h = mixed((h + len(run) - 1) * 0x9E3779B97F4A7C15 & wrap)
    bucket, found = (h >> 33) % 8192, []
    for number in range(4 * bucket, 4 * bucket + 4):
        x = mixed((number + 1) * 0x9E3779B97F4A7C15 & wrap)
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & wrap
        x ^= x >> 31
        for byte in x.to_bytes(8, "little"):
            found += [2.0 * (byte >> bit & 1) - 1 for bit in range(7, -1, -1)]
    return torch.tensor(found)


def spelling(word):
    """By hand: the signs of all runs of 1 to 4 characters of the word with marked ends, but the marks alone."""
    if not word:
        return torch.zeros(SPELLING)
    marked = [0x110000, *map(ord, word), 0x110001]
    runs = [marked[i : i + n] for n in (1, 2, 3, 4) for i in range(len(marked) - n + 1)]
    total = sum(signs(run) for run in runs if run not in ([0x110000], [0x110001]))
    return total / total.norm() * 16


@pytest.mark.parametrize("on", ["the CPU", "a device"])
@pytest.mark.parametrize(("ids", "words"), TEXTS)
def test_the_spelling_of_a_text(ids, words, on, monkeypatch):
    if on == "a device":  # where nobody waits to know how many characters there are
        monkeypatch.setattr(spellings, "_room", lambda places: 26 * (len(places) - 1))
    found = Vocabulary(PIECES).spelled(torch.tensor([ids]))
    assert found.shape == (1, len(ids), SPELLING) and found.dtype == torch.float32
    torch.testing.assert_close(found[0], torch.stack([spelling(word) for word in words]))


def test_the_spelling_of_padded_texts():
    """A row is spelled as if it were alone; what is not within has no spelling, and begins no word."""
    vocabulary, most = Vocabulary(PIECES), 6
    for side in ("left", "right"):
        ids, within = (torch.full((len(TEXTS), most), fill) for fill in (1, False))
        for row, (own, _) in enumerate(TEXTS):
            at = slice(0, len(own)) if side == "right" else slice(most - len(own), most)
            ids[row, at], within[row, at] = torch.tensor(own), True
        found = vocabulary.spelled(ids, within)
        assert not found[~within].any()
        for row, (own, _) in enumerate(TEXTS):
            assert torch.equal(found[row, within[row]], vocabulary.spelled(torch.tensor([own]))[0])
    assert vocabulary.spelled(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, SPELLING)


def test_a_spelling_is_that_of_the_whole_word():
    """However it is cut into tokens."""
    one, other = Vocabulary(PIECES).spelled(torch.tensor([[0, 1, 3], [2, 3, 7]]))
    assert torch.equal(one[0], one[1]) and torch.equal(one[0], other[0])
    assert torch.equal(one[2], other[1]) and not torch.equal(one[0], one[2])
    near, far = (
        torch.cosine_similarity(one[0], Vocabulary(PIECES).spelled(torch.tensor([[i]]))[0, 0], 0) for i in (8, 4)
    )
    assert near > 0.35 > 0.25 > abs(far)


def draw(*shape):
    return torch.randn(*shape) / max(shape[-1], 1) ** 0.5


def block(e, h, heads, c):
    return TextBlock(
        draw(h, e), draw(h, SPELLING), draw(h), draw(h, h, 3), draw(h), draw(heads, h) * 3, draw(heads),
        draw(c, e), draw(c, SPELLING),
    )  # fmt: skip


E, STATES = 12, 20


def make_encoder(layers=0):
    states = StateBlock(draw(layers, STATES), draw(7, layers * STATES), draw(7), draw(5, 7), draw(5))
    blocks = (block(E, 6, 3, 9), block(E, 6, 3, 9))
    return PromptEncoder(draw(E), torch.rand(E) + 0.5, blocks, states if layers else None)


def make_text(lengths, most=None):
    """Each token with a row of its own in both tables."""
    most = most or max(lengths)
    count = len(lengths) * most
    each = torch.arange(count).view(len(lengths), most)
    within = torch.arange(most) < torch.tensor(lengths).unsqueeze(1)
    return Text(torch.randn(count, E), torch.randn(count, SPELLING), each, each, within)


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def by_hand(encoder, text, states=None, attended=None):
    """In float64, prompt by prompt and token by token."""
    gelu = torch.nn.functional.gelu
    encoder = PromptEncoder.of(
        {name: t.double() for name, t in encoder.tensors().items()}, len(encoder.blocks), encoder.states is not None
    )
    keys = []
    for row, within in enumerate(text.within):
        x = text.tokens[text.token[row, within]].double()
        s = text.words[text.word[row, within]].double()
        x = unit((x - encoder.mean) / encoder.spread) * E**0.5
        may = torch.ones(len(x), dtype=torch.bool) if attended is None else attended[row, within]
        parts = []
        for b in encoder.blocks:
            own = x @ b.token.T + s @ b.word.T + b.bias
            heads, seen = len(b.query), []
            for t in range(len(x)):
                around = b.conv_bias.clone()
                for j in range(3):
                    if 0 <= t + j - 1 < len(x):
                        around += b.conv[:, :, j] @ own[t + j - 1]
                seen.append(gelu(own[t] + gelu(around)))
            logits = torch.stack(seen) @ b.query.T + b.query_bias
            logits[~may] = float("-inf")
            weights, values = logits.softmax(0), (x @ b.token_value.T + s @ b.word_value.T).view(len(x), heads, -1)
            parts.append(unit(torch.stack([weights[:, i] @ values[:, i] for i in range(heads)]).flatten()))
        if encoder.states is not None and states is not None:
            last = encoder.states
            own = unit(states[row].double() - last.means) * STATES**0.5
            parts.append(unit(last.w2 @ gelu(last.w1 @ own.flatten() + last.b1) + last.b2))
        keys.append(torch.cat(parts) / len(parts) ** 0.5)
    return torch.stack(keys)


@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("attends", ["all", "some"])
def test_keys_against_the_same_by_hand(layers, attends):
    encoder, text = make_encoder(layers), make_text([5, 1, 3])
    states = torch.randn(3, layers, STATES) if layers else None
    attended = torch.tensor([[1, 0, 1, 0, 0], [1, 0, 0, 0, 0], [0, 1, 1, 1, 1]]).bool() if attends == "some" else None
    keys = encode_prompts(encoder, text, states, attended)
    assert keys.shape == (3, encoder.width) == (3, 9 + 9 + (5 if layers else 0)) and keys.dtype == torch.float32
    torch.testing.assert_close(keys.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(keys.double(), by_hand(encoder, text, states, attended), rtol=1e-5, atol=1e-6)
    if attends == "some":
        assert not torch.allclose(keys, encode_prompts(encoder, text, states), atol=1e-3)


def test_each_part_counts():
    encoder, text, states = make_encoder(2), make_text([4]), torch.randn(1, 2, STATES)
    key = encode_prompts(encoder, text, states)
    for name in ("tokens", "words"):
        other = text._replace(**{name: torch.randn_like(getattr(text, name))})
        assert (encode_prompts(encoder, other, states) - key)[0, :18].abs().max() > 1e-2
        assert torch.equal(encode_prompts(encoder, other, states)[0, 18:], key[0, 18:])
    for layer in range(2):
        changed = states.clone()
        changed[0, layer] += torch.randn(STATES)
        assert (encode_prompts(encoder, text, changed) - key)[0, 18:].abs().max() > 1e-2
    torch.testing.assert_close(encode_prompts(encoder, text)[0] * (2 / 3) ** 0.5, key[0, :18])  # without states


@pytest.mark.parametrize("sides", [(0, 3), (2, 0), (1, 4)])
def test_padding_changes_nothing(sides):
    """In front or behind, whatever stands in it."""
    encoder, text = make_encoder(), make_text([5, 5])
    key = encode_prompts(encoder, text)
    tokens = torch.cat([text.tokens, 100 * torch.randn(1, E)])
    words = torch.cat([text.words, 100 * torch.randn(1, SPELLING)])
    token, word = (torch.nn.functional.pad(t, sides, value=len(tokens) - 1) for t in (text.token, text.word))
    within = torch.nn.functional.pad(text.within, sides, value=False)
    padded = encode_prompts(encoder, Text(tokens, words, token, word, within))
    torch.testing.assert_close(padded, key, rtol=1e-5, atol=1e-6)


def test_a_prompt_without_tokens_is_nothing():
    encoder, text = make_encoder(), make_text([3, 0])
    keys = encode_prompts(encoder, text)
    assert keys.isfinite().all() and not keys[1].any()
    torch.testing.assert_close(keys[:1], encode_prompts(encoder, text)[:1])
    unseen = encode_prompts(encoder, text, attended=torch.zeros(2, 3, dtype=torch.bool))
    assert not unseen.any()


def test_tokens_and_words_that_come_again_are_projected_once():
    """Tables of the distinct ones say the same as a row for each token."""
    encoder, tokens, words = make_encoder(), torch.randn(4, E), torch.randn(3, SPELLING)
    token, word = torch.tensor([[0, 1, 1, 3], [2, 2, 0, 1]]), torch.tensor([[0, 0, 2, 1], [1, 1, 0, 2]])
    within = torch.tensor([[True, True, True, True], [True, True, True, False]])
    each = torch.arange(8).view(2, 4)
    apart = Text(tokens[token.flatten()], words[word.flatten()], each, each, within)
    torch.testing.assert_close(
        encode_prompts(encoder, Text(tokens, words, token, word, within)), encode_prompts(encoder, apart)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_embeddings_of_any_precision(dtype):
    encoder, text = make_encoder(), make_text([4, 2])
    tokens = text.tokens.to(dtype)
    keys = encode_prompts(encoder, text._replace(tokens=tokens))
    assert keys.dtype == torch.float32
    assert torch.equal(keys, encode_prompts(encoder, text._replace(tokens=tokens.float())))


def test_gradients_reach_every_part():
    encoder, text, states = make_encoder(2), make_text([4, 3]), torch.randn(2, 2, STATES)
    tensors = {name: t.requires_grad_() for name, t in encoder.tensors().items()}
    (encode_prompts(encoder, text, states) ** 2 @ torch.rand(encoder.width)).sum().backward()
    shared = {"blocks.0.query_bias", "blocks.1.query_bias"}  # of all tokens the same: it makes no difference
    assert all(t.grad.abs().max() > 1e-7 for name, t in tensors.items() if name not in shared)


def test_an_encoder_is_its_tensors():
    for layers in (0, 2):
        encoder = make_encoder(layers)
        again = PromptEncoder.of(encoder.tensors(), 2, bool(layers))
        assert again.tensors().keys() == encoder.tensors().keys()
        assert all(torch.equal(again.tensors()[name], t) for name, t in encoder.tensors().items())
    with pytest.raises(KeyError, match=r"blocks\.2"):
        PromptEncoder.of(encoder.tensors(), 3, True)


def asked_of(texts, dtype=torch.float32, side="right", most=9):
    """ids, embeddings and what is within, with padding that would be seen."""
    ids, within = (torch.full((len(texts), most), fill) for fill in (1, False))
    for row, own in enumerate(texts):
        at = slice(0, len(own)) if side == "right" else slice(most - len(own), most)
        ids[row, at], within[row, at] = torch.tensor(own), True
    return ids, (3 * torch.randn(len(texts), most, E)).to(dtype), within


def large_encoder(e=E):
    """No width is a multiple of a vector."""
    return PromptEncoder(draw(e), torch.rand(e) + 0.5, (block(e, 37, 5, 65), block(e, 37, 5, 65)), None)


@pytest.fixture(params=_native.isas() if _native.available() else [])
def isa(request):
    with kernels_of(request.param):
        yield request.param


@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_native_keys(layers, side, dtype, isa):
    texts = [own for own, _ in TEXTS]
    states = torch.randn(len(texts), layers, STATES) if layers else None
    for encoder in (make_encoder(layers), large_encoder()):
        prepared = PreparedEncoder(encoder, Vocabulary(PIECES))
        asked = (*asked_of(texts, dtype, side), states if encoder.states is not None else None)
        with torch.no_grad():
            with backend("reference"):
                wanted = prepared(*asked)
            with backend("native"):
                found = prepared(*asked)
                rows = [[None if t is None else t[i : i + 1] for t in asked] for i in range(len(texts))]
                alone = torch.cat([prepared(*row) for row in rows])
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
        text = sum(len(b.word_value) for b in encoder.blocks)  # whatever other prompts there are
        assert torch.equal(found[:, :text], alone[:, :text])


def test_native_keys_of_long_words_and_long_prompts():
    """More runs of a word than a byte counts, words across many tokens, and more tokens than a group has."""
    texts = [[15, 1, 6] * 100, [0, 1] * 150, [8] * 300, [7] * 300, []]
    prepared = PreparedEncoder(large_encoder(40), Vocabulary(PIECES))
    ids, _, within = asked_of(texts, most=300)
    embeddings = torch.randn(len(texts), 300, 80)[..., ::2]
    with torch.no_grad():
        found = prepared(ids, embeddings, within)
        with backend("reference"):
            torch.testing.assert_close(found, prepared(ids, embeddings, within).nan_to_num(), rtol=0, atol=1e-5)
        assert not found[-1].any()
        before = torch.get_num_threads()
        try:
            for threads in (1, 3):
                torch.set_num_threads(threads)
                assert torch.equal(prepared(ids, embeddings, within), found)
        finally:
            torch.set_num_threads(before)


def test_native_keys_are_of_the_text_of_each_token():
    """A token's place, its word and its neighbours count, and what is not within does not."""
    prepared = PreparedEncoder(make_encoder(), Vocabulary(PIECES))
    ids, embeddings, within = asked_of([[2, 4, 0, 1, 3]])
    with torch.no_grad():
        key = prepared(ids, embeddings, within)
        for at, other in ((0, 13), (3, 6), (4, 12)):
            changed = ids.clone()
            changed[0, at] = other
            assert (prepared(changed, embeddings, within) - key).abs().max() > 1e-3
        embeddings[0, 5:], ids[0, 5:] = torch.nan, 99
        assert torch.equal(prepared(ids, embeddings, within), key)
        embeddings[0, 5:], within[0, 2] = 0, False  # where a word was parted, another one begins
        parted = prepared(ids, embeddings, within)
        assert not torch.allclose(parted, key, atol=1e-3)
        with backend("reference"):
            torch.testing.assert_close(parted, prepared(ids, embeddings, within), rtol=0, atol=1e-5)
