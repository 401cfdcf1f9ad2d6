"""Chat templates: from messages to the one text that the model was trained to answer.

A template is a program from a peer. It runs in jinja's sandbox, with what the templates of
transformers use, and on a budget.

1. A template cannot reach what it is not given, and changes nothing that it is given.
2. Loops, calls of macros and ranges cost steps; text that is written, joined or multiplied costs
   characters. Beyond the budget of one rendering it is an error. (A single filter may still make a
   long text of two shorter ones: the budget bounds time, and memory nearly.)
3. Nothing but BadInput comes out of it.
4. A template gets messages in the form that it reads: parts only if it loops over them, the role
   developer only if it knows it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from swarm.errors import BadInput

MOST_STEPS = 100_000  # a thousand messages in a hundred loops
_CONTENT = "a message's content"  # is no name
MOST_CHARACTERS = 16 << 20  # ten times the text of a million tokens, written a few times over


class Parts(str):
    """A content's text, that remembers the parts it came in, in the form that templates read."""

    parts: Sequence[Mapping[str, Any]]

    def __new__(cls, texts: Sequence[str]) -> "Parts":
        """The texts in one, a line each."""
        made = super().__new__(cls, "\n".join(texts))
        made.parts = [{"type": "text", "text": text} for text in texts]
        return made


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    special_tokens: Mapping[str, str],
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Return the text of a conversation, special tokens included: encode it `with_ends=False`.

    `messages`, `tools` and `variables` (of the template's own, such as enable_thinking, and
    documents) are plain JSON values, but for contents that are `Parts`. `special_tokens` are those
    of `Tokens`. BadInput says what the template says.
    """
    environment = _Environment()
    try:
        tree = environment.parse(template)
        messages = _as_read(messages, template, tree)
        program = environment.from_string(_OnABudget().visit(tree))
        return program.render(
            {
                **special_tokens,
                "documents": None,
                **(variables or {}),
                "messages": messages,
                "tools": tools,
                "add_generation_prompt": add_generation_prompt,
            }
        )
    except TemplateError as error:
        raise BadInput(f"the model's chat template says: {error.message}") from error
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        MemoryError,
        RecursionError,
        SyntaxError,  # a template that jinja takes and Python does not
        TypeError,
        ValueError,
    ) as error:
        reason = str(error) or type(error).__name__
        raise BadInput(f"the model's chat template cannot render this: {reason}") from error


def _as_read(
    messages: Sequence[Mapping[str, Any]], template: str, tree: nodes.Template
) -> list[dict[str, Any]]:
    """The messages as this template reads them."""
    takes_parts = _loops_over_content(tree)
    made = []
    for message in messages:
        content, role = message.get("content"), message.get("role")
        plain = dict(message)
        if isinstance(content, Parts):
            plain["content"] = list(content.parts) if takes_parts else str(content)
        if role == "developer" and role not in template:
            plain["role"] = "system"
        made.append(plain)
    return made


def _loops_over_content(tree: nodes.Template) -> bool:
    """Does a loop of the template go over a message's content, by that or by another name?

    Of each node it is asked once, and each name goes on once: no template makes this long.
    """
    goes_on: dict[str, list[str]] = {}  # from a name to those that are given what it has
    macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
    for bound in tree.find_all(nodes.Assign):
        if isinstance(bound.target, nodes.Name):
            _note(goes_on, bound.node, bound.target.name)
    for call in tree.find_all(nodes.Call):
        macro = macros.get(call.node.name) if isinstance(call.node, nodes.Name) else None
        for one, given in zip(macro.args if macro else (), call.args, strict=False):
            _note(goes_on, given, one.name)
    reached, ahead = {_CONTENT}, [_CONTENT]
    while ahead:
        new = set(goes_on.get(ahead.pop(), ())) - reached
        reached |= new
        ahead += new
    loops = tree.find_all(nodes.For)
    return any(name in reached for loop in loops for name in _names_in(loop.iter))


def _note(goes_on: dict[str, list[str]], given: nodes.Node, to: str) -> None:
    for name in _names_in(given):
        goes_on.setdefault(name, []).append(to)


def _names_in(node: nodes.Node | None) -> Iterator[str]:
    """The names whose value this may be, _CONTENT for a message's content."""
    match node:
        case nodes.Filter():
            yield from _names_in(node.node)
        case nodes.CondExpr():
            yield from _names_in(node.expr1)
            yield from _names_in(node.expr2)
        case nodes.Getattr(attr="content") | nodes.Getitem(arg=nodes.Const(value="content")):
            yield _CONTENT
        case nodes.Name():
            yield node.name


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here it only holds them."""

    tags = frozenset({"generation"})  # type: ignore[assignment] # jinja only looks names up in it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox of one rendering, and what is left of its budget."""

    intercepted_binops = frozenset({"+", "*", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            finalize=self.written,
        )
        self._steps = MOST_STEPS
        self._characters = MOST_CHARACTERS
        self.filters["tojson"] = _to_json
        self.globals |= {
            "raise_exception": _raise,
            "strftime_now": lambda form: datetime.now().strftime(form),
            "range": self.counted_range,
        }
        del self.globals["lipsum"]  # writes any amount of text in one call

    def step(self, characters: int) -> bool:
        """One more round of a loop or call of a macro, which has so much text of its own."""
        self._write(characters)
        return self._spend(1)

    def counted_range(self, *bounds: int) -> range:
        """`range`, of which each number is a step."""
        numbers = range(*bounds)
        self._spend(len(numbers))
        return numbers

    def written(self, value: Any) -> Any:
        """What `{{ value }}` writes."""
        text = value if isinstance(value, str) else str(value)
        self._write(len(text))
        return text

    def joined(self, *values: Any) -> str:
        """`a ~ b`."""
        texts = [str(value) for value in values]
        self._write(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """`a + b`, `a * b` and `a ** b`, whose results may be long."""
        if operator == "**":
            if not all(isinstance(side, float) or -64 <= side <= 64 for side in (left, right)):
                raise TemplateError("it raises to too high a power")
        else:
            lengths = [len(side) for side in (left, right) if hasattr(side, "__len__")]
            times = [side for side in (left, right) if isinstance(side, int)]
            repeats = max(times, default=1) if operator == "*" and lengths else 1
            self._write(sum(lengths) * max(repeats, 1))
        return super().call_binop(context, operator, left, right)

    def _spend(self, steps: int) -> bool:
        self._steps -= steps
        if self._steps < 0:
            raise TemplateError(f"it takes more than {MOST_STEPS} steps")
        return True

    def _write(self, characters: int) -> None:
        self._characters -= characters
        if self._characters < 0:
            raise TemplateError(f"it writes more than {MOST_CHARACTERS} characters")


class _OnABudget(NodeTransformer):
    """Makes every loop, macro and `~` of a template tell the environment."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802 # jinja looks for it
        self.generic_visit(node)
        return _tell("joined", node.nodes, node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self._count(node)
        if node.test is not None:
            node.test = nodes.And(_tell("step", [nodes.Const(0)], node.lineno), node.test)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:  # noqa: N802
        self._count(node)
        return node

    def _count(self, node: nodes.For | nodes.Macro) -> None:
        characters = sum(len(text.data) for text in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        told = _tell("step", [nodes.Const(characters)], node.lineno)
        node.body.insert(0, nodes.ExprStmt(told, lineno=node.lineno))


def _tell(method: str, arguments: list[nodes.Expr], line: int) -> nodes.Call:
    """A call of the environment's own method, which a template cannot name or replace."""
    attribute = nodes.EnvironmentAttribute(method, lineno=line)
    return nodes.Call(attribute, arguments, [], None, None, lineno=line)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers writes it: jinja's own filter escapes what HTML would mistake."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
