import json
import math
import subprocess
import sys

import numpy as np
import pytest

from spa_jax.envs.webshop.search import Index, IndexWriter, analyse, stored_length


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("The Women's Running Shoes", ["women", "run", "shoe"]),
        ("us is a 10x", ["us", "10x"]),  # stop words; two letters are not stemmed
        ("6.76 fl-oz, 1,000", ["6.76", "fl", "oz", "1,000"]),
        ("material:wood 5:30 a_b __", ["material:wood", "5", "30", "a_b"]),
        ("night\u2019s caf\u00e9 \u00bd \u2764\ufe0f", ["night", "caf\u00e9", "\u2764\ufe0f"]),
        ("\u6f22\u5b57 \u30c6\u30ec\u30d3", ["\u6f22", "\u5b57", "\u30c6\u30ec\u30d3"]),
    ],
)
def test_texts_are_analysed_as_lucene_does(text: str, terms: list[str]) -> None:
    assert analyse(text) == terms


def test_both_ways_through_a_text_find_the_same_words() -> None:
    text = "x.y 1.5,2 don't a:b:c _z 'quoted' 12\"x14\" e-mail a.1 1.a"
    assert analyse(text + " \u00e9")[:-1] == analyse(text)


def test_lengths_are_stored_in_one_byte() -> None:
    # SmallFloat.byte4ToInt(SmallFloat.intToByte4(n)), by hand: 24 + 4 leading bits of n - 24.
    assert [stored_length(n) for n in (0, 39, 40, 41, 57, 100, 313, 1919)] == [
        0,
        39,
        40,
        40,
        56,
        96,
        312,
        1816,
    ]


def _index(*texts: str) -> Index:
    writer = IndexWriter(None, piece=2)  # several pieces
    for text in texts:
        writer.add(text)
    scores = writer.finish(lambda _, kind, size: np.empty(size, kind))
    rank = np.arange(len(texts), dtype=np.int32)[::-1]
    return Index(
        scores, rank, lambda terms: {t: writer.terms[t] for t in terms if t in writer.terms}
    )


def test_scores_are_bm25_by_hand() -> None:
    index = _index("red lamp", "red red shoe box", "green hat", "blue cup tea")
    mean = (2 + 4 + 2 + 3) / 4
    weight = math.log(1 + (4 - 2 + 0.5) / (2 + 0.5))
    once = weight * 1 / (1 + 0.9 * (0.6 + 0.4 * 2 / mean))
    twice = weight * 2 / (2 + 0.9 * (0.6 + 0.4 * 4 / mean))
    assert index.search("red") == [
        (1, pytest.approx(twice, rel=1e-6)),
        (0, pytest.approx(once, rel=1e-6)),
    ]
    assert index.search("red red")[0] == (1, pytest.approx(2 * twice, rel=1e-6))
    assert index.search("the unknown") == index.search("") == []


def test_equal_scores_are_ordered_by_rank() -> None:
    index = _index("cup", "cup", "cup", "hat")
    assert [row for row, _ in index.search("cup")] == [2, 1, 0]
    assert [row for row, _ in index.search("cup", hits=2)] == [2, 1]


def test_an_environment_process_loads_neither_jax_nor_scipy() -> None:
    code = (
        "import sys, json; from spa_jax.envs.webshop import search; search.load_bm25s(); "
        "print(json.dumps([n for n in ('bm25s', 'jax', 'scipy', 'flax') if n in sys.modules]))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    assert json.loads(output) == ["bm25s"]
