"""Text to token ids and back, for a client without torch or transformers.

1. What a peer's files hold raises PeerFault at worst; what a user or a template asks, BadInput.
2. `Tokens` gives the ids that transformers' AutoTokenizer gives, special tokens included.
3. The pieces of a `TextStream` concatenate to the decoded text, and none ends inside a character.
4. What a `StopScanner` lets through holds no stop and no beginning of one, however it is cut.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from swarm.errors import BadInput, PeerFault

UNKNOWN_CHARACTER = "\N{REPLACEMENT CHARACTER}"  # what half a character decodes to

_NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")

_LETTERS = sorted(ByteLevel.alphabet())  # a byte that is no letter has one beyond the 256
_OTHERS = sorted(set(range(256)) - set(map(ord, _LETTERS)))
_BYTE_OF = dict(zip(_LETTERS, [*sorted(set(range(256)) - set(_OTHERS)), *_OTHERS], strict=True))


class Tokens:
    """The model's tokenizer, as its own files describe it."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        """Read tokenizer.json, and tokenizer_config.json, special_tokens_map.json and
        chat_template.jinja if they are there. PeerFault when one is missing or malformed.
        """
        if "tokenizer.json" not in files:
            raise PeerFault("the model has no tokenizer.json")
        config = _json_object(files, "tokenizer_config.json")
        if "added_tokens_decoder" not in config:  # transformers reads the map of older models only
            config |= _json_object(files, "special_tokens_map.json")
        with _blamed("the model's tokenizer.json cannot be read"):
            self._tokenizer = Tokenizer.from_buffer(files["tokenizer.json"])
        with _blamed("the model's tokenizer_config.json cannot be applied"):
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            self._tokenizer.encode_special_tokens = config.get("split_special_tokens") is True
            self.special_tokens = _name_special_tokens(self._tokenizer, config)
        self.chat_templates = _chat_templates(files, config)
        self._special_ids = frozenset(
            token for token, entry in self._added().items() if entry.special
        )
        self._has_byte_runs = b'"ByteFallback"' in files["tokenizer.json"]

    @property
    def chat_template(self) -> str | None:
        """The model's chat template, the default one of several."""
        return self.chat_templates.get("default")

    def template_for(self, *, has_tools: bool = False) -> str | None:
        """The template of a chat, where there are tools the one for them; None of a model without.

        BadInput if there are several and none of them is for this.
        """
        found = self.chat_templates.get("tool_use") if has_tools else None
        if found is None and self.chat_templates:
            found = self.chat_template
            if found is None:
                names = ", ".join(sorted(self.chat_templates))
                raise BadInput(
                    f"the model has several chat templates ({names}) and none is its default",
                    next_step="complete a text without one, or call the one that should be default",
                )
        return found

    def encode(self, text: str, *, with_ends: bool = True) -> list[int]:
        """Return the ids of `text`; `with_ends` adds the special tokens that the model expects
        around it (a rendered chat already holds them). BadInput if the text has no ids.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadInput("the text holds bytes that are no characters in UTF-8") from error
        with _blamed("the model's tokenizer cannot encode this text"):
            return list(self._tokenizer.encode(text, add_special_tokens=with_ends).ids)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Return the text of `ids`. Ids that the tokenizer does not know are left out."""
        with _blamed("the model's tokenizer cannot decode these ids"):
            return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)

    def has_text(self, token: int, *, skip_special: bool = True) -> bool:
        """Tell whether `decode` takes any notice of this id."""
        if skip_special and token in self._special_ids:
            return False
        return self._tokenizer.id_to_token(token) is not None

    @property
    def size(self) -> int:
        """One more than the highest id, added tokens included."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def written(self) -> str:
        """Return the tokenizer as the text of a tokenizer.json, added tokens included."""
        return self._tokenizer.to_str()

    def is_byte(self, token: int) -> bool:
        """Tell whether the id is one byte whose text depends on the bytes next to it."""
        if not self._has_byte_runs:
            return False
        text = self._tokenizer.id_to_token(token)
        return text is not None and _BYTE_TOKEN.fullmatch(text) is not None

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes that the id stands for, which may be a part of a character only."""
        text = self.decode([token], skip_special=False)
        piece = self._tokenizer.id_to_token(token)
        if piece is None or UNKNOWN_CHARACTER not in text:
            return text.encode()
        if self.is_byte(token):
            return bytes.fromhex(piece[3:5])
        known = all(letter in _BYTE_OF for letter in piece)
        return bytes(_BYTE_OF[letter] for letter in piece) if known else text.encode()

    def _added(self) -> Mapping[int, AddedToken]:
        added: Mapping[int, AddedToken] = self._tokenizer.get_added_tokens_decoder()
        return added


