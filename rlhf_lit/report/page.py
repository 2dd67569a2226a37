"""The page: one file that needs no other, no network and no script."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from importlib.resources import files

from rlhf_lit.report.content import Section
from rlhf_lit.report.figures import Figure
from rlhf_lit.report.study import Study


def render(study: Study, sections: Sequence[Section]) -> str:
    """The page as HTML; every text in it is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("rlhf_lit.report").joinpath("page.html").read_text(encoding="utf-8"))
    return template.render(
        study=study,
        sections=sections,
        inline=inline,
        runs=len(study.runs),
        seeds=sorted({arm.seeds for arm in study.arms}),
    )


def inline(figure: Figure) -> str:
    """A figure as an address that holds it. An SVG in the page itself would share its ids with the others'."""
    return "data:image/svg+xml;base64," + base64.b64encode(figure.svg).decode("ascii")
