"""docs/ and the README: their code runs word for word, on tiny models for those it names; the reference is whole."""

from __future__ import annotations

import re
from pathlib import Path

import chats
import pytest
import torch
import transformers
from PIL import Image

import unike_kernels as uk
from unike_kernels import ops, serving, training

ROOT = Path(__file__).resolve().parents[1]
# A comment in front of a block says why no test runs it.
BLOCK = re.compile(r"(<!-- not run: .+? -->\n)?```python\n(.*?)```", re.DOTALL)


def code_of(page: Path) -> str:
    """All that a page runs, in its order."""
    return "\n".join(code for left_out, code in BLOCK.findall(page.read_text()) if not left_out)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """(page, names that it takes for granted) -> its names afterwards; models are those of `chats`."""

    def loads(kind: str, made: object) -> None:
        monkeypatch.setattr(getattr(transformers, kind), "from_pretrained", lambda name: made)

    def execute(page: str, **names: object) -> dict[str, object]:
        monkeypatch.chdir(tmp_path)
        loads("AutoModelForCausalLM", chats.model())
        loads("AutoTokenizer", chats.tokenizer())
        for family, kind in (("llava", "LlavaForConditionalGeneration"), ("qwen", "Qwen2VLForConditionalGeneration")):
            if kind in (code := code_of(ROOT / page)):
                for name, made in zip((kind, "AutoProcessor"), getattr(chats, family)(), strict=True):
                    loads(name, made)
        exec(compile(code, page, "exec"), names)
        return names

    return execute


@pytest.mark.smoke
@pytest.mark.slow
def test_the_readme(run, capsys):
    """The edit holds while it is patched in, in the words that are streamed, and not afterwards."""
    code = code_of(ROOT / "README.md")
    answer, asked = re.search(r'answer="(.*?)"', code).group(1), re.search(r'"content": "(.*?)"', code).group(1)
    names = run("README.md")
    assert names["result"].reached
    said = capsys.readouterr().out.splitlines()
    assert said[0] == str(names["result"])
    assert said[1] == answer
    assert answer not in said[2:]
    names["chat"](asked)
    assert capsys.readouterr().out.splitlines()[-1] == said[-1] != answer


@pytest.mark.slow
def test_the_tutorial_of_a_chat_model(run, capsys):
    names = run("docs/tutorials/chat.md")
    said = capsys.readouterr().out
    assert said.count("The capital of Peru is Cusco.") >= 2 and "Francis Bacon wrote Hamlet." in said
    assert names["result"].reached and not uk.is_patched(names["model"])


@pytest.mark.slow
def test_the_tutorial_of_a_scope(run, capsys):
    """The edit's prompt reaches it in both wordings, and its neighbour's does not."""
    names = run("docs/tutorials/scope.md")
    routes = [line for line in capsys.readouterr().out.splitlines() if "cosine with 'peru'" in line]
    assert [line.split(":")[0] for line in routes[::2]] == ["'peru' acts", "no edit acts"]
    assert names["result"].reached > 0.9


@pytest.mark.smoke
@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "qwen-vl"])
def test_the_how_tos_about_images(run, tmp_path, capsys, family):
    for name in ("bird", "street"):
        pixels = (torch.rand(16, 16, 3) * 255).to(torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{name}.png")
    names = run(f"docs/how-to/{family}.md")
    assert names["result"].reached and capsys.readouterr().out.splitlines()[-1].strip() == "A kea."


def test_the_how_tos(run, make_model, make_memory, make_edit, tmp_path):
    """All pages that have code and train nothing."""
    model = make_model("llama")
    memory, another = make_memory(model), make_memory(model, seed=2)
    edits = {id: make_edit(model, id, memory, seed=seed) for seed, id in enumerate(("a", "b", "other", "kea"))}
    for id, edit in edits.items():
        edit.save(tmp_path / "edits" / f"{id}.safetensors")
    edits["a"].save(tmp_path / "edit.safetensors")
    memory.save(tmp_path / "memory.safetensors")
    another.save(tmp_path / "another.safetensors")
    ids = torch.arange(4, 10).repeat(3, 1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 2}
    keys = torch.randn(60, 64)
    given = {
        "model": model, "tokenizer": chats.tokenizer(), "memory": memory, "globex": memory, "edit": edits["a"],
        "kea": edits["kea"], "other": edits["other"], "x": torch.randn(3, 5, 64), "mlp": torch.nn.Identity(),
        "inputs": {"input_ids": ids[:1], "attention_mask": torch.ones_like(ids[:1]), "max_new_tokens": 2},
        "batch_of_three": batch, "bird": Image.new("RGB", (16, 16)), "keys": keys, "queries": keys[:2],
        "more_keys": keys, "array": keys.numpy(),
    }  # fmt: skip
    pages = sorted(page for page in (ROOT / "docs" / "how-to").glob("*.md") if code_of(page).strip())
    trained = {"llava.md", "qwen-vl.md"}
    assert len(pages) > len(trained) + 4
    for page in pages:
        if page.name not in trained:
            run(str(page.relative_to(ROOT)), **given)
            assert not uk.is_patched(model), page


def test_the_reference_has_every_public_name():
    """By the paths where they are defined, as the site's generator would take `fold` for the module of that name."""
    pages = "\n".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    told = set(re.findall(r"^::: (\S+)$", pages, re.MULTILINE))
    modules = {"nn", "ops", "__version__", "ACTIVATIONS"}
    for module in (uk, ops, training, serving):
        for name in set(module.__all__) - modules:
            made = getattr(module, name)
            assert f"{made.__module__}.{made.__qualname__}" in told, name


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(name):
    """Those of docs/ the site's generator checks."""
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / name).read_text())
    assert links and [link for link in links if not (ROOT / link).exists()] == []
