"""Every switch of the method that the paper leaves open or that changes what an edit means."""

from __future__ import annotations

import dataclasses
import numbers
import sys
from dataclasses import dataclass
from typing import Any, Literal

_CHOICES = {
    "retrieval": ("token", "sequence"),
    "tokens": ("all", "text", "answer"),
    "values": ("out", "pre", "projected", "context"),
    "convention": ("inclusion", "eq7"),
    "norm": ("match", "none"),
    "neurons": ("plain", "gated"),
    "w_zeta": ("memory", "edit"),
    "scope": ("all", "memory"),
}
_LATER: dict[str, Any] = {"scope": "all", "tau": 0.02}  # what older artifacts do not say, and mean

# More entries than any attention over them makes use of, and what a search on a CUDA device takes.
MOST_ENTRIES = 2**20

# What they led to is in the edit's own tensors: its neurons, zeta' and beta, and its entries.
_TRAINING_ONLY = ("neurons", "w_zeta", "beta", "scope")


@dataclass(frozen=True)
class Config:
    """The semantics of a memory and of the edits that are trained with it. Stored in both artifacts.

    Attributes:
        k: entries retrieved (the paper's top-40), 1 to 2**20; where a memory has fewer, all of them, at their cost.
        retrieval: "token": each token retrieves its own entries (causal, stateless); "sequence": once, with the last
            prompt token, as the paper words it.
        tokens: which tokens are shifted: "all"; "text" (not those of an image); or "answer", from the last prompt token
            on, which is where the memory's keys come from. Padding never is.
        values: what the memory attention returns: "out" (h_pos at the attention's output, where the blend takes place),
            "pre" (h_pos at its input, keys and values in one, the paper's wording), "projected" (W_k and W_v W_o per
            head, Eq. 8 to the letter), or "context" (h_know of Eq. 2 itself: the attention's output where an answer's
            token is produced while the knowledge stands in the prompt). The last has an entry for each token of an
            answer, which asks for retrieval="token" and tokens="answer"; with norm="none", alpha=1.0 and more layers
            than neurons have, it edits without them. See `extract`.
        scale: of the attention logits: a number; None: 1 / sqrt(width of a key); or "cosine": a logit is the cosine of
            query and key, divided by `tau`. States before attention are long and close to each other, so that with
            1 / sqrt(width) all retrieved entries weigh the same.
        tau: the temperature of scale="cosine"; without a meaning otherwise. On a language model 40 entries count as 39
            with 1 / sqrt(width), as 26 with 0.05 and as 12 with 0.02 (see `LayerTrace.effective`).
        alpha: the gate: "token" (cosine with the token's own h_input), "last" (with h_input of the last prompt token,
            Eq. 7), or a fixed number in 0..1.
        convention: "inclusion": (1 - alpha) h_input + alpha h_know; "eq7": Eq. 7 to the letter, the other way round.
        norm: "match": h_know is rescaled to |h_input|; "none": literal.
        neurons: on gated FFNs, "plain" neurons Act(q K + b) (Eq. 3) or "gated" ones Act(q K + b) * (q U + c).
        w_zeta: "memory": W_zeta is trained with the encoders and frozen; "edit": trained inside each edit.
        beta: of a trained edit's beta * zeta' (Eq. 6). It is an initialisation: W_V^extra + beta zeta' with W_V^extra
            free is the same class of functions as W_V^extra alone, and what training adds has nothing of its direction
            (measured on a language model: cosines of -0.01 to 0.01).
        scope: where an edit acts: "all": in every row that selects it, at all tokens; "memory": from the last prompt
            token on, in the rows for whose prompt its own entry wins against those of the memory's other facts and of
            the other edits (see `Scope`). The other rows are the unedited model's, bit for bit.

    Where a prompt ends is found as the model is used: a pass of several tokens, and the first one over a key-value
    cache, end with their prompt. `uk.rows(..., prompt_lengths=...)` tells it where that is not so: in teacher forcing,
    assisted decoding, and passes without a cache.

    Raises:
        ValueError: a value out of its range; the message names it.
    """

    k: int = 40
    retrieval: str = "token"
    tokens: str = "answer"
    values: str = "out"
    scale: float | str | None = "cosine"
    tau: float = 0.02
    alpha: str | float = "token"
    convention: str = "inclusion"
    norm: str = "match"
    neurons: str = "plain"
    w_zeta: str = "memory"
    beta: float = 0.1
    scope: str = "all"

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"Config.{name}: expected one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        for name in ("k", "scale", "tau", "alpha", "beta"):  # a number of another library is as good, but no JSON
            value = getattr(self, name)
            if isinstance(value, numbers.Real) and not isinstance(value, int | float):
                object.__setattr__(self, name, int(value) if isinstance(value, numbers.Integral) else float(value))
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"Config.k: expected an integer of at least 1, got {self.k!r}")
        if self.k > MOST_ENTRIES:
            raise ValueError(f"Config.k: expected at most {MOST_ENTRIES}, got {self.k}")
        if self.scale not in (None, "cosine") and not (_is_number(self.scale) and float(self.scale) > 0):
            raise ValueError(f"Config.scale: expected None, 'cosine' or a positive number, got {self.scale!r}")
        if not (_is_number(self.tau) and self.tau > 0):
            raise ValueError(f"Config.tau: expected a positive number, got {self.tau!r}")
        if self.alpha not in ("token", "last") and not (
            _is_number(self.alpha) and 0 <= float(self.alpha) <= 1  # the type of a string is refused just before
        ):
            raise ValueError(f"Config.alpha: expected 'token', 'last' or a number in 0..1, got {self.alpha!r}")
        if not _is_number(self.beta):
            raise ValueError(f"Config.beta: expected a finite number, got {self.beta!r}")

    @property
    def needs_prompt_ends(self) -> bool:
        """Whether a forward pass must know where each prompt ends."""
        return self.needs_whole_prompts or self.tokens == "answer" or self.scope == "memory"

    @property
    def needs_whole_prompts(self) -> bool:
        """Whether all tokens depend on the prompt's last one, so that a prompt must not come in chunks."""
        return self.retrieval == "sequence" or self.alpha == "last"

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, as artifacts store them in JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """The inverse of `to_dict`, of what older versions wrote, too.

        Raises ValueError for an unknown or missing name or a value out of range.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(values, dict) or {*_LATER, *values} != names:
            got = sorted(values) if isinstance(values, dict) else type(values).__name__
            raise ValueError(f"Config: expected the fields {sorted(names)}, got {got}")
        return cls(**{**_LATER, **values})

    def differences(self, other: Config) -> list[str]:
        """Each field that an inference depends on and in which the two differ, as 'name: mine != theirs'."""
        names = [f.name for f in dataclasses.fields(self) if f.name not in _TRAINING_ONLY]
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in names]
        return [f"{name}: {mine!r} != {theirs!r}" for name, mine, theirs in pairs if mine != theirs]


def _is_number(value: object) -> bool:
    # Compared, not converted: an integer may be too large for a float.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


@dataclass(frozen=True)
class ANNConfig:
    """How an approximate index is built and searched.

    Attributes:
        kind: "ivf": keys in lists around centres, of which the nearest are searched; "hnsw": a graph of neighbours.
        lists: of "ivf"; None: four times the root of the number of keys.
        probes: of "ivf", lists that a query searches.
        links: of "hnsw", neighbours of a key.
        breadth: of "hnsw", candidates that a query keeps while it searches.
    """

    kind: Literal["ivf", "hnsw"] = "ivf"
    lists: int | None = None
    probes: int = 32
    links: int = 32
    breadth: int = 128

    def __post_init__(self) -> None:
        if self.kind not in ("ivf", "hnsw"):
            raise ValueError(f"ANNConfig.kind: expected 'ivf' or 'hnsw', got {self.kind!r}")
        for name in ("lists", "probes", "links", "breadth"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"ANNConfig.{name}: expected at least 1, got {value!r}")
