"""Memory is planned for conversations of a length that people have, and the plan is told."""

import json
import shutil
from pathlib import Path

import pytest

from blocks.thread import ComputeThread
from routing.span import Span
from swarm.console import Console
from swarm.errors import BadInput
from swarm.loading import Loader, cache_tokens
from swarm.model import PLANNED_CONTEXT, Description, describe
from swarm.settings import DEMO_FOLDER, ServeSettings

MILLION = 1 << 20


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Description:
    """The demo model with a context of a million tokens."""
    folder = Path(shutil.copytree(DEMO_FOLDER, tmp_path_factory.mktemp("wide") / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": MILLION}))
    return describe(folder)


def chosen(described: Description, **settings: int) -> Span:
    with ComputeThread(1) as thread, Console() as console:
        asked = ServeSettings(dtype="bfloat16", **settings)  # type: ignore[arg-type]
        return Loader(asked, described, thread, console).choose((), "12D3KooWsomebody")


def test_a_model_of_a_long_context_fits_where_its_conversations_do(
    wide: Description, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chosen(wide, memory_bytes=2 << 30) == Span(0, wide.card.blocks)
    said = capsys.readouterr().err
    assert f"{PLANNED_CONTEXT} tokens, of the {MILLION}" in said
    assert "--context" in said


def test_the_context_planned_for_is_a_choice(
    wide: Description, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BadInput, match="does not fit"):
        chosen(wide, memory_bytes=2 << 30, context_tokens=MILLION)
    assert capsys.readouterr().err == ""
    assert chosen(wide, memory_bytes=100 << 20, context_tokens=512) == Span(0, wide.card.blocks)


def test_the_plan_of_a_short_context_is_its_own_and_says_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    demo = describe(DEMO_FOLDER)
    chosen(demo, memory_bytes=1 << 30)
    assert capsys.readouterr().err == ""
    assert cache_tokens(demo, 1 << 20, 0, 512) == 512
