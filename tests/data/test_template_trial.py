"""Chat templates are programs of strangers: sandboxed, and tried with limits before they are used."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from drift_jax.data import template_trial
from drift_jax.data.tokenizer import load_tokenizer
from drift_jax.errors import DataError, DriftError, ModelError
from drift_jax.records import Message
from tests.tiny import build_tiny_tokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
EXCESSES = {
    "loops": (ENDLESS, "not done after 1 seconds"),
    "within the tag of transformers": (
        "{% generation %}" + ENDLESS + "{% endgeneration %}",
        "not done after 1 seconds",
    ),
    "power": ("{{ 10 ** (10 ** 10) }}", "not done after 1 seconds"),
    "calls": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
        "not done after 1 seconds",
    ),
    "times": ("{{ 'x' * 10 ** 9 }}", "more than 512 MiB of memory"),
    "padding": ("{{ '%2000000000s' % 'x' }}", "more than 512 MiB of memory"),
    "doubling": (
        "{% set n = namespace(t='xy') %}{% for i in range(40) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
        "more than 512 MiB of memory",
    ),
    "many pieces": ("{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}", "more than 1,000,000 characters"),
}


def write(folder: Path, template: str) -> Path:
    build_tiny_tokenizer(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"chat_template": template}))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    return folder


@pytest.mark.parametrize("kind", EXCESSES)
def test_a_template_without_end_is_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile, says = EXCESSES[kind]
    if "seconds" in says:  # a busy machine may take as long as this for the memory that others want
        monkeypatch.setattr(template_trial, "SECONDS", 1)
        source = template_trial.__file__
        shortened = tmp_path / "trial.py"  # the child reads the limit from its file
        shortened.write_text(Path(source).read_text().replace("SECONDS = 10 ", "SECONDS = 1 "))
        monkeypatch.setattr(template_trial, "__file__", str(shortened))
    start = time.monotonic()
    with pytest.raises(ModelError, match=f"chat template cannot be used: it .*{says}.*chat_template.jinja"):
        load_tokenizer(write(tmp_path / "model", CHATML + hostile))
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    "reach",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os.system('touch PLACE') }}",
        "{{ messages.append(1) }}",
        "{{ range(10 ** 9) }}",
        "{{ 1 + 'a' }}",
    ],
)
def test_a_template_cannot_leave_the_sandbox(reach: str, tmp_path: Path) -> None:
    place = tmp_path / "touched"
    with pytest.raises(DriftError, match="chat template"):
        load_tokenizer(write(tmp_path / "model", CHATML + reach.replace("PLACE", str(place))))
    assert not place.exists()


def test_what_a_template_writes_for_one_row_is_bounded(tmp_path: Path) -> None:
    """Trials have other words: this template waits for those of a row."""
    hostile = "{% if messages[0].content == 'now' %}{{ 'x' * 10 ** 7 }}{% endif %}"
    tokenizer = load_tokenizer(write(tmp_path / "model", CHATML + hostile))
    assert tokenizer.encode_chat([Message("user", "later")])
    with pytest.raises(DataError, match=r"writes 10,000,\d\d\d characters for a dialogue of 3"):
        tokenizer.encode_chat([Message("user", "now")])


def test_the_trial_has_no_say_in_what_it_does_not_know(tmp_path: Path) -> None:
    assert template_trial.find_excess("{% nonsense %}", "[{}]") is None
    assert template_trial.find_excess("{{ raise_exception('no') }}", "[{}]") is None
    assert template_trial.find_excess("{% generation %}a{% endgeneration %}{{ strftime_now('%Y') }}", "[{}]") is None
