"""What a forward pass tells the patched modules: the tokens to shift and the place of the prompt's end."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

from unike_kernels import Config
from unike_kernels.nn import Context, ModelContext, PromptState, Version

LEFT = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
RIGHT = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])


def prompt(*lengths, **config):
    return PromptState(torch.tensor(lengths), Config(**(config or {"alpha": "last"})))


@pytest.mark.parametrize("mask", [LEFT, RIGHT])
def test_padding_is_not_shifted(mask):
    context = Context()
    context.enter(2, 4, 0, mask)
    assert context.shifted.dtype == torch.bool and torch.equal(context.shifted, mask.bool())
    context.enter(2, 1, 3, mask)
    assert context.shifted.tolist() == [[bool(mask[0, 3])], [True]]
    context.enter(2, 0, 4, mask)
    assert context.shifted.shape == (2, 0)


@pytest.mark.parametrize("mask", [None, torch.zeros(2, 1, 4, 4)])
def test_without_a_mask_of_tokens_all_are_shifted(mask):
    context = Context(shifted=torch.zeros(1, 1, dtype=torch.bool))
    context.enter(2, 4, 0, mask)
    assert context.shifted is None


def test_only_text_is_shifted():
    text = torch.tensor([[True, False, True, True], [False, True, True, True]])
    context = Context(text=text)
    context.enter(2, 4, 0, None)
    assert torch.equal(context.shifted, text)
    context.enter(2, 4, 0, LEFT)
    assert torch.equal(context.shifted, text & LEFT.bool())
    context.enter(4, 4, 0, LEFT.repeat_interleave(2, 0))  # beams
    assert torch.equal(context.shifted, (text & LEFT.bool()).repeat_interleave(2, 0))
    context.enter(2, 1, 4, None)  # of another pass: says nothing about these tokens
    assert context.shifted is None


@pytest.mark.parametrize(
    ("mask", "lengths", "last"),
    [
        (None, (3, 4), [2, 3]),
        (None, (1, 1), [0, 0]),
        (LEFT, (2, 4), [3, 3]),
        (LEFT, (1, 3), [2, 2]),
        (RIGHT, (2, 4), [1, 3]),
        (RIGHT, (1, 2), [0, 1]),
        (torch.ones(2, 1, 4, 4), (2, 4), [1, 3]),
    ],
)
def test_the_prompts_end(mask, lengths, last):
    """A sequence may go on after its prompt, as a target does in training."""
    context = Context(prompt=prompt(*lengths))
    context.prompt.saved[0, "ids"] = torch.zeros(1)
    context.enter(2, 4, 0, mask)
    assert context.prompt.last.tolist() == last
    assert context.prompt.saved == {}


def test_one_length_for_each_run_of_beams():
    context = Context(rows=2, prompt=prompt(2, 4))
    context.enter(6, 4, 0, None)
    assert context.prompt.last.tolist() == [1, 1, 1, 3, 3, 3]


@pytest.mark.parametrize("mask", [LEFT, None])
def test_after_the_prompt_what_it_left_is_kept(mask):
    context = Context(prompt=prompt(2, 4))
    context.enter(2, 4, 0, mask)
    context.prompt.saved[0, "ids"] = torch.zeros(1)
    for past in (4, 5):
        grown = None if mask is None else torch.cat([mask, torch.ones(2, past - 3).long()], 1)
        context.enter(2, 1, past, grown)
        assert context.prompt.last is None
        assert list(context.prompt.saved) == [(0, "ids")]


@pytest.mark.parametrize(
    ("tokens", "past", "mask", "lengths"),
    [
        (4, 0, LEFT, (3, 4)),  # longer than the row
        (4, 0, None, (4, 5)),
        (2, 0, LEFT[:, 2:], (2, 4)),  # the first chunk of several
        (2, 2, LEFT, (2, 4)),  # the last chunk of several
        (2, 2, None, (2, 4)),  # one prompt in the past, one not
    ],
)
def test_a_prompt_in_parts_is_an_error(tokens, past, mask, lengths):
    context = Context(prompt=prompt(*lengths))
    with pytest.raises(ValueError, match="the whole prompt must come in one forward pass"):
        context.enter(2, tokens, past, mask)


@pytest.mark.parametrize(
    ("tokens", "past", "mask", "shifted"),
    [
        (4, 0, LEFT, [[0, 0, 0, 1], [0, 0, 1, 1]]),
        (4, 0, RIGHT, [[0, 1, 0, 0], [0, 0, 1, 1]]),
        (4, 0, None, [[0, 1, 1, 1], [0, 0, 1, 1]]),
        (2, 0, LEFT[:, :2], [[0, 0], [0, 0]]),  # the prompt in chunks
        (2, 2, LEFT, [[0, 1], [1, 1]]),
        (1, 4, torch.cat([LEFT, torch.ones(2, 1).long()], 1), [[1], [1]]),
    ],
)
def test_from_the_prompts_end_on(tokens, past, mask, shifted):
    context = Context(prompt=prompt(2, 3, tokens="answer"))
    context.enter(2, tokens, past, mask)
    assert context.shifted.int().tolist() == shifted
    assert context.prompt.last is None


def test_a_batch_that_is_no_multiple_of_the_rows_is_an_error():
    context = Context(rows=2)
    context.enter(4, 3, 0, None)
    with pytest.raises(ValueError, match="rows: 2 edit sets were given, the batch has 3 rows"):
        context.enter(3, 3, 0, None)


class Cache:
    length = 0

    def get_seq_length(self):
        return self.length


def test_a_generation_is_known_by_its_cache():
    context, cache, old, new = ModelContext(), Cache(), Version({}, {}), Version({}, {})
    context.current = old
    context.begin(cache)
    assert context.now().version is old
    context.current, cache.length = new, 3
    context.begin(cache)
    assert context.now().version is old
    for nothing in (None, ((torch.zeros(1), torch.zeros(1)),), Cache()):
        context.begin(nothing)
        assert context.now().version is new
    cache.length = 0  # begun anew
    context.begin(cache)
    assert context.now().version is new
    context.current, cache.length = old, 2
    context.forget_running()
    context.begin(cache)
    assert context.now().version is old


def test_threads_and_copies_have_passes_of_their_own():
    context = ModelContext()
    context.now().rows = 3
    seen = []
    thread = threading.Thread(target=lambda: seen.append(context.now().rows))
    thread.start()
    thread.join()
    assert seen == [None]
    assert copy.deepcopy(context).now().rows is None
    assert context.now().rows == 3
