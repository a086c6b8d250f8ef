"""docs/your_data.md lists every finding of `gndet check`, each under what becomes of it."""

import re

from conftest import REPOSITORY

from gndet.data.datasets.faults import FAULTS, FIXED, NOTED, REFUSED

PAGE = (REPOSITORY / "docs" / "your_data.md").read_text(encoding="utf-8")
HEADINGS = {"Refused": REFUSED, "Fixed in memory": FIXED, "Noted": NOTED}


def test_every_finding_is_listed_under_its_outcome() -> None:
    for heading, severity in HEADINGS.items():
        table = re.search(rf"(?ms)^### {heading}$.*?(?=^##)", PAGE)[0]
        first_cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
        listed = [code for cell in first_cells for code in re.findall(r"`([^`]+)`", cell)]
        assert sorted(listed) == sorted(code for code, kind in FAULTS.items() if kind.severity == severity)
