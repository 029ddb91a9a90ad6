"""Dialogues to ids: equal to transformers for ordinary text, and text never becomes a control token."""

from __future__ import annotations

import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from drift_jax.data.tokenizer import ChatTokenizer, _byte_of, check_vocab, load_tokenizer
from drift_jax.errors import DataError, ModelError
from drift_jax.records import Message, messages_to_rows, read_dsat
from tests.tiny import ADDED, CHAT_TEMPLATE, build_tiny_tokenizer

REPO = Path(__file__).parents[2]
REAL = [REPO / "../shared/data/dsat_real.jsonl", REPO / "data/sample/dsat.jsonl"]

# The shape of Qwen3's template in what matters here: it looks into messages, drops the reasoning of earlier
# turns, and puts an empty reasoning block (added tokens) before the last reply.
REASONING_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- set content = message.content.split('</tool_call>')[-1] | trim %}"
    "{%- if message.role == 'assistant' and loop.last %}"
    "{{- '<|im_start|>assistant\\n<tool_call>\\n\\n</tool_call>\\n\\n' + content + '<|im_end|>\\n' }}"
    "{%- else %}"
    "{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

# The same, and it may be told that a reply has no thought: then the prompt ends with the empty one.
THINKING_TEMPLATE = REASONING_TEMPLATE.removesuffix("{%- endif %}") + (
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<tool_call>\\n\\n</tool_call>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)

# A template that puts halves of a control token right around the message.
EMBRACING_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '<' + message.content | trim + '>' + '<|im_end|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant<' }}{%- endif %}"
)


def edit_json(path: Path, **changes: Any) -> None:
    value = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not ...}))


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_tokenizer(tmp_path_factory.mktemp("tiny"), vocab_size=512)


@pytest.fixture(scope="module")
def tiny(tiny_dir: Path) -> ChatTokenizer:
    return load_tokenizer(tiny_dir)


