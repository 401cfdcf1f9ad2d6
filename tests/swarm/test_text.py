import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from swarm.errors import BadInput, PeerFault
from swarm.text import TextStream, Tokens

REPOSITORY = Path(__file__).resolve().parents[2]
CORPUS = [
    "Once upon a time, there was a little girl named Lily. She loved to play outside.",
    "Il était une fois, naïve et drôle; größer, schöner.",
    "日本語のテキスト と 中文文本 and русский текст 👩‍👩‍👧 🎉🎉",
] * 4
SENTENCES = [
    "Once upon a time, Lily played.",
    "  two spaces, a tab\t and a\n\nnew line ",
    "größe 日本語 👩‍👩‍👧 🎉 ẞ \u202e fine",
    "x",
    "",
    "<s>not a beginning</s>",
    "in <s> the </s> middle , played  fine <mask>",
]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=alphabet,
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS[:4], trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Llama 2's: a space before the first word, single bytes for unknown characters."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=380, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS[:1], trainer)
    described = json.loads(tokenizer.to_str())
    described["added_tokens"] = described["added_tokens"][:3]  # bytes are no added tokens
    return Tokenizer.from_str(json.dumps(described))


def metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200,
        special_tokens=["<unk>", "<s>", "</s>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


KINDS = {
    "byte level": byte_level,
    "byte fallback": byte_fallback,
    "metaspace": metaspace,
    "word piece": word_piece,
}
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}


@cache
def tokenizer_json(kind: str) -> bytes:
    return str(KINDS[kind]().to_str()).encode()


@cache
def tokens_of(kind: str) -> Tokens:
    config = json.dumps(NAMED).encode()
    return Tokens({"tokenizer.json": tokenizer_json(kind), "tokenizer_config.json": config})


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if "token" in path.name}


def expected_text(tokens: Tokens, prompt: list[int], ids: list[int]) -> str:
    """The law of TextStream, in its plainest form."""
    whole = tokens.decode(prompt + ids)
    begin = tokens.decode(prompt).rstrip("\ufffd")
    return whole[len(os.path.commonprefix([whole, begin])) :]  # noqa: RUF071 # of characters


def pieces_of(tokens: Tokens, prompt: list[int], groups: list[list[int]]) -> Iterator[str]:
    stream = TextStream(tokens, prompt)
    for group in groups:
        piece = stream.feed(group)
        assert not piece.endswith("\ufffd")
        yield piece
    yield stream.finish()


# the tokenizer


def assert_equals_transformers(folder: Path) -> None:
    tokens, theirs = Tokens(files_in(folder)), AutoTokenizer.from_pretrained(folder)
    assert tokens.special_tokens == theirs.special_tokens_map
    for text in SENTENCES:
        ids = tokens.encode(text)
        assert ids == theirs(text)["input_ids"]
        assert tokens.encode(text, with_ends=False) == theirs.encode(text, add_special_tokens=False)
        for skips in (True, False):
            decoded = theirs.decode(ids, skip_special_tokens=skips)
            assert tokens.decode(ids, skip_special=skips) == decoded


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"add_bos_token": True},
        {"add_bos_token": True, "add_eos_token": True},
        {"add_bos_token": False},
        {"pad_token": "<pad>", "additional_special_tokens": ["<tool>"]},
        {"unk_token": {"content": "<unk>", "lstrip": False, "__type": "AddedToken"}},
        {"pad_token": "fine"},
        {"image_token": "<image>", "extra_special_tokens": {"video_token": "fine"}},
        {"added_tokens_decoder": {"900": {"content": "ly", "special": False}}},
        *(
            {"added_tokens_decoder": {"1": {"content": "<s>", "special": True, flag: True}}}
            for flag in ("lstrip", "rstrip", "single_word", "normalized")
        ),
        {"added_tokens_decoder": {"1": {"content": "<s>", "special": False, "rstrip": True}}},
        {"added_tokens_decoder": {"9": {"content": "played", "special": True, "lstrip": True}}},
        {"bos_token": {"content": "<s>", "rstrip": True, "__type": "AddedToken"}},
        {"mask_token": {"content": "<mask>", "lstrip": True, "__type": "AddedToken"}},
        {
            "additional_special_tokens": [
                {"content": "fine", "rstrip": True, "__type": "AddedToken"}
            ]
        },
        {"extra_special_tokens": ["fine", "<new>"], "additional_special_tokens": ["Lily"]},
        {"split_special_tokens": True},
        {"add_prefix_space": True},
        {"add_prefix_space": False},
        {"model_max_length": 3, "padding_side": "left"},
    ],
    ids=str,
)
def test_ids_and_text_are_those_of_transformers(
    kind: str, more: dict[str, object], tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json(kind))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**NAMED, **more}))
    assert_equals_transformers(tmp_path)


