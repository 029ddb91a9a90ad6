"""How well rules find complaints, as JSON: on 198 real complaints and the ordinary turns of the same dialogues.

    python scripts/detector_quality.py [FILE] [--rules en_v1] [--show]

FILE has DSAT records with `group` (the person or thread that a dialogue comes from) and `signal`. Complaints are the
`user_preference` of all rows, explicit ones those whose signal says so. Ordinary turns are the user turns inside the
prompts that no row has as its complaint, each once a group: `follow_ups` come after a reply, where a detector looks,
`first_turns` open a dialogue, where it does not.

The rules were written while looking at the half `develop`; `held_out` was only scored. A group is in one half, by its
hash. `--show` prints what was missed and what fired on ordinary turns, of `develop` only. Without FILE those 198 are
looked for beside the repository, which does not hold them.

Caveats. The complaints were themselves chosen by reading and by pattern, most of them from people who programmed:
recall on other logs may be lower. Nobody labelled the ordinary turns, and there are few. Precision here is that of a
file with a complaint in every dialogue; `precision_at_12_percent` says what it would be where, as in WildFeedback, 12 %
of user turns complain: as measured, and if rules fired as often on ordinary turns as the interval's upper end says.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed

from drift_jax.data.mining.complaint_rules import RuleSet, load_rules
from drift_jax.errors import DataError, DriftError
from drift_jax.records import read_dsat

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "dsat_real.jsonl"
HALVES = ("develop", "held_out")
NEEDED = "Give a JSONL file of DSAT records with `group` and `signal` as FILE."
SHARE = 0.1196  # of WildFeedback's user turns, see the README


class UserTurn(NamedTuple):
    half: str
    kind: str  # explicit, refinement, follow_up, first_turn
    text: str


def load_turns(path: Path) -> list[UserTurn]:
    """Complaints and ordinary turns. Raises `DataError` as `read_dsat`, and where the file cannot tell them apart."""
    records = read_dsat(path).records
    for record in records:
        missing = [key for key in ("group", "signal") if not isinstance(record.extra.get(key), str)]
        if missing:
            raise DataError(f"{path}: row {record.id!r} has no text in {' and '.join(missing)}. {NEEDED}")
    chosen = {(r.extra["group"], r.user_preference.strip()) for r in records}
    turns: list[UserTurn] = []
    seen: set[tuple[str, str]] = set()
    for record in records:
        group = record.extra["group"]
        half = HALVES[int(hashlib.sha256(group.encode()).hexdigest(), 16) % 2]
        turns.append(
            UserTurn(half, "explicit" if record.extra["signal"] == "explicit" else "refinement", record.user_preference)
        )
        users = [m.content for m in record.prompt if m.role == "user"]
        for place, text in enumerate(users):
            key = (group, text.strip())
            if key not in chosen and key not in seen:
                seen.add(key)
                turns.append(UserTurn(half, "follow_up" if place else "first_turn", text))
    for half in HALVES:
        kinds = {turn.kind for turn in turns if turn.half == half}
        if "follow_up" not in kinds or not kinds & {"explicit", "refinement"}:
            raise DataError(
                f"{path}: half {half} lacks complaints, or ordinary turns after a reply. Give records of more groups."
            )
    return turns


def measure(turns: Sequence[UserTurn], rules: Sequence[RuleSet]) -> dict[str, Any]:
    """Counts and rates of some turns, for all rules together and for each."""
    fired = [(turn.kind, [label for one in rules for label, _ in one.match(turn.text)]) for turn in turns]
    total = Counter(kind for kind, _ in fired)
    names = [one.label(rule) for one in rules for rule in one.rules]
    hits = {name: Counter(kind for kind, labels in fired if name in labels) for name in names}
    return {
        "turns": dict(total),
        "all_rules": rates(Counter(kind for kind, labels in fired if labels), total),
        "rules": {
            name: {
                "complaints": hits[name]["explicit"] + hits[name]["refinement"],
                "follow_ups": hits[name]["follow_up"],
                "first_turns": hits[name]["first_turn"],
            }
            for name in names
        },
    }


def rates(hits: Counter[str], total: Counter[str]) -> dict[str, Any]:
    complaints, all_complaints = hits["explicit"] + hits["refinement"], total["explicit"] + total["refinement"]
    recall, follow_ups = complaints / all_complaints, rate(hits["follow_up"], total["follow_up"])
    return {
        "recall": rate(complaints, all_complaints),
        "recall_explicit": rate(hits["explicit"], total["explicit"]),
        "precision": rate(complaints, complaints + hits["follow_up"]),
        "follow_ups_fired": follow_ups,
        "first_turns_fired": rate(hits["first_turn"], total["first_turn"]),
        "precision_at_12_percent": {
            "measured": precision_among(recall, follow_ups["rate"]),
            "at_upper_end": precision_among(recall, follow_ups["interval"][1]),
        },
    }


def precision_among(recall: float, fired: float) -> float | None:
    """Precision where a share `SHARE` of the turns complains; None where nothing fires."""
    found = recall * SHARE + fired * (1 - SHARE)
    return round(recall * SHARE / found, 3) if found else None


def rate(count: int, total: int) -> dict[str, Any]:
    """A share, with Wilson's interval of 95 %."""
    if not total:
        return {"count": count, "of": 0}
    share, z = count / total, 1.96
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    width = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    interval = [round(max(0.0, middle - width), 3), round(min(1.0, middle + width), 3)]
    return {"count": count, "of": total, "rate": round(share, 3), "interval": interval}


def show(turns: Iterable[UserTurn], rules: Sequence[RuleSet]) -> None:
    for turn in turns:
        labels = {label: found for one in rules for label, found in one.match(turn.text)}
        if turn.half == HALVES[0] and bool(labels) != (turn.kind in ("explicit", "refinement")):
            print(f"{turn.kind}: {turn.text[:200]!r} {labels or ''}", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", default=DATA)
    parser.add_argument("--rules", action="append", help="ours by name, or a file; may be given several times")
    parser.add_argument("--show", action="store_true", help="what went wrong in the half that rules are written with")
    args = parser.parse_args()
    try:
        rules = [load_rules(name) for name in args.rules or ["en_v1"]]
        if not args.file.is_file():
            raise DataError(f"{args.file} is not there. {NEEDED}")
        turns = load_turns(args.file)
    except DriftError as error:
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        return 2
    if args.show:
        show(turns, rules)
    by_half = {half: measure([turn for turn in turns if turn.half == half], rules) for half in HALVES}
    report = {"rules": {f"{r.name}-v{r.version}": r.hash for r in rules}, **by_half, "all": measure(turns, rules)}
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
