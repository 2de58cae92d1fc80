"""A catalogue that can be played: products, goals and the search index.

Small catalogues are built in memory at start.  The full one (1.18 million products) is
prepared once, on disk, by `python -m experiments.prepare_webshop`:

    STORE/catalogue.sqlite                          products, goals, terms of the index
    STORE/{data,indices,indptr,rank}.npy            the index; see `search.Index`

Nothing of it is loaded: SQLite and NumPy map the files, so all processes of a machine
share one copy, in its page cache.
"""

import json
import shutil
import sqlite3
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from spa_jax.envs.webshop.catalogue import (
    STORE,
    Files,
    Product,
    find_files,
    is_usable,
    make_product,
    read_object,
    stream,
)
from spa_jax.envs.webshop.goals import KINDS, Goal, GoalKey, draw_goals, make_goal, order
from spa_jax.envs.webshop.search import HITS, Index, IndexWriter
from spa_jax.errors import UserError

VERSION = 1
PRICE_SEED = 0
# Larger product files are not built in memory: that takes minutes and gigabytes, in each worker.
MAX_IN_MEMORY = 256 * 2**20  # bytes

_DATABASE = "catalogue.sqlite"
_ARRAYS = ("data", "indices", "indptr", "rank")
_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value);
CREATE TABLE product (row INTEGER PRIMARY KEY, asin TEXT NOT NULL, record TEXT NOT NULL);
CREATE TABLE goal (place INTEGER PRIMARY KEY, row INTEGER, choice INTEGER, price_upper REAL);
CREATE TABLE attribute (name TEXT PRIMARY KEY, goals INTEGER) WITHOUT ROWID;
CREATE TABLE term (name TEXT PRIMARY KEY, id INTEGER) WITHOUT ROWID;
"""

Progress = Callable[[Iterable[Any], str], Iterable[Any]]


def _no_progress(items: Iterable[Any], _: str) -> Iterable[Any]:
    return items


class Catalogue:
    """Products, goals and search.  Made by `open_catalogue`, `build` or `prepare`.

    Attributes:
      kind: of its goals, "human" or "synthetic".
      products: how many products.
      goals: how many goals.
      official_small: whether it is the benchmark's own 1,000-product catalogue, to which the
        paper's index files do not apply.
    """

    def __init__(self, database: sqlite3.Connection, arrays: dict[str, np.ndarray]):
        self._database = database
        meta = dict(database.execute("SELECT name, value FROM meta"))
        if meta.get("version") != VERSION:
            raise UserError("the WebShop store is of another version; prepare it again")
        self.kind: str = meta["kind"]
        self.products: int = meta["products"]
        self.goals: int = meta["goals"]
        self.official_small = bool(meta["official_small"])
        scores = {name: arrays[name] for name in ("data", "indices", "indptr")}
        self._index = Index(scores | {"num_docs": self.products}, arrays["rank"], self._term_ids)

    def _term_ids(self, terms: Iterable[str]) -> dict[str, int]:
        select = "SELECT id FROM term WHERE name = ?"
        found = {term: self._database.execute(select, (term,)).fetchone() for term in set(terms)}
        return {term: row[0] for term, row in found.items() if row}

    def product(self, row: int) -> Product:
        """The product at this place of the catalogue."""
        select = "SELECT record FROM product WHERE row = ?"
        return _product(self._database.execute(select, (row,)).fetchone()[0])

    def find(self, asin: str) -> Product | None:
        """The product with this id."""
        select = "SELECT record FROM product WHERE asin = ?"
        found = self._database.execute(select, (asin,)).fetchone()
        return _product(found[0]) if found else None

    def all_products(self) -> Iterator[Product]:
        """All products in order."""
        for (record,) in self._database.execute("SELECT record FROM product ORDER BY row"):
            yield _product(record)

    def goal(self, place: int) -> Goal:
        """The goal of this index.

        Raises:
          UserError: if there is none.
        """
        select = "SELECT row, choice, price_upper FROM goal WHERE place = ?"
        found = self._database.execute(select, (place,)).fetchone()
        if found is None:
            raise UserError(f"no goal {place}: the catalogue's goals are 0 to {self.goals - 1}")
        key = GoalKey(*found)
        product = self.product(key.row)
        counts = {name: self._goals_with(name) for name in product.instruction_attributes}
        return make_goal(product, key, self.kind, counts)

    def _goals_with(self, attribute: str) -> int:
        select = "SELECT goals FROM attribute WHERE name = ?"
        found = self._database.execute(select, (attribute,)).fetchone()
        return found[0] if found else 0

    def search(self, query: str) -> list[tuple[str, float]]:
        """The ids of the best products and their scores, best first."""
        select = "SELECT asin FROM product WHERE row = ?"
        return [
            (self._database.execute(select, (row,)).fetchone()[0], score)
            for row, score in self._index.search(query, HITS)
        ]

    def scores(self, query: str, asins: Iterable[str]) -> dict[str, float]:
        """The scores of these products for a query; ids of no product are left out."""
        scores = self._index.scores(query)
        select = "SELECT row FROM product WHERE asin = ?"
        found = {asin: self._database.execute(select, (asin,)).fetchone() for asin in asins}
        return {asin: float(scores[row[0]]) for asin, row in found.items() if row}


def _product(record: str) -> Product:
    fields = json.loads(record)
    for name in ("bullets", "attributes", "instruction_attributes", "human"):
        fields[name] = tuple(fields[name])
    fields["options"] = {name: tuple(values) for name, values in fields["options"].items()}
    return Product(**fields)


def store_folder(data: str | Path) -> Path | None:
    """The prepared store that `data` is or holds; None if there is none."""
    for folder in (Path(data), Path(data) / STORE, Path(data) / "webshop" / STORE):
        if (folder / _DATABASE).is_file():
            return folder
    return None


def open_catalogue(data: str | Path) -> Catalogue:
    """A catalogue of a store, of a folder that holds one, or of a folder with small files.

    Raises:
      UserError: if there is neither, or the files are too big to be built in memory.
    """
    folder = store_folder(data)
    if folder is not None:
        return _open_store(folder)
    files = find_files(data)
    if files.products.stat().st_size > MAX_IN_MEMORY:
        raise UserError(
            f"{files.products} is too big to be read at each start; prepare it once: "
            f"python -m experiments.prepare_webshop --data={data}"
        )
    return build(files, default_kind(files))


def _random(seed: int) -> Random:
    """Draws prices and bounds as the original's process does after `random.seed(seed)`.

    One word is drawn there before the first price, by a library.
    """
    random = Random(seed)
    random.getrandbits(32)
    return random


def _open_store(folder: Path) -> Catalogue:
    try:
        database = sqlite3.connect(
            f"file:{folder / _DATABASE}?mode=ro&immutable=1", uri=True, check_same_thread=False
        )
        database.execute(f"PRAGMA mmap_size = {1 << 40}")
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
        return Catalogue(database, arrays)
    except (OSError, ValueError, KeyError, sqlite3.Error) as error:
        raise UserError(
            f"{folder} is no whole WebShop store ({error}); prepare it again"
        ) from error


def default_kind(files: Files) -> str:
    """The goals of a catalogue: as the paper, human ones, but for the 1,000-product files."""
    return "synthetic" if "1000" in files.products.name else "human"


def build(files: Files, kind: str, price_seed: int = PRICE_SEED) -> Catalogue:
    """Builds a catalogue in memory.

    Args:
      files: where it comes from.
      kind: which goals it gets, one of `goals.KINDS`.
      price_seed: seeds the prices of products with a range of prices, and the price bounds.
    """
    database = sqlite3.connect(":memory:", check_same_thread=False)
    arrays: dict[str, np.ndarray] = {}

    def make_array(name: str, kind: np.dtype, size: int) -> np.ndarray:
        arrays[name] = np.empty(size, kind)
        return arrays[name]

    _fill(
        database,
        files,
        kind,
        random=_random(price_seed),
        scratch=None,
        make_array=make_array,
        progress=_no_progress,
    )
    return Catalogue(database, arrays)


def prepare(
    files: Files,
    out: Path,
    kind: str,
    price_seed: int = PRICE_SEED,
    progress: Progress = _no_progress,
) -> None:
    """Builds a catalogue on disk, under a temporary name until it is whole.

    Args:
      files: where it comes from.
      out: the store's folder; it must not exist.
      kind: which goals it gets, one of `goals.KINDS`.
      price_seed: see `build`.
      progress: wraps what takes long, with a title.

    Raises:
      UserError: if the store exists or the files are broken.
    """
    if out.exists():
        raise UserError(f"{out} exists; remove it to prepare it again")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was stopped
    scratch = partial / "pieces"
    scratch.mkdir(parents=True)
    database = sqlite3.connect(partial / _DATABASE)
    _write_fast(database)

    def make_array(name: str, kind: np.dtype, size: int) -> np.ndarray:
        path = partial / f"{name}.npy"
        return np.lib.format.open_memmap(path, mode="w+", dtype=kind, shape=(size,))

    _fill(
        database,
        files,
        kind,
        random=_random(price_seed),
        scratch=scratch,
        make_array=make_array,
        progress=progress,
    )
    database.close()
    shutil.rmtree(scratch)
    partial.rename(out)


def _write_fast(database: sqlite3.Connection) -> None:
    """What is written is thrown away if the run stops: no journal, no waiting for the disk."""
    database.execute("PRAGMA journal_mode = OFF")
    database.execute("PRAGMA synchronous = OFF")
    database.execute("PRAGMA cache_size = -200000")  # KiB


def _fill(
    database: sqlite3.Connection,
    files: Files,
    kind: str,
    *,
    random: Random,
    scratch: Path | None,
    make_array: Callable[[str, np.dtype, int], np.ndarray],
    progress: Progress,
) -> None:
    """Writes products, goals and index."""
    if kind not in KINDS:
        raise UserError(f"goals {kind!r} are unknown; choose one of {', '.join(KINDS)}")
    database.executescript(_SCHEMA)
    writer = IndexWriter(scratch)
    asins, with_goals = _add_products(
        database, files, random, scratch=scratch, writer=writer, progress=progress
    )
    if not asins:
        raise UserError(f"{files.products} holds no product")
    goals = _add_goals(database, kind, random, with_goals, progress)
    database.executemany("INSERT INTO term VALUES (?, ?)", sorted(writer.terms.items()))
    # Equal scores: the smaller id first.
    rank = make_array("rank", np.dtype(np.int32), len(asins))
    rank[np.argsort(np.array(asins))] = np.arange(len(asins))
    list(progress(iter([writer.finish(make_array)]), "scores"))
    meta = {
        "version": VERSION,
        "kind": kind,
        "products": len(asins),
        "goals": goals,
        "official_small": int("1000" in files.products.name),
    }
    database.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
    database.commit()


def _add_products(
    database: sqlite3.Connection,
    files: Files,
    random: Random,
    *,
    scratch: Path | None,
    writer: IndexWriter,
    progress: Progress,
) -> tuple[list[str], list[int]]:
    """Writes the products; returns their ids and the rows of those that may have goals."""
    notes = sqlite3.connect(":memory:" if scratch is None else scratch / "notes.sqlite")
    _write_fast(notes)
    notes.execute("CREATE TABLE notes (asin TEXT PRIMARY KEY, record TEXT) WITHOUT ROWID")
    notes.executemany(
        "INSERT OR REPLACE INTO notes VALUES (?, ?)",
        ((asin, json.dumps(n)) for asin, n in progress(stream(files.attributes), "attributes")),
    )
    human = read_object(files.human)
    asins: dict[str, int] = {}
    with_goals = []
    for record in progress(stream(files.products), "products"):
        if not is_usable(record) or record["asin"] in asins:
            continue
        asin, row = record["asin"], len(asins)
        asins[asin] = row
        found = notes.execute("SELECT record FROM notes WHERE asin = ?", (asin,)).fetchone()
        product = make_product(
            record, json.loads(found[0]) if found else None, human.get(asin, []), random
        )
        if product.instruction is not None or product.human:
            with_goals.append(row)
        text = json.dumps(vars(product), ensure_ascii=False)
        database.execute("INSERT INTO product VALUES (?, ?, ?)", (row, asin, text))
        writer.add(product.document)
    notes.close()
    database.execute("CREATE UNIQUE INDEX product_asin ON product (asin)")
    return list(asins), with_goals


def _add_goals(
    database: sqlite3.Connection, kind: str, random: Random, rows: list[int], progress: Progress
) -> int:
    """Draws the goals and writes them in their final order; returns how many."""
    select = "SELECT record FROM product WHERE row = ?"
    places, choices, bounds = array("q"), array("q"), array("d")
    attributes: dict[str, int] = {}
    for row in progress(rows, "goals"):
        product = _product(database.execute(select, (row,)).fetchone()[0])
        before = len(places)
        for choice, bound in draw_goals(product, kind, random):
            places.append(row)
            choices.append(choice)
            bounds.append(bound)
        for name in product.instruction_attributes:
            attributes[name] = attributes.get(name, 0) + len(places) - before
    database.executemany(
        "INSERT INTO goal VALUES (?, ?, ?, ?)",
        ((i, places[p], choices[p], bounds[p]) for i, p in enumerate(order(len(places)))),
    )
    database.executemany("INSERT INTO attribute VALUES (?, ?)", attributes.items())
    return len(places)
