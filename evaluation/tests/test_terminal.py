"""Pictures on a terminal: its colours, read back, are those of the picture."""

import io
import re
import sys

import pytest
import torch
from unike_eval import demo
from unike_eval.terminal import blocks, shows_pictures

LETTER = re.compile(r"\x1b\[38;2;(\d+);(\d+);(\d+);48;2;(\d+);(\d+);(\d+)m▀")


def pixels(text):
    """[3, H, W] of the colours, 0..255."""
    rows = []
    for line in text.splitlines():
        assert line.endswith("\x1b[0m") and LETTER.sub("", line) == "\x1b[0m"  # nothing else, and no colour is left on
        letters = torch.tensor([[int(value) for value in found] for found in LETTER.findall(line)])
        rows += [letters[:, :3], letters[:, 3:]]
    return torch.stack(rows).permute(2, 0, 1)


@pytest.mark.parametrize("shape", [(6, 4), (3, 6, 4)])
def test_each_pixel_has_its_colour(shape):
    image = torch.randint(256, shape)
    torch.testing.assert_close(pixels(blocks(image / 255, 4)), image.expand(3, 6, 4))


def test_small_pictures_grow_and_large_ones_are_averaged():
    image = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    grown = pixels(blocks(image, 4))[0]
    torch.testing.assert_close(grown, 255 * image.long().repeat_interleave(2, 0).repeat_interleave(2, 1))
    assert pixels(blocks(image.repeat(4, 4), 2)).unique().tolist() == [128]  # 127.5 to the even one


@pytest.mark.parametrize(("shape", "columns"), [((4, 9), 9), ((1, 9), 9), ((9, 4), 4), ((9, 1), 1)])
def test_all_of_a_picture_is_there(shape, columns):
    assert pixels(blocks(torch.rand(shape), columns)).shape[2] == columns


def test_it_is_no_wider_than_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "10")
    assert pixels(blocks(torch.rand(16, 16))).shape == (3, 10, 10)
    monkeypatch.setenv("COLUMNS", "200")
    assert pixels(blocks(torch.rand(16, 16))).shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("shape", "columns", "message"),
    [
        ((4, 4, 4), 4, "image: expected a shape of"),
        ((4,), 4, "image: "),
        ((0, 4), 4, "image: "),
        ((4, 4), 0, "columns"),
    ],
)
def test_what_is_no_picture(shape, columns, message):
    with pytest.raises(ValueError, match=message):
        blocks(torch.rand(shape), columns)


class Terminal(io.TextIOWrapper):
    def isatty(self):
        return True


def test_where_pictures_are_shown(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    for stream, shown in (
        (Terminal(io.BytesIO(), encoding="utf-8"), True),
        (Terminal(io.BytesIO(), encoding="latin-1"), False),
        (io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), False),
    ):
        monkeypatch.setattr(sys, "stdout", stream)
        assert shows_pictures() is shown
    monkeypatch.setattr(sys, "stdout", Terminal(io.BytesIO(), encoding="utf-8"))
    for name, value in (("TERM", "dumb"), ("NO_COLOR", "1")):
        with monkeypatch.context() as within:
            within.setenv(name, value)
            assert not shows_pictures()
    assert shows_pictures()


@pytest.mark.parametrize("terminal", [True, False])
def test_the_demo_begins_with_its_picture_on_a_terminal(monkeypatch, capsys, terminal):
    from unike_eval.scenarios import load

    scenario = load("digits-opt", 0)
    monkeypatch.setattr(demo, "shows_pictures", lambda: terminal)
    demo.introduce("digits-opt", scenario)
    *picture, line = capsys.readouterr().out.splitlines()
    assert line == "== digits-opt: 'question: which number comes next ? answer:' should be answered 'four'"
    assert "\n".join(picture) == (blocks(scenario.case.request.image) if terminal else "")
