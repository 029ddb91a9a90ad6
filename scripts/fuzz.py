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
from types import FunctionType, ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from drift_jax.errors import DriftError
from tests.bad_input.damage import damaged, seeds_of
from tests.bad_input.parsers import PARSERS


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


def functions_of(module: ModuleType) -> list[FunctionType]:
    """Its own ones, and those of its classes."""
    owners = [module, *(value for value in vars(module).values() if isinstance(value, type))]
    found = [value for owner in owners for value in vars(owner).values() if isinstance(value, FunctionType)]
    return [value for value in found if value.__module__ == module.__name__]


def by_coverage(kind: str, words: list[str]) -> None:
    import atheris  # pyright: ignore[reportMissingImports]

    with tempfile.TemporaryDirectory() as folder:
        # Of the package alone: of all that is loaded it would take minutes.
        for module in [module for name, module in sys.modules.items() if name.startswith("drift_jax.")]:
            for function in functions_of(module):
                atheris.instrument_func(function)
        seeds = Path(folder) / "seeds"
        seeds.mkdir()
        for number, data in enumerate(set(seeds_of(kind, Path(folder)))):
            (seeds / str(number)).write_bytes(data)
        words = [sys.argv[0], *words, f"-artifact_prefix={folder}/", "-timeout=60", str(seeds)]
        atheris.Setup(words, lambda data: try_one(kind, data, Path(folder)))
        atheris.Fuzz()  # ends the process


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
