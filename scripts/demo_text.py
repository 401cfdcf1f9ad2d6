"""Stories for the demo model: read, made plain, told apart, held out, and compared with outputs.

1. Everything here is a plain function of its arguments; only `read_stories` reads files.
2. A story is one string, one paragraph per line, in ASCII, whole as far as its look can tell.
"""

import random
import re
from collections.abc import Sequence
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"
LEAST_CHARACTERS = 200  # what is shorter is a piece of a story that was cut in the wrong place
HELD_OUT_PER_THOUSAND = 40

PLAIN = {
    "\N{LEFT DOUBLE QUOTATION MARK}": '"',
    "\N{LEFT SINGLE QUOTATION MARK}": "'",
    "\N{RIGHT SINGLE QUOTATION MARK}": "'",
    "\N{EN DASH}": "-",
    "\N{EM DASH}": "-",
    "\N{HORIZONTAL ELLIPSIS}": "...",
    "\N{LATIN SMALL LETTER E WITH ACUTE}": "e",
    # the last: one of its bytes means nothing in Windows-1252, and what is left of its mojibake
    # is the beginning of the others'
    "\N{RIGHT DOUBLE QUOTATION MARK}": '"',
}


def plain(text: str) -> str:
    """Return `text` with its curly quotes and dashes as ASCII, mojibake or not.

    The mojibake is UTF-8 once read as Windows-1252 and written down like that.
    """
    for odd, usual in PLAIN.items():
        text = text.replace(odd.encode("utf-8").decode("cp1252", errors="ignore"), usual)
    for odd, usual in PLAIN.items():  # only now: the mojibake of a dash ends in a curly quote
        text = text.replace(odd, usual)
    return text


def split_stories(text: str) -> list[str]:
    """Return the whole stories of one file, in order; pieces are left out.

    A file with `<|endoftext|>` is split there. The others keep the paragraphs of a story apart by
    a blank line, or a blank before the newline, and end a story by a newline alone.
    """
    text = plain(text)
    pieces = text.split(END_OF_TEXT) if END_OF_TEXT in text else re.split(r"(?<=\S)\n(?=\S)", text)
    stories = ("\n".join(line.strip() for line in p.split("\n") if line.strip()) for p in pieces)
    return [story for story in stories if is_whole(story)]


def is_whole(story: str) -> bool:
    """Say whether this looks like a story from its first word to its last."""
    return (
        len(story) >= LEAST_CHARACTERS
        and story.isascii()
        and (story[0].isupper() or story[0] == '"')
        and story[-1] in '.!?"'
    )


def read_stories(folder: Path) -> list[str]:
    """Return all stories of the folder's tinystories-*.txt, each once, in order of the files.

    Exits with a sentence if there is no such file.
    """
    files = sorted(folder.glob("tinystories-*.txt"))
    if not files:
        raise SystemExit(f"{folder} has no tinystories-*.txt. Name the folder that does: --data.")
    texts = (file.read_text(encoding="utf-8") for file in files)
    return list(dict.fromkeys(story for text in texts for story in split_stories(text)))


def hold_out(stories: Sequence[str], seed: int) -> tuple[list[str], list[str]]:
    """Return (training, held out): whole stories, drawn by `seed`, at least one held out."""
    shuffled = random.Random(seed).sample(stories, len(stories))
    held = max(1, len(stories) * HELD_OUT_PER_THOUSAND // 1000)
    return shuffled[held:], shuffled[:held]


def longest_copied_run(text: str, sources: Sequence[str]) -> str:
    """Return the longest run of words of `text` that stands, word for word, in one source.

    Words are what blanks separate, punctuation included. Of several runs the first is returned.
    """
    joined = " \n ".join(" ".join(source.split()) for source in sources)  # no word is a newline
    haystack = f" {joined} "
    words = text.split()
    longest = 0
    found = ""
    for first in range(len(words)):
        while first + longest < len(words):
            run = " ".join(words[first : first + longest + 1])
            if f" {run} " not in haystack:
                break
            longest, found = longest + 1, run
    return found
