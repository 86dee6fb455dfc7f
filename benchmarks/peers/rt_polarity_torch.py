"""rt-polarity with PyTorch: a bag of words and n-grams in one sum, over ten folds.

    python benchmarks/peers/rt_polarity_torch.py ARCHIVE

ARCHIVE is sentence_polarity.zip. Batch, epochs, optimizer, dropout and folds are those
of `recipes/text_classifier.py`, and so are the parts of the model; but here they are
trained on the sum of their logits, as one would first write it, and the recipe trains
each by itself and weighs them. Features are scikit-learn's.
With `--model conv` it is the convolution of Kim 2014 without pre-trained vectors.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
from _rt_polarity import FOLDS, WORD, folds_of, sentences
from sklearn.feature_extraction.text import CountVectorizer
from torch import nn
from torch.nn import functional as F

DIM = 64
BATCH = 64
START = 0.05  # of the weights of n-grams
WORD_DROPOUT = 0.3
LENGTH = 48  # words of a text
NGRAMS = 784  # n-grams of a text
SETTINGS = {"bag": (3e-3, 0.7, 6), "conv": (1e-3, 0.5, 6)}  # rate, dropout, epochs


class Bag(nn.Module):
    """Mean of word embeddings, and the scaled weights of n-grams."""

    def __init__(self, vocab: int, ratios: np.ndarray, dropout: float):
        super().__init__()
        self.embed = nn.Embedding(vocab, DIM, padding_idx=0)
        nn.init.normal_(self.embed.weight, std=DIM**-0.5)
        self.out = nn.Linear(DIM, 2)
        self.register_buffer("ratios", torch.tensor(ratios, dtype=torch.float32))
        self.weights = nn.Parameter(torch.full(ratios.shape, START))
        self.bias = nn.Parameter(torch.zeros(2))
        self.dropout = dropout

    def forward(self, tokens: torch.Tensor, ngrams: torch.Tensor) -> torch.Tensor:
        """Map ids (batch, length) and (batch, count) to logits (batch, 2)."""
        is_word = (tokens != 0).float()
        kept = F.dropout(is_word, WORD_DROPOUT, self.training)
        total = torch.einsum("bl,bld->bd", kept, self.embed(tokens))
        mean = total / is_word.sum(1, keepdim=True).clamp(min=1)
        deep = self.out(F.dropout(mean, self.dropout, self.training))
        present = F.dropout((ngrams != 0).float(), self.dropout, self.training)
        scaled = F.embedding(ngrams, self.weights * self.ratios)
        return deep + torch.einsum("bn,bnc->bc", present, scaled) + self.bias


class Conv(nn.Module):
    """Convolutions over words of widths 3, 4 and 5, and their maxima."""

    def __init__(self, vocab: int, ratios: np.ndarray, dropout: float):
        super().__init__()
        self.embed = nn.Embedding(vocab, DIM, padding_idx=0)
        nn.init.normal_(self.embed.weight, std=DIM**-0.5)
        self.layers = nn.ModuleList(nn.Conv1d(DIM, 64, width) for width in (3, 4, 5))
        self.out = nn.Linear(3 * 64, 2)
        self.dropout = dropout

    def forward(self, tokens: torch.Tensor, ngrams: torch.Tensor) -> torch.Tensor:
        """Map ids (batch, length) to logits (batch, 2)."""
        x = self.embed(tokens).transpose(1, 2)
        maxima = [F.relu(layer(x)).amax(-1) for layer in self.layers]
        features = F.dropout(torch.cat(maxima, 1), self.dropout, self.training)
        return self.out(features)


def main() -> None:
    """Train and test on each fold, and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("archive", type=Path)
    parser.add_argument("--model", choices=list(SETTINGS), default="bag")
    parser.add_argument("--split-seed", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folds", type=int, default=FOLDS, help="how many to run")
    asked = parser.parse_args()

    start = time.perf_counter()
    texts, labels = sentences(asked.archive)
    fold_of = folds_of(labels, asked.split_seed)
    scores = []
    training = 0.0
    for fold in range(asked.folds):
        data = _features(texts, labels, fold_of != fold)
        began = time.perf_counter()
        scores.append(_accuracy(data, asked.model, asked.seed))
        training += time.perf_counter() - began
    print(
        json.dumps(
            {
                "model": asked.model,
                "seed": asked.seed,
                "split_seed": asked.split_seed,
                "accuracy": float(np.mean(scores)),
                "folds": scores,
                "training_seconds": round(training, 1),
                "seconds": round(time.perf_counter() - start, 1),
            }
        )
    )


def _features(texts: np.ndarray, labels: np.ndarray, train: np.ndarray) -> dict:
    """Return tokens, n-grams, labels of both parts, and the ratios."""
    counters = [
        CountVectorizer(token_pattern=WORD, ngram_range=(1, 2), binary=True),
        CountVectorizer(analyzer="char_wb", ngram_range=(3, 5), binary=True),
    ]
    bags = sp.hstack([each.fit_transform(texts[train]) for each in counters]).tocsr()
    others = sp.hstack([each.transform(texts[~train]) for each in counters]).tocsr()
    ratios = _ratios(bags, labels[train])
    words = {word for text in texts[train] for word in _words(text)}
    ids = {word: number for number, word in enumerate(sorted(words), 2)}

    def part(rows: np.ndarray, matrix: sp.csr_matrix) -> tuple:
        tokens = [[ids.get(word, 1) for word in _words(text)] for text in texts[rows]]
        ngrams = [ids + 1 for ids in np.split(matrix.indices, matrix.indptr[1:-1])]
        targets = torch.tensor(labels[rows])
        return _padded(tokens, LENGTH), _padded(ngrams, NGRAMS), targets

    return {
        "train": part(train, bags),
        "test": part(~train, others),
        "ratios": np.stack([-ratios, ratios], axis=1),
        "vocab": len(ids) + 2,
    }


def _words(text: str) -> list[str]:
    return re.findall(WORD, text.lower())


def _ratios(bags: sp.csr_matrix, labels: np.ndarray) -> np.ndarray:
    """Return the log-count ratio of each n-gram, and 0 for padding."""
    p = 1 + np.asarray(bags[labels == 1].sum(0)).ravel()
    q = 1 + np.asarray(bags[labels == 0].sum(0)).ravel()
    return np.concatenate([[0], np.log((p / p.sum()) / (q / q.sum()))])


def _accuracy(data: dict, kind: str, seed: int) -> float:
    """Train a model, and return its accuracy on the test texts."""
    torch.manual_seed(seed)
    rate, dropout, epochs = SETTINGS[kind]
    model = {"bag": Bag, "conv": Conv}[kind](data["vocab"], data["ratios"], dropout)
    tokens, ngrams, labels = data["train"]
    total = math.ceil(epochs * len(labels) / BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    order = torch.cat([torch.randperm(len(labels)) for _ in range(epochs + 1)])
    for step in range(total):
        rows = order[step * BATCH : (step + 1) * BATCH]
        loss = F.cross_entropy(model(tokens[rows], ngrams[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        logits = model(*data["test"][:2])
    return float((logits.argmax(1) == data["test"][2]).float().mean())


def _padded(lists: list, length: int) -> torch.Tensor:
    rows = np.zeros((len(lists), length), np.int64)
    for row, ids in zip(rows, lists, strict=True):
        row[: len(ids)] = ids[:length]
    return torch.tensor(rows)


if __name__ == "__main__":
    main()
