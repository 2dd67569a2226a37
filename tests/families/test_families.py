"""docs/models.md says of every family what is found when it is tried."""

from __future__ import annotations

import pytest
from family_table import COLUMNS, HEAD, PAGE, TAIL, markdown, page_with, row_of
from small_families import FAMILIES

# A cap on the logits of a text part, a factor on them and an own score head, states narrower than the layers, stacked
# experts with adapters on them, and a model that is refused.
TELLING = ("gemma4_text", "falcon_h1", "opt", "mixtral", "bert")


def cells(line: str) -> list[str]:
    """A row's cells, but for the numbers of its refusals' lines."""
    return [cell.split(" (")[0] for cell in line.strip("| ").split(" | ")[1:]]


@pytest.mark.parametrize("kind", TELLING)
def test_the_pages_row_is_what_is_found(kind: str) -> None:
    row = row_of(kind)
    written = next(line for line in PAGE.read_text().splitlines() if f"(`{kind}`)" in line)
    assert cells(written) == list(row.cells.values())
    said = PAGE.read_text().partition(HEAD)[2].partition(TAIL)[0]
    assert all(f". {line}\n" in said for line in row.refusals.values())


def test_the_page_has_a_row_for_every_family() -> None:
    lines = PAGE.read_text().partition(HEAD)[2].partition(TAIL)[0].splitlines()
    rows = [line for line in lines if line.startswith("|")][2:]
    assert [line.partition("(`")[2].partition("`)")[0] for line in rows] == list(FAMILIES)
    assert len(FAMILIES) > 40
    assert all(len(cells(line)) == len(COLUMNS) for line in rows)


@pytest.mark.soak
def test_the_page_is_what_is_generated() -> None:
    rows = [row_of(kind) for kind in FAMILIES]
    for row in rows:
        assert row.cells["log-probs"] in ("yes", "refused"), row.kind
    assert PAGE.read_text(encoding="utf-8") == page_with(markdown(rows))
