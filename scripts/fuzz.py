"""Damaged files for every parser, for as long as one likes: nothing but errors of ours may come of them.

    python scripts/fuzz.py --seconds 600 [--kind config ...] [--seed 1]

With atheris installed (`pip install atheris`), `--atheris KIND` lets coverage choose the damage. What fails is
written to `fuzz-KIND.bin` and shown.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from drift_jax.errors import DriftError
from tests.bad_input.corpus import FOLDER
from tests.bad_input.parsers import PARSERS, damaged, seeds_of


def try_one(kind: str, data: bytes, folder: Path) -> bool:
    """Whether the parser took the file; raises what is no error of ours."""
    suffix, parse = PARSERS[kind]
    path = folder / f"file{suffix}"
    path.write_bytes(data)
    begun = time.monotonic()
    try:
        parse(path)
        return True
    except DriftError:
        return False
    except BaseException:
        Path(f"fuzz-{kind}.bin").write_bytes(data)
        print(f"{kind}: the file is kept as fuzz-{kind}.bin", file=sys.stderr)
        raise
    finally:
        if time.monotonic() - begun > 10:
            Path(f"fuzz-{kind}-slow.bin").write_bytes(data)
            print(f"{kind}: a file took {time.monotonic() - begun:.0f} s", file=sys.stderr)


def by_chance(kinds: list[str], seconds: float, seed: int) -> None:
    source, end = random.Random(seed), time.monotonic() + seconds
    tried, taken = Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        seeds = {kind: seeds_of(kind, Path(folder)) for kind in kinds}
        while time.monotonic() < end:
            kind = source.choice(kinds)
            data = damaged(source.choice(seeds[kind]), source)
            taken[kind] += try_one(kind, data, Path(folder))
            tried[kind] += 1
    for kind, count in tried.most_common():
        print(f"{kind}: {count:,} files, {taken[kind]:,} of them could be read")


def by_coverage(kind: str, words: list[str]) -> None:
    import atheris  # pyright: ignore[reportMissingImports]

    with tempfile.TemporaryDirectory() as folder:
        atheris.instrument_all()
        atheris.Setup([sys.argv[0], *words, str(FOLDER / kind)], lambda data: try_one(kind, data, Path(folder)))
        atheris.Fuzz()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kind", action="append", choices=list(PARSERS))
    options.add_argument("--seconds", type=float, default=60.0)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--atheris", metavar="KIND", choices=list(PARSERS))
    given, rest = options.parse_known_args()
    if given.atheris:
        by_coverage(given.atheris, [f"-max_total_time={given.seconds:.0f}", *rest])
    else:
        by_chance(given.kind or list(PARSERS), given.seconds, given.seed)


if __name__ == "__main__":
    main()
