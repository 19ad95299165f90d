"""How results look in a notebook: one line as text, and a small table as HTML, escaped, without scripts.

The HTML takes font and colours from the page around it, light or dark; lines and quiet text are shades of grey.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape

_STYLE = (
    ".calibrant{max-width:60em;overflow-wrap:break-word}.calibrant p{margin:.3em 0}"
    ".calibrant table{border-collapse:collapse;margin:.4em 0}"
    ".calibrant td,.calibrant th{text-align:left!important;vertical-align:top;padding:.2em 1em .2em 0;"
    "border:0;border-bottom:1px solid rgba(128,128,128,.35);background:none}"
    ".calibrant th,.calibrant .quiet{font-weight:400;opacity:.75}"
    ".calibrant pre{font-family:monospace;white-space:pre-wrap}"
    ".calibrant .answer{padding:0 .6em;border-radius:1em;color:#fff;white-space:nowrap}"
)
_ANSWERS = {"pass": ("✓ pass", "#1a7f4b"), "fail": ("✗ fail", "#b3261e"), "cannot tell": ("? cannot tell", "#8a6100")}


class Shown:
    """An object with a short `repr` and a small table in a notebook, both made from `facts`."""

    def facts(self) -> Mapping[str, str]:
        """What the object is: name of a fact → the fact in a few words."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return line(type(self).__name__, self.facts())

    def _repr_html_(self) -> str:
        return card(f"<b>{escape(type(self).__name__)}</b>", table(self.facts().items()))


def line(kind: str, facts: Mapping[str, str]) -> str:
    """`Kind(fact: words; fact: words)`; a fact without a name stands by itself."""
    words = "; ".join(f"{name}: {fact}" if name else fact for name, fact in facts.items())
    return f"{kind}({words.replace('`', '')})"


def card(heading: str, *parts: str) -> str:
    """A heading and what is below it, all of it HTML."""
    return f'<style>{_STYLE}</style><div class="calibrant"><div>{heading}</div>{"".join(parts)}</div>'


def table(rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> str:
    """A table of `prose`; without a head, the first cells name what the second ones say."""
    first = "th" if not head else "td"
    top = f"<tr>{''.join(f'<th>{prose(name)}</th>' for name in head)}</tr>" if head else ""
    body = (
        f"<tr><{first}>{prose(name)}</{first}>{''.join(f'<td>{prose(cell)}</td>' for cell in cells)}</tr>"
        for name, *cells in rows
    )
    return f"<table>{top}{''.join(body)}</table>"


def answers(rows: Iterable[tuple[str, str]]) -> str:
    """A table of the answers of verdicts, as coloured words, and their sentences."""
    body = (f"<tr><td>{badge(answer)}</td><td>{prose(sentence)}</td></tr>" for answer, sentence in rows)
    return f"<table>{''.join(body)}</table>"


def badge(answer: str) -> str:
    """The answer of a verdict as a coloured word; empty for one that only describes."""
    if answer not in _ANSWERS:
        return ""
    words, colour = _ANSWERS[answer]
    return f'<span class="answer" style="background:{colour}">{words}</span>'


def prose(text: str) -> str:
    """Escaped text, with names in backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(str(text)))


def paragraph(text: str) -> str:
    """A paragraph of `prose`."""
    return f"<p>{prose(text)}</p>"


def following(remedy: str, command: str) -> str:
    """The next thing to do, with a line to paste; empty if there is none."""
    return f"{paragraph(remedy)}<pre>{escape(command)}</pre>" if remedy else ""


def details(summary: str, content: str) -> str:
    """HTML that is folded away under a line of text."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def counted(count: int, one: str, many: str) -> str:
    """`1 datum`, `1,437 data`."""
    return f"{count:,} {one if count == 1 else many}"