@pytest.fixture(scope="module")
def reasoning(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return with_template(tiny_dir, tmp_path_factory.mktemp("reasoning"), REASONING_TEMPLATE)


@pytest.fixture(scope="module")
def embracing(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return with_template(tiny_dir, tmp_path_factory.mktemp("embracing"), EMBRACING_TEMPLATE)


def with_template(tiny_dir: Path, directory: Path, template: str) -> ChatTokenizer:
    shutil.copytree(tiny_dir, directory, dirs_exist_ok=True)
    edit_json(directory / "tokenizer_config.json", chat_template=template)
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def demo(demo_model_dir: Path) -> ChatTokenizer:
    return load_tokenizer(demo_model_dir)


@pytest.fixture()
def variant(tiny_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the tiny tokenizer with keys of its JSON files changed (`...` removes a key)."""

    def build(config: dict[str, Any] | None = None, tokenizer: dict[str, Any] | None = None) -> Path:
        directory = tmp_path / "variant"
        shutil.copytree(tiny_dir, directory)
        edit_json(directory / "tokenizer_config.json", **(config or {}))
        edit_json(directory / "tokenizer.json", **(tokenizer or {}))
        return directory

    return build


def transformers_ids(directory: Path, messages: list[Message], add_generation_prompt: bool) -> list[int]:
    host = PreTrainedTokenizerFast.from_pretrained(directory)
    return host.apply_chat_template(
        messages_to_rows(messages),
        add_generation_prompt=add_generation_prompt,
        tokenize=True,
        return_dict=False,
    )


def control_ids_in(tokenizer: ChatTokenizer, ids: list[int]) -> list[int]:
    return [i for i in ids if i in tokenizer.control_ids]


def nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


# Pieces of control tokens, and what stands next to them in rendered dialogues.
fragments = st.sampled_from(
    [token[i:j] for token in ADDED for i, j in ((0, 99), (0, 2), (0, -1), (0, -2), (1, 99), (-2, 99), (2, -2))]
    + ["<", ">", "|", "\n", " ", "user\n", "assistant\n", "<|im_start|>assistant\n", "<|im_end|>\n", "\ue000"]
)
adversarial = st.lists(fragments | st.text(max_size=5), min_size=1, max_size=8).map("".join)
ordinary = st.text(max_size=40).filter(lambda text: not any(token in text for token in ADDED))


def dialogues(content: st.SearchStrategy[str]) -> st.SearchStrategy[list[Message]]:
    roles = st.sampled_from(
        [
            ("user",),
            ("system", "user"),
            ("user", "assistant", "user"),
            ("system", "user", "assistant", "user"),
        ]
    )
    return roles.flatmap(
        lambda names: st.tuples(*(st.builds(Message, st.just(name), content) for name in names)).map(list)
    )


# ------------------------------------------------------------------------- equal to transformers


@settings(max_examples=80, deadline=None)
@given(messages=dialogues(ordinary), cue=st.booleans())
def test_ordinary_text_equals_transformers(
    tiny: ChatTokenizer, tiny_dir: Path, messages: list[Message], cue: bool
) -> None:
    host = PreTrainedTokenizerFast.from_pretrained(tiny_dir)
    expected = host.apply_chat_template(
        messages_to_rows(messages), add_generation_prompt=cue, tokenize=True, return_dict=False
    )
    assert tiny.encode_chat(messages, add_generation_prompt=cue) == expected
    assert tiny.render(messages, cue) == host.apply_chat_template(
        messages_to_rows(messages), add_generation_prompt=cue, tokenize=False
    )


def test_default_system_message_and_merges_across_the_header(tiny: ChatTokenizer, tiny_dir: Path) -> None:
    """A leading newline of the message merges with that of the header: parts encoded apart would differ."""
    messages = [Message("user", "\n\n  def f(x):\n")]
    ids = tiny.encode_chat(messages)
    assert ids == transformers_ids(tiny_dir, messages, True)
    assert tiny.decode(ids, skip_special=False).startswith("<|im_start|>system\nYou are a small model")
    assert tiny.encode_text("user\n\n\n  def") != tiny.encode_text("user\n") + tiny.encode_text("\n\n  def")


@pytest.mark.parametrize("path", REAL, ids=["shared", "sample"])
@pytest.mark.parametrize("which", ["tiny", "demo"])
def test_real_conversations(path: Path, which: str, request: pytest.FixtureRequest) -> None:
    """Equal to transformers, and prompt + completion is the whole dialogue, split at one place."""
    if not path.exists():
        pytest.skip(f"{path} is not here")
    tokenizer: ChatTokenizer = request.getfixturevalue(which)
    host = PreTrainedTokenizerFast.from_pretrained(
        request.getfixturevalue("tiny_dir" if which == "tiny" else "demo_model_dir")
    )
    for record in read_dsat(path).records:
        prompt, reply = list(record.prompt), Message("assistant", record.rejected)
        ids = tokenizer.encode_chat(prompt)
        assert ids == host.apply_chat_template(messages_to_rows(prompt), add_generation_prompt=True, return_dict=False)
        before, whole = tokenizer.render(prompt, True), tokenizer.render([*prompt, reply], False)
        assert whole.startswith(before)
        completion = tokenizer.encode_completion(prompt, record.rejected)
        assert completion.count(tokenizer.turn_end_id) == 1
        both = tokenizer.decode(ids + completion, skip_special=False)
        assert both + "\n" == nfc(whole) if which == "tiny" else both + "\n" == whole


def test_tokenizer_json_is_loaded_as_it_is(variant: Callable[..., Path]) -> None:
    """A directory that says qwen2 and brings other pre-tokenizer rules: its own rules hold."""
    directory = variant(
        tokenizer={
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Digits", "individual_digits": True},
                    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
                ],
            }
        }
    )
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen2", "eos_token_id": 1}))
    text = "    best = items[0]\n    for item in items:\n        if item"
    whole = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    assert load_tokenizer(directory).encode_text(text) == whole


# ---------------------------------------------------------------------- text stays text


def check_text_stays_text(tokenizer: ChatTokenizer, messages: list[Message]) -> None:
    benign = [Message(message.role, "x") for message in messages]
    ids = tokenizer.encode_chat(messages)
    assert control_ids_in(tokenizer, ids) == control_ids_in(tokenizer, tokenizer.encode_chat(benign))
    normal = [Message(message.role, nfc(message.content)) for message in messages]
    assert tokenizer.decode(ids, skip_special=False) == tokenizer.render(normal, True)
    assert all(message.content in tokenizer.render(messages, True) for message in messages)


@settings(max_examples=120, deadline=None)
@given(messages=dialogues(adversarial))
def test_messages_never_become_control_tokens(tiny: ChatTokenizer, messages: list[Message]) -> None:
    check_text_stays_text(tiny, messages)


@settings(max_examples=80, deadline=None)
@given(messages=dialogues(adversarial), reply=adversarial)
def test_replies_never_become_control_tokens(tiny: ChatTokenizer, messages: list[Message], reply: str) -> None:
    ids = tiny.encode_completion(messages, reply)
    assert control_ids_in(tiny, ids) == [tiny.turn_end_id]
    assert ids[-1] == tiny.turn_end_id
    assert tiny.decode(ids[:-1], skip_special=False) == nfc(reply)


@settings(max_examples=120, deadline=None)
@given(text=adversarial)
def test_plain_text_never_becomes_control_tokens(tiny: ChatTokenizer, text: str) -> None:
    ids = tiny.encode_text(text)
    assert control_ids_in(tiny, ids) == []
    assert tiny.decode(ids) == nfc(text)


@pytest.mark.parametrize("token", ADDED)
def test_every_added_token_stays_text(tiny: ChatTokenizer, token: str) -> None:
    """The same text, straight through the tokenizer, is the control id: what must not happen."""
    assert len(tiny._backend.encode(token, add_special_tokens=False).ids) == 1
    check_text_stays_text(tiny, [Message("user", f"a{token}\n{token}b")])


def test_demo_tokenizer_keeps_text(demo: ChatTokenizer) -> None:
    """SmolLM2 has its control tokens inside the BPE vocabulary too, where no merge leads to them."""
    for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<file_sep>", "<jupyter_code>"):
        check_text_stays_text(demo, [Message("user", f"{token}system\n{token}"), Message("assistant", token)])
        assert demo.decode(demo.encode_text(token)) == token


def check_no_control_tokens_added(tokenizer: ChatTokenizer, messages: list[Message]) -> None:
    benign = [Message(message.role, "x") for message in messages]
    assert control_ids_in(tokenizer, tokenizer.encode_chat(messages)) == control_ids_in(
        tokenizer, tokenizer.encode_chat(benign)
    )
    reply = messages[-1].content
    assert control_ids_in(tokenizer, tokenizer.encode_completion(messages, reply)) == control_ids_in(
        tokenizer, tokenizer.encode_completion(benign, "x")
    )


@settings(max_examples=60, deadline=None)
@given(messages=dialogues(adversarial))
def test_template_that_looks_into_messages(reasoning: ChatTokenizer, messages: list[Message]) -> None:
    check_no_control_tokens_added(reasoning, messages)


@settings(max_examples=60, deadline=None)
@given(messages=dialogues(adversarial))
def test_template_that_embraces_messages(embracing: ChatTokenizer, messages: list[Message]) -> None:
    check_no_control_tokens_added(embracing, messages)


@pytest.mark.parametrize(
    "content",
    ["|im_end|", " |im_end|\n", "|im_end|> x", "\n|im_end|> x", "x <|im_end|", "x <|im_end| \n", "/tool_call"],
)
def test_control_token_half_from_the_template(content: str, embracing: ChatTokenizer) -> None:
    """This template writes `<` and `>` around the stripped message; the spelled-out whole is text."""
    whole = f"<{content.strip()}>"
    assert any(token in whole for token in ADDED)
    check_no_control_tokens_added(embracing, [Message("user", content)])
    assert whole in embracing.render([Message("user", content)], True)


def test_ordinary_text_reaches_the_template_untouched(variant: Callable[..., Path]) -> None:
    """Some templates switch modes on words in a message: that must go on working."""
    switch = CHAT_TEMPLATE + "{{- '#' if '/no_think' in messages[0]['content'] else '' }}"
    tokenizer = load_tokenizer(variant(config={"chat_template": switch}))
    assert tokenizer.render([Message("user", "Hi /no_think")], True).endswith("#")


def test_a_template_may_be_told_that_there_are_no_thoughts(tiny_dir: Path, tmp_path: Path, tiny: ChatTokenizer) -> None:
    """Else the policy thinks where its prompt ends, and the logged reply begins with a thought that it never had."""
    asked = [Message("user", "Hi")]
    thinking = with_template(tiny_dir, tmp_path / "m", THINKING_TEMPLATE)
    told = load_tokenizer(tmp_path / "m", "none")
    empty = "<tool_call>\n\n</tool_call>\n\n"
    shown = [
        [t.decode(ids, skip_special=False) for ids in (t.encode_chat(asked)[-6:], t.encode_completion(asked, "Hello"))]
        for t in (thinking, told)
    ]
    assert shown[0][0].endswith("<|im_start|>assistant\n") and shown[0][1] == f"{empty}Hello<|im_end|>"
    assert shown[1][0].endswith(empty) and shown[1][1] == "Hello<|im_end|>"
    whole = [*asked, Message("assistant", "Hello")]
    assert thinking.encode_chat(whole, False) == told.encode_chat(whole, False)
    assert thinking.content_hash != told.content_hash
    # One that does not ask is as before.
    assert load_tokenizer(tiny_dir, "none").content_hash == tiny.content_hash


def test_replies_that_think_need_the_template_s_own_way(tiny_dir: Path, tmp_path: Path) -> None:
    """A logged reply that brings its thought does not begin with an empty one; some templates write none at all."""
    takes = "message.content.split('</tool_call>')[-1] | trim", "message.content | trim"
    bare = "<tool_call>\\n\\n</tool_call>\\n\\n' + content", "' + content"
    whole = THINKING_TEMPLATE.replace(*takes).replace(*bare)
    with_template(tiny_dir, tmp_path / "m", whole)
    with pytest.raises(ModelError, match="cannot be told apart.* Set data.thinking to template for this model"):
        load_tokenizer(tmp_path / "m", "none")
    # An empty thought unless the reply has one of its own.
    own = "{%- if 'Thought:' in content %}{{- '<|im_start|>assistant\\n' + content + '<|im_end|>\\n' }}{%- elif "
    asks = THINKING_TEMPLATE.replace(*takes).replace("{%- if message.role", own + "message.role", 1)
    with_template(tiny_dir, tmp_path / "asks", asks)
    asked, reply = [Message("user", "Hi")], "Thought: Hm.\n\nHello"
    with pytest.raises(DataError, match="data.thinking: template takes replies that bring thoughts of their own"):
        load_tokenizer(tmp_path / "asks", "none").encode_reply(asked, reply)
    assert load_tokenizer(tmp_path / "asks").encode_reply(asked, reply)


def test_reasoning_template_splits(reasoning: ChatTokenizer) -> None:
    ids = reasoning.encode_completion([Message("user", "Hi")], " Hello ")
    assert reasoning.decode(ids, skip_special=False) == "<tool_call>\n\n</tool_call>\n\nHello<|im_end|>"


def test_control_token_that_begins_like_another(variant: Callable[..., Path], tiny_dir: Path) -> None:
    """The longer one counts, as in transformers."""
    tokens = json.loads((tiny_dir / "tokenizer.json").read_text())["added_tokens"]
    longer = {**tokens[-1], "id": 512, "content": "<|im_start|>assistant"}
    directory = variant(tokenizer={"added_tokens": [*tokens, longer]})
    tokenizer = load_tokenizer(directory)
    ids = tokenizer.encode_chat([Message("user", "Hi")])
    assert ids == transformers_ids(directory, [Message("user", "Hi")], True)
    assert 512 in ids


def test_whole_words_from_the_vocabulary(variant: Callable[..., Path], tiny_dir: Path) -> None:
    """Llama 3's `ignore_merges` looks whole words up in the vocabulary; control tokens may stand there."""
    spec = json.loads((tiny_dir / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in spec["added_tokens"]}
    model = {**spec["model"], "ignore_merges": True, "vocab": {**spec["model"]["vocab"], **ids}}
    one_word = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer = load_tokenizer(variant(tokenizer={"model": model, "pre_tokenizer": one_word}))
    for token in ADDED:
        assert control_ids_in(tokenizer, tokenizer.encode_text(token)) == []
        assert tokenizer.decode(tokenizer.encode_text(token)) == token


# ------------------------------------------------------------------------------- ids that end and fill


def test_ids_of_the_tiny_tokenizer(tiny: ChatTokenizer) -> None:
    assert tiny.vocab_size == 512
    assert tiny.turn_end_id == 509
    assert tiny.eos_ids == (509, 507)
    assert tiny.pad_id == 507
    assert tiny.control_ids == frozenset(range(507, 512))


def test_ids_of_the_demo_model(demo: ChatTokenizer) -> None:
    assert (demo.vocab_size, demo.turn_end_id, demo.eos_ids, demo.pad_id) == (49152, 2, (2,), 2)


@pytest.mark.parametrize(
    ("generation", "model", "config", "eos", "pad"),
    [
        # A base model: its tokenizer and config name another token than the one that ends a turn.
        (None, {"eos_token_id": 507}, {"eos_token": "<|endoftext|>", "pad_token": None}, (509, 507), 509),
        ({"eos_token_id": 511}, {"eos_token_id": [507, 510]}, {}, (509, 511, 507, 510), 507),
        ({"eos_token_id": None, "pad_token_id": 5}, {}, {"pad_token": None, "eos_token": None}, (509,), 5),
        ({}, {}, {"eos_token": "</s>", "pad_token": "<pad>"}, (509,), 509),  # not in the vocabulary
        ({}, {}, {"eos_token": {"content": "<|endoftext|>"}, "pad_token": {"content": "!"}}, (509, 507), 0),
    ],
)
def test_eos_ids_are_the_union(
    generation: Any, model: Any, config: Any, eos: Any, pad: int, variant: Callable[..., Path]
) -> None:
    directory = variant(config=config)
    (directory / "generation_config.json").unlink()
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    (directory / "config.json").write_text(json.dumps(model))
    tokenizer = load_tokenizer(directory)
    assert tokenizer.eos_ids == eos
    assert tokenizer.pad_id == pad


def test_decode_skips_special_tokens_only(tiny: ChatTokenizer) -> None:
    ids = [508, *tiny.encode_text("Hi"), 510, 509]
    assert tiny.decode(ids) == "Hi<tool_call>"
    assert tiny.decode(ids, skip_special=False) == "<|im_start|>Hi<tool_call><|im_end|>"


# ----------------------------------------------------------------------------------- chat templates


@pytest.mark.parametrize("source", ["config", "named", "jinja", "json", "jinja before config"])
def test_where_the_template_comes_from(source: str, variant: Callable[..., Path], tiny: ChatTokenizer) -> None:
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHAT_TEMPLATE}]
    in_config = {"config": CHAT_TEMPLATE, "named": named, "jinja before config": "wrong"}
    directory = variant(config={"chat_template": in_config.get(source, ...)})
    if source.startswith("jinja"):
        (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    if source == "json":
        (directory / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    messages = [Message("user", "Hi")]
    assert load_tokenizer(directory).encode_chat(messages) == tiny.encode_chat(messages)


def test_template_may_refuse_a_dialogue(variant: Callable[..., Path]) -> None:
    refusing = "{%- if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{%- endif %}"
    tokenizer = load_tokenizer(variant(config={"chat_template": refusing + CHAT_TEMPLATE}))
    with pytest.raises(DataError, match="the chat template refuses this dialogue: no system"):
        tokenizer.encode_chat([Message("system", "s"), Message("user", "u")])


def test_half_of_a_surrogate_pair_is_refused(variant: Callable[..., Path]) -> None:
    """JSON has none, but an escape in a template's own string makes one."""
    writing = "{% if messages[0].content == 'cut' %}{{ '\\ud83d' }}{% endif %}"
    tokenizer = load_tokenizer(variant(config={"chat_template": writing + CHAT_TEMPLATE}))
    tokenizer.encode_chat([Message("user", "whole \U0001f600")])
    with pytest.raises(DataError, match="writes half of a surrogate pair, which no tokenizer can take"):
        tokenizer.encode_chat([Message("user", "cut")])


def test_template_that_rewrites_the_prompt(variant: Callable[..., Path]) -> None:
    counting = "{{- 'turns: ' + messages | length | string + '\\n' }}" + CHAT_TEMPLATE
    tokenizer = load_tokenizer(variant(config={"chat_template": counting}))
    with pytest.raises(DataError, match=r"cannot be told apart: '1.*' became '2"):
        tokenizer.encode_completion([Message("user", "Hi")], "Hello")


# ------------------------------------------------------------------------------------- what is refused


def test_missing_template(variant: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match=r"variant has no chat template: looked for .*Instruct model"):
        load_tokenizer(variant(config={"chat_template": ...}))


def test_missing_directory_and_files(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="none is not a model directory: a tokenizer.json is needed"):
        load_tokenizer(tmp_path / "none")
    (tmp_path / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be loaded"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_cut_off_file(name: str, variant: Callable[..., Path]) -> None:
    directory = variant()
    path = directory / name
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(
        ModelError, match=f"{path} cannot be loaded" if name == "tokenizer.json" else f"{path} is not JSON: "
    ):
        load_tokenizer(directory)


NO_TURN_END = "{%- for m in messages %}{{- m.role + ': ' + m.content + '\\n' }}{%- endfor %}{{- 'assistant: ' }}"


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (NO_TURN_END, "must open an assistant turn .* and end it with an added token"),
        (CHAT_TEMPLATE.partition("{%- if add_gen")[0], "must open an assistant turn"),
        ("{%- for m in %}", "the chat template cannot render a question and its answer"),
        ("{{ raise_exception('never') }}", "cannot render a question and its answer: never"),
    ],
)
def test_unusable_template(template: str, why: str, variant: Callable[..., Path]) -> None:
    directory = variant(config={"chat_template": template})
    with pytest.raises(ModelError, match=why) as caught:
        load_tokenizer(directory)
    assert str(directory) in str(caught.value)


def test_added_token_that_swallows_text_around_it(variant: Callable[..., Path], tiny_dir: Path) -> None:
    tokens = json.loads((tiny_dir / "tokenizer.json").read_text())["added_tokens"]
    directory = variant(tokenizer={"added_tokens": [{**token, "rstrip": True} for token in tokens]})
    with pytest.raises(ModelError, match="reach across control tokens"):
        load_tokenizer(directory)


def test_added_token_that_merges_also_make(variant: Callable[..., Path], tiny_dir: Path) -> None:
    spec = json.loads((tiny_dir / "tokenizer.json").read_text())
    word = max(spec["model"]["vocab"], key=len)
    extra = {**spec["added_tokens"][-1], "id": spec["model"]["vocab"][word], "content": word}
    with pytest.raises(ModelError, match="cannot be told from text"):
        load_tokenizer(variant(tokenizer={"added_tokens": [extra, *spec["added_tokens"]]}))


def test_other_tokenizer_models(variant: Callable[..., Path]) -> None:
    model = {"type": "WordLevel", "vocab": {"a": 0, "<unk>": 1}, "unk_token": "<unk>"}
    with pytest.raises(ModelError, match="the tokenizer's model is WordLevel; only BPE is read"):
        load_tokenizer(variant(tokenizer={"model": model}))


@pytest.mark.parametrize("value", ["<|im_end|>", [1, "2"], -1, 1.5, True])
def test_eos_that_is_no_id(value: Any, variant: Callable[..., Path]) -> None:
    directory = variant()
    edit_json(directory / "generation_config.json", eos_token_id=value)
    with pytest.raises(ModelError, match="eos_token_id must be a token id or a list of them"):
        load_tokenizer(directory)


def test_vocabularies_that_do_not_fit(tiny: ChatTokenizer) -> None:
    check_vocab(tiny, 512)
    check_vocab(tiny, 640)  # models pad their embeddings
    with pytest.raises(ModelError, match=r"has 512 ids, the model has embeddings for 511: .*do not belong"):
        check_vocab(tiny, 511)


def test_byte_without_a_token(variant: Callable[..., Path], tiny_dir: Path) -> None:
    """BPE drops such a byte without a word; SmolLM2's vocabulary lacks 21 of them."""
    spec = json.loads((tiny_dir / "tokenizer.json").read_text())
    vocab = {text: i for text, i in spec["model"]["vocab"].items() if text != "Ć"}  # byte 0x06
    directory = variant(tokenizer={"model": {**spec["model"], "vocab": vocab}})
    assert Tokenizer.from_file(str(directory / "tokenizer.json")).encode("a\x06b").tokens == ["a", "b"]
    tokenizer = load_tokenizer(directory)
    with pytest.raises(DataError, match=r"no token for byte 0x06 .*'a\\x06b' \(U\+0006\)"):
        tokenizer.encode_text("a\x06b")
    assert tokenizer.decode(tokenizer.encode_text("a\x05b")) == "a\x05b"


def test_byte_alphabet() -> None:
    """Against the pre-tokenizer itself, for every byte that occurs in UTF-8."""
    split = ByteLevel(add_prefix_space=False, use_regex=False)
    for text in map(chr, [*range(0x800), *range(0x800, 0xD800, 64), *range(0x10000, 0x110000, 4096)]):
        ((written, _),) = split.pre_tokenize_str(text)
        assert bytes(map(_byte_of, written)) == text.encode()
    assert sorted(map(_byte_of, ByteLevel.alphabet())) == list(range(256))


def test_bytes_of_the_demo_tokenizer(demo: ChatTokenizer) -> None:
    """What it cannot write is refused; everything else comes back."""
    refused = []
    for code in [*range(0x20), *range(0x7F, 0x180), 0x4E00, 0x1F642, 0xE0001, 0x40000, 0x10FFFF]:
        try:
            assert demo.decode(demo.encode_text(f"a{chr(code)}b")) == f"a{chr(code)}b"
        except DataError:
            refused.append(code)
    assert refused == [0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0x40000]


def test_directory_without_tokenizer_json(tiny_dir: Path, tiny: ChatTokenizer, tmp_path: Path) -> None:
    """The older files vocab.json and merges.txt: transformers builds the tokenizer by `model_type`."""
    spec = json.loads((tiny_dir / "tokenizer.json").read_text())
    added = {str(token.pop("id")): token for token in spec["added_tokens"]}
    for name in ("tokenizer_config.json", "generation_config.json"):
        shutil.copy(tiny_dir / name, tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", added_tokens_decoder=added)
    (tmp_path / "vocab.json").write_text(json.dumps(spec["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(merge) for merge in spec["model"]["merges"]))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    messages = [Message("user", "How do I sort <tool_call>?")]
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode_chat(messages) == tiny.encode_chat(messages)
    assert tokenizer.vocab_size == tiny.vocab_size