def test_special_tokens_of_older_models_are_those_of_transformers(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json("metaspace"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(NAMED))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "Lily"}))
    assert Tokens(files_in(tmp_path)).special_tokens["bos_token"] == "Lily"
    assert_equals_transformers(tmp_path)


def test_truncation_and_padding_of_the_file_are_not_applied() -> None:
    tokenizer = Tokenizer.from_str(tokenizer_json("byte level").decode())
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokens = Tokens({"tokenizer.json": tokenizer.to_str().encode()})
    assert tokens.encode(SENTENCES[0]) == tokens_of("byte level").encode(SENTENCES[0])


def test_the_tokenizer_of_a_real_model_is_that_of_transformers(shared_data: Path) -> None:
    folder = shared_data / "stories260K"
    assert_equals_transformers(folder)
    assert Tokens(files_in(folder)).encode("Once upon a time")[0] == 1


def test_the_tokenizer_of_the_demo_model_is_that_of_transformers() -> None:
    folder = REPOSITORY / "swarm" / "demo"
    if not (folder / "tokenizer.json").is_file():
        pytest.skip("the demo model is not built")
    assert_equals_transformers(folder)


def test_ids_beyond_the_vocabulary_decode_to_nothing() -> None:
    assert tokens_of("byte level").decode([2**31 - 1, 5]) == tokens_of("byte level").decode([5])


def test_text_that_is_no_unicode_is_bad_input() -> None:
    with pytest.raises(BadInput):
        tokens_of("byte level").encode("caf\udce9")


def spoiled(**changes: object) -> bytes:
    return json.dumps({**json.loads(tokenizer_json("byte level")), **changes}).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"{" * 100_000,
        spoiled(model=None),
        spoiled(model={"type": "BPE", "vocab": {"a": -1}, "merges": []}),
        spoiled(model={"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}),
        spoiled(model={"type": "Unigram", "unk_id": 9, "vocab": [["a", 0.0]]}),
        spoiled(
            pre_tokenizer={"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated"}
        ),
        spoiled(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA"}),
        spoiled(decoder={"type": "Nothing"}),
    ],
    ids=range(11),
)
def test_a_malformed_tokenizer_is_the_peers_fault(data: bytes) -> None:
    with pytest.raises(PeerFault):
        Tokens({"tokenizer.json": data}).encode("some text")


@pytest.mark.parametrize(
    "config",
    [
        b"no json",
        b"[1]",
        b'{"bos_token": 3}',
        b'{"bos_token": {"no": "content"}}',
        b'{"bos_token": {"content": ["<s>"]}}',
        b'{"added_tokens_decoder": {"x": {}}}',
        b'{"added_tokens_decoder": [1]}',
        b'{"extra_special_tokens": 7}',
    ],
)
def test_a_malformed_tokenizer_config_is_the_peers_fault(config: bytes) -> None:
    with pytest.raises(PeerFault):
        Tokens({"tokenizer.json": tokenizer_json("metaspace"), "tokenizer_config.json": config})


def test_a_model_without_tokenizer_is_the_peers_fault() -> None:
    with pytest.raises(PeerFault, match=r"no tokenizer\.json"):
        Tokens({})


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"tokenizer_config.json": b'{"chat_template": "A"}'}, "A"),
        ({"tokenizer_config.json": b'{"chat_template": "A"}', "chat_template.jinja": b"B"}, "B"),
        (
            {
                "tokenizer_config.json": b'{"chat_template": [{"name": "tools", "template": "T"},'
                b'{"name": "default", "template": "D"}]}'
            },
            "D",
        ),
        ({"tokenizer_config.json": b'{"chat_template": [7, {"name": "rag"}]}'}, None),
    ],
)
def test_the_chat_template_is_found_where_models_keep_it(
    files: dict[str, bytes], expected: str | None
) -> None:
    files = {"tokenizer.json": tokenizer_json("metaspace"), **files}
    assert Tokens(files).chat_template == expected


SEVERAL = [{"name": name, "template": name[0]} for name in ("rag", "tool_use", "default")]


