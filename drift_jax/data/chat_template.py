"""A model's chat template as a function of dialogues, after it was seen to behave.

Some templates know of thoughts (Qwen3): by default a reply may begin with one, and the prompt ends before it. Told
`enable_thinking` false, they end the prompt with a thought that is empty and closed, as a reply without a thought has.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from tokenizers import Tokenizer
from tokenizers.models import BPE

from drift_jax.data.template_trial import find_excess
from drift_jax.errors import ModelError
from drift_jax.records import Message, messages_to_rows

Thinking = Literal["none", "template"]  # keys of `THOUGHTS`

_THINKING = "enable_thinking"
# `data.thinking` -> what a template that asks is told
THOUGHTS: Mapping[Thinking, Mapping[str, bool]] = {"none": {_THINKING: False}, "template": {}}
PROBE = (
    Message("user", "  Grüße, 1234!\n\n"),
    Message("assistant", "\n A reply:\n\n    code  \n"),
    Message("user", "Again?"),
)


def knows_thoughts(template: str) -> bool:
    """Whether the template can be told that there are none."""
    return _THINKING in template


def template_variables(template: str, special: dict[str, str | None], thinking: Thinking) -> dict[str, Any]:
    """What the template is told besides messages: the texts of special tokens, and of thoughts if it asks."""
    named: dict[str, Any] = {key: text for key, text in special.items() if text}
    return named | (dict(THOUGHTS[thinking]) if knows_thoughts(template) else {})


def check_template(template: str, variables: dict[str, Any]) -> None:
    """Raises `ModelError` for a template that takes far too much time or memory; see `template_trial`."""
    rows = [messages_to_rows(messages) for messages in (PROBE[:1], PROBE[:2], PROBE)]
    dialogues = [
        {"messages": row, "add_generation_prompt": asks, "tools": None, "documents": None, **variables}
        for row in rows
        for asks in (False, True)
    ]
    excess = find_excess(template, json.dumps(dialogues))
    if excess is not None:
        raise ModelError(
            f"the chat template cannot be used: {excess} for a dialogue of three lines. It is a program of the model's "
            "repository: take the model from another one, or put a chat_template.jinja of its family there."
        )


def build_renderer(template: str, variables: dict[str, Any]) -> Callable[[Sequence[Message], bool], str]:
    """(messages, whether the prompt of a reply follows) -> text. It raises whatever the template raises."""
    from transformers import PreTrainedTokenizerFast  # takes a second to import

    # Only the template is rendered here, so an empty tokenizer does. Special tokens it would not know from a call.
    tokens = {key: text for key, text in variables.items() if key != _THINKING}
    told = {key: value for key, value in variables.items() if key == _THINKING}
    host = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()), **tokens)

    def render(messages: Sequence[Message], add_generation_prompt: bool) -> str:
        text = host.apply_chat_template(
            messages_to_rows(messages),
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **told,
        )
        return str(text)

    return render
