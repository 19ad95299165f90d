"""The templates of reports: pages, their common style, and their common parts."""

from __future__ import annotations

import re
from importlib import resources
from typing import Any

_HERE = "calibrant.evaluation.reporting"


def template(name: str, package: str = _HERE) -> Any:
    """A template of jinja2, which can include `style.css` and import from `macros.html`.

    Args:
        name: name of the file.
        package: the package that the file lies in.
    """
    import jinja2
    from markupsafe import Markup, escape

    def prose(text: str) -> Markup:
        """Mark names in backticks as code, and escape all other text."""
        return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))

    def source(name: str) -> str | None:
        files = [resources.files(folder).joinpath(name) for folder in (package, _HERE)]
        return next((file.read_text(encoding="utf-8") for file in files if file.is_file()), None)

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(source),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["prose"] = prose
    return environment.get_template(name)
