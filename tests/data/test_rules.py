"""Rules of one stack alone, each against that stack's own words or calls: the tables of `data/rules.py`, row by row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from drift_jax.data.rules import TEMPLATES, TRUNCATIONS, PairIds
from drift_jax.data.tokenizer import ChatTokenizer, load_tokenizer
from drift_jax.records import Message, Pair
from tests.tiny import build_tiny_tokenizer

PAIR = Pair("a", (Message("user", "Sort [2, 1]."),), "[1, 2]", "No.")
# As Gemma's: turns have another beginning, and there is no turn for the system.
NO_SYSTEM = (
    "{%- for message in messages %}"
    "{{- '<|endoftext|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|endoftext|>assistant\\n' }}{%- endif %}"
)


def tokenizer_of(folder: Path, template: str | None = None) -> ChatTokenizer:
    build_tiny_tokenizer(folder)
    if template is not None:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    return load_tokenizer(folder)


def test_reply_text_is_what_the_template_writes_after_the_prompt(tmp_path: Path) -> None:
    """TRL 0.12 to 0.28 (`maybe_apply_chat_template`): the text behind the prompt's, encoded alone, turn end and all."""
    tokenizer = tokenizer_of(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    prompt = [{"role": m.role, "content": m.content} for m in PAIR.prompt]
    before = theirs.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    template = TEMPLATES["reply_text"]
    assert template.encode_prompt(PAIR.prompt, tokenizer) == theirs(before, add_special_tokens=False)["input_ids"]
    for reply, encode in ((PAIR.chosen, template.encode_chosen), (PAIR.rejected, template.encode_rejected)):
        whole = theirs.apply_chat_template([*prompt, {"role": "assistant", "content": reply}], tokenize=False)
        text = whole.removeprefix(before)
        assert text == f"{reply}<|im_end|>\n"
        assert encode(PAIR, tokenizer) == theirs(text, add_special_tokens=False)["input_ids"]


def test_the_handbook_puts_an_empty_system_turn_where_there_is_a_place_for_one(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path / "chatml")
    encode = TEMPLATES["handbook"].encode_prompt
    text = tokenizer.decode(encode(PAIR.prompt, tokenizer), skip_special=False)
    assert text.startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user\nSort")
    own = (Message("system", "Be brief."), *PAIR.prompt)
    text = tokenizer.decode(encode(own, tokenizer), skip_special=False)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSort")
    without = tokenizer_of(tmp_path / "other", NO_SYSTEM)
    text = without.decode(encode(PAIR.prompt, without), skip_special=False)
    assert text == "<|endoftext|>user\nSort [2, 1].<|im_end|>\n"


PROMPT, CHOSEN, REJECTED = list(range(100, 110)), [1, 2, 3, 4], [5, 6]


@pytest.mark.parametrize(
    ("rule", "limits", "expected"),
    [
        # Prompts are cut where prompt and longer reply do not fit, and only then; replies where that is not enough.
        ("trl<=0.11", (4, 14), (PROMPT, CHOSEN, REJECTED)),
        ("trl<=0.11", (4, 13), (PROMPT[-4:], CHOSEN, REJECTED)),
        ("trl<=0.11", (4, 7), (PROMPT[-4:], CHOSEN[:3], REJECTED)),
        ("trl<=0.11 keep_start", (4, 14), (PROMPT, CHOSEN, REJECTED)),
        ("trl<=0.11 keep_start", (4, 13), (PROMPT[:4], CHOSEN, REJECTED)),
        ("trl<=0.11 keep_start", (4, 7), (PROMPT[:4], CHOSEN[:3], REJECTED)),
        # The prompt's limit holds always, and each reply takes what the prompt leaves.
        ("trl0.12", (4, 14), (PROMPT[-4:], CHOSEN, REJECTED)),
        ("trl0.12", (4, 7), (PROMPT[-4:], CHOSEN[:3], REJECTED)),
        # One limit, from the start.
        ("keep_start", (4, 12), (PROMPT, CHOSEN[:2], REJECTED)),
        ("keep_start", (4, 9), (PROMPT[:9], [], [])),
    ],
)
def test_what_a_rule_keeps(rule: str, limits: tuple[int, int], expected: tuple[list[int], ...]) -> None:
    """By hand; limits are (max_prompt_length, max_length)."""
    kept = TRUNCATIONS[rule].cut(PairIds(PROMPT, CHOSEN, REJECTED), *limits)
    assert (kept.prompt, kept.chosen, kept.rejected) == expected
