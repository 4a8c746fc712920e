"""Eq. 11-15 on observations made by hand, and what is observed of a model."""

import pytest
import torch
from configs import every_token
from unike_eval import METRICS, PROTOCOLS, Case, Observation, observe, observe_case, score
from unike_eval.metrics import agreement, token_accuracy

import unike_kernels as uk
from unike_kernels.training import Sample
from unike_kernels.training.samples import encode, forward


def seen(first, answer, wanted=(), others=0, said="", right=False):
    """First choices at each position; the nine behind them are `others`, `others` + 1, ..."""
    behind = torch.arange(100 + others, 109 + others).expand(len(first), 9)
    best = torch.cat([torch.tensor(first)[:, None], behind], 1)
    return Observation(best, torch.tensor(answer, dtype=torch.bool), torch.tensor(wanted), said, right)


def test_token_accuracy_is_of_the_answers_first_choices():
    assert token_accuracy(seen([1, 2, 3, 4], [0, 0, 1, 1], [3, 9])) == 0.5
    assert token_accuracy(seen([3, 9, 1], [0, 1, 0], [9])) == 1.0


BEFORE = seen([1, 2, 3, 4], [0, 0, 1, 1])


@pytest.mark.parametrize(
    ("after", "protocol", "images", "expected"),
    [
        (seen([1, 2, 3, 4], [0, 0, 1, 1]), "mmedit", False, 1.0),
        (seen([9, 9, 9, 4], [0, 0, 1, 1]), "mmedit", False, 0.25),  # over all positions
        (seen([9, 9, 9, 4], [0, 0, 1, 1]), "unike", False, 0.5),  # over the answer's
        (seen([9, 9, 3, 4], [0, 0, 1, 1]), "unike", True, 1.0),
        (seen([9, 9, 3, 4], [0, 0, 1, 1]), "exact", False, 1.0),
        (seen([1, 2, 9, 4], [0, 0, 1, 1]), "exact", True, 0.0),
        (seen([1, 2, 3, 4], [0, 0, 1, 1], others=1), "mmedit", False, 1.0),  # text: the first choices
        (seen([1, 2, 3, 4], [0, 0, 1, 1], others=1), "mmedit", True, 0.1),  # images: ten, rank by rank
        (seen([1, 2, 9, 9], [0, 0, 1, 1]), "mmedit", True, 0.95),
    ],
)
def test_agreement(after, protocol, images, expected):
    assert agreement(BEFORE, after, protocol, images) == pytest.approx(expected)


def test_score_takes_means_over_samples_and_leaves_out_what_is_empty():
    before = {
        "reliability": [seen([1], [1], [1])],
        "t_generality": [],
        "t_locality": [BEFORE, BEFORE],
        "m_locality": [BEFORE],
    }
    after = {
        "reliability": [seen([1], [1], [2])],
        "t_generality": [],
        "t_locality": [seen([9, 2, 3, 4], [0, 0, 1, 1]), seen([1, 2, 9, 9], [0, 0, 1, 1])],
        "m_locality": [seen([1, 2, 3, 4], [0, 0, 1, 1], others=1)],
    }
    assert score(before, after, "mmedit") == pytest.approx(
        {"reliability": 0.0, "t_locality": (0.75 + 0.5) / 2, "m_locality": 0.1}
    )
    assert score(before, after, "unike") == pytest.approx({"reliability": 0.0, "t_locality": 0.5, "m_locality": 1.0})
    half = {"reliability": [seen([1, 2], [1, 1], [1, 3]), seen([1, 3], [1, 1], [1, 3])]}
    assert (score({}, half, "unike"), score({}, half, "exact")) == ({"reliability": 0.75}, {"reliability": 0.5})
    silent = {"near_locality": [seen([1, 2], [0, 0])]}  # without an answer there is nowhere to look
    assert (score(silent, silent, "unike"), score(silent, silent, "mmedit")) == ({}, {"near_locality": 1.0})
    said = {"reliability": [seen([], [], said="Lima", right=True), seen([], [], said="Lima Lima")]}
    said |= {"t_locality": [seen([], [], said="The peso."), seen([], [], said="cold", right=True)]}
    was = {"t_locality": [seen([], [], said="a Peso"), seen([], [], said="hot")]}
    assert score(was, said, "generated") == {"reliability": 0.5, "t_locality": 0.5}
    with pytest.raises(ValueError, match="protocol: expected one of generated, unike, mmedit, exact; got 'vqa'"):
        score(before, after, "vqa")
    with pytest.raises(ValueError, match="protocol: expected one of generated, unike, mmedit, exact; got 'vqa'"):
        agreement(BEFORE, BEFORE, "vqa", False)