@pytest.mark.parametrize("has_tools", [False, True])
@pytest.mark.parametrize("names", [("default", "tool_use", "rag"), ("default",), ("tool_use",), ()])
def test_of_several_chat_templates_the_one_is_used_that_transformers_uses(
    names: tuple[str, ...], has_tools: bool, tmp_path: Path
) -> None:
    told = [entry for entry in SEVERAL if entry["name"] in (*names, "rag")]
    files = {
        "tokenizer.json": tokenizer_json("metaspace"),
        "tokenizer_config.json": json.dumps({"chat_template": told}).encode(),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokens(files)
    tools = [{}] if has_tools else None
    try:
        wanted = theirs.get_chat_template(tools=tools)
    except ValueError:
        with pytest.raises(BadInput, match=r"several chat templates \(rag.*\) and none is its"):
            ours.template_for(has_tools=has_tools)
    else:
        assert ours.template_for(has_tools=has_tools) == wanted


def test_a_model_without_a_chat_template_has_none_for_any_chat() -> None:
    ours = Tokens({"tokenizer.json": tokenizer_json("metaspace")})
    assert (ours.template_for(), ours.template_for(has_tools=True)) == (None, None)


# the stream


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_pieces_concatenate_to_the_decoded_text(kind: str, data: st.DataObject) -> None:
    tokens = tokens_of(kind)
    letters = st.sampled_from("ab Lily\n.éß日本語👩‍👩‍👧🎉")
    ids = tokens.encode(data.draw(st.text(letters | st.characters(codec="utf-8"))))
    cut = data.draw(st.integers(0, len(ids)))
    prompt, ids = ids[:cut], ids[cut:]
    size = data.draw(st.integers(1, 4))
    groups = [ids[start : start + size] for start in range(0, len(ids), size)]
    assert "".join(pieces_of(tokens, prompt, groups)) == expected_text(tokens, prompt, ids)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_even_ids_without_sense_are_streamed_as_they_decode(kind: str, data: st.DataObject) -> None:
    tokens = tokens_of(kind)
    some_ids = st.lists(st.integers(0, 420) | st.integers(0, 260), max_size=30)
    prompt, ids = data.draw(some_ids), data.draw(some_ids)
    pieces = pieces_of(tokens, prompt, [[token] for token in ids])
    assert "".join(pieces) == expected_text(tokens, prompt, ids)


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
def test_a_character_of_several_tokens_comes_as_one_piece(kind: str) -> None:
    tokens = tokens_of(kind)
    ids = tokens.encode("a 🎉 b", with_ends=False)
    assert len(ids) > 3
    pieces = [piece for piece in pieces_of(tokens, [], [[token] for token in ids]) if piece]
    assert "🎉" in "".join(pieces)
    assert all("\ufffd" not in piece for piece in pieces)


@pytest.mark.parametrize("kind", KINDS)
def test_words_are_given_as_soon_as_they_are_certain(kind: str) -> None:
    tokens = tokens_of(kind)
    ids = tokens.encode("Once upon a time there was a girl", with_ends=False)
    stream = TextStream(tokens)
    shown = ""
    for count, token in enumerate(ids, start=1):
        shown += stream.feed([token])
        assert shown == tokens.decode(ids[:count])


def test_a_first_word_keeps_its_space_after_a_prompt_and_loses_it_without() -> None:
    tokens = tokens_of("byte fallback")
    prompt, word = tokens.encode("Once"), tokens.encode("upon", with_ends=False)
    assert TextStream(tokens, prompt).feed(word) == " upon"
    assert TextStream(tokens).feed(word) == "upon"
    skipped = [token for token in tokens.encode("</s>", with_ends=False) if token == 2]
    assert TextStream(tokens, skipped).feed(word) == "upon"


def test_spaces_that_a_decoder_strips_at_the_beginning_stay_in_the_middle() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, " ": 1, "b": 2}, unk_token="a"))
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 2, 0)])
    tokens = Tokens({"tokenizer.json": tokenizer.to_str().encode()})
    stream = TextStream(tokens)
    pieces = [stream.feed([token]) for token in (1, 1, 1, 0, 1, 1, 1, 2)]
    assert "".join(pieces) == " a   b"


def test_a_long_text_is_decoded_a_few_ids_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = tokens_of("byte level")
    ids = tokens.encode(" ".join(CORPUS)) * 5
    longest = 0
    decode = tokens.decode

    def counted(ids: list[int], *, skip_special: bool = True) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(ids, skip_special=skip_special)

    monkeypatch.setattr(tokens, "decode", counted)
    stream = TextStream(tokens)
    for token in ids:
        stream.feed([token])
    assert longest < 20
