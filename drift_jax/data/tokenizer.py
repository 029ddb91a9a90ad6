"""Dialogues to token ids and back, through a model's own tokenizer and chat template.

`tokenizer.json` is loaded as it is. (`AutoTokenizer` picks a class by `model_type` and builds a pre-tokenizer
of its own: wrong ids, without a word, for a directory that says qwen2 but brings other rules.)

Text inside a message never becomes a control token. A message may spell `<|im_start|>`; those characters are
encoded as characters, and only what the chat template itself writes becomes a control id. For messages
without such spellings the ids equal those of transformers' `apply_chat_template`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, SupportsInt, final

import jinja2
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from drift_jax.data.chat_template import (
    PROBE,
    Thinking,
    build_renderer,
    check_template,
    knows_thoughts,
    template_variables,
)
from drift_jax.data.tokenizer_files import find_chat_template, read_object, token_ids, token_text
from drift_jax.errors import DataError, ModelError
from drift_jax.reading import read_text
from drift_jax.records import Message

_LARGEST = 1 << 30  # bytes of a tokenizer.json; published ones have up to some tens of MB
_HALF_PAIR = re.compile("[\ud800-\udfff]")
_PROBE_REPLY = "drift-probe-reply"
# What a template may write: tools, dates and rules of conduct of its own, and a message in more than one place.
_MOST_WRITTEN, _MOST_TIMES = 1_000_000, 20


def load_tokenizer(model_dir: str | Path, thinking: Thinking = "template") -> ChatTokenizer:
    """Loads the tokenizer and chat template of a Hugging Face model directory.

    Args:
      thinking: what the template is told of thoughts before a reply, where it asks (`chat_template.py`).

    Raises:
      ModelError: a file is missing or broken, there is no chat template, or the tokenizer is of a kind whose
        control tokens cannot be told from text.
    """
    directory = Path(model_dir)
    if not directory.is_dir():
        raise ModelError(f"{directory} is not a model directory: a tokenizer.json is needed there.")
    config = read_object(directory / "tokenizer_config.json")
    template = find_chat_template(directory, config)
    special = {key: token_text(directory, config, key) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    with _panics_are_errors(directory):
        backend = _load_backend(directory)
        generation, model = (read_object(directory / name) for name in ("generation_config.json", "config.json"))
        of_token = {key: _id_of(backend, text) for key, text in special.items()}
        eos = [*token_ids(generation, "eos_token_id"), *token_ids(model, "eos_token_id"), *of_token["eos_token"]]
        pad = [*of_token["pad_token"], *token_ids(generation, "pad_token_id"), *token_ids(model, "pad_token_id")]
        try:
            return ChatTokenizer(backend, template, special, eos, pad, of_token["eos_token"], thinking)
        except (ModelError, DataError) as error:  # the probe dialogue is one
            raise ModelError(f"{directory}: {error}") from None


def check_vocab(tokenizer: ChatTokenizer, model_vocab_size: int) -> None:
    """Checks that the model has an embedding for every id the tokenizer can produce.

    Raises:
      ModelError: with both sizes. (JAX clamps an index that is out of range, so nothing else would notice.)
    """
    if tokenizer.vocab_size > model_vocab_size:
        raise ModelError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model has embeddings for {model_vocab_size}: "
            "they do not belong together. Use the tokenizer files that came with the model."
        )


@dataclass(frozen=True)
class _Shield:
    """Stand-ins for the characters of control tokens, there and back; empty when none is needed."""

    hide: dict[int, str]
    show: dict[int, str]


@final
class ChatTokenizer:
    """Encodes dialogues and text, decodes ids. Built by `load_tokenizer`.

    Attributes:
      eos_ids: every id that ends a completion: of the turn's end, generation_config.json, config.json and the
        tokenizer.
      turn_end_id: the id that the template writes after an assistant's reply (ChatML: `<|im_end|>`).
      eos_token_id: the id of the tokenizer's own `eos_token`; the turn end where it names none.
      knows_system: whether the template has a place for a system message.
      pad_id: an id to fill with. It may equal an EOS id: mask by position, never by `ids != pad_id`.
      vocab_size: highest id + 1, added tokens included.
      control_ids: the ids of all added tokens. Text never becomes one of them.
      content_hash: sha256 of all that this was built from; with equal hashes ids are equal.
    """

    def __init__(
        self,
        backend: Tokenizer,
        template: str,
        special: dict[str, str | None],
        eos_ids: Sequence[int],
        pad_ids: Sequence[int],
        eos_token_ids: Sequence[int],
        thinking: Thinking = "template",
    ) -> None:
        self._backend = backend
        variables = template_variables(template, special, thinking)
        check_template(template, variables)
        self._render = build_renderer(template, variables)
        self._template_chars = frozenset(template)
        self._control = {t.content: i for i, t in backend.get_added_tokens_decoder().items()}
        source = backend.to_str()
        spec = json.loads(source)
        self._plain = _without_control_tokens(spec, set(self._control))
        self._missing_bytes = _missing_bytes(spec)
        # Longest first: of two that begin at the same place the longer one counts, as in `tokenizers`.
        literals = sorted(filter(None, self._control), key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, literals)) + ")" if literals else r"((?!))")
        self._heads = tuple({text[:n] for text in literals for n in range(1, len(text))})
        self._tails = tuple({text[n:] for text in literals for n in range(1, len(text))})
        self._literals = "\0".join(literals)
        self._characters = sorted(set(self._literals) - {"\0"})

        parts: list[Any] = [source, template, special, *map(list, (eos_ids, pad_ids, eos_token_ids))]
        if thinking != "template" and knows_thoughts(template):
            parts.append(thinking)
        self.content_hash = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        self.control_ids = frozenset(self._control.values())
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if not self.vocab_size:
            raise ModelError("tokenizer.json has no tokens. Take the file from the model's own repository again.")
        self.turn_end_id = self._find_turn_end()
        self.eos_ids = tuple(dict.fromkeys([self.turn_end_id, *eos_ids]))
        self.eos_token_id = [*eos_token_ids, self.turn_end_id][0]
        self.knows_system = "system" in template or "<|im_start|>" in template
        self.pad_id = [*pad_ids, *self.eos_ids][0]
        self._check_against_backend()
        self._told = "enable_thinking" in variables
        if self._told:
            self._check_thoughts()

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The dialogue as the template writes it: for people; ids come from `encode_chat`."""
        shield = self._shield(messages)
        return self._rendered(messages, add_generation_prompt, shield).translate(shield.show)

    def encode_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Ids of the dialogue through the chat template, by default up to where the reply begins.

        Raises:
          DataError: the template refuses the dialogue, or the tokenizer has no token for one of its bytes.
        """
        shield = self._shield(messages)
        return self._encode(self._rendered(messages, add_generation_prompt, shield), shield)

    def encode_completion(self, prompt: Sequence[Message], reply: str) -> list[int]:
        """Ids of `reply` as the answer to `prompt`, up to its turn end.

        What the template writes after the turn's end (ChatML: a newline) is not part of it: no sampler would
        produce it. Raises as `encode_reply`.
        """
        ids = self.encode_reply(prompt, reply)
        return ids[: ids.index(self.turn_end_id) + 1]

    def encode_reply(self, prompt: Sequence[Message], reply: str) -> list[int]:
        """Ids of all that the template writes after `encode_chat(prompt)` when `reply` is the answer.

        Raises:
          DataError: the template writes the dialogue with the reply in another way than the prompt alone, so
            that no split into prompt and completion exists; or as for `encode_chat`.
        """
        dialogue = [*prompt, Message("assistant", reply)]
        shield = self._shield(dialogue)
        before = self._rendered(prompt, True, shield)
        whole = self._rendered(dialogue, False, shield)
        if not whole.startswith(before):
            raise DataError(
                "the chat template writes the prompt differently once the reply follows, so prompt and reply "
                f"cannot be told apart: {_first_difference(before, whole)}."
                + (" data.thinking: template takes replies that bring thoughts of their own." if self._told else "")
            )
        ids = self._encode(whole[len(before) :], shield)
        if self.turn_end_id not in ids:
            raise DataError(f"the chat template writes no turn end (id {self.turn_end_id}) after the reply.")
        return ids

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text, nothing added. A control token that is spelled out stays text.

        Raises:
          DataError: the tokenizer has no token for one of the text's bytes (it would drop it without a word).
        """
        if self._missing_bytes:
            data = text.encode("utf-8")
            lost = sorted(set(data) & self._missing_bytes)
            if lost:
                raise DataError(
                    f"the tokenizer has no token for byte 0x{lost[0]:02x} and would drop it, found in "
                    f"{_around(text, lost[0])}. Remove that character from the row."
                )
        return self._plain.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[SupportsInt], skip_special: bool = True) -> str:
        """Text of the ids. `skip_special` leaves out special tokens, not added ones such as `<think>`."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def _rendered(self, messages: Sequence[Message], add_generation_prompt: bool, shield: _Shield) -> str:
        hidden = [
            Message(m.role, m.content.translate(shield.hide)) if self._resembles_control(m.content) else m
            for m in messages
        ]
        try:
            text = self._render(hidden, add_generation_prompt)
        except Exception as error:  # a template is a program, and may raise anything
            raise DataError(f"the chat template refuses this dialogue: {_why(error)}") from error
        if not text.isascii() and _HALF_PAIR.search(text):
            raise DataError("the chat template writes half of a surrogate pair, which no tokenizer can take.")
        said = sum(len(message.content) for message in messages)
        if len(text) > _MOST_WRITTEN + _MOST_TIMES * said:
            raise DataError(f"the chat template writes {len(text):,} characters for a dialogue of {said:,}.")
        return text

    def _shield(self, messages: Sequence[Message]) -> _Shield:
        """What hides the characters of control tokens in messages that hold a control token or a part of one.

        With it no control token found in the rendered dialogue takes a character from a message. Other
        messages reach the template untouched, since templates may look into them.
        """
        if not any(self._resembles_control(message.content) for message in messages):
            return _Shield({}, {})
        taken = self._template_chars.union(*(message.content for message in messages))
        private_use = chain(range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
        free = (code for code in private_use if chr(code) not in taken)
        stand_ins = {char: next(free) for char in self._characters}
        return _Shield(
            hide={ord(char): chr(code) for char, code in stand_ins.items()},
            show={code: char for char, code in stand_ins.items()},
        )

    def _resembles_control(self, text: str) -> bool:
        # A template may strip a message before it puts its own text next to it.
        core = text.strip()
        return (
            self._split.search(text) is not None
            or core.endswith(self._heads)
            or core.startswith(self._tails)
            or (core != "" and core in self._literals)
        )

    def _encode(self, rendered: str, shield: _Shield) -> list[int]:
        ids: list[int] = []
        # With one group, `re.split` alternates text and matched control tokens.
        for i, part in enumerate(self._split.split(rendered)):
            if i % 2:
                ids.append(self._control[part])
            elif part:
                ids += self.encode_text(part.translate(shield.show))
        return ids

    def _find_turn_end(self) -> int:
        dialogue = [Message("user", "probe"), Message("assistant", _PROBE_REPLY)]
        try:
            whole = self._render(dialogue, False)
            asks_for_reply = self._render(dialogue[:1], True) != self._render(dialogue[:1], False)
        except Exception as error:  # a template is a program, and may raise anything
            raise ModelError(f"the chat template cannot render a question and its answer: {_why(error)}") from error
        _, found, tail = whole.rpartition(_PROBE_REPLY)
        match = self._split.search(tail)
        if not found or match is None or not asks_for_reply:
            raise ModelError(
                "the chat template must open an assistant turn (add_generation_prompt) and end it with an "
                f"added token of the tokenizer; after the assistant's text it writes {tail!r}."
            )
        return self._control[match[0]]

    def _check_thoughts(self) -> None:
        """That prompts which end with an empty thought are the beginning of prompts with their replies."""
        try:
            self.encode_reply(PROBE[:1], "A reply.")
        except DataError as error:
            raise ModelError(f"{error} Set data.thinking to template for this model.") from None

    def _check_against_backend(self) -> None:
        # Holds for added tokens and pre-tokenizers that treat each stretch of text on its own. The exceptions
        # (lstrip, rstrip, a prefix space for the first word only) would give other ids than transformers.
        ours = self.encode_chat(PROBE)
        theirs = self._backend.encode(self.render(PROBE, True), add_special_tokens=False).ids
        if ours != theirs:
            raise ModelError(
                f"text between control tokens is encoded to {ours}, the tokenizer as a whole gives {theirs}: "
                "its added tokens or pre-tokenizer reach across control tokens, which is not computed here."
            )


@contextlib.contextmanager
def _panics_are_errors(directory: Path) -> Iterator[None]:
    """Where `tokenizers` itself breaks on a file, Python gets no `Exception`, and of a class without a public name."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ModelError(
            f"{directory / 'tokenizer.json'} cannot be loaded: the tokenizers library breaks on it ({error!s:.200}). "
            "Take the file from the model's own repository again."
        ) from None