SAMPLES = [
    Sample("w1 w2 w3", "w4 w5"),
    Sample("w6", "w7"),
    Sample("w8 w9 w10 w11 w12", "w13"),
    Sample("w14 w15", "w16"),
]


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("config", [every_token(k=7, values="pre"), every_token(k=7, values="pre", alpha="last")])
@pytest.mark.parametrize("kind", ["llama", "blip2-opt"])
def test_observations_in_batches_are_those_one_by_one(
    make_model, make_memory, make_edit, make_processor, kind, config, padding_side
):
    # In float64, so that rounding does not change an order (LLaMA's norms round to float32: far from a tie, too).
    model = make_model(kind, dtype=torch.float64)
    memory = make_memory(model, config)
    processor = make_processor(padding_side)
    samples = SAMPLES
    if kind.startswith("blip2"):
        processor = AsDouble(processor)
        samples = [*SAMPLES[:2], *(Sample(s.prompt, s.answer, torch.rand(16, 16)) for s in SAMPLES[2:])]
    with uk.patched(model, [make_edit(model, "a", memory)], memory):
        together = observe(model, processor, samples, batch_size=3)
        alone = [observe(model, processor, [s])[0] for s in samples]
        for one, other, s in zip(together, alone, samples, strict=True):
            assert torch.equal(one.best, other.best)
            assert torch.equal(one.answer, other.answer)
            assert torch.equal(one.wanted, other.wanted)
            assert (one.said, one.right) == (other.said, other.right)
            words, placeholders = s.answer.split(), 4 * (s.image is not None)
            assert one.wanted.tolist() == [4 + int(w[1:]) for w in words]
            assert one.best.shape == (len(s.prompt.split()) + len(words) + placeholders - 1, 10)
            assert one.answer.tolist() == [False] * (len(one.answer) - len(words)) + [True] * len(words)


class AsDouble:
    """A processor whose images are float64."""

    def __init__(self, processor):
        self.processor, self.tokenizer = processor, processor.tokenizer

    def __call__(self, **kwargs):
        features = self.processor(**kwargs)
        return {k: v.double() if k == "pixel_values" else v for k, v in features.items()}


def test_observed_are_the_models_best_next_tokens(make_model, processor):
    model = make_model("opt").train()
    found = observe(model, processor, SAMPLES[:1])[0]
    assert model.training
    with torch.no_grad():
        logits = forward(model.eval(), encode(processor, SAMPLES[:1]).inputs)[0, :-1]
    assert torch.equal(found.best, logits.sort(-1, descending=True).indices[:, :10])


def test_a_case_from_before_to_after(make_model, make_edit, processor):
    model = make_model("opt")
    case = Case(SAMPLES[0], rephrasings=(SAMPLES[1],), text_locality=(SAMPLES[2], SAMPLES[3]))
    assert list(case.groups()) == list(METRICS)
    before = observe_case(model, processor, case)
    assert {name: len(o) for name, o in before.items()} == dict(zip(METRICS, (1, 1, 0, 2, 0, 0, 0, 0), strict=True))
    with uk.patched(model, [make_edit(model, "a")]):
        after = observe_case(model, processor, case)
    for protocol in PROTOCOLS:
        unchanged, changed = score(before, before, protocol), score(before, after, protocol)
        assert list(changed) == ["reliability", "t_generality", "t_locality"]
        assert unchanged["t_locality"] == 1.0 > changed["t_locality"]
