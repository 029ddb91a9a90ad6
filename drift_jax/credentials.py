"""Secrets stay in the environment: what a config, which is copied into every run folder, must not hold.

None of the messages here shows the value that it refuses.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator

_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]{0,63}")
_SECRET_NAME = re.compile(r"(^|_)(KEY|API_?KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)")
# How keys of the usual services begin.
_KEY = re.compile(r"\b(sk-|hf_|gh[opsu]_|github_pat_|glpat-|gsk_|xox[a-z]-|AKIA)[\w-]{16,}")
# Arguments of `vllm serve` that are no one's to give here, and why.
_REFUSED_OPTIONS = {
    "--trust-remote-code": "code of a model's repository is never run",
    "--host": "a server that is started here is for this machine alone",
    "--port": "vllm.port chooses it",
    "--api-key": "each start of a server has a random key of its own",
    "--hf-token": "the model is a directory, and secrets do not belong in a config",
    "--ssl-keyfile-password": "secrets do not belong in a config, nor in a list of processes",
    "--config": "its options are not seen here; give them one by one",
}
_NO_ADDRESS = "is no address of a server; write it as http://HOST:PORT/v1"
_SHORTEST = 4  # characters of an abbreviated option, such as --ho

# Keys of configs whose values no message repeats.
UNSHOWN = frozenset({"base_url", "base_urls", "api_key_env", "args", "env"})


def check_server_url(url: str) -> str:
    """Raises `ValueError` for an address of a server that holds a secret, or may, and for what is none."""
    try:
        parts = urlsplit(url)
        named = parts.username is not None or parts.password is not None
    except ValueError:
        raise ValueError(_NO_ADDRESS) from None
    if named or "@" in url:
        raise ValueError(
            "must not hold a user or password: configs are copied into run folders. Export the server's key in a "
            "variable and name that in api_key_env"
        )
    if parts.query or parts.fragment or "?" in url:
        raise ValueError(
            "must end with its path, without `?...` or `#...`, where keys often stand: configs are copied into run "
            "folders. Export the server's key in a variable and name that in api_key_env"
        )
    if url and not _can_be_asked(url):
        raise ValueError(_NO_ADDRESS)
    return url


def _can_be_asked(url: str) -> bool:
    """Whether the HTTP client and the system's resolver can make something of an address."""
    import httpx2  # here: most commands load a config and ask no server

    try:
        found = httpx2.URL(url)
        found.raw_host.decode("ascii").encode("idna")  # as the resolver does
        port = urlsplit(url).port  # at most 65535
    except (ValueError, httpx2.InvalidURL):
        return False
    # One without http:// is left to whoever knows which key it is of.
    return port != 0 and " " not in url and bool(found.raw_host or found.scheme not in ("http", "https"))


def check_variable_name(name: str) -> str:
    """Raises `ValueError` for what cannot be the name of an environment variable: it may be the key itself."""
    if name and (not _VARIABLE.fullmatch(name) or _KEY.match(name)):
        raise ValueError(
            "must be the NAME of an environment variable (capital letters, digits, _). If this is the key itself, "
            "export it in a variable, name that here, and have the key replaced: it has been in a file"
        )
    return name


def check_server_arguments(words: Sequence[str]) -> tuple[str, ...]:
    """Raises `ValueError` for arguments of `vllm serve` that would open it to others, run code, or show a key."""
    for word in words:
        name = word.partition("=")[0].replace("_", "-")
        # vLLM's parser takes every beginning of an option that no other has.
        for option, why in _REFUSED_OPTIONS.items():
            if len(name) >= _SHORTEST and option.startswith(name):
                raise ValueError(f"must not have {option}: {why}")
        if _KEY.search(word):
            raise ValueError("holds what looks like a key. Export it in the environment, which the server inherits")
    return tuple(words)


def check_server_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Raises `ValueError` for variables that hold secrets by their name or value."""
    for name, value in variables.items():
        if _SECRET_NAME.search(name.upper()) or _KEY.search(value):
            raise ValueError(
                f"must not have {name if not _KEY.search(name) else 'a key'}: configs are copied into run folders. "
                "Export it in the environment of the command, which the server inherits"
            )
    return dict(variables)


ServerUrl = Annotated[str, AfterValidator(check_server_url)]
VariableName = Annotated[str, AfterValidator(check_variable_name)]
ServerArguments = Annotated[tuple[str, ...], AfterValidator(check_server_arguments)]
ServerEnvironment = Annotated[dict[str, str], AfterValidator(check_server_environment)]


def found(key: Sequence[int | str], value: object) -> str:
    """The end of a message on a config key: `, found VALUE`, or nothing where the value may be a secret."""
    hidden = UNSHOWN & set(map(str, key)) and isinstance(value, str | list | dict)
    return "" if hidden else f", found {value!r}"
