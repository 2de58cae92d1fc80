"""Prepares WebShop's full catalogue once, so that environments open it at once and share it.

    python -m experiments.prepare_webshop --data=DIR

DIR holds the official files: items_shuffle.json, items_ins_v2.json, items_human_ins.json (and
the paper's train_indices.json and test_indices.json).  The store, DIR/webshop_store, is written
under a temporary name: a run that was stopped leaves none, and starts over.
"""

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tqdm
from absl import flags

from experiments import flags as flags_lib

_DATA = flags.DEFINE_string("data", None, "The folder of WebShop's files.", required=True)
_STORE = flags.DEFINE_string("store", "", "Where the store goes; empty: DATA/webshop_store.")
_GOALS = flags.DEFINE_enum(
    "goals",
    None,
    ["human", "synthetic"],
    "Which goals; by default those of people, but synthetic ones for the 1,000-product files.",
)
_SEED = flags.DEFINE_integer(
    "price_seed", 0, "Seeds prices that have a range, and the goals' price bounds."
)


def main(argv: Sequence[str]) -> None:
    """Prepares the store."""
    del argv
    from spa_jax.envs.webshop import store
    from spa_jax.envs.webshop.catalogue import STORE, find_files

    start = time.monotonic()
    files = find_files(_DATA.value)
    out = Path(_STORE.value) if _STORE.value else files.products.parent / STORE
    kind = _GOALS.value or store.default_kind(files)
    store.prepare(files, out, kind, _SEED.value, _bar)
    catalogue = store.open_catalogue(out)
    seconds = time.monotonic() - start
    size = sum(path.stat().st_size for path in out.iterdir()) / 2**20
    print(
        f"RESULT products={catalogue.products} goals={catalogue.goals} seconds={seconds:.0f} "
        f"mebibytes={size:.0f} store={out}"
    )


def _bar(items: Iterable[Any], title: str) -> Iterable[Any]:
    return tqdm.tqdm(items, desc=title, unit="", mininterval=1.0)


if __name__ == "__main__":
    flags_lib.run(main)
