"""What the files of a model directory say of its tokenizer, beside tokenizer.json itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from drift_jax.errors import ModelError
from drift_jax.reading import SMALL, read_json, read_text

_REMEDY = "Take the file from the model's own repository again."


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; empty when there is no such file. Raises `ModelError`."""
    if not path.exists() and not path.is_symlink():
        return {}
    value = read_json(path, _REMEDY, ModelError)
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object, found {type(value).__name__}.")
    return value


def find_chat_template(directory: Path, config: dict[str, Any]) -> str:
    """The template; `config` is tokenizer_config.json. Raises `ModelError` where there is none."""
    jinja_file = directory / "chat_template.jinja"
    if jinja_file.exists():
        return read_text(jinja_file, ModelError, SMALL, _REMEDY)
    template = config.get("chat_template") or read_object(directory / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # several named templates
        named = [item for item in template if isinstance(item, dict) and item.get("name") == "default"]
        template = named[-1].get("template") if named else None
    if not isinstance(template, str) or not template.strip():
        raise ModelError(
            f"{directory} has no chat template: looked for chat_template.jinja, `chat_template` in "
            "tokenizer_config.json, and chat_template.json. A base model has none: use the Instruct model, "
            "or put a chat_template.jinja there."
        )
    return template


def token_text(directory: Path, config: dict[str, Any], key: str) -> str | None:
    """Of the token that tokenizer_config.json has under `key`, such as `eos_token`. Raises `ModelError`."""
    value = config.get(key)
    text = value.get("content") if isinstance(value, dict) else value
    if text is not None and not isinstance(text, str):
        raise ModelError(
            f"{directory / 'tokenizer_config.json'}: {key} must be a token's text, an object with it, or null, "
            f"found {value!r:.80}. {_REMEDY}"
        )
    return text


def token_ids(config: dict[str, Any], key: str) -> list[int]:
    """One id or several, such as `eos_token_id` of generation_config.json. Raises `ModelError`."""
    value = config.get(key)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and i >= 0 for i in values):
        raise ModelError(f"{key} must be a token id or a list of them, found {value!r:.80}.")
    return values
