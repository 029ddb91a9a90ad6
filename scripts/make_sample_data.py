"""Chooses the small sample in data/sample/ from a file of real conversations.

    python scripts/make_sample_data.py --source FILE [--out data/sample] [--model .cache/demo_model]

Nothing is drawn at random: the order is that of the sha256 of a name, so the same source gives the same
bytes. data/README.md describes what comes out.

Rows that ask for the same thing must not end up on both sides of a split. `group` alone does not see to
that: in RealHumanEval it is one person, and several people worked on the same task. `SAME_TASK` joins those
rows, and a split moves whole families, that is rows connected by a group or by a task.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout, not installed

from drift_jax.errors import DataError, DriftError
from drift_jax.files import write_jsonl
from drift_jax.records import DsatRecord, Message, Pair, dsat_to_row, messages_to_rows, pair_to_row, read_dsat

REPO = Path(__file__).resolve().parent.parent

MAX_PROMPT_TOKENS = 224  # through the chat template, with the header of the reply
MAX_TOKENS = 384  # prompt + reply, with the reply's end token
MIN_REPLY_TOKENS = 12  # below, a reply is a joke or a greeting
MAX_ROWS_PER_GROUP = 3

HELD_OUT_ROWS = {"rhe": 5, "oasst": 11}  # the first rows of dsat.jsonl
TRAIN_ROWS = 48  # the rest of dsat.jsonl
SEED_TEST_ROWS = {"rhe": 2, "oasst": 6}
SEED_TRAIN_ROWS = 24
COMPARE_ROWS = 64  # compare.jsonl: the shortest pairs, to compare numbers on, not to learn from

# Read and left out altogether.
SET_ASIDE = {
    "rhe-ff931e847070": "the second user turn is code that was forgotten, not a complaint",
    "oasst-989923fd-aaab": "the user is pleased and asks for something else",
    "oasst-74dfe183-1e15": "the user is pleased and asks for something else",
    "oasst-b470cd8f-e91a": "argues about who is morally superior",
    "oasst-e008e4fa-e8ac": "verses about a genocide",
}

# Read and not used as a seed pair: the later reply is no better an answer to the prompt than the logged one.
NO_SEED = {
    "rhe-46449ba49e82": "the later code does not run",
    "rhe-c5308d7dd469": "the later code does something else",
    "rhe-5d013373e6e3": "the later code does not do what the text says",
    "rhe-104e4397ce27": "the later reply explains an error message",
    "oasst-fb6ce843-e56e": "the later reply declines to answer",
}
APOLOGY = re.compile(r"\s*(my apolog|apolog|i(['’]m| am) (very |so )?sorry|sorry|i apolog)", re.IGNORECASE)

# Rows of different groups that work on the same task, found by reading.
SAME_TASK = {
    "digits of an integer": (
        "rhe-97fe6ea0df6c rhe-0884a44c2f15 rhe-11e6a2e3bdcc rhe-3258d6aa98a9 rhe-46449ba49e82 "
        "rhe-0f63ed9fa869 rhe-b67017656591 rhe-104e4397ce27 rhe-b823954836a4 rhe-3a75bc6f5726"
    ),
    "product of three primes": "rhe-56fc09d396a9 rhe-6696ceb161db",
    "sum and product of a list": "rhe-ab3fdddb7f0e rhe-9e6da19f166c",
    "triples of a list": "rhe-cc65710d74ef rhe-c5308d7dd469",
    "split at several delimiters": "rhe-5d013373e6e3 rhe-ec230acfffa3",
    "an affordable graphics card": "oasst-ca2b02a5-5742 oasst-6fc1d39f-099e",
}
_TASK_OF = {row_id: task for task, ids in SAME_TASK.items() for row_id in ids.split()}

Family = list[DsatRecord]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Choose the sample data.")
    parser.add_argument("--source", type=Path, required=True, metavar="FILE", help="the 198 conversations")
    parser.add_argument("--out", type=Path, default=REPO / "data" / "sample", metavar="DIR")
    parser.add_argument("--model", type=Path, default=REPO / ".cache" / "demo_model", metavar="DIR")
    args = parser.parse_args(argv)
    try:
        make_sample_data(args.source, args.model, args.out)
    except DriftError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def make_sample_data(source: Path, model: Path, out: Path) -> None:
    """Writes dsat.jsonl, seed.train.jsonl, seed.test.jsonl and compare.jsonl into `out`.

    Raises:
      DataError: the source is not the file that the tables above speak of, or too few rows fit.
    """
    records = read_dsat(source).records
    check_tables(records)
    count = token_counter(model)
    usable = [record for record in records if record.id not in SET_ASIDE and fits(record, record.rejected, count)]
    usable = cap_groups(usable)
    seedable = {record.id for record in usable if can_seed(record, count)}

    families = build_families(usable)
    held_out = take_families(families, HELD_OUT_ROWS, lambda record: record.id not in seedable)
    seed_test = take_families(families, SEED_TEST_ROWS, lambda record: record.id in seedable)
    rest = by_hash(record for family in families for record in family)
    # Rows of the seed stage come first, so that they are among the training rows.
    train = sorted(rest, key=lambda record: record.id not in seedable)[:TRAIN_ROWS]
    seed_train = [record for record in train if record.id in seedable][:SEED_TRAIN_ROWS]

    wanted = {"training": (len(train), TRAIN_ROWS), "seed": (len(seed_train), SEED_TRAIN_ROWS)}
    for name, (found, needed) in wanted.items():
        if found < needed:
            raise DataError(f"{needed} {name} rows are wanted, {found} are left. Lower the number in this script.")
    answered = [r for r in records if r.extra.get("next_assistant") and r.id not in SET_ASIDE]
    out.mkdir(parents=True, exist_ok=True)
    write_jsonl(out / "compare.jsonl", map(seed_row, by_hash(sorted(answered, key=characters)[:COMPARE_ROWS])))
    write_jsonl(out / "dsat.jsonl", map(sample_row, by_hash(held_out) + by_hash(train)))
    write_jsonl(out / "seed.train.jsonl", map(seed_row, by_hash(seed_train)))
    write_jsonl(out / "seed.test.jsonl", map(seed_row, by_hash(seed_test)))
    print(f"{len(records)} rows, {len(usable)} usable, {len(seedable)} of them as seed pairs.")
    print(f"{out}/dsat.jsonl: {len(held_out)} held-out rows, then {len(train)} training rows.")
    print(f"{out}/seed.train.jsonl: {len(seed_train)} pairs, {out}/seed.test.jsonl: {len(seed_test)} pairs.")
    print(f"{out}/compare.jsonl: {min(COMPARE_ROWS, len(answered))} pairs.")


def check_tables(records: Iterable[DsatRecord]) -> None:
    """Raises `DataError` when the tables of this script name rows that the source does not hold."""
    unknown = sorted({*SET_ASIDE, *NO_SEED, *_TASK_OF} - {record.id for record in records})
    if unknown:
        raise DataError(
            f"the source must hold the rows that this script was written for; it lacks {', '.join(unknown)}. "
            "Give the file named in data/README.md."
        )


def token_counter(model: Path) -> Callable[..., int]:
    """`count(messages, add_generation_prompt)` -> tokens through the chat template of `model`."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(model))

    def count(messages: Iterable[Message], add_generation_prompt: bool = False) -> int:
        text = tokenizer.apply_chat_template(
            messages_to_rows(messages), add_generation_prompt=add_generation_prompt, tokenize=False
        )
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    return count


