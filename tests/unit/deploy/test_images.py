from __future__ import annotations

import re


def test_the_dockerfile_has_nothing_to_complain_of(tool):
    told = tool("hadolint", "deploy/Dockerfile")
    assert told.returncode == 0, told.stdout


def test_a_build_needs_no_other_image_than_the_one_it_is_told(repo):
    lines = (repo / "deploy/Dockerfile").read_text(encoding="utf-8").splitlines()
    assert not lines[0].lower().startswith("# syntax")
    assert {line.split()[1] for line in lines if line.startswith("FROM ")} == {"${PYTHON_IMAGE}"}


def test_the_image_runs_as_a_numbered_user_who_is_not_root(repo):
    text = (repo / "deploy/Dockerfile").read_text(encoding="utf-8")
    assert re.findall(r"^USER (.+)$", text, re.MULTILINE) == ["10001:10001"]


def test_everything_that_is_copied_into_a_build_is_let_in(repo):
    ignored = (repo / ".dockerignore").read_text(encoding="utf-8").splitlines()
    let_in = tuple(line.removeprefix("!").removesuffix("/*.txt") for line in ignored if line.startswith("!"))
    dockerfile = (repo / "deploy/Dockerfile").read_text(encoding="utf-8")
    copied = [
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", dockerfile, re.MULTILINE)
        for source in line.split()[:-1]
    ]
    assert copied
    for source in copied:
        assert (repo / source).exists(), source
        assert source.startswith(let_in), source


def test_what_builds_the_packages_is_in_the_lock(repo):
    dockerfile = (repo / "deploy/Dockerfile").read_text(encoding="utf-8")
    lock = (repo / "deploy/requirements/dev.txt").read_text(encoding="utf-8")
    found = re.search(r"\^\(([a-z|-]+)\)==", dockerfile)
    assert found is not None
    for package in found[1].split("|"):
        assert re.search(rf"^{package}==", lock, re.MULTILINE), package
