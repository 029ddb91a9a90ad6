"""A small byte-level BPE tokenizer with a ChatML template, built on the spot: tests need no download.

It has the shape of Qwen2.5's: NFC normaliser, Qwen's pre-tokenizer pattern, added tokens after the vocabulary
(three special ones and `<tool_call>`, `</tool_call>` that are added but not special), a template that puts a
default system message in front, and two EOS ids.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
NOT_SPECIAL = ("<tool_call>", "</tool_call>")
ADDED = SPECIAL + NOT_SPECIAL

DEFAULT_SYSTEM = "You are a small model that exists for tests."

CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' %}"
    "{{- '<|im_start|>system\\n" + DEFAULT_SYSTEM + "<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- endif %}"
)

_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_CORPUS = (
    "system\nuser\nassistant\n",
    DEFAULT_SYSTEM,
    "How do I sort a list of numbers in Python, largest first? Call sorted with reverse set to True.",
    "That is wrong: the question was about a list of words, and the answer must not change the list itself.",
    "Thank you, this is better. Please explain why the second loop starts at one and not at zero.",
    "def largest(items):\n    best = items[0]\n    for item in items:\n        if item > best:\n"
    "            best = item\n    return best\n\n\nprint(largest([1, 2, 3]))\n",
    "The user asked for a shorter reply. Here is a shorter one, its steps numbered.\n\n1. Read.\n2. Write.",
    "It should have been sent yesterday; nobody answered, so the whole order was sent back to the warehouse.",
    "Large rivers carry sand towards the sea, where waves and wind spread it along the coast for many miles.",
    'Write <b>bold</b> text and close every tag. A tool call looks like {"name": "search"} in JSON.',
    "Das ist größer als früher. C'est déjà l'été. これはテストです。 Привет, мир! 你好，世界。 🙂🙃",
)


def build_tiny_tokenizer(directory: Path, vocab_size: int = 384) -> Path:
    """Writes tokenizer.json, tokenizer_config.json and generation_config.json into `directory`.

    Args:
      directory: made when it does not exist.
      vocab_size: number of ids, added tokens included; 261 (bytes and added tokens) to about 560.

    Returns:
      `directory`. The ids of `ADDED` are the last five, in that order.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(ADDED),
        min_frequency=0,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in NOT_SPECIAL])
    size = tokenizer.get_vocab_size()
    if size != vocab_size:
        raise ValueError(f"the training lines give {size} tokens, {vocab_size} were asked for")
    tokenizer.save(str(directory / "tokenizer.json"))
    ids = {text: tokenizer.token_to_id(text) for text in ADDED}
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": None,
            "add_bos_token": False,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 4096,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    _write_json(
        directory / "generation_config.json",
        {
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
            "pad_token_id": ids["<|endoftext|>"],
        },
    )
    return directory


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
