"""What answers for a swarm in these tests, a tokenizer of characters, and a client without HTTP."""

import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import trio
from session_worlds import FINGERPRINT, VOCABULARY, World
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from swarm.client_session import ClientSession, Journal
from swarm.fetching import Model
from swarm.gateway.app import application
from swarm.gateway.attending import App
from swarm.gateway.settings import GatewaySettings
from swarm.messages import Output, Wish
from swarm.model_card import ANY_LENGTH, ModelCard
from swarm.record import PeerRecord
from swarm.text import Tokens
from swarm.wire import Tensor

END = 0
CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n"]  # ids 1 to 96
MODEL = "arithmetic"


def tokenizer() -> Tokenizer:
    """One id for each character, and END."""
    written = {" ": "\u0120", "\n": "\u010a"}  # as byte-level tokenizers write them
    vocabulary = {written.get(each, each): place + 1 for place, each in enumerate(CHARACTERS)}
    made = Tokenizer(models.BPE({"<end>": END, **vocabulary}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<end>"])
    return made


def tokens(template: Any = None) -> Tokens:
    config = {"eos_token": "<end>", **({"chat_template": template} if template else {})}
    return Tokens(
        {
            "tokenizer.json": tokenizer().to_str().encode(),
            "tokenizer_config.json": json.dumps(config).encode(),
        }
    )


def card(context: int = 512) -> ModelCard:
    return ModelCard(
        format=1,
        name="Architecture",
        model_type="none",
        blocks=4,
        hidden_size=1,
        vocabulary_size=VOCABULARY,
        context_length=context,
        end_of_sequence_ids=(END,),
    )


def model(template: Any = None) -> Model:
    return Model(fingerprint=FINGERPRINT, card=card(), tokens=tokens(template))


def record(peer: str = "p", span: str = "0:4", **more: Any) -> PeerRecord:
    return PeerRecord(
        peer=peer,
        sequence=1,
        fingerprint=FINGERPRINT,
        model_name=MODEL,
        blocks=4,
        span=span,
        decode_seconds_per_block=0.01,
        prefill_seconds_per_block_token=0.001,
        **more,
    )


class WorldSwarm:
    """The servers of a world, as a client of theirs sees them."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.model = model()

    def session(
        self, max_tokens: int, *, prompt: Sequence[int] = (), route_seconds: float = 30.0
    ) -> AbstractAsyncContextManager[ClientSession]:
        return self.world.session(max_tokens=max_tokens, route_seconds=route_seconds)

    def records(self) -> tuple[PeerRecord, ...]:
        return tuple(record(each.peer, str(each.span)) for each in self.world.servers)

    def record_of(self, _peer: str) -> PeerRecord | None:
        return None


class ScriptedSwarm:
    """One server whose model wants to say `script`, and after it END."""

    def __init__(self, script: str, template: Any = None) -> None:
        self.model = model(template)
        self.script = [*self.model.tokens.encode(script), END]
        self.prompts: list[str] = []
        self.sessions: list[ScriptedSession] = []

    @asynccontextmanager
    async def session(
        self, max_tokens: int, *, prompt: Sequence[int] = (), route_seconds: float = 30.0
    ) -> AsyncIterator["ScriptedSession"]:
        made = ScriptedSession(self.script)
        self.sessions.append(made)
        yield made
        self.prompts.append(self.model.tokens.decode(made.prompt, skip_special=False))

    def records(self) -> tuple[PeerRecord, ...]:
        return (record(),)

    def record_of(self, peer: str) -> PeerRecord | None:
        return record(peer)


class PiecesSwarm(ScriptedSwarm):
    """The same with a byte-level tokenizer of these pieces, which are the script."""

    def __init__(
        self, pieces: Sequence[str], template: str = "Hm", special: Sequence[str] = ()
    ) -> None:
        super().__init__("")
        letters = [each for each in "<aserint>H" if each not in pieces]
        words = {each: place for place, each in enumerate(["<end>", *pieces, *letters])}
        made = Tokenizer(models.BPE(words, []))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.decoder = decoders.ByteLevel()
        made.add_special_tokens(["<end>", *special])
        files = {"tokenizer.json": made.to_str(), "chat_template.jinja": template}
        tokens = Tokens({name: text.encode() for name, text in files.items()})
        self.model = replace(self.model, tokens=tokens)
        self.script = [*range(1, len(pieces) + 1), END]


class ScriptedSession:
    """Answers at once, as the last hop would: see `blocks.ends.candidates`."""

    def __init__(self, script: Sequence[int]) -> None:
        self.route = (("p", "0:4"),)
        self.journal = Journal()
        self.pages = self.reused_tokens = 0
        self.length_scaling = ANY_LENGTH
        self.pages = self.reused_tokens = 0
        self.length_scaling = ANY_LENGTH
        self.prompt: list[int] = []
        self.wishes: list[Wish] = []
        self._script = script
        self._said = 0
        self._outputs: list[Output] = []

    def step(
        self,
        start: int,
        payload: Mapping[str, Tensor],
        wanted: str,
        wish: Wish,
        sequence_length: int = 0,
    ) -> None:
        ids = np.frombuffer(payload["ids"].data, "<i4").tolist()
        if not self._said and start == len(self.prompt):
            self.prompt += ids
        if wanted != "none":
            self.wishes.append(wish)
            self._outputs.append(
                Output(serial=self._said + 1, start=start, payload=self._answer(wish))
            )

    async def next_output(self) -> Output:
        await trio.lowlevel.checkpoint()
        self._said += 1
        return self._outputs.pop(0)

    def _answer(self, wish: Wish) -> dict[str, Tensor]:
        logits = -np.arange(VOCABULARY, dtype=np.float32) * 0.01
        logits[self._script[min(self._said, len(self._script) - 1)]] += 10
        for token, amount in wish.bias:
            logits[token] += amount
        if wish.allowed is not None:
            kept = np.full(VOCABULARY, -np.inf, np.float32)
            kept[list(wish.allowed)] = logits[list(wish.allowed)]
            logits = kept
        free = [n for n in np.argsort(-logits, kind="stable") if n not in wish.penalised]
        free = [n for n in free if logits[n] > -np.inf][: wish.count or None]
        named = [*wish.penalised, *(token for token, _ in wish.bias)]
        left = np.full(1, -50, "<f4")
        return {
            "tokens": Tensor("int32", (1, len(free)), np.asarray(free, "<i4").tobytes()),
            "logits": Tensor("float32", (1, len(free)), logits[free].astype("<f4").tobytes()),
            "named": Tensor("float32", (1, len(named)), logits[named].astype("<f4").tobytes()),
            "left": Tensor("float32", (1,), left.tobytes()),
        }


class Answer:
    """What came back."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""
        self.parts: list[tuple[float, bytes]] = []
        self.is_whole = False
        self.on_part: Callable[[bytes], None] = lambda _part: None

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The data of a stream's events, parsed but for the last mark."""
        lines = self.body.decode().split("\n")
        data = [line[6:] for line in lines if line.startswith("data: ")]
        return [each if each == "[DONE]" else json.loads(each) for each in data]


def application_of(swarm: Any, **bounds: Any) -> App:
    return application(swarm, GatewaySettings(**bounds))


async def ask(
    app: App,
    path: str,
    body: Any = None,
    *,
    headers: Mapping[str, str] | None = None,
    method: str | None = None,
    hang_up: trio.Event | None = None,
    answer: Answer | None = None,
) -> Answer:
    """Send one request, as a connection would; GET without a body. `hang_up` closes the socket."""
    made = Answer() if answer is None else answer
    gone = trio.Event() if hang_up is None else hang_up
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    fields = {"content-type": "application/json", **(headers or {})}
    inbox = [{"type": "http.request", "body": data, "more_body": False}]

    async def receive() -> Any:
        if inbox:
            return inbox.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        await trio.lowlevel.checkpoint()
        if message["type"] == "http.response.start":
            assert not made.status, "an answer is begun once"
            made.status = message["status"]
            made.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            return
        made.body += message["body"]
        made.parts.append((trio.current_time(), message["body"]))
        made.on_part(message["body"])
        if not message.get("more_body", False):
            made.is_whole = True
            gone.set()

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.1"},
        "http_version": "1.1",
        "method": method or ("GET" if body is None else "POST"),
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in fields.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    await app(scope, receive, send)
    return made


def asked(swarm: Any, path: str, body: Any = None, **bounds: Any) -> Answer:
    """Ask a swarm that answers at once, and nothing else."""

    async def main() -> Answer:
        return await ask(application_of(swarm, **bounds), path, body)

    return trio.run(main)