def _load_backend(directory: Path) -> Tokenizer:
    path = directory / "tokenizer.json"
    try:
        if path.exists():
            return Tokenizer.from_str(read_text(path, ModelError, _LARGEST))
        from transformers import AutoTokenizer

        # False, or transformers asks at the terminal whether to run the repository's code.
        loaded = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        return Tokenizer.from_str(loaded.backend_tokenizer.to_str())
    except Exception as error:  # the libraries raise bare Exception, OSError, ValueError, AttributeError, ...
        raise ModelError(
            f"{path} cannot be loaded: {error}. Take the file from the model's own repository again, or "
            "write it with `save_pretrained` of a fast tokenizer."
        ) from error


def _without_control_tokens(spec: dict[str, Any], control: set[str]) -> Tokenizer:
    """The tokenizer of a tokenizer.json, unable to make an added token; it adds nothing before or after."""
    if spec["model"]["type"] != "BPE":
        raise ModelError(f"the tokenizer's model is {spec['model']['type']}; only BPE is read.")
    # With `ignore_merges` a whole word is looked up in the vocabulary, so the entries must go from there too.
    vocab = {text: i for text, i in spec["model"]["vocab"].items() if text not in control}
    changes = {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    plain = {**spec, **changes, "model": {**spec["model"], "vocab": vocab}}
    try:
        return Tokenizer.from_str(json.dumps(plain, ensure_ascii=False))
    except Exception as error:  # `tokenizers` raises bare Exception
        raise ModelError(f"a merge rule makes an added token, which then cannot be told from text: {error}") from error


def _missing_bytes(spec: dict[str, Any]) -> frozenset[int]:
    """Bytes that a byte-level vocabulary has no token for (SmolLM2 lacks 21); BPE drops them silently."""
    if '"ByteLevel"' not in json.dumps(spec["pre_tokenizer"]):
        return frozenset()
    return frozenset(_byte_of(char) for char in ByteLevel.alphabet() if char not in spec["model"]["vocab"])


def _byte_of(char: str) -> int:
    """Inverse of the byte-level alphabet: printable Latin-1 is itself, other bytes count from U+0100."""
    shifted = [*range(0x00, 0x21), *range(0x7F, 0xA1), 0xAD]
    return shifted[ord(char) - 0x100] if ord(char) >= 0x100 else ord(char)


def _id_of(backend: Tokenizer, text: str | None) -> list[int]:
    found = backend.token_to_id(text) if text else None
    return [] if found is None else [found]


def _why(error: Exception) -> str:
    """What a template said itself, or what went wrong in it."""
    return str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"


def _first_difference(before: str, whole: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(whole))
    return f"{before[at : at + 30]!r} became {whole[at : at + 30]!r}"


def _around(text: str, byte: int) -> str:
    at = next(i for i, char in enumerate(text) if byte in char.encode("utf-8"))
    return f"{text[max(0, at - 10) : at + 11]!r} (U+{ord(text[at]):04X})"
