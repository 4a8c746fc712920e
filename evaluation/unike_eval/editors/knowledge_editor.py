"""KE (De Cao et al., EMNLP 2021): an LSTM reads the request and says how its gradient is to be gated and shifted."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

from unike_kernels.training.samples import Sample

from .hyper import HyperEditor

_HIDDEN = 128


class KnowledgeEditor(HyperEditor):
    """Change of a weight = sigma(eta) (softmax(alpha) gamma^T * gradient + softmax(beta) delta^T).

    The vectors are linear in what a bidirectional LSTM makes of the request's tokens, question and answer.
    """

    name = "KE"

    @override
    def build(self) -> nn.Module:
        table = self.model.get_input_embeddings()  # type: ignore[operator]
        self._reader = nn.LSTM(table.embedding_dim, _HIDDEN, batch_first=True, bidirectional=True)
        self._heads = nn.ModuleDict(
            {
                name.replace(".", "/"): nn.Linear(2 * _HIDDEN, 2 * (m.out_features + m.in_features) + 1)
                for name, m in self.linears.items()
            }
        )
        return nn.ModuleList([self._reader, self._heads])

    @override
    def changes(self, request: Sample) -> dict[str, Tensor]:
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        table = self.model.get_input_embeddings()  # type: ignore[operator]
        ids = tokenizer(f"{request.prompt} {request.answer}", return_tensors="pt").input_ids.to(table.weight.device)
        _, (state, _) = self._reader(table(ids).detach().float())
        told = state.transpose(0, 1).flatten()
        found = {}
        for name, (u, delta) in self.gradients(request).items():
            rows, columns = delta.shape[1], u.shape[1]
            parts = self._heads[name.replace(".", "/")](told).split([rows, rows, columns, columns, 1])
            alpha, beta, gamma, shift, eta = parts
            gate = torch.outer(alpha.softmax(0), gamma)
            found[name] = eta.sigmoid() * (gate * (delta.T @ u) + torch.outer(beta.softmax(0), shift))
        return found
