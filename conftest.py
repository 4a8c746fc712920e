"""What all tests share: a fixed seed, hypothesis without time limits (a shared machine can be slow), and tiny models.

The models are random: 6 layers, d = 64, 4 heads, with an OPT (inline FFN) or a LLaMA decoder (gated FFN), alone or in
a BLIP-2. Their weights are larger than at a usual initialisation, so that a change anywhere shows in the logits.
"""

from __future__ import annotations

import pytest
import torch
from configs import every_token
from hypothesis import settings

import unike_kernels as uk
from unike_kernels.artifacts.fingerprint import fingerprint

pytest_plugins = ["ptxsim.plugin", "budget"]

settings.register_profile("unike", deadline=None, print_blob=True)
settings.load_profile("unike")

WIDTH, LAYERS = 64, 6
WORDS = [f"w{i}" for i in range(40)]


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def make_processor():
    """padding side -> a processor of words; `.tokenizer` is its tokenizer."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast
    from unike_eval.toy import WorldProcessor

    def make(padding_side: str = "left") -> WorldProcessor:
        vocabulary = ["<pad>", "</s>", "<unk>", "<image>", *WORDS]
        words = Tokenizer(WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
        words.pre_tokenizer = WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=words,
            pad_token="<pad>",
            eos_token="</s>",
            bos_token="</s>",
            unk_token="<unk>",
            additional_special_tokens=["<image>"],
            model_input_names=["input_ids", "attention_mask"],
            padding_side=padding_side,
        )
        return WorldProcessor(tokenizer, (16, 16))

    return make


@pytest.fixture
def processor(make_processor):
    return make_processor()


def _text_config(decoder: str):
    from transformers import LlamaConfig, OPTConfig

    shared = {
        "vocab_size": len(WORDS) + 4,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    if decoder == "opt":
        return OPTConfig(**shared, ffn_dim=96, word_embed_proj_dim=WIDTH, dropout=0.0)
    return LlamaConfig(**shared, intermediate_size=80, num_key_value_heads=2)


def _blip2_config(decoder: str):
    from transformers import Blip2Config

    part = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Blip2Config(
        vision_config=dict(part, image_size=16, patch_size=8),
        qformer_config=dict(
            part,
            encoder_hidden_size=32,
            cross_attention_frequency=1,
            vocab_size=1,
            max_position_embeddings=1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        text_config=_text_config(decoder).to_dict(),
        num_query_tokens=4,
        image_token_index=3,
    )


@pytest.fixture(scope="session")
def make_model():
    """ "opt", "llama", "blip2-opt" or "blip2-llama" -> a tiny random model in eval mode; the same for the same seed."""
    from transformers import Blip2ForConditionalGeneration, LlamaForCausalLM, OPTForCausalLM

    def make(kind: str, *, seed: int = 0, dtype: torch.dtype = torch.float32):
        torch.manual_seed(seed)
        decoder = kind.removeprefix("blip2-")
        if kind != decoder:
            model = Blip2ForConditionalGeneration(_blip2_config(decoder))
        else:
            model = {"opt": OPTForCausalLM, "llama": LlamaForCausalLM}[kind](_text_config(decoder))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape) * (0.1 if p.dim() == 1 else max(p[0].numel(), 1) ** -0.5))
        return model.eval().to(dtype)

    return make


def _random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape) * scale).to(dtype)


def _usual_outputs(model, layers) -> list[torch.Tensor]:
    """The mean output of these layers' attention over a text of all words."""
    from unike_kernels.backbones import find_decoder

    found = find_decoder(model).layers
    means: dict[int, torch.Tensor] = {}

    def note(index: int, output) -> None:
        states = output if isinstance(output, torch.Tensor) else output[0]
        means[index] = states.mean((0, 1))

    handles = [
        found[i].attention.module.register_forward_hook(lambda module, args, output, i=i: note(i, output))
        for i in layers
    ]
    with torch.no_grad():
        words = torch.arange(4, 4 + len(WORDS))[None]
        decoded = {"decoder_input_ids": words} if model.config.is_encoder_decoder else {}
        getattr(model, "language_model", model)(input_ids=words, **decoded)
    for handle in handles:
        handle.remove()
    return [means[i] for i in layers]