class TextStream:
    """Text as it comes, token by token, in pieces.

    All pieces together are `decode(prompt + fed)` without its beginning `decode(prompt)`; a
    character that the prompt left unfinished belongs to the stream. Give no prompt to get what
    `decode(fed)` gives, without the space that some tokenizers put before a first word.

    Only the last few ids are decoded again: `_window` ends with all ids since the last clean place
    (where nothing was held back, `_clean`), and begins with ids shown before that give context.
    """

    def __init__(
        self, tokens: Tokens, prompt_ids: Sequence[int] = (), *, skip_special: bool = True
    ) -> None:
        self._tokens = tokens
        self._skips = skip_special
        self._window = self._heard(prompt_ids)
        self._clean = 0
        self._shown = self._decode(self._window).rstrip(UNKNOWN_CHARACTER)

    def feed(self, ids: Iterable[int]) -> str:
        """Return the text that these ids make certain, maybe none."""
        new = self._heard(ids)
        if not new:
            return ""
        self._window += new
        certain = self._certain_ids()
        text = self._decode(self._window[:certain])
        stable = text.rstrip(UNKNOWN_CHARACTER)
        if not stable.startswith(self._shown):  # held back, or rewritten: `finish` will tell
            return ""
        piece = stable[len(self._shown) :]
        self._shown = stable
        if certain == len(self._window) and stable == text:
            self._narrow()
        return piece

    def finish(self) -> str:
        """Return what was held back. Nothing may be fed after it."""
        text = self._decode(self._window)
        piece = text[_shared_length(text, self._shown) :]
        self._shown = text
        return piece

    def _heard(self, ids: Iterable[int]) -> list[int]:
        return [token for token in ids if self._tokens.has_text(token, skip_special=self._skips)]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokens.decode(ids, skip_special=self._skips)

    def _certain_ids(self) -> int:
        """How many ids of the window precede a run of bytes at its end, which is decoded anew with
        each byte: one wrong byte turns all characters of the run into unknown ones.
        """
        count = len(self._window)
        while count > 0 and self._tokens.is_byte(self._window[count - 1]):
            count -= 1
        return count

    def _narrow(self) -> None:
        """Forget the context before the last clean place, if what follows it can be the context:
        it must have text of its own, or a decoder might strip the next id's space as a first one.
        """
        context = self._window[self._clean :]
        shown = self._decode(context)
        if shown:
            self._window, self._shown, self._clean = context, shown, len(context)


class StopScanner:
    """Lets text through up to the first stop: the one that is complete first, of several that end
    at the same place the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """BadInput if a stop is empty."""
        if not all(stops):
            raise BadInput("a stop must have at least one character")
        self._stops = tuple(sorted(stops, key=len, reverse=True))
        self._held = ""
        self.matched: str | None = None

    def feed(self, piece: str) -> str:
        """Return the text that is certainly before any stop; `matched` tells when one came."""
        if self.matched is not None:
            return ""
        text = self._held + piece
        ends = [(text.find(stop) + len(stop), stop) for stop in self._stops if stop in text]
        if ends:
            end, self.matched = min(ends, key=lambda found: found[0])  # the longest comes first
            self._held = ""
            return text[: end - len(self.matched)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """Return what was held back, when generation ended without a stop."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def _shared_length(one: str, other: str) -> int:
    """The length of the longest common beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _json_object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        value = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise PeerFault(f"the model's {name} is not JSON") from error
    if not isinstance(value, dict):
        raise PeerFault(f"the model's {name} is not an object")
    return value


@contextmanager
def _blamed(sentence: str) -> Iterator[None]:
    """Turn what the tokenizers library raises into PeerFault.

    It raises bare Exception for everything, and a panic of its Rust code is a BaseException.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise PeerFault(f"{sentence}: {error}") from error
        raise


def _name_special_tokens(tokenizer: Tokenizer, config: Mapping[str, Any]) -> dict[str, str]:
    """Return the special tokens that `config` names, by their names; add those that the tokenizer
    does not hold as added tokens, or not as `added_tokens_decoder` has them, in the order of
    transformers.
    """
    named = {name: config[name] for name in _NAMED_TOKENS if config.get(name)}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    of_the_model = extra if isinstance(extra, dict) else {}
    named |= {
        name: value for name, value in {**config, **of_the_model}.items() if _names(name, value)
    }
    listed = config.get("added_tokens_decoder") or {}
    wanted = [listed[key] for key in sorted(listed, key=int)] + list(named.values())
    named_end = len(wanted)
    wanted += [] if isinstance(extra, dict) else extra
    held = {entry.content: repr(entry) for entry in tokenizer.get_added_tokens_decoder().values()}
    contents = {_added_token(value, is_special=True).content for value in named.values()}
    for place, value in enumerate(wanted):
        token = _added_token(value, is_special=place >= len(listed) and place < named_end)
        is_other = place < len(listed) and repr(token) != held.get(token.content)
        if is_other or token.content not in held:
            token.special |= token.content in contents
            held[token.content] = repr(token)
            add = tokenizer.add_special_tokens if token.special else tokenizer.add_tokens
            add([token])
    return {name: _added_token(value, is_special=True).content for name, value in named.items()}


def _names(name: str, value: Any) -> bool:
    """Tell whether this entry of a config names a special token of the model's own."""
    return name.endswith("_token") and isinstance(value, str) and name not in _NAMED_TOKENS


def _added_token(value: Any, *, is_special: bool) -> AddedToken:
    if isinstance(value, str):
        return AddedToken(value, special=True)
    special = is_special or bool(value.get("special"))
    named = ("single_word", "lstrip", "rstrip", "normalized")
    flags = {name: bool(value[name]) for name in named if name in value}
    return AddedToken(value["content"], special=special, **flags)


def _chat_templates(files: Mapping[str, bytes], config: Mapping[str, Any]) -> dict[str, str]:
    """The model's chat templates by name: its own file, else those of tokenizer_config."""
    if "chat_template.jinja" in files:
        try:
            return {"default": files["chat_template.jinja"].decode()}
        except UnicodeDecodeError as error:
            raise PeerFault("the model's chat_template.jinja is not UTF-8") from error
    told = config.get("chat_template")
    listed = told if isinstance(told, list) else [{"name": "default", "template": told}]
    entries = [entry for entry in listed if isinstance(entry, dict)]
    named = {str(entry.get("name")): entry.get("template") for entry in entries}
    return {name: template for name, template in named.items() if isinstance(template, str)}
