"""Is one run better than another?  A paired test over the games that both played.

    python -m experiments.compare_runs runs/a runs/b
    python -m experiments.compare_runs runs/a runs/b runs/c --evaluation=sft

Each run after the first is compared with the first: the share of games won, the difference with its
95% interval (a bootstrap over games), the games that one alone won, the exact McNemar test, and the
difference that so many games could have seen four times out of five.  A run is a workdir, or any
folder with trajectories.jsonl.  It speaks of these two policies on these games; training again with
another seed gives other policies: `python -m experiments.study` compares those.
"""

from collections.abc import Sequence

from absl import flags

from experiments import flags as flags_lib
from spa_jax.study import pairs

_MOST = 100  # runs


def main(argv: Sequence[str]) -> None:
    found = pairs.compare(argv[1:], _EVALUATION.value)
    print(pairs.table(found))
    for one in found:
        if one.only_here or one.missing:
            print(
                f"{one.name}: {one.only_here} episodes that the first run has not played and "
                f"{one.missing} that it has alone are left out"
            )
    last = found[-1].difference.to_dict()
    print(
        f"RESULT difference={last['difference']:.4f} low={last['low']:.4f} "
        f"high={last['high']:.4f} gained={last['gained']} lost={last['lost']} p={last['p']:.4g}"
    )


if __name__ == "__main__":
    _EVALUATION = flags.DEFINE_string(
        "evaluation", "spa", "Which evaluation of the runs: a folder below W/eval."
    )
    flags_lib.run(main, words=_MOST)
