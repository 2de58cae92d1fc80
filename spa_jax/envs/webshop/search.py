"""Search as WebShop's Lucene index ranks: BM25 with k1 0.9 and b 0.4, the 50 best products.

`bm25s` holds and scores the index.  What we add makes its ranking Lucene's own:

- the analysis of Lucene's English analyser: words by Unicode's default word boundaries
  (emoji are words too), possessive 's cut, 33 stop words dropped, Porter's stemmer on
  words of three and more characters;
- Lucene's document lengths, which it stores in one byte (`stored_length`);
- its tie break in this benchmark, by the product's id.

    score(d) = sum_t w_t - w_t / (1 + f_td / (k1 * (1 - b + b * len_d / mean length)))
    w_t      = ln(1 + (N - n_t + 0.5) / (n_t + 0.5))

in float32, as Lucene computes it (org.apache.lucene.search.similarities.BM25Similarity).
"""

import dataclasses
import functools
import importlib
import math
import re
import sys
import types
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import Stemmer

HITS = 50
K1, B = 0.9, 0.4

_STOP_WORDS = frozenset(
    "a an and are as at be but by for if in into is it no not of on or such that the their "
    "then there these they this to was will with".split()
)

# Unicode's Extended_Pictographic (version 12) beyond what is a letter: Lucene indexes emoji.
_PICTOGRAPH = (
    "\u00a9\u00ae\u203c\u2049\u2122\u2139\u2194-\u2199\u21a9\u21aa\u231a\u231b\u2328\u2388\u23cf"
    "\u23e9-\u23f3\u23f8-\u23fa\u25aa\u25ab\u25b6\u25c0\u25fb-\u25fe\u2600-\u2605"
    "\u2607-\u2612\u2614-\u2685\u2690-\u2705\u2708-\u2712\u2714\u2716\u271d\u2721\u2728\u2733"
    "\u2734\u2744\u2747\u274c\u274e\u2753-\u2755\u2757\u2763-\u2767\u2795-\u2797\u27a1\u27b0"
    "\u27bf\u2934\u2935\u2b05-\u2b07\u2b1b\u2b1c\u2b50\u2b55\u3030\u303d\u3297\u3299"
    "\U0001f000-\U0001f0ff\U0001f10d-\U0001f10f\U0001f12f\U0001f16c-\U0001f171"
    "\U0001f17e\U0001f17f\U0001f18e\U0001f191-\U0001f19a\U0001f1ad-\U0001f1e5"
    "\U0001f201-\U0001f20f\U0001f21a\U0001f22f\U0001f232-\U0001f23a\U0001f23c-\U0001f23f"
    "\U0001f249-\U0001f3fa\U0001f400-\U0001f53d\U0001f546-\U0001f64f\U0001f680-\U0001f6ff"
    "\U0001f774-\U0001f77f\U0001f7d5-\U0001f7ff\U0001f80c-\U0001f80f\U0001f848-\U0001f84f"
    "\U0001f85a-\U0001f85f\U0001f888-\U0001f88f\U0001f8ae-\U0001f8ff\U0001f90c-\U0001f93a"
    "\U0001f93c-\U0001f945\U0001f947-\U0001fffd"
)
_IDEOGRAPH = "\u2e80-\u2fd5\u3005\u3007\u3021-\u3029\u3038-\u303b\u3041-\u309f\u3400-\u4dbf"
_IDEOGRAPH += "\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han and Hiragana
_KATAKANA = "\u30a1-\u30ff\u31f0-\u31ff\u32d0-\u32fe\u3300-\u3357\uff66-\uff9d"
_POSSESSIVE = ("'s", "\u2019s", "\uff07s")


def _ranges(categories: Sequence[str]) -> str:
    """A regular expression's ranges of all characters of these Unicode categories, up to U+FFFF."""
    found: list[list[int]] = []
    for code in range(128, 0x10000):
        if unicodedata.category(chr(code)) in categories:
            if found and found[-1][1] == code - 1:
                found[-1][1] = code
            else:
                found.append([code, code])
    return "".join(f"{re.escape(chr(a))}-{re.escape(chr(b))}" for a, b in found)


