"""Checks the built site: `python docs/check_site.py docs/_build/html`, the last step of `make docs`.

Every link inside the site leads to a file, and to a place in it if it names one; no page loads anything from elsewhere.
"""

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

LOADS = {"src", "srcset", "data", "poster"}  # attributes that make a browser fetch something
NAMED = {"author", "canonical", "next", "prev"}  # what a <link> names and no browser fetches
REMOTE = re.compile(r"(?:https?:)?//", re.IGNORECASE)
IN_STYLE = re.compile(r"""(?:url\(\s*|@import\s+)["']?((?:https?:)?//[^"')\s]+)""", re.IGNORECASE)


class _Page(HTMLParser):
    """What a page offers (`ids`), leads to (`links`), loads (`loads`) and has as style (`style`)."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.style = ""
        self._in_style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        self.loads += [given[name] for name in LOADS & given.keys()]
        self.style += given.get("style", "")
        self._in_style = tag == "style"
        if "href" in given:
            (self.loads if _is_fetched(tag, given) else self.links).append(given["href"])

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False

    def handle_data(self, data: str) -> None:
        self.style += data if self._in_style else ""


def _is_fetched(tag: str, given: dict[str, str]) -> bool:
    """Whether a browser fetches what a tag with `href` names, before anyone clicks."""
    return tag in {"image", "use"} or (
        tag == "link" and given.get("rel") not in {"author", "canonical", "next", "prev"}
    )


def read(page: Path) -> _Page:
    parser = _Page()
    parser.feed(page.read_text(encoding="utf-8"))
    return parser


def faults(site: Path) -> Iterator[str]:
    """What is wrong with a site: a line for each dead link, and for each thing that is loaded from elsewhere."""
    pages = {page.resolve(): read(page) for page in sorted(site.rglob("*.html"))}
    if not (site / "index.html").is_file():
        yield f"{site} has no index.html: build the site first"
    for path, page in pages.items():
        name = path.relative_to(site.resolve())
        yield from (f"{name}: {link} leads nowhere" for link in page.links + page.loads if _is_dead(path, link, pages))
        yield from (f"{name}: {load} is loaded from elsewhere" for load in page.loads if REMOTE.match(load))
        yield from (f"{name}: {load} is loaded from elsewhere" for load in IN_STYLE.findall(page.style))
    for style in sorted(site.rglob("*.css")):
        found = IN_STYLE.findall(style.read_text(encoding="utf-8"))
        yield from (f"{style.relative_to(site)}: {load} is loaded from elsewhere" for load in found)


def _is_dead(page: Path, link: str, pages: dict[Path, _Page]) -> bool:
    """Whether a link inside the site names a file or a place that does not exist."""
    if re.match(r"\w+:|//", link):
        return False
    file, place = urldefrag(link)
    target = (page.parent / unquote(file.partition("?")[0])).resolve() if file else page
    if not target.is_file():
        return True
    return bool(place) and target in pages and unquote(place) not in pages[target].ids


if __name__ == "__main__":
    found = list(faults(Path(sys.argv[1])))
    print("\n".join(found) or "All links inside the site lead somewhere, and nothing is loaded from elsewhere.")
    sys.exit(bool(found))
