"""Mixing the pairs of a handbook file: the same rows in the same order as the handbook's own steps give."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest

from drift_jax.data.mixer import load_mixture
from drift_jax.errors import DataError
from drift_jax.handbook import DatasetMixture, DatasetPart
from drift_jax.records import Message, Pair, read_pairs

SAMPLE = Path(__file__).resolve().parent.parent.parent / "data" / "sample"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` keeps what it read in a cache; the tests neither use nor fill that of the machine."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def row(name: str) -> dict[str, Any]:
    """prompt + chosen + rejected, as TRL has them."""
    return {
        "prompt": [say("user", f"ask {name}")],
        "chosen": [say("assistant", f"good {name}")],
        "rejected": [say("assistant", f"bad {name}")],
    }


def dialogue(name: str) -> dict[str, Any]:
    """Whole dialogues beside a prompt as text, as ultrafeedback_binarized has them."""
    ask = say("user", f"ask {name}")
    good, bad = say("assistant", f"good {name}"), say("assistant", f"bad {name}")
    return {"prompt": f"ask {name}", "prompt_id": name, "chosen": [ask, good], "rejected": [ask, bad], "score": 1.5}


def rows(prefix: str, count: int, make: Any = row) -> list[dict[str, Any]]:
    return [make(f"{prefix}{i}") for i in range(count)]


def write(path: Path, content: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in content), encoding="utf-8")


def saved(directory: Path, **splits: list[dict[str, Any]]) -> str:
    datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in splits.items()}).save_to_disk(str(directory))
    return str(directory)


def parquet(directory: Path, **splits: list[dict[str, Any]]) -> str:
    directory.mkdir()
    for split, content in splits.items():
        datasets.Dataset.from_list(content).to_parquet(str(directory / f"{split}-00000-of-00001.parquet"))
    return str(directory)


def jsonl(directory: Path, **splits: list[dict[str, Any]]) -> str:
    for split, content in splits.items():
        write(directory / f"pairs.{split}.jsonl", content)
    return str(directory)


def read(out: Path, split: str = "train") -> tuple[Pair, ...]:
    return read_pairs(out / f"pairs.{split}.jsonl").records


def replies(out: Path, split: str = "train") -> list[str]:
    return [pair.chosen for pair in read(out, split)]


def chosen(dataset: datasets.Dataset) -> list[str]:
    return [item["chosen"][-1]["content"] for item in dataset]


# --- the order --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [saved, parquet, jsonl])
@pytest.mark.parametrize("make", [row, dialogue])
def test_dataset_mixer_does_what_the_handbook_did(tmp_path: Path, layout: Any, make: Any) -> None:
    content = {name: {"train": rows(name, 40, make), "test": rows(name + "t", 7, make)} for name in "ab"}
    names = {name: layout(tmp_path / name, **splits) for name, splits in content.items()}
    mixture = DatasetMixture(
        train=(DatasetPart(names["a"], "train", share=0.99), DatasetPart(names["b"], "train", share=0.3)),
        test=(DatasetPart(names["a"], "test"), DatasetPart(names["b"], "test")),
    )
    out = load_mixture(mixture, tmp_path / "out")

    # Written out from alignment-handbook's mix_datasets.
    table = {name: {k: datasets.Dataset.from_list(v) for k, v in splits.items()} for name, splits in content.items()}
    parts = [table["a"]["train"].select(range(39)), table["b"]["train"].select(range(12))]
    assert replies(out) == chosen(datasets.concatenate_datasets(parts).shuffle(seed=42))
    tests = [table[name]["test"] for name in "ab"]
    assert replies(out, "test") == chosen(datasets.concatenate_datasets(tests).shuffle(seed=42))


def test_dataset_mixture_does_what_the_newer_handbook_does(tmp_path: Path) -> None:
    content = {name: rows(name, 30, dialogue) for name in "ab"}
    names = {name: saved(tmp_path / name, train=content[name]) for name in "ab"}
    mixture = DatasetMixture(
        train=(
            DatasetPart(names["a"], "train", columns=("chosen", "rejected"), share=0.5),
            DatasetPart(names["b"], "train", columns=("chosen", "rejected")),
        ),
        seed=3,
        shuffle_parts=True,
        test_size=0.2,
    )
    out = load_mixture(mixture, tmp_path / "out")

    table = {name: datasets.Dataset.from_list(content[name]) for name in "ab"}
    joined = datasets.concatenate_datasets([table["a"].shuffle(seed=3).select(range(15)), table["b"]])
    cut = joined.shuffle(seed=3).train_test_split(test_size=0.2, seed=3)
    assert replies(out) == chosen(cut["train"]) and len(replies(out)) == 36
    assert replies(out, "test") == chosen(cut["test"])


def test_without_a_seed_rows_keep_their_order(tmp_path: Path) -> None:
    name = jsonl(tmp_path / "a", train=rows("a", 9))
    out = load_mixture(DatasetMixture((DatasetPart(name, "train"),), seed=None), tmp_path / "out")
    assert replies(out) == [f"good a{i}" for i in range(9)]
    assert not (out / "pairs.test.jsonl").exists()


def test_the_same_mixture_gives_the_same_bytes_and_takes_old_files_away(tmp_path: Path) -> None:
    name = jsonl(tmp_path / "a", train=rows("a", 9), test=rows("t", 3))
    mixture = DatasetMixture((DatasetPart(name, "train"),), (DatasetPart(name, "test"),))
    outs = [load_mixture(mixture, tmp_path / out) for out in ("one", "two")]
    for file in ("pairs.train.jsonl", "pairs.test.jsonl", "mixture.json"):
        assert (outs[0] / file).read_bytes() == (outs[1] / file).read_bytes()
    load_mixture(DatasetMixture(mixture.train), outs[0])
    assert sorted(path.name for path in outs[0].iterdir()) == ["mixture.json", "pairs.train.jsonl"]


# --- the rows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [saved, parquet, jsonl])
def test_whole_dialogues_become_prompt_and_replies(tmp_path: Path, layout: Any) -> None:
    turns = [say("system", "s"), say("user", "one"), say("assistant", "two"), say("user", "three")]
    pair = {"chosen": [*turns, say("assistant", "yes")], "rejected": [*turns, say("assistant", "no")]}
    name = layout(tmp_path / "a", train=[pair])
    (got,) = read(load_mixture(DatasetMixture((DatasetPart(name, "train"),)), tmp_path / "out"))
    assert got.prompt == tuple(Message(**turn) for turn in turns)
    assert (got.chosen, got.rejected, got.meta, got.extra) == ("yes", "no", {"id": f"{name}:train:0"}, {})


@pytest.mark.parametrize("layout", [saved, parquet, jsonl])
@pytest.mark.parametrize("names_replies", [True, False], ids=["LLaMA-Factory", "WildFeedback"])
def test_turns_of_from_and_value_become_messages(tmp_path: Path, layout: Any, names_replies: bool) -> None:
    turns = [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}, {"from": "human", "value": "three"}]
    speaker = {"from": "gpt"} if names_replies else {}
    pair = {"conversations": turns, "chosen": speaker | {"value": "yes"}, "rejected": speaker | {"value": "no"}}
    name = layout(tmp_path / "a", train=[pair | {"system": ""}, pair | {"system": "s"}])
    got, with_system = read(load_mixture(DatasetMixture((DatasetPart(name, "train"),), seed=None), tmp_path / "out"))
    prompt = (Message("user", "one"), Message("assistant", "two"), Message("user", "three"))
    assert (got.prompt, got.chosen, got.rejected) == (prompt, "yes", "no")
    assert with_system.prompt == (Message("system", "s"), *prompt)


def test_ids_are_dataset_split_and_row_and_meta_stays(tmp_path: Path) -> None:
    content = [row("x") | {"meta": {"id": "old", "token_ids": [1, 2], "sampler": None}}, row("y") | {"id": "7"}]
    name = jsonl(tmp_path / "a", train=content)
    part = DatasetPart(name, "train")
    out = load_mixture(DatasetMixture((part, part), seed=None), tmp_path / "out")
    meta = [pair.meta for pair in read(out)]
    assert meta[0] == {"id": f"{name}:train:0", "token_ids": [1, 2], "sampler": None, "source_id": "old"}
    assert meta[1] == {"id": f"{name}:train:1", "source_id": "7"}
    assert [m["id"] for m in meta[2:]] == [f"{name}:train:0#2", f"{name}:train:1#2"]


def test_the_sample_files_are_read_by_the_names_of_their_splits(tmp_path: Path) -> None:
    name = str(SAMPLE)
    mixture = DatasetMixture((DatasetPart(name, "seed.train", share=1.0),), (DatasetPart(name, "seed.test"),))
    out = load_mixture(mixture, tmp_path / "out")
    for split in ("train", "test"):
        before = read_pairs(SAMPLE / f"seed.{split}.jsonl").records
        after = {pair.meta["source_id"]: pair for pair in read(out, split)}
        assert {pair.id for pair in before} == set(after)
        for pair in before:
            same = after[pair.id]
            assert (pair.prompt, pair.chosen, pair.rejected) == (same.prompt, same.chosen, same.rejected)


def test_files_of_a_stage_come_before_other_readings_of_a_directory(tmp_path: Path) -> None:
    name = parquet(tmp_path / "a", train=rows("p", 3))
    write(tmp_path / "a" / "train.jsonl", rows("plain", 2))
    part = DatasetMixture((DatasetPart(name, "train"),), seed=None)
    assert replies(load_mixture(part, tmp_path / "out")) == ["good plain0", "good plain1"]
    write(tmp_path / "a" / "pairs.train.jsonl", rows("pair", 1))
    assert replies(load_mixture(part, tmp_path / "out")) == ["good pair0"]


def test_a_split_saved_on_its_own(tmp_path: Path) -> None:
    datasets.Dataset.from_list(rows("a", 2)).save_to_disk(str(tmp_path / "a" / "train_prefs"))
    mixture = DatasetMixture((DatasetPart(str(tmp_path / "a"), "train_prefs"),), seed=None)
    assert replies(load_mixture(mixture, tmp_path / "out")) == ["good a0", "good a1"]


def test_messages_may_have_nulls_from_other_rows(tmp_path: Path) -> None:
    odd = row("b")
    odd["prompt"][0]["name"] = None
    out = load_mixture(
        DatasetMixture((DatasetPart(saved(tmp_path / "a", train=[row("a"), odd]), "train"),)), tmp_path / "out"
    )
    assert len(read(out)) == 2


# --- what is refused --------------------------------------------------------------------------------------


def refusal(tmp_path: Path, *train: DatasetPart, **keys: Any) -> str:
    out = tmp_path / "out"
    with pytest.raises(DataError) as caught:
        load_mixture(DatasetMixture(train, **keys), out)
    assert not out.exists() or not list(out.iterdir())  # nothing is left behind
    return str(caught.value)


def test_no_pairs(tmp_path: Path) -> None:
    assert "names no pairs" in refusal(tmp_path)
    name = jsonl(tmp_path / "a", train=rows("a", 3))
    assert "leave no row" in refusal(tmp_path, DatasetPart(name, "train", share=0.3))


def test_a_test_size_that_leaves_nothing(tmp_path: Path) -> None:
    name = jsonl(tmp_path / "a", train=rows("a", 3))
    assert "cannot hold out test_split_size 3 of 3 rows" in refusal(
        tmp_path, DatasetPart(name, "train"), seed=0, test_size=3
    )


def test_a_hub_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'org/pairs' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    message = refusal(tmp_path, DatasetPart("org/pairs", "train_prefs", "big"))
    assert message.startswith("cannot read org/pairs:big:train_prefs: Couldn't reach 'org/pairs' on the Hub")
    assert "no directory org/pairs" in message and "name its directory" in message


def test_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = refusal(tmp_path, DatasetPart("org/no-such-pairs", "train"))
    assert "cannot read org/no-such-pairs:train" in message and "Hugging Face hub" in message


@pytest.mark.parametrize("layout", [saved, parquet, jsonl])
def test_a_missing_split(tmp_path: Path, layout: Any) -> None:
    name = layout(tmp_path / "a", train=rows("a", 3))
    message = refusal(tmp_path, DatasetPart(name, "train_prefs"))
    assert f"cannot read {name}:train_prefs" in message and "train_prefs" in message.split(": ", 1)[1]
    assert "The directory holds" in message and "pairs.train_prefs.jsonl" in message


@pytest.mark.parametrize("layout", [saved, parquet, jsonl])
def test_a_missing_column(tmp_path: Path, layout: Any) -> None:
    content = [{"prompt": "p", "chosen": [say("user", "a"), say("assistant", "b")], "score": 1}]
    name = layout(tmp_path / "a", train=content)
    message = refusal(tmp_path, DatasetPart(name, "train"))
    assert message.startswith(f"{name}:train has no column rejected; it has ") and "score" in message
    message = refusal(tmp_path, DatasetPart(name, "train", columns=("chosen", "rejected", "x")))
    assert "no column rejected and x" in message


SHAREGPT = {
    "conversations": [{"from": "human", "value": "a"}],
    "chosen": {"from": "gpt", "value": "b"},
    "rejected": {"from": "gpt", "value": "c"},
}
BAD = [
    (dialogue("x") | {"chosen": "text"}, "chosen and rejected must be lists of messages"),
    (dialogue("x") | {"rejected": None}, "missing rejected; found prompt, prompt_id, chosen"),
    (dialogue("x") | {"rejected": [say("user", "else"), say("assistant", "a")]}, "up to their last message"),
    (row("x") | {"chosen": [say("assistant", " ")]}, r"chosen[0].content is empty"),
    (row("x") | {"chosen": [say("user", "a"), say("assistant", "b")]}, "must be a list of one assistant message"),
    (dialogue("x") | {"chosen": [say("assistant", "b")], "rejected": [say("assistant", "c")]}, "is an empty list"),
    (row("x") | {"prompt": [say("assistant", "b")]}, "prompt roles must be"),
    (row("x") | {"chosen": [{"role": "assistant", "content": "b", "name": "n"}]}, "found also name"),
    (row("x") | {"chosen": [say("assistant", "\ud800")]}, "U+D800"),
    (SHAREGPT | {"conversations": [{"from": "bot", "value": "a"}]}, "found 'bot'"),
    (SHAREGPT | {"rejected": {"from": "human", "value": "b"}}, "rejected"),
    (SHAREGPT | {"rejected": [say("assistant", "b")], "conversations": ["a"]}, "prompt[0]"),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "why"), BAD, ids=[why for _, why in BAD])
def test_a_bad_row_is_named_with_its_place(tmp_path: Path, bad: dict[str, Any], why: str) -> None:
    name = jsonl(tmp_path / "a", train=[row("a"), row("b"), bad])
    message = refusal(tmp_path, DatasetPart(name, "train"))
    assert message.startswith("1 of 3 rows cannot be used")
    assert f"{name}:train, row 2: " in message and why in message and "--on-bad-row skip" in message


def test_bad_rows_are_left_out_and_counted_on_demand(tmp_path: Path) -> None:
    content = [item for i, (bad, _) in enumerate(BAD[:4]) for item in (row(str(i)), bad)]
    name = jsonl(tmp_path / "a", train=content)
    mixture = DatasetMixture((DatasetPart(name, "train"),))
    out = load_mixture(mixture, tmp_path / "out", on_bad_row="skip")
    clean = load_mixture(mixture, tmp_path / "all", on_bad_row="skip")
    places = [int(pair.id.rsplit(":", 1)[1]) for pair in read(clean)]
    order = datasets.Dataset.from_dict({"i": list(range(8))}).shuffle(seed=42)["i"]
    assert places == [i for i in order if i % 2 == 0]
    summary = json.loads((out / "mixture.json").read_text(encoding="utf-8"))
    assert summary["train"]["pairs"] == 4 and sum(summary["train"]["left_out"].values()) == 4
    assert summary["test"] == {"pairs": 0, "left_out": {}}
    assert summary["parts"] == [
        {"name": name, "split": "train", "config": None, "columns": None, "share": None, "rows": 8}
    ]


def test_nothing_but_bad_rows_is_refused_in_any_case(tmp_path: Path) -> None:
    name = jsonl(tmp_path / "a", train=[BAD[0][0], BAD[3][0]])
    with pytest.raises(DataError, match="2 of 2 rows cannot be used"):
        load_mixture(DatasetMixture((DatasetPart(name, "train"),)), tmp_path / "out", on_bad_row="skip")


def test_lines_that_are_no_rows(tmp_path: Path) -> None:
    name = jsonl(tmp_path / "a", train=rows("a", 2))
    with (tmp_path / "a" / "pairs.train.jsonl").open("a", encoding="utf-8") as file:
        file.write("{oops\n\n[1]\n")
    message = refusal(tmp_path, DatasetPart(name, "train"))
    assert "2 lines of" in message and "pairs.train.jsonl:3: " in message and "pairs.train.jsonl:5: " in message


def test_the_source_is_left_as_it_is(tmp_path: Path) -> None:
    name = jsonl(tmp_path / "a", train=rows("a", 5))
    before = (tmp_path / "a" / "pairs.train.jsonl").read_bytes()
    shutil.copytree(name, tmp_path / "copy")
    load_mixture(DatasetMixture((DatasetPart(name, "train"),)), tmp_path / "out")
    assert (tmp_path / "a" / "pairs.train.jsonl").read_bytes() == before
    assert sorted(path.name for path in Path(name).iterdir()) == ["pairs.train.jsonl"]