def _word_pattern() -> re.Pattern[str]:
    """Unicode's default word boundaries (UAX #29), as far as they matter for words."""
    extend = rf"[{_ranges(('Mn', 'Me', 'Mc', 'Cf'))}\uff9e\uff9f]*"
    # \w without what Unicode counts as numbers but not as digits (such as 1/4), which ends words.
    not_letter = _ranges(("No",)) + _IDEOGRAPH + _KATAKANA + "\uff9e\uff9f"
    letter, digit = rf"[^\W\d_{not_letter}]", r"\d"
    part = rf"(?:(?:{letter}|{digit}|_){extend})+"
    within_word = rf"(?<={letter})[:.'\u00b7\u2018\u2019\u2024\ufe55\uff07\uff0e\uff1a](?={letter})"
    within_number = (
        rf"(?<={digit})[,;.'\u2018\u2019\u2024\u2044\uff07\uff0e\uff0c\uff1b](?={digit})"
    )
    return re.compile(
        rf"{part}(?:(?:{within_word}|{within_number}){part})*"
        rf"|[{_IDEOGRAPH}]{extend}|(?:[{_KATAKANA}]{extend})+"
        rf"|[{_PICTOGRAPH}]{extend}(?:(?<=\u200d)[{_PICTOGRAPH}]{extend})*"
        rf"|[\U0001f1e6-\U0001f1ff]{{1,2}}"
    )


_ASCII_WORD = re.compile(
    r"[a-z0-9_]+(?:(?:(?<=[a-z])[:.'](?=[a-z])|(?<=[0-9])[,;.'](?=[0-9]))[a-z0-9_]+)*"
)
_WORD = _word_pattern()
_stem = Stemmer.Stemmer("porter").stemWord


@functools.lru_cache(maxsize=1 << 16)
def _term(word: str) -> str:
    """What a word is indexed as; empty if it is not."""
    if word.endswith(_POSSESSIVE):
        word = word[:-2]
    if word in _STOP_WORDS or not word.strip("_"):
        return ""
    return _stem(word) if len(word) > 2 else word


def analyse(text: str) -> list[str]:
    """The terms of a text, in order."""
    text = text.lower()
    words = (_ASCII_WORD if text.isascii() else _WORD).findall(text)
    return [term for term in map(_term, words) if term]


def stored_length(length: int) -> int:
    """What is left of a document's length in Lucene's index: exact below 40, then 4 bits of it.

    (org.apache.lucene.util.SmallFloat, byte4ToInt(intToByte4(length)).)
    """
    if length < 40:
        return length
    shift = max((length - 24).bit_length() - 4, 0)
    return ((length - 24) >> shift << shift) + 24


def load_bm25s() -> types.ModuleType:
    """Imports bm25s without JAX and SciPy, which it would load if they are installed.

    It uses JAX for a top-k that is not called here, and starts it when imported; an
    environment process must not.
    """
    blocked = [name for name in ("jax", "scipy") if name not in sys.modules]
    sys.modules.update(dict.fromkeys(blocked))  # type: ignore[arg-type]  # None: not importable
    try:
        return importlib.import_module("bm25s")
    finally:
        for name in blocked:
            del sys.modules[name]


@dataclasses.dataclass(frozen=True)
class Postings:
    """A piece of an inverted index: entry i says that a document holds a term so many times.

    Attributes:
      term: int32 [n], sorted.
      document: int32 [n], sorted within a term.
      count: float32 [n].
    """

    term: np.ndarray
    document: np.ndarray
    count: np.ndarray


