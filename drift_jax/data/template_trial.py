"""Tries a chat template in a process of its own, with little time and memory, before this process renders it.

A template is a program from a model repository. jinja2's sandbox keeps it from files and attributes, not from loops in
loops or from texts of 10**9 characters. Nothing within a process stops those for sure (a product of integers listens to
no signal), and nothing can take memory back; a process with limits dies alone.

    python template_trial.py < JSON        the child: the standard library and jinja2 alone, so that it is there at once

What only this child would refuse (an extension it lacks) is no verdict: the template then shows itself when it is used.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

SECONDS = 10  # of the processor; a template takes milliseconds
MOST_BYTES = 1 << 29  # of addresses; the interpreter with jinja2 has 50 MB of them
MOST_CHARACTERS = 1_000_000  # of a dialogue with a few words
_WALL_SECONDS = 300  # for what the limit of the processor does not see; a busy machine takes a while for 0.2 s
_TOO_MUCH, _TOO_LONG = 3, 4  # exit codes


@functools.lru_cache(maxsize=64)
def find_excess(template: str, dialogues: str) -> str | None:
    """What a template takes too much of when it renders each of the dialogues; None where it behaves.

    Args:
      dialogues: JSON, a list of the variables of one rendering each.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        done = subprocess.run(
            [sys.executable, "-P", __file__],
            input=json.dumps({"template": template, "dialogues": json.loads(dialogues)}),
            env=environment,
            capture_output=True,
            text=True,
            timeout=_WALL_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"it was not done after {_WALL_SECONDS} seconds"
    if done.returncode == _TOO_MUCH:
        return f"it wanted more than {MOST_BYTES >> 20} MiB of memory"
    if done.returncode == _TOO_LONG:
        return f"it wrote more than {MOST_CHARACTERS:,} characters"
    if done.returncode < 0:  # SIGXCPU, or SIGKILL after it
        return f"it was not done after {SECONDS} seconds of the processor"
    return None


def _set_limits() -> None:
    import resource

    for limit, most in ((resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_AS, MOST_BYTES), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(limit)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        # Some systems have no limit of addresses; the other one holds there.
        if limit != resource.RLIMIT_AS or sys.platform == "linux":
            resource.setrlimit(limit, (most, most))


def _build_environment() -> Any:
    """As transformers has it: the same sandbox, options, filter and functions."""
    import datetime

    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what the assistant says; here its body stands as it is."""

        tags = {"generation"}  # noqa: RUF012  (jinja2's form)

        def parse(self, parser: Any) -> nodes.Node | list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    # Chat templates write text for a tokenizer, not HTML.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _render_all(template: str, dialogues: Sequence[dict[str, Any]]) -> int:
    environment = _build_environment()
    try:
        compiled = environment.from_string(template)
        for dialogue in dialogues:
            length = 0
            for piece in compiled.generate(**dialogue):
                length += len(piece)
                if length > MOST_CHARACTERS:
                    return _TOO_LONG
    except MemoryError:
        return _TOO_MUCH
    except Exception:  # whatever it is, it comes again where it can be told
        return 0
    return 0


def main() -> int:
    given = json.load(sys.stdin)
    _set_limits()
    return _render_all(given["template"], given["dialogues"])


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # what a hostile template has left behind is not even tidied up
