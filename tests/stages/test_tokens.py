"""Pairs of a file as ids, and their cache: the same with it as without, never stale, never trusted when damaged."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from drift_jax.config import DataConfig, RunConfig, build_config
from drift_jax.data.pairs import TruncationCounts
from drift_jax.data.token_cache import KEPT, TokenizedRows, cache_path, read_tokens, write_tokens
from drift_jax.data.tokenizer import ChatTokenizer, load_tokenizer
from drift_jax.errors import DataError, StageError
from drift_jax.stages import tokens
from drift_jax.stages.tokens import TOKEN_KEYS, TokenizedFile, describe_cuts, load_tokenized, token_key
from tests.full_disk import full_disk  # noqa: F401
from tests.tiny import build_tiny_tokenizer
from tests.tiny_pairs import random_pairs, write_pairs

KEY = 64 * "a"


def build(**data: Any) -> RunConfig:
    """A config under which pairs of `pairs_file` are cut, emptied and refused."""
    values = {"max_length": 80, "max_prompt_length": 60, "truncation": "keep_start", "on_bad_row": "skip"}
    return build_config({"run_dir": "none", "model": {"path": "none"}, "data": values | data})


def plain(file: TokenizedFile) -> dict[str, Any]:
    """A file as values that can be compared: arrays are lists here."""
    return dataclasses.asdict(file) | {"pairs": rows_as_lists(file.pairs)}


def rows_as_lists(pairs: list[Any]) -> list[dict[str, Any]]:
    rows = [{field.name: getattr(pair, field.name) for field in dataclasses.fields(pair)} for pair in pairs]
    return [{k: (v.dtype, v.tolist()) if isinstance(v, np.ndarray) else v for k, v in row.items()} for row in rows]


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_tokenizer(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def tokenizer(tiny_dir: Path) -> ChatTokenizer:
    return load_tokenizer(tiny_dir)


@pytest.fixture()
def pairs_file(tmp_path: Path) -> Path:
    """Eight pairs: one that no ids can be made of, one whose prompt leaves no room for a completion."""
    path = write_pairs(tmp_path / "pairs.train.jsonl", 8)
    rows = [json.loads(line) for line in path.open()]
    rows[2]["meta"]["chosen_token_ids"] = [10**6]
    rows[5]["prompt"][0]["content"] = "Why? " * 100
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture()
def no_encoding(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and from then on a tokenizer that is asked for anything raises."""

    def forbid() -> None:
        def refuse(*_: object, **__: object) -> None:
            raise AssertionError("the tokenizer was asked")

        for name in ("encode_chat", "encode_completion", "encode_reply", "encode_text", "decode", "render"):
            monkeypatch.setattr(ChatTokenizer, name, refuse)

    return forbid


def console() -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, emoji=False, width=200), text


# --- the same with the cache as without -----------------------------------------------------------------------


def test_a_hit_equals_tokenising_and_asks_no_tokenizer(
    pairs_file: Path, tokenizer: ChatTokenizer, tmp_path: Path, no_encoding: Callable[[], None]
) -> None:
    plainly = load_tokenized(build(), pairs_file, tokenizer)
    assert len(plainly.pairs) == 6 and plainly.emptied == ("s5",) and "pair s2" in plainly.refused[0]
    assert plainly.cuts.prompts_cut and plainly.cuts.chosen_tokens_cut and plainly.cuts.completions_emptied
    whole = load_tokenized(build(max_length=1000, on_bad_row="skip"), pairs_file, tokenizer)
    words = f"{plainly.cuts.prompts_cut} prompts ({plainly.cuts.prompt_tokens_cut} tokens)"
    assert f"cut to fit: nothing; of those held out: {words}, " in describe_cuts(whole, plainly)
    assert describe_cuts(plainly, whole).endswith("; of those held out: nothing")
    missed = load_tokenized(build(), pairs_file, tokenizer, tmp_path / "tokens")
    no_encoding()
    hit = load_tokenized(build(), pairs_file, tokenizer, tmp_path / "tokens")
    assert plain(hit) == plain(missed) == plain(plainly)
    for cache in (None, tmp_path / "elsewhere"):
        with pytest.raises(AssertionError, match="the tokenizer was asked"):
            load_tokenized(build(), pairs_file, tokenizer, cache)


