"""Every link and picture of the pages leads somewhere, and every page can be found."""

from pathlib import Path

import pytest
from conftest import REPOSITORY
from pages import PAGES, anchors, links, name_of


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    broken = []
    for path, anchor in links(page):
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(f"{path}#{anchor}")
    assert broken == []


def test_the_readme_links_to_every_page() -> None:
    linked = {(REPOSITORY / path).resolve() for path, _ in links(REPOSITORY / "README.md") if path}
    assert [name_of(page) for page in PAGES if page.name != "README.md" and page not in linked] == []


def test_every_picture_of_docs_is_shown_on_a_page() -> None:
    shown = {(page.parent / path).resolve() for page in PAGES for path, _ in links(page)}
    assert [path.name for path in (REPOSITORY / "docs").glob("*.png") if path not in shown] == []


def test_the_readme_has_at_most_200_lines_of_120_characters() -> None:
    lines = (REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 200
    assert [line for line in lines if len(line) > 120] == []


def test_every_page_says_what_one_can_do_after_reading_it() -> None:
    for page in (REPOSITORY / "docs").glob("*.md"):
        opening = " ".join(page.read_text(encoding="utf-8").split("\n\n")[1].split())
        assert opening.startswith(("After reading this page you", "After this page you")), page.name
