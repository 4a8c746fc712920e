"""What is asked of a model and what it should answer, and how that becomes a batch of tokens."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from ..backbones import placeholder_ids
from ..patching import is_patched, rows
from . import chat

P = ParamSpec("P")
R = TypeVar("R")


def taking_gradients(function: Callable[P, R]) -> Callable[P, R]:
    """`function` can take gradients, and what it makes can be trained with, whatever modes its caller is in."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(False), torch.enable_grad():
            return function(*args, **kwargs)

    return run


@dataclass(frozen=True)
class Sample:
    """What is asked of a model, and an answer: an edit request, or something that an edit must not change.

    Attributes:
        prompt: a text that the answer follows, behind a space.
        answer: what follows; "" where the prompt alone counts.
        image: that the prompt, or the last message, is about.
        messages: in place of a prompt: a chat whose next turn is the answer, rendered by the model's own chat template.
            Each is a dict of "role" and "content", a string or a list of {"type": "text", "text": ...} and {"type":
            "image", "image": ...}; the image may be a file's name, too, and an image part that holds none is the place
            of `image`.

    Raises:
        ValueError: a prompt and messages; messages of another form.
    """

    prompt: str = ""
    answer: str = ""
    image: Any = None
    messages: chat.Messages | None = field(default=None, hash=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.messages is None:
            return
        if self.prompt:
            raise ValueError(f"Sample: expected a prompt or messages, got both; the prompt is {self.prompt!r}")
        chat.check(self.messages)
        chat.images_of(self.messages, self.image)

    @property
    def images(self) -> tuple[Any, ...]:
        """Those beside and within the messages, in order."""
        if self.messages is not None:
            return chat.images_of(self.messages, self.image)
        return () if self.image is None else (self.image,)

    @property
    def question(self) -> str:
        """The prompt, or the words of the last message; for people."""
        return self.prompt if self.messages is None else chat.text_of(self.messages[-1])

    @property
    def asked(self) -> Sample:
        """The same without its answer."""
        return replace(self, answer="")


@dataclass(frozen=True)
class Triplet:
    """A piece of in-context knowledge (paper, Appendix C): a question, its true answer, and the model's wrong one.

    Attributes:
        prompt, image, messages: the question, as in a `Sample`.
        positive: the true answer.
        negative: the model's wrong one.
    """

    prompt: str = ""
    positive: str = ""
    negative: str = ""
    image: Any = None
    messages: chat.Messages | None = field(default=None, hash=False, kw_only=True)

    def __post_init__(self) -> None:
        self.answered("")

    def answered(self, answer: str) -> Sample:
        """The question with an answer, "" for none."""
        return Sample(self.prompt, answer, self.image, messages=self.messages)

    @property
    def text(self) -> str:
        """What it says, in a line for people."""
        told = f"{self.answered('').question} -> {self.positive}, not {self.negative}"
        return " ".join(told.split())


@dataclass(frozen=True)
class Batch:
    """Encoded prompts with answers, of one kind (all with images, or none).

    Attributes:
        inputs: what the model takes.
        ends: int64 [B], index of the last prompt token.
        lasts: int64 [B], index of the last answer token.
        prompt_lengths: prompt tokens of each row, padding not counted.
    """

    inputs: dict[str, Tensor]
    ends: Tensor
    lasts: Tensor
    prompt_lengths: list[int]

    def answer_mask(self) -> Tensor:
        """bool [B, T], the answer tokens."""
        position = torch.arange(self.inputs["input_ids"].shape[1], dtype=torch.int64, device=self.ends.device)
        return (position > self.ends.unsqueeze(1)) & (position <= self.lasts.unsqueeze(1))


def encode(
    processor: Any, samples: Sequence[Sample], device: torch.device | str = "cpu", *, ended: bool = False
) -> Batch:
    """Tokenise prompts and answers with a Hugging Face processor (or tokenizer, for text alone).

    An answer follows its prompt behind a space, and messages as the chat template has it. A processor that takes what
    follows the prompt as an argument of its own, `suffix` (PaliGemma), gets the answer there. All inputs that the
    processor makes are kept, except for labels.

    Args:
        processor: the model's processor or tokenizer.
        samples: one or more; with images each, or all without, and all of messages, or none.
        device: where the batch is put.
        ended: the answers have the token behind them that ends the model's turn: for messages the template's, else the
            tokenizer's end of text, where it has one.

    Raises:
        ValueError: no samples; some with and some without an image, or some of messages; messages where there is no
            chat template; a prompt without tokens; or one whose tokens are not the first ones of prompt and answer
            together, so that the answer's tokens cannot be told apart.
    """
    if not samples:
        raise ValueError("samples: expected at least one, got none")
    kinds = set(map(_kind, samples))
    if len({kind.images for kind in kinds}) > 1:
        raise ValueError("samples: expected all with an image or none, got both; encode them apart")
    if len(kinds) > 1:
        raise ValueError("samples: expected all of messages or none, got both; encode them apart")
    (kind,) = kinds

    answered = any(s.answer for s in samples)
    apart = answered and not kind.messages and "suffix" in inspect.signature(type(processor).__call__).parameters
    texts = [_Text(s.prompt, s.answer) if apart else _text(processor, s, ended) for s in samples]
    given: dict[str, Any] = {"text": [t.prompt if apart else t.whole for t in texts]}
    if apart:
        given["suffix"] = [t.answer for t in texts]
    if kind.images:
        images = [[opened(image) for image in s.images] for s in samples]
        given["images"] = images if kind.messages else [image for (image,) in images]
    settings: dict[str, Any] = {"padding": True, "return_tensors": "pt"}
    if kind.messages and chat.begins(processor, texts[0].prompt):
        settings["add_special_tokens"] = False
    with torch.device("cpu"):  # processors know no device of their own
        encoded = processor(**given, **settings)
    inputs = {name: t.to(device) for name, t in encoded.items() if isinstance(t, Tensor) and name != "labels"}
    if not answered:
        answers = [_Answer(0, 0)] * len(samples)
    else:
        answers = _suffixes(inputs, ended) if apart else _answers(processor, texts, inputs, given, settings)
    ends, lasts, lengths = [], [], []
    for row, answer in enumerate(answers):
        positions = inputs["attention_mask"][row].nonzero().flatten()
        last = len(positions) - 1 - answer.behind
        end = last - answer.tokens
        if end < 0:
            raise ValueError(f"samples[{row}]: the prompt {texts[row].prompt!r} has no tokens; expected at least one")
        ends.append(int(positions[end]))
        lasts.append(int(positions[last]))
        lengths.append(end + 1)
    first, behind = (torch.tensor(t, dtype=torch.int64, device=device) for t in (ends, lasts))
    return Batch(inputs, first, behind, lengths)


class _Kind(NamedTuple):
    """What samples of one batch have in common."""

    images: bool
    messages: bool


def _kind(sample: Sample) -> _Kind:
    return _Kind(bool(sample.images), sample.messages is not None)


class _Text(NamedTuple):
    """What the model is given, and what it says, with all that stands in front of and behind the answer."""

    prompt: str
    answer: str

    @property
    def whole(self) -> str:
        return self.prompt + self.answer


def _text(processor: Any, sample: Sample, ended: bool) -> _Text:
    if sample.messages is None:
        prompt, lead, end = sample.prompt, " ", chat.end_of_text(processor)
    else:
        prompt, lead, end = chat.turn(processor, sample.messages, sample.image)
    if not sample.answer:
        return _Text(prompt, "")
    more = end if ended and not sample.answer.endswith(end) else ""
    return _Text(prompt, f"{lead}{sample.answer}{more}")


def opened(image: Any) -> Any:
    """An image; a file's name or an address stand for what is there."""
    if not isinstance(image, str):
        return image
    from transformers.image_utils import load_image

    return load_image(image)


class _Answer(NamedTuple):
    """Where an answer is in its row, counted from the row's end: its tokens, and those behind it."""

    tokens: int
    behind: int


def _suffixes(inputs: Mapping[str, Tensor], ended: bool) -> list[_Answer]:
    """Of a processor that was given the answers apart: their token types are 1, and the last one ends the text."""
    of_answer = (inputs["token_type_ids"] == 1) & inputs["attention_mask"].bool()
    behind = 0 if ended else 1
    return [_Answer(int(n) - behind, behind) for n in of_answer.sum(-1)]


def _answers(
    processor: Any,
    texts: Sequence[_Text],
    inputs: Mapping[str, Tensor],
    given: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> list[_Answer]:
    """By the tokenizer: what comes behind the tokens of the prompt alone. Images need not be looked at for that.

    A processor that shows no tokenizer is asked for the prompts itself, and then looks at the images again.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    images = {name: value for name, value in given.items() if name == "images" and tokenizer is processor}
    with torch.device("cpu"):
        prompts = tokenizer(text=[t.prompt for t in texts], **images, **settings)
        text = inputs
        if tokenizer is not processor:
            text = tokenizer(text=[t.whole for t in texts], **settings)
    found = []
    for row, sample in enumerate(texts):
        head, tokens, own = (
            t["input_ids"][row][t["attention_mask"][row].bool()].tolist() for t in (prompts, text, inputs)
        )
        if tokens[: len(head)] != head:
            end = getattr(tokenizer, "eos_token_id", None)
            if head and head[-1] == end and tokens[: len(head) - 1] == head[:-1]:
                advice = (
                    f"the tokenizer ends every text with {tokenizer.eos_token!r}: pass one that does not "
                    "(add_eos_token=False)"
                )
            else:
                advice = "end the prompt at a word boundary"
            raise ValueError(
                f"samples[{row}]: the tokens of the prompt {sample.prompt!r} are not the first tokens of the prompt "
                f"with its answer; {advice}"
            )
        if not head:
            raise ValueError(f"samples[{row}]: the prompt {sample.prompt!r} has no tokens; expected at least one")
        tail = tokens[len(head) :]
        if own[len(own) - len(tail) :] != tail:
            raise ValueError(
                f"samples[{row}]: the processor's tokens do not end with those of the answer {sample.answer!r}, so "
                "that they cannot be told"
            )
        found.append(_Answer(len(tail), 0))
    return found


def batches(samples: Sequence[Sample], size: int) -> Iterator[list[int]]:
    """Indices of `samples` in batches of one kind (with images, without; of messages, of prompts), in order."""
    for kind in itertools.product((True, False), repeat=2):
        indices = [i for i, s in enumerate(samples) if _kind(s) == kind]
        for start in range(0, len(indices), size):
            yield indices[start : start + size]


def needs_image(model: nn.Module) -> bool:
    """Whether the model's forward cannot do without pixel_values, so that text goes to its language model."""
    pixel = inspect.signature(model.forward).parameters.get("pixel_values")
    return pixel is not None and pixel.default is inspect.Parameter.empty


def text_model_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
    """What takes these inputs: the model, or for text the language model of one that cannot do without an image."""
    return model.language_model if "pixel_values" not in inputs and needs_image(model) else model


def forward(model: nn.Module, inputs: Mapping[str, Tensor], at: Tensor | None = None) -> Tensor:
    """Logits [B, T, V] of the model, or of its language model; see `text_model_of`.

    Args:
        model: a Hugging Face model.
        inputs: of a batch.
        at: int64 [K], the positions whose logits [B, K, V] are wanted: the others, which may take longer than all
            layers, are not computed where the model can leave them out. None: all.

    Raises:
        ValueError: a sample is longer than the model's context.
    """
    lengths = inputs["attention_mask"].sum(-1)
    longest, most = int(lengths.argmax()), context_length(model)
    if most is not None and lengths[longest] > most:
        raise ValueError(
            f"samples[{longest}]: {int(lengths[longest])} tokens with its answer, but the model's context is {most}"
        )
    into = text_model_of(model, inputs)
    spares = at is not None and "logits_to_keep" in inspect.signature(into.forward).parameters
    wanted = {"logits_to_keep": at} if spares else {}
    logits: Tensor = into(**accepted(into, inputs), use_cache=False, **wanted).logits
    return logits if at is None or spares else logits[:, at]


def accepted(model: nn.Module, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The inputs, without token types where the model knows none: many tokenizers return them for all models."""
    known = inspect.signature(model.forward).parameters
    return {name: t for name, t in inputs.items() if name != "token_type_ids" or name in known}


def context_length(model: nn.Module) -> int | None:
    """Tokens that the language model can take, if its configuration tells (max_position_embeddings)."""
    config = getattr(model, "config", None)
    if config is None:
        return None
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def prompt_lengths_for(model: nn.Module, batch: Batch) -> AbstractContextManager[None]:
    """Within the block a patched model knows where the prompts of this batch end; an unpatched one need not."""
    return rows(model, prompt_lengths=batch.prompt_lengths) if is_patched(model) else nullcontext()


def repeated(batch: Batch, times: int) -> Batch:
    """The rows so many times behind one another."""
    if times == 1:
        return batch
    inputs = {name: t.repeat(times, *[1] * (t.dim() - 1)) for name, t in batch.inputs.items()}
    return Batch(inputs, batch.ends.repeat(times), batch.lasts.repeat(times), batch.prompt_lengths * times)


def drop_tokens(batch: Batch, seeds: Mapping[int, int], share: float, kept_ids: Collection[int]) -> Batch:
    """The batch with a random share of the prompt's tokens left out in some rows.

    Args:
        batch: as `encode` makes it; it is not changed.
        seeds: row -> seed; what a row loses depends on that row and its seed alone. Other rows stay whole.
        share: probability that a token is left out; the last one of a prompt stays.
        kept_ids: token ids that always stay, such as `placeholder_ids`.
    """
    if not seeds:
        return batch
    ids, mask, lengths = batch.inputs["input_ids"], batch.inputs["attention_mask"].clone(), list(batch.prompt_lengths)
    order = torch.arange(ids.shape[1], dtype=torch.int64, device=ids.device).repeat(len(ids), 1)
    for row, seed in seeds.items():
        prompt = slice(0, int(batch.ends[row]) + 1)
        seen = mask[row, prompt].bool()
        kept = seen.clone()
        drawn = torch.rand(
            int(seen.sum()), generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32, device="cpu"
        )
        kept[seen] = (drawn >= share).to(ids.device)
        held = [token in kept_ids for token in ids[row, prompt].tolist()]
        kept |= seen & torch.tensor(held, dtype=torch.bool, device=ids.device)
        kept[-1] = True
        # What is left out goes to the front, where nothing is attended to.
        order[row, prompt] = torch.cat([(~kept).nonzero().flatten(), kept.nonzero().flatten()])
        mask[row, prompt] = kept.to(mask.dtype)
        lengths[row] -= int(seen.sum() - kept.sum())
    inputs = _reordered({**batch.inputs, "attention_mask": mask}, order)
    return Batch(inputs, batch.ends, batch.lasts, lengths)


def _reordered(inputs: Mapping[str, Tensor], order: Tensor) -> dict[str, Tensor]:
    """What there is of each token, int64 order [B, T] of them; all else as it is."""
    return {name: t.gather(1, order) if t.shape == order.shape else t for name, t in inputs.items()}


_SUFFIX = 1 << 32  # what is added is drawn apart from what is left out


def add_random_suffix(batch: Batch, seeds: Mapping[int, int], most: int, vocabulary: Sequence[int]) -> Batch:
    """The batch with one or more random tokens behind the prompt in some rows, in the place of what was left out of it.

    Args:
        batch: as `drop_tokens` makes it; it is not changed.
        seeds: row -> seed; what a row gets depends on its prompt and that seed alone. Other rows stay as they are.
        most: tokens of a row at most; fewer where its prompt has less room in front, none where it has none.
        vocabulary: token ids to draw from.
    """
    if not seeds or not most:
        return batch
    ids, mask, lengths = batch.inputs["input_ids"], batch.inputs["attention_mask"], list(batch.prompt_lengths)
    order = torch.arange(ids.shape[1], dtype=torch.int64, device=ids.device).repeat(len(ids), 1)
    drawn = {}
    for row, seed in seeds.items():
        end = int(batch.ends[row]) + 1
        room = end - int(mask[row, :end].sum())
        generator = torch.Generator("cpu").manual_seed(seed + _SUFFIX)
        wanted = torch.randint(1, most + 1, (), generator=generator, dtype=torch.int64, device="cpu")
        if count := min(int(wanted), room):
            picked = torch.randint(len(vocabulary), (count,), generator=generator, dtype=torch.int64, device="cpu")
            drawn[row, end - count, end] = [vocabulary[i] for i in picked.tolist()]
            # The prompt moves forward; in all but their ids the new tokens are like its last one.
            order[row, : end - count], order[row, end - count : end] = order[row, count:end].clone(), end - 1
            lengths[row] += count
    inputs = _reordered(batch.inputs, order)
    for (row, start, end), tokens in drawn.items():
        inputs["input_ids"][row, start:end] = torch.tensor(tokens, dtype=ids.dtype, device=ids.device)
    return Batch(inputs, batch.ends, batch.lasts, lengths)


def ordinary_ids(model: nn.Module, processor: Any) -> list[int]:
    """The token ids that stand for text: neither special, nor placeholders for images and the like."""
    tokenizer = getattr(processor, "tokenizer", processor)
    known = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    count = min(known, len(tokenizer)) if hasattr(tokenizer, "__len__") else known
    return sorted({*range(count)} - {*getattr(tokenizer, "all_special_ids", ())} - {*placeholder_ids(model)})


def with_prompt_dropout(model: nn.Module, batch: Batch, share: float, seed: int) -> Batch:
    """The batch, and behind it a copy with some tokens of its prompts left out (prompt dropout); none if share is 0."""
    return dropout_copies(model, batch, share, [None, seed] if share else [None])


def dropout_copies(
    model: nn.Module,
    batch: Batch,
    share: float,
    seeds: Sequence[int | None],
    suffix: int = 0,
    vocabulary: Sequence[int] = (),
) -> Batch:
    """Copies of a batch behind one another, one for each seed, with some tokens of their prompts left out.

    Args:
        model: whose placeholders for images and the like always stay.
        batch: as `encode` makes it.
        share: probability that a token is left out.
        seeds: of each row of a copy; None: that copy is whole.
        suffix: random tokens at most behind a prompt that is not whole, in the place of what is left out.
        vocabulary: token ids of such a suffix.
    """
    rows = len(batch.ends)
    drawn = {copy * rows + row: seed for copy, seed in enumerate(seeds) if seed is not None for row in range(rows)}
    dropped = drop_tokens(repeated(batch, len(seeds)), drawn, share, placeholder_ids(model))
    return add_random_suffix(dropped, drawn, suffix, vocabulary)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block the model is in eval mode; then each module has its own mode back."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
