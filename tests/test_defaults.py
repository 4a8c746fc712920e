"""torch's default dtype and default device are the user's: whatever they are, the library computes the same bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import unike_kernels as uk
from unike_kernels.backbones import match_activation
from unike_kernels.ops import EditPool, SemanticEncoder
from unike_kernels.training import EditTraining, EncoderTraining, Sample, Triplet, build_memory, train_edit

IDS = [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]]
TRIPLETS = [Triplet(f"w{i} w{i + 9}", f"w{i + 18}", f"w{i + 1} w{i + 5}") for i in range(8)]


@pytest.fixture(params=[torch.float16, torch.bfloat16, torch.float64, "meta"], ids=str)
def unusual(request):
    """Calls a function under another default dtype or device, which is set back afterwards."""

    def run(compute: Callable[[], list[Tensor]]) -> list[Tensor]:
        if request.param == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(request.param)
        try:
            return compute()
        finally:
            torch.set_default_device(None)
            torch.set_default_dtype(torch.float32)

    return run


def assert_same(compute: Callable[[], list[Tensor]], unusual) -> None:
    """Bit for bit, dtypes and devices too; three times, since a damaged heap may take a while to show."""
    expected = [t.detach().clone() for t in compute()]
    assert expected and all(t.device.type == "cpu" for t in expected)
    for got in (unusual(compute) for _ in range(3)):
        for a, b in zip(got, expected, strict=True):
            assert (a.dtype, a.device, a.shape) == (b.dtype, b.device, b.shape)
            assert torch.equal(a.detach(), b)


def ids() -> Tensor:
    return torch.tensor(IDS, dtype=torch.int64, device="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_a_patched_model_forward_and_backward(make_model, make_memory, make_edit, unusual, kind, dtype):
    model = make_model(kind, dtype=dtype)
    memory = make_memory(model)
    edits = [make_edit(model, name, memory, seed=seed) for seed, name in enumerate("ab")]
    embeddings = model.get_input_embeddings()(ids()).detach()

    def compute() -> list[Tensor]:
        x = embeddings.clone().requires_grad_()
        with uk.patched(model, edits, memory), uk.rows(model, [["a"], ["a", "b"]], memory=[True, False]):
            alone = model(input_ids=ids(), use_cache=False).logits
            out = model(inputs_embeds=x, use_cache=False).logits
            out.float().square().mean().backward()
            with torch.no_grad(), uk.explain(model) as told:
                model(input_ids=ids(), use_cache=False)
        told = told.passes[0][3]
        return [alone, out, x.grad, told.entries, told.scores, told.alpha, told.neurons["a"]]

    assert_same(compute, unusual)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_the_operators_and_their_gradients(unusual, backend):
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float32, device="cpu").requires_grad_()

    x, base, hidden, alpha = random(6, 32), random(6, 32), random(6, 32), random(6)
    keys, zeta, beta = random(7, 32), random(2, 32), random(2)
    encoder = SemanticEncoder(*(t.detach() for t in (random(4, 32), random(4), random(32, 4), random(32))))
    index = uk.ops.normalize_rows(random(20, 32).detach())
    table, anchor = random(20, 32).detach(), random(2, 32)
    indices = [torch.tensor(t, dtype=torch.int64, device="cpu") for t in ([0, 3, 7], [0, 1, 3], [1, 0, 1])]
    pool = EditPool(keys, random(7), random(7, 32), random(7), random(7, 32), zeta, beta, *indices)
    found = torch.randint(-1, 20, (6, 5), dtype=torch.int64, device="cpu")

    def compute() -> list[Tensor]:
        with uk.backend(backend):
            out = uk.ops.patched_ffn(x, base, pool, activation="gelu")
            attended, gate = uk.ops.latent_attention(hidden, base, table, table, found, encoder, anchor=anchor)
            given, _ = uk.ops.latent_attention(hidden, base, table, table, found, encoder, alpha=alpha)
            shifted, _, ids = uk.ops.memory_attention(hidden, base, index, table, table, encoder, k=5)
            scores, best = uk.ops.cosine_topk(x.detach(), index, 25, normalized=True)
            total = (out * out).sum() + attended.sum() + gate.sum() + given.sum() + (shifted * shifted).sum()
            wanted = [x, base, hidden, alpha, anchor, *(t for t in pool[:7] if t is not None)]
            return [out, attended, gate, given, shifted, ids, scores, best, *torch.autograd.grad(total, wanted)]

    assert_same(compute, unusual)


@pytest.mark.parametrize("scan", ["float32", "float16", "bfloat16", "int8"])
def test_an_index(unusual, scan, tmp_path):
    keys, queries = (torch.randn(n, 40, dtype=torch.float32, device="cpu") for n in (90, 5))

    def compute() -> list[Tensor]:
        index = uk.CosineIndex(keys[:50], scan=scan)
        index.add(keys[50:])
        index.remove([3, 60])
        index.save(tmp_path / "index")
        return [*index.search(queries, 9), *uk.CosineIndex.load(tmp_path / "index").search(queries, 100)]

    assert_same(compute, unusual)


def test_files(make_model, make_memory, make_edit, unusual, tmp_path):
    model = make_model("llama")
    memory = make_memory(model)
    edit = make_edit(model, "a", memory, gated=True)

    def compute() -> list[Tensor]:
        memory.save(tmp_path / "memory")
        edit.save(tmp_path / "edit")
        loaded, back = uk.MemoryBank.load(tmp_path / "memory"), uk.Edit.load(tmp_path / "edit")
        assert loaded.id == memory.id
        m, e = loaded.layers[3], back.layers[3]
        return [m.index, m.keys, *m.encoder, m.zeta_prime, *e.tensors().values()]

    assert_same(compute, unusual)


def test_a_bank(make_model, make_edit, unusual):
    model = make_model("llama")
    edits = [make_edit(model, name, seed=seed) for seed, name in enumerate("abc")]
    x, base = (torch.randn(8, 64, dtype=torch.float32, device="cpu") for _ in range(2))

    def compute() -> list[Tensor]:
        bank = uk.EditBank([2, 3, 4, 5], 64, "silu")
        empty = bank.apply(2, x, base, [[], []])
        for edit in edits:
            bank.add(edit)
        bank.remove("b")
        return [empty, bank.apply(2, x, base, [["a"], ["c", "a"], [], ["c"]])]

    assert_same(compute, unusual)


def test_training(make_model, make_processor, unusual):
    """An edit, with the memory that it was trained beside."""
    model, processor = make_model("llama"), make_processor()
    memory = build_memory(
        model, processor, TRIPLETS, layers=[2, 4], training=EncoderTraining(steps=6), progress=False
    ).memory  # fmt: skip
    request, kept = Sample("w1 w2 w3", "w30 w31"), [Sample("w9 w5", "w8")]
    training = EditTraining(neurons=3, lr=1e-2, steps=3)

    def compute() -> list[Tensor]:
        result = train_edit(
            model, processor, request, memory, preserve=kept, training=training, progress=False, layers=[2, 4]
        )
        return [t for layer in result.edit.layers.values() for t in layer.tensors().values()]

    assert_same(compute, unusual)


def test_building_a_memory(make_model, make_processor, unusual):
    model, processor = make_model("opt"), make_processor()

    def compute() -> list[Tensor]:
        training = EncoderTraining(steps=6)
        made = build_memory(model, processor, TRIPLETS, layers=[3], training=training, progress=False).memory.layers[3]
        return [made.index, made.keys, *made.encoder, made.zeta, made.zeta_prime]

    assert_same(compute, unusual)


def test_activations_are_recognised(unusual):
    from transformers.activations import ACT2FN

    wanted = {"gelu_new": "gelu_tanh", "gelu": "gelu", "silu": "silu", "relu": "relu", "gelu_pytorch_tanh": "gelu_tanh"}
    functions = {name: ACT2FN[name] for name in wanted}

    def compute() -> list[Tensor]:
        assert {name: match_activation(f, name) for name, f in functions.items()} == wanted
        return [torch.zeros(1, dtype=torch.float32, device="cpu")]

    assert_same(compute, unusual)
