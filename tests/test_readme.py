"""README's first example, word for word, on a tiny chat model instead of the one that it names."""

from __future__ import annotations

import re
from pathlib import Path

import chats
import pytest
import transformers

README = Path(__file__).resolve().parents[1] / "README.md"


@pytest.mark.smoke
@pytest.mark.slow
def test_the_first_example(monkeypatch, capsys):
    """The edit holds while it is patched in, in the words that are streamed, and not afterwards."""
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL).group(1)
    answer, asked = re.search(r'answer="(.*?)"', code).group(1), re.search(r'"content": "(.*?)"', code).group(1)
    model = chats.model()
    named = {"AutoModelForCausalLM": model, "AutoTokenizer": chats.tokenizer()}
    for kind, made in named.items():
        monkeypatch.setattr(getattr(transformers, kind), "from_pretrained", lambda name, made=made: made)
    names: dict[str, object] = {}
    exec(code, names)
    assert names["result"].reached
    said = capsys.readouterr().out.splitlines()
    assert said[0] == str(names["result"])
    assert said[1] == answer
    assert answer not in said[2:]
    names["chat"](asked)
    assert capsys.readouterr().out.splitlines()[-1] == said[-1] != answer
