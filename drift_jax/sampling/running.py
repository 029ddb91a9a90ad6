"""Servers that others run: which model they serve, and how they come to load new weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from drift_jax.config import RunConfig
from drift_jax.endpoint import Endpoint, Retry, is_local
from drift_jax.errors import ConfigError, EndpointError, ModelError
from drift_jax.models.hf import load_qwen_config
from drift_jax.sampling.server import needed_length

_REFUSED_KEY = (401, 403)


def full_url(url: str) -> str:
    """With the /v1 that OpenAI's protocol has."""
    url = url.rstrip("/")
    return url if url.endswith("/v1") else f"{url}/v1"


def find_model(endpoint: Endpoint, config: RunConfig) -> tuple[str, Path | None]:
    """(the server's name of its model, the directory or hub id that it was started with).

    Raises:
      ConfigError: the key is refused; no such model, or several; the server takes shorter prompts.
      EndpointError: it does not answer.
    """
    try:
        models = endpoint.get("/models").get("data", [])
    except EndpointError as error:
        if error.status in _REFUSED_KEY:
            raise ConfigError(
                f"{endpoint.base_url} refuses the API key ({error.status}). vllm.api_key_env names the environment "
                f"variable that holds it, now {config.vllm.api_key_env or 'none'!r}."
            ) from None
        raise
    names, wanted = [model.get("id") for model in models], config.vllm.served_name
    if wanted is None and len(names) != 1:
        raise ConfigError(f"{endpoint.base_url} serves {names}: name the policy with vllm.served_name.")
    if wanted is not None and wanted not in names:
        raise ConfigError(
            f"{endpoint.base_url} serves {names} and not {wanted!r}, which vllm.served_name asks for. Leave the key "
            "out to take the model that is served."
        )
    model = models[names.index(wanted or names[0])]
    longest, needed = model.get("max_model_len"), needed_length(config)
    if longest is not None and longest < needed:
        raise ConfigError(
            f"{endpoint.base_url} was started with --max-model-len {longest}; sampling.max_input_length + "
            f"max_new_tokens are {needed}. Restart it with a longer one, or lower these."
        )
    return model["id"], Path(model["root"]) if model.get("root") else None


def reload_weights(endpoint: Endpoint, root: Path | None, model_dir: Path, refresh: str) -> str | None:
    """Has a server load the weights of `model_dir` in place, if it offers that. What it then answers is to be proven.

    vLLM offers it where VLLM_SERVER_DEV_MODE=1 is set. A path that it cannot see would kill its engine, so by default
    only servers of this machine are asked.

    Args:
      root: what the server was started with.
      refresh: the config's vllm.refresh.

    Returns:
      None when the server has loaded them; else why it was not asked or would not.

    Raises:
      EndpointError: it failed half-way.
      ConfigError: it serves a model of other sizes.
    """
    if refresh == "restart":
        return "vllm.refresh is restart"
    if refresh == "auto" and not is_local(endpoint.base_url):
        return "it is on another machine, and vllm.refresh is not shared"
    check_same_model(endpoint, root, model_dir)
    control = endpoint.beside(endpoint.base_url.removesuffix("/v1"), Retry(attempts=1))
    with control:
        try:
            # Waits for what is in flight; and clears the cache of prefixes, which holds keys and values of old weights.
            control.post("/pause?mode=wait", {})
        except EndpointError as error:
            if error.status in (404, 405):
                return "it was started without VLLM_SERVER_DEV_MODE=1"
            raise
        try:
            path = {"weights_path": str(model_dir.absolute())}
            control.post("/collective_rpc", {"method": "reload_weights", "kwargs": path})
        finally:
            control.post("/resume", {})
    return None


def check_same_model(endpoint: Endpoint, root: Path | None, model_dir: Path) -> None:
    """Raises `ConfigError` when the server's model is one of other sizes, where its directory can be looked at.

    Weights of other shapes would leave the server with part of them.
    """
    if root is None or not (root / "config.json").exists():
        return
    try:
        theirs = load_qwen_config(root)
    except ModelError as error:
        raise ConfigError(f"{endpoint.base_url} serves another kind of model: {error}") from None
    theirs, ours = (replace(sizes, pad_token_id=None) for sizes in (theirs, load_qwen_config(model_dir)))
    if theirs != ours:
        raise ConfigError(
            f"{endpoint.base_url} serves {root}, a model of other sizes than {model_dir}: {theirs} there, {ours} here. "
            "Restart it with a directory of this run."
        )
