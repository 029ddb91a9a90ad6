"""Calls that are never made here, as far as ruff's rules S (pyproject.toml) do not know them: SECURITY.md says why."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
# What reads these can be made to run code by what it reads.
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
READERS = {"read_pickle", "load_pickle"}
AUTO = {"from_pretrained"}


def problems_of(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"line {node.lineno}: {name}" for name in names if name.partition(".")[0] in PICKLES)
        elif isinstance(node, ast.Call):
            yield from (f"line {node.lineno}: {problem}" for problem in _of_call(node))


def _of_call(call: ast.Call) -> Iterator[str]:
    name = ast.unparse(call.func)
    last = name.rpartition(".")[2]
    given = {word.arg: ast.unparse(word.value) for word in call.keywords if word.arg}
    if given.get("trust_remote_code", "False") != "False":
        yield "trust_remote_code"
    if last in AUTO and name.split(".")[0].startswith("Auto") and "trust_remote_code" not in given:
        yield f"{name} asks at the terminal unless trust_remote_code is False"
    if given.get("allow_pickle", "True" if name in ("np.load", "numpy.load") else "False") != "False":
        yield f"{name} without allow_pickle=False"
    if name == "torch.load" or last in READERS:
        yield name
    if last == "extractall" and given.get("filter") != "'data'":
        yield "extractall without filter='data'"
    if given.get("verify", "True") == "False":
        yield "verify=False"
    if given.get("follow_redirects", "False") != "False":
        yield "follow_redirects sends a key to whom the server names"


def test_no_call_that_runs_what_it_reads() -> None:
    found = [
        f"{path.relative_to(REPO)}: {problem}"
        for folder in ("drift_jax", "scripts")
        for path in sorted((REPO / folder).rglob("*.py"))
        for problem in problems_of(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


def tokenizers_in(source: str) -> set[str]:
    """Ways round `ChatTokenizer`, by which text of a message could become a control token."""
    names = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    found = {name for name in names if name == "apply_chat_template" or "Tokenizer" in name}
    return found - {"ChatTokenizer"}


def test_text_becomes_ids_in_one_place() -> None:
    """Sampler, showcase, evaluation and pairs have one guard against control tokens that are spelled out."""
    package = REPO / "drift_jax"
    found = [path for path in package.rglob("*.py") if tokenizers_in(path.read_text(encoding="utf-8"))]
    assert sorted(str(path.relative_to(package)) for path in found) == ["data/chat_template.py", "data/tokenizer.py"]
    template = (package / "data" / "chat_template.py").read_text(encoding="utf-8")  # dialogues to text, no further
    assert template.count("apply_chat_template(") == template.count("tokenize=False") == 1
    assert tokenizers_in("transformers.AutoTokenizer.from_pretrained(a)") and tokenizers_in("t.apply_chat_template(m)")


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "np.load(path)",
        "numpy.load(path, allow_pickle=True)",
        "np.savez(file, allow_pickle=True)",
        "AutoTokenizer.from_pretrained(folder)",
        "load_dataset(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(folder, trust_remote_code=flag)",
        "pd.read_pickle(path)",
        "torch.load(path)",
        "archive.extractall(folder)",
        "httpx2.Client(verify=False)",
        "httpx2.Client(follow_redirects=True)",
    ],
)
def test_the_check_can_fail(line: str) -> None:
    assert list(problems_of(line))
    assert not list(
        problems_of("np.load(path, allow_pickle=False); json.load(file); archive.extractall(a, filter='data')")
    )
