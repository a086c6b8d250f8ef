"""The Dockerfile copies existing files, installs what pyproject.toml requires, and its commands are valid."""

import json
import re
import shlex
import tomllib

from conftest import REPOSITORY

from gndet.cli.main import parse

DOCKERFILE = (REPOSITORY / "docker" / "Dockerfile").read_text()
COMMENTS = re.sub(r"\\\n#", " ", DOCKERFILE)  # a command on one line
INSTRUCTIONS = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", DOCKERFILE)).splitlines()


def arguments(instruction: str) -> list[list[str]]:
    return [shlex.split(line)[1:] for line in INSTRUCTIONS if line.startswith(instruction + " ")]


def test_every_copied_path_exists_and_nothing_is_copied_twice() -> None:
    sources = [source for copy in arguments("COPY") for source in copy[:-1]]
    assert {"pyproject.toml", "gndet"} <= set(sources) and len(sources) == len(set(sources))
    assert not [source for source in sources if not (REPOSITORY / source).exists()]


def test_what_the_wheel_is_built_from_is_copied_before_it_is_installed() -> None:
    before = INSTRUCTIONS[: INSTRUCTIONS.index("RUN pip install --no-cache-dir .")]
    copied = {word for line in before if line.startswith("COPY ") for word in shlex.split(line)[1:-1]}
    pyproject = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    project, wheel = pyproject["project"], pyproject["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {"pyproject.toml", project["readme"], *project["license-files"], *wheel["only-include"]} <= copied


def test_every_command_shown_for_the_image_is_understood() -> None:
    shown = [shlex.split(command) for command in re.findall(r"docker run .* gndet:\w+ (.*)", COMMENTS)]
    assert len(shown) >= 4
    for words in shown:
        if words[0] == "--nproc_per_node=8":  # torchrun with a script of ours
            assert (REPOSITORY / words[1]).is_file()
            words = [words[1].removeprefix("tools/").removesuffix(".py"), *words[2:]]
        options = parse(words)
        if hasattr(options, "config"):
            assert (REPOSITORY / options.config).is_file()


def test_the_entry_point_is_a_script_of_the_package() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    (entry,) = [json.loads(line.partition(" ")[2]) for line in INSTRUCTIONS if line.startswith("ENTRYPOINT ")]
    assert entry[0] in project["scripts"]


def test_the_wheels_fetched_first_are_those_the_package_needs() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    fetched = re.findall(r'"(torch[^"]*[<>=][^"]*)"', DOCKERFILE)
    assert len(fetched) == 2 and set(fetched) <= set(project["dependencies"])


def test_the_container_does_not_run_as_root() -> None:
    users = arguments("USER")
    assert users and users[-1] not in (["root"], ["0"])


def test_kernels_can_be_compiled_when_they_first_run() -> None:
    """Triton needs a C compiler, C's headers and Python.h; torch.compile on a CPU needs a C++ compiler."""
    (packages,) = [line for line in INSTRUCTIONS if line.startswith("RUN apt-get")]
    installed = packages.partition(" install ")[2].partition("&&")[0].split()
    assert {"gcc", "g++", "libc6-dev", "--no-install-recommends"} <= set(installed)
    assert INSTRUCTIONS.index(packages) < next(i for i, line in enumerate(INSTRUCTIONS) if line.startswith("USER "))
    assert arguments("FROM") == [["python:3.12-slim"]]  # it has Python.h; Debian's own Python has it in a package


def test_a_user_without_a_name_and_a_home_can_write_every_cache() -> None:
    values = dict(word.split("=", 1) for words in arguments("ENV") for word in words)
    folders = {"HOME", "XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "MPLCONFIGDIR"}
    assert set(values) == {"USER", *folders}
    assert all(values[name] == "/tmp" or values[name].startswith("/tmp/") for name in folders)
