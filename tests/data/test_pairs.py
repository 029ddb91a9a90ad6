"""Pairs to ids: what is prompt, what is completion, what is cut and counted."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drift_jax.data.pairs import TruncationCounts, count_truncation, tokenize_pair
from drift_jax.data.rules import DRIFT_RULES, PairIds, Truncation, keep_prompt_end
from drift_jax.data.tokenizer import ChatTokenizer, load_tokenizer
from drift_jax.errors import DataError
from drift_jax.records import Message, Pair, read_dsat
from tests.tiny import DEFAULT_SYSTEM, build_tiny_tokenizer

REPO = Path(__file__).parents[2]
IM_END, ENDOFTEXT = 381, 379

PAIR = Pair("a", (Message("user", "Sort [2, 1]."),), "[1, 2]", "No.")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return load_tokenizer(build_tiny_tokenizer(tmp_path_factory.mktemp("tiny"), vocab_size=384))


def with_meta(**meta: Any) -> Pair:
    return dataclasses.replace(PAIR, meta=meta)


def test_prompt_and_completions(tokenizer: ChatTokenizer) -> None:
    pair = tokenize_pair(PAIR, tokenizer, 1024, 2048)
    assert tokenizer.decode(pair.prompt_ids, skip_special=False) == (
        f"<|im_start|>system\n{DEFAULT_SYSTEM}<|im_end|>\n"
        "<|im_start|>user\nSort [2, 1].<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert tokenizer.decode(pair.chosen_ids, skip_special=False) == "[1, 2]<|im_end|>"
    assert tokenizer.decode(pair.rejected_ids, skip_special=False) == "No.<|im_end|>"
    for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids):
        assert ids.dtype == np.int32
    assert pair.chosen_ids.tolist().count(IM_END) == 1
    assert pair.id == "a"
    assert count_truncation([pair]) == TruncationCounts()


def test_sampled_ids_are_used_as_they_are(tokenizer: ChatTokenizer) -> None:
    """Not the ids that encoding the text again would give: a sampler may spell a word in other tokens."""
    letters = [tokenizer.encode_text(char)[0] for char in "answer"]
    assert letters != tokenizer.encode_text("answer")
    for end in (IM_END, ENDOFTEXT):
        pair = with_meta(chosen_token_ids=[*letters, end], finish_reason="stop")
        assert tokenize_pair(pair, tokenizer, 1024, 2048).chosen_ids.tolist() == [*letters, end]


def test_completion_cut_by_the_sampler_has_no_end(tokenizer: ChatTokenizer) -> None:
    ids = tokenizer.encode_text("the answer is")
    pair = tokenize_pair(with_meta(chosen_token_ids=ids, finish_reason="length"), tokenizer, 1024, 2048)
    assert pair.chosen_ids.tolist() == ids


@pytest.mark.parametrize(
    ("meta", "why"),
    [
        ({"chosen_token_ids": []}, "chosen has no token"),
        ({"chosen_token_ids": "5 6"}, "meta.chosen_token_ids must be a list of token ids, found '5 6'"),
        ({"chosen_token_ids": [1, 2.0]}, "meta.chosen_token_ids must be a list of token ids"),
        ({"chosen_token_ids": [5, 384]}, "holds 384, the tokenizer has ids below 384: .*another model"),
        ({"chosen_token_ids": [-1, 5]}, "holds -1"),
        ({"chosen_token_ids": [5], "finish_reason": "stop"}, r"ends with 5, which is none of .*\(381, 379\)"),
    ],
)
def test_unusable_sampled_ids_name_the_pair(meta: dict[str, Any], why: str, tokenizer: ChatTokenizer) -> None:
    with pytest.raises(DataError, match=f"^pair a: .*{why}"):
        tokenize_pair(with_meta(**meta), tokenizer, 1024, 2048)


def test_text_of_a_control_token_stays_text(tokenizer: ChatTokenizer) -> None:
    """The completion ends at the turn end of the template, not at one that the reply spells out."""
    pair = tokenize_pair(dataclasses.replace(PAIR, rejected="It is <|im_end|>\nyes <|im_"), tokenizer, 1024, 2048)
    assert tokenizer.decode(pair.rejected_ids[:-1]) == "It is <|im_end|>\nyes <|im_"
    assert [i for i in pair.rejected_ids.tolist() if i in tokenizer.control_ids] == [IM_END]


def test_template_that_rewrites_the_prompt_refuses_the_pair(tmp_path: Path) -> None:
    directory = build_tiny_tokenizer(tmp_path)
    (directory / "chat_template.jinja").write_text(
        "{%- for m in messages %}"
        "{{- '<|im_start|>' + m.role + (' last' if loop.last else '') + '\\n' + m.content + '<|im_end|>\\n' }}"
        "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    )
    with pytest.raises(DataError, match="pair a: the chat template writes the prompt differently"):
        tokenize_pair(PAIR, load_tokenizer(directory), 1024, 2048)


# ------------------------------------------------------------------------------------------- cutting


def arange_pair(prompt: int, chosen: int, rejected: int) -> PairIds:
    """Ids that tell where they stood: 0.. in the prompt, 1000.. in chosen, 2000.. in rejected."""
    return PairIds(list(range(prompt)), list(range(1000, 1000 + chosen)), list(range(2000, 2000 + rejected)))


@pytest.mark.parametrize(
    ("sizes", "prompt", "chosen", "rejected"),
    [
        # max_prompt_length 4, max_length 10
        ((3, 5, 6), range(0, 3), range(1000, 1005), range(2000, 2006)),
        ((3, 7, 8), range(0, 3), range(1000, 1007), range(2000, 2007)),
        # The prompt keeps its end, also when the whole pair would fit.
        ((5, 1, 1), range(1, 5), range(1000, 1001), range(2000, 2001)),
        # Each completion is cut for itself.
        ((9, 20, 6), range(5, 9), range(1000, 1006), range(2000, 2006)),
    ],
)
def test_budgets(sizes: Any, prompt: range, chosen: range, rejected: range) -> None:
    pair = keep_prompt_end(arange_pair(*sizes), max_prompt_length=4, max_length=10)
    assert pair == PairIds(list(prompt), list(chosen), list(rejected))


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.tuples(*(st.integers(1, 40) for _ in range(3))),
    max_prompt_length=st.integers(1, 30),
    room=st.integers(1, 30),
)
def test_a_token_is_left_of_each_part(sizes: tuple[int, int, int], max_prompt_length: int, room: int) -> None:
    max_length = max_prompt_length + room
    pair = keep_prompt_end(arange_pair(*sizes), max_prompt_length, max_length)
    assert 0 < len(pair.prompt) <= max_prompt_length
    assert 0 < len(pair.chosen) <= max_length - len(pair.prompt)
    assert 0 < len(pair.rejected) <= max_length - len(pair.prompt)


def test_cuts_are_counted(tokenizer: ChatTokenizer) -> None:
    whole = tokenize_pair(PAIR, tokenizer, 1024, 2048)
    size, chosen = len(whole.prompt_ids), len(whole.chosen_ids)
    limit = size - 3
    long = dataclasses.replace(PAIR, id="b", rejected="No. " * 10)
    pairs = [tokenize_pair(pair, tokenizer, limit, limit + chosen - 1) for pair in (PAIR, long)]
    counts = count_truncation(pairs)
    rejected = len(tokenizer.encode_completion(PAIR.prompt, "No. " * 10))
    assert [pair.id for pair in pairs] == ["a", "b"]
    assert counts == TruncationCounts(
        prompts_cut=2,
        prompt_tokens_cut=6,
        chosen_cut=2,
        chosen_tokens_cut=2,
        rejected_cut=1,
        rejected_tokens_cut=rejected - chosen + 1,
        completions_emptied=0,
    )
    # The reply was cut, so it has no turn end: nothing was put in its place.
    assert pairs[0].chosen_ids.tolist() == whole.chosen_ids.tolist()[:-1]
    assert pairs[0].prompt_ids.tolist() == whole.prompt_ids.tolist()[3:]
    assert count_truncation([]) == TruncationCounts()


def test_rules_are_data(tokenizer: ChatTokenizer) -> None:
    """Another way to cut is another object; what it empties is counted."""

    def keep_nothing(pair: PairIds, max_prompt_length: int, max_length: int) -> PairIds:
        return dataclasses.replace(pair, chosen=[])

    rules = dataclasses.replace(DRIFT_RULES, truncation=Truncation(keep_nothing))
    pair = tokenize_pair(PAIR, tokenizer, 4, 10, rules)
    assert pair.emptied and count_truncation([pair]).completions_emptied == 1


@pytest.mark.parametrize(("max_prompt_length", "max_length"), [(0, 10), (10, 10), (11, 10)])
def test_budgets_without_room(max_prompt_length: int, max_length: int, tokenizer: ChatTokenizer) -> None:
    with pytest.raises(ValueError, match="need 0 < max_prompt_length < max_length"):
        tokenize_pair(PAIR, tokenizer, max_prompt_length, max_length)


@pytest.mark.parametrize("name", ["../shared/data/dsat_real.jsonl", "data/sample/dsat.jsonl"])
def test_real_conversations_split(name: str, tokenizer: ChatTokenizer) -> None:
    """Prompt ids and completion ids are the ids of the whole dialogue, its last newline apart."""
    path = REPO / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    newline = tokenizer.encode_text("\n")
    for record in read_dsat(path).records:
        pair = Pair(record.id, record.prompt, record.rejected, record.user_preference)
        tokenized = tokenize_pair(pair, tokenizer, 100_000, 200_000)
        for reply, ids in ((pair.chosen, tokenized.chosen_ids), (pair.rejected, tokenized.rejected_ids)):
            whole = tokenizer.encode_chat([*pair.prompt, Message("assistant", reply)], False)
            split = [*tokenized.prompt_ids.tolist(), *ids.tolist(), *newline]
            if reply[0] in "\r\n \t":  # merges with the newline of the header when encoded in one go
                assert tokenizer.decode(split, False) == tokenizer.decode(whole, False)
            else:
                assert split == whole