def test_no_path_is_no_pairs(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    cache = tmp_path / "tokens"
    assert load_tokenized(build(), None, tokenizer, cache) == TokenizedFile([], TruncationCounts())
    assert not cache.exists()


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_a_file_without_rows_is_no_pairs(tokenizer: ChatTokenizer, tmp_path: Path, on_bad_row: str) -> None:
    """A pair stage that holds nothing out leaves such a file."""
    path = tmp_path / "pairs.test.jsonl"
    path.touch()
    for cache in (None, tmp_path / "tokens", tmp_path / "tokens"):
        found = load_tokenized(build(on_bad_row=on_bad_row), path, tokenizer, cache)
        assert found == TokenizedFile([], TruncationCounts())


def test_bad_rows_are_counted_once_each(
    pairs_file: Path, tokenizer: ChatTokenizer, tmp_path: Path, no_encoding: Callable[[], None]
) -> None:
    lines = pairs_file.read_text().splitlines()
    twice = json.dumps({"prompt": 1, "chosen": 2, "rejected": 3})
    pairs_file.write_text("\n".join(["{", *lines, twice, "", lines[0]]) + "\n")
    first = load_tokenized(build(), pairs_file, tokenizer, tmp_path / "tokens")
    assert first.drops == {"bad row": 3, "not encodable": 1, "completion cut away": 1} and len(first.pairs) == 6
    no_encoding()
    assert load_tokenized(build(), pairs_file, tokenizer, tmp_path / "tokens").drops == first.drops


@pytest.mark.parametrize("count", [0, 1, 30])
def test_a_file_reads_back_what_was_written(tmp_path: Path, count: int) -> None:
    pairs = [
        dataclasses.replace(pair, id=f"größer {i}", prompt_tokens_cut=i, chosen_tokens_cut=2 * i, rejected_tokens_cut=9)
        for i, pair in enumerate(random_pairs(count))
    ]
    if count == 30:
        pairs[3] = dataclasses.replace(pairs[3], chosen_ids=np.empty(0, np.int32))
    path = cache_path(tmp_path / "deeper" / "tokens", "pairs.train", KEY)
    write_tokens(path, KEY, TokenizedRows(pairs, ("why: {🙂}",)))
    found = read_tokens(path, KEY)
    assert found is not None and found.refused == ("why: {🙂}",)
    assert rows_as_lists(found.pairs) == rows_as_lists(pairs)
    assert read_tokens(path.with_name("other.npz"), KEY) is None


def test_refused_pairs_are_not_cached_as_if_they_were_none(
    pairs_file: Path, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    for _ in range(2):
        with pytest.raises(DataError, match="1 rows cannot be encoded"):
            load_tokenized(build(on_bad_row="error"), pairs_file, tokenizer, tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()


def test_a_missing_file_is_named(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read .*none.jsonl: No such file"):
        load_tokenized(build(), tmp_path / "none.jsonl", tokenizer, tmp_path / "tokens")


# --- the key --------------------------------------------------------------------------------------------------


def test_the_key_names_every_value_of_the_config_that_tokenising_reads(
    pairs_file: Path, tokenizer: ChatTokenizer
) -> None:
    read: set[str] = set()

    def recorder(base: type, prefix: str) -> type:
        def read_and_note(self: object, name: str) -> Any:
            if name in base.__dataclass_fields__:
                read.add(prefix + name)
            return object.__getattribute__(self, name)

        return type(base.__name__, (base,), {"__getattribute__": read_and_note})

    plainly = build()
    values = {field.name: getattr(plainly, field.name) for field in dataclasses.fields(plainly)}
    data = recorder(DataConfig, "data.")(**dataclasses.asdict(plainly.data))
    config = recorder(RunConfig, "")(**values | {"data": data})
    read.clear()
    load_tokenized(config, pairs_file, tokenizer)
    assert read - {"data"} == set(TOKEN_KEYS)


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 96},
        {"max_prompt_length": 40},
        {"template": "handbook"},
        {"eos": "append"},
        {"truncation": "trl0.12"},
        {"on_bad_row": "error"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_config_is_part_of_the_key(pairs_file: Path, tokenizer: ChatTokenizer, change: dict[str, Any]) -> None:
    assert {f"data.{name}" for name in change} <= set(TOKEN_KEYS)
    assert token_key(build(**change), pairs_file, tokenizer) != token_key(build(), pairs_file, tokenizer)


def test_other_keys_of_the_config_are_not(pairs_file: Path, tokenizer: ChatTokenizer) -> None:
    other = build(test_rows=3, max_rows=5, dsat="x.jsonl")
    other = dataclasses.replace(
        other, run_dir="elsewhere", train=dataclasses.replace(other.train, batch_size=4, seed=1)
    )
    assert token_key(other, pairs_file, tokenizer) == token_key(build(), pairs_file, tokenizer)


def edit(name: str, **values: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def edit_vocabulary(directory: Path) -> None:
    """Two words of the vocabulary change their ids."""
    path = directory / "tokenizer.json"
    spec = json.loads(path.read_text())
    one, two = list(spec["model"]["vocab"])[:2]
    vocab = spec["model"]["vocab"]
    vocab[one], vocab[two] = vocab[two], vocab[one]
    path.write_text(json.dumps(spec))


def edit_template(directory: Path) -> None:
    """The same characters in another order: a hash of its set of characters would not notice."""
    template = json.loads((directory / "tokenizer_config.json").read_text())["chat_template"]
    edit("tokenizer_config.json", chat_template=template.replace("for tests", "rof tests"))(directory)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda directory: None, True),
        (edit("tokenizer_config.json", model_max_length=5), True),  # nothing here reads it
        (edit_vocabulary, False),
        (edit_template, False),
        (edit("tokenizer_config.json", bos_token="<|endoftext|>"), False),  # a template may write it
        (edit("tokenizer_config.json", eos_token="<|endoftext|>"), False),
        (edit("generation_config.json", eos_token_id=[7]), False),
        (edit("tokenizer.json", normalizer=None), False),
    ],
    ids=["copy", "unread", "vocabulary", "template", "bos", "eos", "eos of generation", "normalizer"],
)
def test_the_tokenizer_is_part_of_the_key(
    pairs_file: Path, tokenizer: ChatTokenizer, tmp_path: Path, change: Callable[[Path], None], same: bool
) -> None:
    directory = build_tiny_tokenizer(tmp_path / "changed")
    change(directory)
    changed = token_key(build(), pairs_file, load_tokenizer(directory))
    assert (changed == token_key(build(), pairs_file, tokenizer)) == same


def test_every_byte_of_the_pairs_is_part_of_the_key(pairs_file: Path, tokenizer: ChatTokenizer) -> None:
    before = token_key(build(), pairs_file, tokenizer)
    text = pairs_file.read_text()
    pairs_file.write_text(text.replace("Question 7?", "Question 7!"))
    assert token_key(build(), pairs_file, tokenizer) != before
    pairs_file.write_text(text)
    assert token_key(build(), pairs_file.rename(pairs_file.with_name("moved.jsonl")), tokenizer) == before


def test_the_format_and_the_libraries_are_part_of_the_key(
    pairs_file: Path, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [token_key(build(), pairs_file, tokenizer)]
    version = importlib.metadata.version
    with monkeypatch.context() as patched:
        patched.setattr(tokens, "FORMAT", tokens.FORMAT + 1)
        keys.append(token_key(build(), pairs_file, tokenizer))
    for library in ("tokenizers", "transformers", "jinja2"):
        with monkeypatch.context() as patched:
            patched.setattr(
                importlib.metadata, "version", lambda name, new=library: "0.0" if name == new else version(name)
            )
            keys.append(token_key(build(), pairs_file, tokenizer))
    assert len(set(keys)) == len(keys) == 5


# --- damaged, old and unwritable files --------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)


def rewrite(path: Path, **changes: np.ndarray | None) -> None:
    """The archive with other arrays; None leaves one out."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files} | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


def other_tokens(path: Path) -> None:
    """A whole archive, every checksum of it right, but not what the digest is of."""
    with np.load(path) as file:
        rewrite(path, tokens=file["tokens"] + np.int32(1))


def other_text(path: Path) -> None:
    with np.load(path) as file:
        rewrite(path, text=np.frombuffer(file["text"].tobytes().replace(b"s0", b"s9"), np.uint8))


def of_another_key(path: Path) -> None:
    rows = read_tokens(path, path.name.split(".")[-2])
    assert rows is not None
    write_tokens(path, KEY, rows)


def with_a_pickle(path: Path) -> None:
    rewrite(path, tokens=np.array([Canary()], object))


class Canary:
    """Unpickling it is noticed."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("the cache was unpickled",))


def without_digest(path: Path) -> None:
    rewrite(path, digest=None)


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        flip_a_byte,
        other_tokens,
        other_text,
        of_another_key,
        with_a_pickle,
        without_digest,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("not an archive"),
    ],
)
def test_a_damaged_file_is_made_again_with_one_line(
    pairs_file: Path,
    tokenizer: ChatTokenizer,
    tmp_path: Path,
    no_encoding: Callable[[], None],
    damage: Callable[[Path], Any],
) -> None:
    cache = tmp_path / "tokens"
    first = load_tokenized(build(), pairs_file, tokenizer, cache)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    damage(file)
    out, text = console()
    again = load_tokenized(build(), pairs_file, tokenizer, cache, out)
    assert plain(again) == plain(first) and file.read_bytes() == whole
    (line,) = text.getvalue().splitlines()
    assert f"{file} is damaged: " in line and line.endswith("; tokenising again")
    no_encoding()
    out, text = console()
    assert plain(load_tokenized(build(), pairs_file, tokenizer, cache, out)) == plain(first)
    assert text.getvalue() == ""


def test_the_newest_files_of_a_kind_are_kept(pairs_file: Path, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    cache = tmp_path / "tokens"
    test = write_pairs(tmp_path / "pairs.train.more.jsonl", 4)  # its name begins like the other's
    load_tokenized(build(), test, tokenizer, cache)
    stranger = cache / "pairs.train.notes.npz"
    stranger.write_text("mine")
    configs = [build(max_length=length) for length in (50, 51, 52, 53)]
    for config in configs:
        load_tokenized(config, pairs_file, tokenizer, cache)
    newest = [cache_path(cache, "pairs.train", token_key(config, pairs_file, tokenizer)) for config in configs[-KEPT:]]
    of_test = cache_path(cache, "pairs.train.more", token_key(build(), test, tokenizer))
    assert KEPT == 2 and set(cache.iterdir()) == {*newest, of_test, stranger}


def test_a_full_disk_leaves_no_half_file(full_disk: Path, tokenizer: ChatTokenizer) -> None:
    path = cache_path(full_disk, "pairs.train", KEY)
    with pytest.raises(StageError, match="cannot write"):
        write_tokens(path, KEY, TokenizedRows(random_pairs(1000), ()))
    assert list(full_disk.iterdir()) == []


def test_a_directory_that_cannot_be_made_is_named(pairs_file: Path, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("a file where the directory should be")
    with pytest.raises(StageError, match="cannot write .*tokens/pairs.train"):
        load_tokenized(build(), pairs_file, tokenizer, tmp_path / "tokens")


# --- what a person sees -----------------------------------------------------------------------------------------


def test_a_large_file_shows_its_rate_and_a_small_one_nothing(
    pairs_file: Path, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, text = console()
    load_tokenized(build(), pairs_file, tokenizer, console=out)
    assert text.getvalue() == ""
    monkeypatch.setattr(tokens, "_WORTH_A_BAR", 8)
    load_tokenized(build(), pairs_file, tokenizer, console=out)
    (line,) = text.getvalue().splitlines()
    assert line.startswith("tokenising pairs.train.jsonl: 8/8 pairs, ") and "/s, done in 0:0" in line
