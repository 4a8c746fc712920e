"""What a forward pass tells the patched modules: the tokens to shift and the place of the prompt's end."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from capture import Capture
from configs import every_token

from unike_kernels import PatchError
from unike_kernels.nn import ModelContext, Pass, PromptState, Selection, Trace, Version, passes

LEFT = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
RIGHT = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
NOW = Version({}, {})


def prompt(*lengths, **config):
    return PromptState(torch.tensor(lengths), max(lengths), every_token(**(config or {"alpha": "last"})))


def a_pass(batch, tokens, past=0, mask=None, text=None, **selection):
    given = {"batch": batch, "tokens": tokens, "past": past, "attention_mask": mask, "text": text}
    return Pass.of(NOW, Selection(**selection), **given)


@pytest.mark.parametrize("mask", [LEFT, RIGHT])
def test_padding_is_not_shifted(mask):
    shifted = a_pass(2, 4, 0, mask).shifted
    assert shifted.dtype == torch.bool and torch.equal(shifted, mask.bool())
    assert a_pass(2, 1, 3, mask).shifted.tolist() == [[bool(mask[0, 3])], [True]]
    assert a_pass(2, 0, 4, mask).shifted.shape == (2, 0)


@pytest.mark.parametrize("mask", [None, torch.zeros(2, 1, 4, 4)])
def test_without_a_mask_of_tokens_all_are_shifted(mask):
    assert a_pass(2, 4, 0, mask).shifted is None


def test_only_text_is_shifted():
    text = torch.tensor([[True, False, True, True], [False, True, True, True]])
    assert torch.equal(a_pass(2, 4, text=text).shifted, text)
    assert torch.equal(a_pass(2, 4, 0, LEFT, text).shifted, text & LEFT.bool())
    beams = a_pass(4, 4, 0, LEFT.repeat_interleave(2, 0), text)
    assert torch.equal(beams.shifted, (text & LEFT.bool()).repeat_interleave(2, 0))
    assert a_pass(2, 1, 4, text=text).shifted is None  # of another pass: says nothing about these tokens


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
    made = a_pass(2, 4, 0, mask, prompt=prompt(*lengths))
    assert made.last.tolist() == last and made.prompted


def test_one_length_for_each_run_of_beams():
    assert a_pass(6, 4, rows=2, prompt=prompt(2, 4)).last.tolist() == [1, 1, 1, 3, 3, 3]


@pytest.mark.parametrize("mask", [LEFT, None])
def test_after_the_prompt_what_it_left_is_kept(mask):
    remembering = Version({}, {0: object()})
    context, selection = ModelContext(remembering, config=every_token(alpha="last")), Selection(prompt=prompt(2, 4))

    def begun(tokens, past, mask):
        context.begin(selection, batch=2, tokens=tokens, past=past, attention_mask=mask)
        made = context.now()
        context.end()
        return made

    first = begun(4, 0, mask)
    first.generation.saved[0, "ids"] = torch.zeros(1)
    for past in (4, 5):
        grown = None if mask is None else torch.cat([mask, torch.ones(2, past - 3).long()], 1)
        made = begun(1, past, grown)
        assert made.last is None and made.prompted
        assert list(made.generation.saved) == [(0, "ids")]
    # Another prompt has a place of its own: the first one's pass may be computed again.
    other = begun(4, 0, mask)
    assert other.generation.saved == {} and list(first.generation.saved) == [(0, "ids")]


@pytest.mark.parametrize(
    ("tokens", "past", "mask", "lengths"),
    [
        (4, 0, LEFT, (3, 4)),  # longer than the row
        (4, 0, None, (4, 5)),
        (2, 0, LEFT[:, 2:], (2, 4)),  # the first chunk of several
        (2, 2, LEFT, (2, 4)),  # the last chunk of several
        (2, 2, None, (2, 4)),  # one prompt in the past, one not
        (2, 3, torch.cat([LEFT, torch.ones(2, 1).long()], 1), (3, 3)),  # the past of one is padding
    ],
)
def test_a_prompt_in_parts_is_an_error(tokens, past, mask, lengths):
    with pytest.raises(ValueError, match="the whole prompt must come in one forward pass"):
        a_pass(2, tokens, past, mask, prompt=prompt(*lengths))


@pytest.mark.parametrize("mask", [LEFT, RIGHT, None])
def test_nothing_waits_on_a_gpu(mask, monkeypatch):
    """A pass over a prompt is recorded, and made again for another mask; what is known without a mask is checked."""
    monkeypatch.setattr(passes, "on_gpu", lambda t: True)
    given = None if mask is None else mask.clone()
    chosen = prompt(2, 3)
    graph = Capture(lambda: a_pass(2, 4, 0, given, prompt=chosen).last)
    for now in (mask, mask) if mask is None else (mask, LEFT, RIGHT):
        if now is not None:
            given.copy_(now)
        graph.replay()
        assert torch.equal(graph.result, a_pass(2, 4, 0, now, prompt=chosen).last)
    grown = None if mask is None else torch.cat([mask, torch.ones(2, 1).long()], 1)
    assert Capture(lambda: a_pass(2, 1, 4, grown, prompt=chosen).last).result is None
    for tokens, past in ((2, 0), (2, 2)):
        with pytest.raises(ValueError, match="the whole prompt must come in one forward pass"):
            a_pass(2, tokens, past, None if mask is None else mask[:, : tokens + past], prompt=chosen)


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
    made = a_pass(2, tokens, past, mask, prompt=prompt(2, 3, tokens="answer"))
    assert made.shifted.int().tolist() == shifted


def test_a_batch_that_is_no_multiple_of_the_rows_is_an_error():
    a_pass(4, 3, rows=2)
    with pytest.raises(ValueError, match="rows: 2 edit sets were given, the batch has 3 rows"):
        a_pass(3, 3, rows=2)


class Cache:
    length = 0

    def get_seq_length(self):
        return self.length


def version_of_a_pass(context, cache=None):
    context.begin(context.in_force(), cache, batch=1, tokens=1)
    found = context.now().version
    context.end()
    return found


def test_a_generation_is_known_by_its_cache():
    cache, old, new = Cache(), Version({}, {}), Version({}, {})
    context = ModelContext(old)
    assert version_of_a_pass(context, cache) is old
    context.publish(new)
    cache.length = 3
    assert version_of_a_pass(context, cache) is old
    for nothing in (None, ((torch.zeros(1), torch.zeros(1)),), Cache()):
        assert version_of_a_pass(context, nothing) is new
    cache.length = 0  # begun anew
    assert version_of_a_pass(context, cache) is new
    context.publish(old)
    cache.length = 2
    assert version_of_a_pass(context, cache) is new
    context.forget_running()
    assert version_of_a_pass(context, cache) is old


def test_a_pass_within_a_pass():
    """A hook that calls the model again leaves the outer pass what it was."""
    context = ModelContext(NOW)
    context.begin(context.in_force(), batch=2, tokens=4, attention_mask=LEFT)
    outer = context.now()
    context.begin(context.in_force(), batch=2, tokens=4, attention_mask=RIGHT)
    assert torch.equal(context.now().shifted, RIGHT.bool())
    context.end()
    assert context.now() is outer
    context.end()
    assert context.now() is not outer and context.now().shifted is None
    context.end()  # of a pass that failed before it began
    assert context.now().version is NOW


def test_a_pass_runs_in_one_thread():
    context = ModelContext(NOW)
    context.begin(context.in_force(), batch=2, tokens=4, attention_mask=LEFT)
    seen = []
    thread = threading.Thread(target=lambda: seen.append(context.now().shifted))
    thread.start()
    thread.join()
    assert seen == [None]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda context: pickle.loads(pickle.dumps(context))])
def test_a_copy_has_the_version_and_no_open_blocks(copied):
    context = ModelContext(NOW, "none")
    with context.selecting(Selection(rows=3)), context.traces.entered(Trace()):
        twin = copied(context)
        assert twin.selection() is None and twin.traces.innermost() is None and twin.traced is None
        assert twin.default == "none" and isinstance(twin.current, Version)
        with twin.selecting(Selection(rows=2)):
            assert (context.selection().rows, twin.selection().rows) == (3, 2)


def test_compiled_code_takes_the_tables_of_the_block_entered_last():
    """As copies, but what a prompt leaves behind is one."""
    context, state = ModelContext(NOW), prompt(2, 3)
    selection = Selection(rows=2, memory_ranges=torch.tensor([[0, 0], [1, 2]]), prompt=state)
    with context.selecting(selection):
        checked = context._checked(context.traced)
        assert torch.equal(checked.memory_ranges, selection.memory_ranges)
        assert torch.equal(checked.prompt_lengths, state.lengths) and checked.prompt is state
        with ThreadPoolExecutor(1) as pool, pytest.raises(PatchError, match="compiled code knows one"):
            pool.submit(context._checked, context.traced).result()


def test_a_context_is_not_kept_alive():
    context = ModelContext(NOW)
    with context.selecting(Selection(rows=3)):
        pass
    gone = weakref.ref(context)
    del context
    gc.collect()
    assert gone() is None
