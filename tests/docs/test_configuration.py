"""docs/configuration.md lists every option, and is what its generator writes."""

import importlib.util

from conftest import REPOSITORY

from gndet.config.loading import load_config
from gndet.training.run_folder import flat

PAGE = REPOSITORY / "docs" / "configuration.md"


def test_the_page_is_what_the_generator_writes() -> None:
    path = REPOSITORY / "docs" / "make_configuration.py"
    spec = importlib.util.spec_from_file_location("make_configuration", path)
    assert spec and spec.loader
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    assert PAGE.read_text(encoding="utf-8") == generator.page(), "run `python docs/make_configuration.py`"


def test_every_option_is_on_the_page() -> None:
    headings, section = set(), ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = line[3:].replace("Top level", "").replace("data.train and data.val", "data.train")
        elif line.startswith("| `"):
            headings.add(f"{section}.{line.split('`')[1]}".strip("."))
    options = set(flat(load_config(REPOSITORY / "configs" / "quickstart.yaml")))
    missing = {key for key in options if not key.startswith("data.val.") and ".norm" not in key} - headings
    assert missing == set()
