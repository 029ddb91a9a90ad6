"""Writes a file shaped like WildFeedback's annotated utterances, of any size, from the conversations of a DSAT file.

    python scripts/make_wildfeedback.py --out wf.jsonl --mb 1600 [--source dsat.jsonl]

One row an utterance, in the published column names, spelling included. Conversations are strung together from those
of the source, with their sentences shuffled and a tenth of the words exchanged, so that they differ from each other.
Labels come as often as in the published data (12 % of the conversations DSAT, 5 % SAT, one in two hundred both), and so
do quirks: missing booleans, both labels, a complaint as first row, a missing agent row, `Preceeding` that is not YES,
empty content; one conversation in a hundred is a copy of another one. The same seed writes the same bytes. With
--format sharegpt or wildchat conversations of those shapes are written, as many as --conversations says.

Without --source the 198 real conversations beside the repository are taken, and where they are not, the 64 of its own
sample; other conversations make other bytes. Which they were is said on standard error.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed

from drift_jax.files import atomic_writer

REPO = Path(__file__).resolve().parent.parent
REAL, SAMPLE = REPO.parent / "shared" / "data" / "dsat_real.jsonl", REPO / "data" / "sample" / "dsat.jsonl"
Turns = list[tuple[str, str]]  # role and content
COMPLAINTS = ("That is not what I asked for.", "This is wrong.", "You did not answer my question.", "No, try again.")


def main() -> int:
    args = parse_args()
    print(f"source: {args.source}", file=sys.stderr)
    dialogues = load_dialogues(args.source)
    write = {"wildfeedback": utterance_rows, "sharegpt": sharegpt_rows, "wildchat": wildchat_rows}[args.format]
    written = 0
    with atomic_writer(args.out, "wb") as file:
        for rows in itertools.islice(write(make_conversations(dialogues, args)), args.conversations):
            data = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
            file.write(data)
            written += len(data)
            if args.mb is not None and written >= args.mb * 10**6:
                break
    print(json.dumps({"out": args.out.name, "mb": round(written / 1e6, 1), "format": args.format, "seed": args.seed}))
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = REAL if REAL.is_file() else SAMPLE
    parser.add_argument("--source", type=Path, default=default, help="JSONL of DSAT rows")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--mb", type=float, help="stop after so many megabytes")
    parser.add_argument("--conversations", type=int, help="stop after so many conversations")
    parser.add_argument("--kb", type=float, default=7.0, help="of a conversation, at least; most are longer")
    parser.add_argument("--format", choices=("wildfeedback", "sharegpt", "wildchat"), default="wildfeedback")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.mb is None and args.conversations is None:
        parser.error("give --mb, --conversations or both: it would write without end")
    if not args.source.is_file():
        parser.error(f"{args.source} is not there: give a JSONL file of DSAT rows with --source")
    return args


def load_dialogues(path: Path) -> list[Turns]:
    """Prompt, reply, complaint and, where there is one, the reply after it, from user to assistant."""
    dialogues = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        turns = [(m["role"], m["content"]) for m in [*row["prompt"], *row["rejected"], row["user_preference"]]]
        turns = [turn for turn in turns if turn[0] != "system"]
        after = row.get("next_assistant")
        dialogues.append([*turns, ("assistant", after)] if after else turns[:-1])
    return dialogues


def make_conversations(dialogues: list[Turns], args: argparse.Namespace) -> Iterator[tuple[random.Random, Turns]]:
    """Without end; each with the random numbers for what is done to it."""
    draw = random.Random(args.seed)
    words = sorted({word for turns in dialogues for _, text in turns for word in text.split() if word.isalpha()})
    copied: Turns | None = None
    while True:
        if copied is not None and draw.random() < 0.01:
            yield draw, copied
            continue
        turns: Turns = []
        while sum(len(text) for _, text in turns) < 1000 * args.kb:
            turns += [(role, change(text, words, draw)) for role, text in draw.choice(dialogues)]
        copied = turns
        yield draw, turns


def change(text: str, words: list[str], draw: random.Random) -> str:
    """Lines in another order, and a tenth of the words exchanged."""
    lines = text.split("\n")
    draw.shuffle(lines)
    kept = []
    for line in lines:
        parts = line.split(" ")
        for _ in range(1 + len(parts) // 10):
            parts[draw.randrange(len(parts))] = words[int(draw.random() * len(words))]
        kept.append(" ".join(parts))
    return "\n".join(kept)


def utterance_rows(conversations: Iterator[tuple[random.Random, Turns]]) -> Iterator[list[dict[str, Any]]]:
    for draw, turns in conversations:
        rows = [utterance(i, role, text) for i, (role, text) in enumerate(turns)]
        label(rows, draw)
        if draw.random() < 0.005:
            del rows[1]  # the agent row is missing
        if draw.random() < 0.002:
            rows[draw.randrange(len(rows))]["Content"] = ""
        yield rows


def utterance(number: int, role: str, text: str) -> dict[str, Any]:
    user = role == "user"
    return {
        "UtteranceId": number,
        "TurnId": number // 2 + 1,
        "Role": "User" if user else "Agent",
        "Content": text,
        "Preceeding": "YES" if user and number else None,
        "Satisfaction": False if user else None,
        "Disatisfaction": False if user else None,
        "Satisfaction-Justificiation": None,
        "Dissatisfaction-Justificiation": None,
        "State": "NEWTOPIC" if number == 0 else None,
    }


def label(rows: list[dict[str, Any]], draw: random.Random) -> None:
    """Labels of one conversation, and the quirks of labels."""
    users = range(2, len(rows), 2)
    chance = draw.random()
    if not users:
        return
    at = draw.choice(users)
    if chance < 0.12:
        complain(rows[at], draw)
        if draw.random() < 0.04 and at + 2 < len(rows):
            satisfy(rows[at + 2])
    elif chance < 0.165:
        satisfy(rows[at])
    elif chance < 0.17:
        complain(rows[at], draw)
        satisfy(rows[at])
    elif chance < 0.172:
        complain(rows[0], draw)
    elif chance < 0.19:
        del rows[at]["Satisfaction"]
        rows[at]["Disatisfaction"] = None
    if draw.random() < 0.02:
        rows[at]["Preceeding"] = "NO"


def complain(row: dict[str, Any], draw: random.Random) -> None:
    row["Content"] = f"{draw.choice(COMPLAINTS)} {row['Content']}"
    row |= {"Disatisfaction": True, "Dissatisfaction-Justificiation": "The user is not happy.", "State": "FEEDBACK"}


def satisfy(row: dict[str, Any]) -> None:
    row |= {"Satisfaction": True, "Satisfaction-Justificiation": "The user is happy.", "State": "FEEDBACK"}


def sharegpt_rows(conversations: Iterator[tuple[random.Random, Turns]]) -> Iterator[list[dict[str, Any]]]:
    names = {"user": "human", "assistant": "gpt"}
    for number, (draw, turns) in enumerate(conversations):
        if draw.random() < 0.12:
            complaint = f"{draw.choice(COMPLAINTS)} {turns[2][1]}" if len(turns) > 2 else COMPLAINTS[0]
            turns = [*turns[:2], ("user", complaint), *turns[3:]]
        said = [{"from": names[role], "value": text} for role, text in turns]
        yield [{"id": f"sg{number}_0", "conversations": said}]


def wildchat_rows(conversations: Iterator[tuple[random.Random, Turns]]) -> Iterator[list[dict[str, Any]]]:
    for number, (draw, turns) in enumerate(conversations):
        person = {"hashed_ip": f"ip{number:032x}", "header": {"user-agent": "x"}, "country": "Nowhere", "state": "None"}
        flags = {"toxic": draw.random() < 0.03, "redacted": draw.random() < 0.02}
        said = [{"role": role, "content": text, "language": "English", **flags, **person} for role, text in turns]
        top = {"conversation_hash": f"{number:032x}", "model": "gpt-4", "turn": len(turns) // 2, "language": "English"}
        checks = [{"flagged": flags["toxic"]} for _ in turns]
        yield [{**top, "conversation": said, "openai_moderation": checks, **flags, **person}]


if __name__ == "__main__":
    sys.exit(main())