class IndexWriter:
    """Collects documents, then writes bm25s's arrays.  Memory is bounded by a piece.

    Args:
      scratch: a folder for finished pieces; None keeps everything in memory.
      piece: documents in a piece.
    """

    def __init__(self, scratch: Path | None, piece: int = 50_000):
        self.terms: dict[str, int] = {}
        self._scratch, self._piece = scratch, piece
        self._pieces: list[Postings | Path] = []
        self._open: list[tuple[list[int], list[int], int]] = []
        self._lengths: list[int] = []

    def add(self, text: str) -> None:
        """Adds the next document."""
        terms = analyse(text)
        counts = Counter(self.terms.setdefault(term, len(self.terms)) for term in terms)
        self._open.append((list(counts), list(counts.values()), len(self._lengths)))
        self._lengths.append(len(terms))
        if len(self._open) >= self._piece:
            self._close_piece()

    def _close_piece(self) -> None:
        sizes = [len(terms) for terms, _, _ in self._open]
        term = np.fromiter((t for terms, _, _ in self._open for t in terms), np.int32, sum(sizes))
        count = np.fromiter((c for _, counts, _ in self._open for c in counts), np.float32)
        document = np.repeat(np.array([d for *_, d in self._open], np.int32), sizes)
        order = np.argsort(term, kind="stable")
        piece = Postings(term[order], document[order], count[order])
        self._open = []
        if self._scratch is None:
            self._pieces.append(piece)
            return
        path = self._scratch / f"piece{len(self._pieces)}.npz"
        np.savez(path, **dataclasses.asdict(piece))
        self._pieces.append(path)

    def finish(self, make_array: Callable[[str, np.dtype, int], np.ndarray]) -> dict[str, Any]:
        """Computes all scores.

        Args:
          make_array: makes the array of a name, type and size that is to be filled.

        Returns:
          bm25s's `scores`: "data" float32 [n] and "indices" int32 [n], by term, "indptr"
          int64 [terms + 1], "num_docs".
        """
        if self._open:
            self._close_piece()
        documents = len(self._lengths)
        found = np.zeros(len(self.terms), np.int64)
        for piece in map(_read_piece, self._pieces):
            found += np.bincount(piece.term, minlength=len(found))
        indptr = make_array("indptr", np.dtype(np.int64), len(found) + 1)
        indptr[0] = 0
        np.cumsum(found, out=indptr[1:])
        data = make_array("data", np.dtype(np.float32), int(indptr[-1]))
        indices = make_array("indices", np.dtype(np.int32), int(indptr[-1]))
        weight = np.array(
            [math.log(1 + (documents - n + 0.5) / (n + 0.5)) for n in found.tolist()], np.float32
        )
        per_length = self._inverse_norms()
        free = indptr[:-1].copy()
        for piece in map(_read_piece, self._pieces):
            of_term = np.bincount(piece.term, minlength=len(found))
            first = np.cumsum(of_term) - of_term
            at = free[piece.term] + np.arange(len(piece.term)) - first[piece.term]
            w = weight[piece.term]
            data[at] = w - w / (np.float32(1) + piece.count * per_length[piece.document])
            indices[at] = piece.document
            free += of_term
        return {"data": data, "indices": indices, "indptr": indptr, "num_docs": documents}

    def _inverse_norms(self) -> np.ndarray:
        """1 / (k1 * (1 - b + b * length / mean length)) of each document, float32."""
        f32 = np.float32
        mean = f32(sum(self._lengths) / max(len(self._lengths), 1) or 1)
        stored = np.array([stored_length(n) for n in self._lengths], f32)
        return f32(1) / (f32(K1) * ((f32(1) - f32(B)) + f32(B) * stored / mean))


def _read_piece(piece: Postings | Path) -> Postings:
    if isinstance(piece, Postings):
        return piece
    with np.load(piece) as arrays:
        return Postings(**arrays)


class Index:
    """A finished index.

    Args:
      scores: bm25s's arrays, in memory or mapped from files.
      rank: int32 [documents], the order among equal scores.
      term_ids: finds the numbers of terms; those that no document has are left out.
    """

    def __init__(
        self,
        scores: dict[str, Any],
        rank: np.ndarray,
        term_ids: Callable[[Iterable[str]], dict[str, int]],
    ):
        bm25s = load_bm25s()
        self._bm25 = bm25s.BM25(k1=K1, b=B, method="lucene", dtype="float64", backend="numpy")
        self._bm25.scores, self._bm25.nonoccurrence_array = scores, None
        self._rank, self._term_ids = rank, term_ids

    def scores(self, query: str) -> np.ndarray:
        """The score of every document, float32 [documents]."""
        terms = analyse(query)
        ids = self._term_ids(terms)
        # Lucene adds in double precision and rounds the sum.
        known = [ids[term] for term in terms if term in ids]
        return self._bm25.get_scores_from_ids(known).astype(np.float32)

    def search(self, query: str, hits: int = HITS) -> list[tuple[int, float]]:
        """The best documents and their scores, best first; only such as hold a term."""
        scores = self.scores(query)
        found = np.flatnonzero(scores)
        if len(found) > hits:
            least = np.partition(scores[found], len(found) - hits)[len(found) - hits]
            found = found[scores[found] >= least]
        order = np.lexsort((self._rank[found], -scores[found]))[:hits]
        return [(int(i), float(scores[i])) for i in found[order]]