@pytest.fixture(scope="session")
def make_memory():
    """(model, config) -> a random memory of 50 entries in the last four layers.

    Enc_sem leans towards the layer's usual attention output, so that most gates are open, each by its own width.
    """

    def make(model, config: uk.Config | None = None, *, seed: int = 1, entries: int = 50, layers=(2, 3, 4, 5)):
        torch.manual_seed(seed)
        config = config or every_token(k=7, values="pre")
        dtype = next(model.parameters()).dtype
        dtype = torch.float32 if dtype == torch.bfloat16 else dtype
        d, r = WIDTH, 16
        heads, width = (4, d // 4) if config.values == "projected" else (1, d)

        def layer(usual: torch.Tensor) -> uk.MemoryLayer:
            encoder = uk.ops.SemanticEncoder(
                _random(r, d, dtype=dtype, scale=d**-0.5), _random(r, dtype=dtype),
                _random(d, r, dtype=dtype, scale=r**-0.5), (6 * usual / usual.norm()).to(dtype),
            )  # fmt: skip
            return uk.MemoryLayer(
                index=_random(entries, d, dtype=dtype),
                keys=_random(entries, heads, width, dtype=dtype),
                values=None if config.values == "pre" else _random(entries, heads, d, dtype=dtype),
                encoder=encoder,
                zeta=_random(8, dtype=dtype),
                zeta_prime=_random(d, dtype=dtype),
            )

        tables = {i: layer(usual) for i, usual in zip(layers, _usual_outputs(model, layers), strict=True)}
        return uk.MemoryBank(tables, config, fingerprint(model), {"made": "at random"})

    return make


@pytest.fixture(scope="session")
def make_edit():
    """(model, id, memory) -> a random edit in the last four layers that changes every token."""
    from unike_kernels.backbones import find_decoder

    def make(model, id: str = "a", memory=None, *, config=None, seed=2, neurons=5, gated=False, layers=(2, 3, 4, 5)):
        torch.manual_seed(seed)
        dtype = next(model.parameters()).dtype
        dtype = torch.float32 if dtype == torch.bfloat16 else dtype
        d = WIDTH

        def layer() -> uk.EditLayer:
            return uk.EditLayer(
                keys=_random(neurons, d, dtype=dtype, scale=d**-0.5),
                key_bias=_random(neurons, dtype=dtype),
                values=_random(neurons, d, dtype=dtype, scale=0.3),
                zeta=_random(d, dtype=dtype),
                beta=torch.tensor(0.1, dtype=dtype),
                up=_random(neurons, d, dtype=dtype, scale=d**-0.5) if gated else None,
                up_bias=_random(neurons, dtype=dtype) if gated else None,
            )

        return uk.Edit(
            id,
            {i: layer() for i in layers},
            next(layer for layer in find_decoder(model).layers if layer.has("ffn")).activation,
            config or (memory.config if memory else every_token(k=7, values="pre")),
            fingerprint(model),
            memory.id if memory else None,
            {"prompt": "w1 w2"},
        )

    return make


@pytest.fixture(scope="session")
def make_inputs(make_processor):
    """Prompts -> what a model of this kind takes; each prompt of a BLIP-2 gets a random image."""

    def make(kind: str, prompts: list[str], *, padding_side: str = "left", dtype: torch.dtype = torch.float32):
        torch.manual_seed(7)
        images = torch.rand(len(prompts), 16, 16) if kind.startswith("blip2") else None
        inputs = dict(make_processor(padding_side)(prompts, images, padding=True))
        if images is not None:
            inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        return inputs

    return make