def fits(record: DsatRecord, reply: str, count: Callable[..., int]) -> bool:
    """Whether prompt and `reply` are within the limits."""
    prompt_tokens = count(record.prompt, add_generation_prompt=True)
    total = count([*record.prompt, Message("assistant", reply)])
    return prompt_tokens <= MAX_PROMPT_TOKENS and total <= MAX_TOKENS and total - prompt_tokens >= MIN_REPLY_TOKENS


def can_seed(record: DsatRecord, count: Callable[..., int]) -> bool:
    """Whether the reply after the complaint may stand as the chosen response to the original prompt."""
    later = record.extra["next_assistant"]
    return later is not None and record.id not in NO_SEED and not APOLOGY.match(later) and fits(record, later, count)


def cap_groups(records: Iterable[DsatRecord]) -> list[DsatRecord]:
    """The first `MAX_ROWS_PER_GROUP` rows of each group."""
    seen: Counter[str] = Counter()
    kept = []
    for record in records:
        seen[record.extra["group"]] += 1
        if seen[record.extra["group"]] <= MAX_ROWS_PER_GROUP:
            kept.append(record)
    return kept


def build_families(records: Iterable[DsatRecord]) -> list[Family]:
    """Rows connected by a group or a task, directly or through others; ordered by hash."""
    families: list[tuple[set[str], Family]] = []
    for record in by_hash(records):
        keys = {record.extra["group"], _TASK_OF.get(record.id, record.id)}
        members = [record]
        separate = []
        for other_keys, other_members in families:
            if keys & other_keys:
                keys |= other_keys
                members = other_members + members
            else:
                separate.append((other_keys, other_members))
        families = [*separate, (keys, members)]
    return [members for _, members in families]


def take_families(
    families: list[Family], wanted: dict[str, int], suits: Callable[[DsatRecord], bool]
) -> list[DsatRecord]:
    """Removes whole families from the list until `wanted` rows of each source are taken; returns the rows.

    Only families all of whose rows suit are taken.

    Raises:
      DataError: the families do not add up to the wanted number.
    """
    missing = dict(wanted)
    taken: list[DsatRecord] = []
    for family in list(families):
        source = family[0].id.split("-")[0]
        if len(family) <= missing[source] and all(map(suits, family)):
            missing[source] -= len(family)
            taken += family
            families.remove(family)
    if any(missing.values()):
        raise DataError(f"{wanted} rows are wanted, still missing {missing}. Lower the number in this script.")
    return taken


def by_hash(records: Iterable[DsatRecord]) -> list[DsatRecord]:
    """A fixed order in which sources and tasks are mixed."""
    return sorted(records, key=lambda record: hashlib.sha256(record.id.encode()).hexdigest())


def characters(record: DsatRecord) -> int:
    """Of the prompt and the longer reply."""
    replies = (record.rejected, record.extra["next_assistant"])
    return sum(len(message.content) for message in record.prompt) + max(map(len, replies))


def sample_row(record: DsatRecord) -> dict:
    provenance = {key: record.extra[key] for key in ("source", "license", "group")}
    return dsat_to_row(DsatRecord(record.id, record.prompt, record.rejected, record.user_preference, provenance))


def seed_row(record: DsatRecord) -> dict:
    meta = {"id": record.id, **{key: record.extra[key] for key in ("source", "license", "group")}}
    return pair_to_row(Pair(record.id, record.prompt, record.extra["next_assistant"], record.rejected, meta))


if __name__ == "__main__":
    sys.exit(main())
