"""Pages that exist in the built site alone, which links and texts may name."""

import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]


@cache
def generated() -> frozenset[Path]:
    """The files of docs/reference, whether or not the site has been built."""
    sys.path.insert(0, str(ROOT / "docs/_ext"))
    try:
        import api_pages
    finally:
        sys.path.pop(0)
    return frozenset(ROOT / "docs" / api_pages.FOLDER / name for name in api_pages.generated(ROOT))


def exists(path: Path) -> bool:
    """Whether a file is in the repository or in the built site."""
    return path.exists() or path.resolve() in generated()
