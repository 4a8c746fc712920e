"""The shipped models: the processor and sizes, and in the slow tests what they know and what they do not.

What they know changes where they are trained (scripts/train_models.py) alone.
"""

from pathlib import Path

import pytest
import torch
from unike_eval import answers
from unike_eval.toy import shapes

from unike_kernels.training import Sample

FOLDER = Path(shapes.__file__).parent / "weights"


@pytest.fixture(scope="module", params=["opt", "llama"])
def model(request):
    return shapes.load_model(request.param)


def accuracy(model, facts, split):
    """The share of right answers, on a test image for each fact, every phrasing of `split`."""
    showing = shapes.showing("test")
    samples = [Sample(p, f.answer, showing[f.shown][n]) for f in facts for n, p in enumerate(f.phrasings(split))]
    said = answers(model, shapes.load_processor(), samples, batch_size=256)
    return sum(a == s.answer for a, s in zip(said, samples, strict=True)) / len(samples)


@pytest.mark.slow
def test_knows_what_it_was_taught(model):
    taught = [fact for fact in shapes.FACTS if not fact.withheld]
    for kind in ("color", "shape", "presence", "absence"):
        # Measured on all test images: at least 98.8% (OPT) and 93.9% (LLaMA, questions with "not").
        assert accuracy(model, [fact for fact in taught if fact.kind == kind], "train") >= 0.92
    # In words that it was not taught about the subject: 90% and 92%.
    assert accuracy(model, taught, "held_out") >= 0.85


@pytest.mark.slow
def test_does_not_know_what_was_withheld(model):
    # Measured on all test images: none with either decoder.
    assert accuracy(model, [fact for fact in shapes.FACTS if fact.withheld], "train") < 0.1


def test_processor_and_size(model):
    processor = shapes.load_processor()
    prompt = shapes.FACTS[0].train[0]
    batch = processor([prompt, prompt], [shapes.images("test")[0][0], torch.rand(3, 64, 64)], padding=True)
    assert batch.pixel_values.shape == (2, 3, 64, 64)
    assert processor(prompt, torch.rand(3, 64, 64)).pixel_values.shape == (1, 3, 64, 64)
    known = {p for f in shapes.FACTS for p in (*f.train, *f.held_out)} | {p for p, _ in shapes.text_items("test")}
    assert processor.tokenizer.unk_token_id not in {t for p in known for t in processor.tokenizer(p).input_ids}
    with pytest.raises(ValueError, match=r"shape \(3, 64, 64\), not \(64, 64\)"):
        processor([prompt], [torch.rand(64, 64)])
    assert not model.training
    assert all(path.stat().st_size < 3_000_000 for path in FOLDER.rglob("*") if path.is_file())
