"""The house: which file may import which, and what lies in the root."""

from support.commands import Parser

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
from conftest import REPOSITORY

import inference
import train

# In reading order: each may import those before it.
ARTICLE = ("dataset", "diffusion", "time_emb", "dit_block", "dit", "config", "inference", "train", "generator",
           "fid_computer")
LINES = 1_800
# Which folders each folder may import, beside itself; whatever stands above the root, the root too.
BELOW = {"support": (), "record": ("support",), "latent": (), "measure": ("latent",), "video": ("latent", "measure"),
         "text": ("latent", "measure", "video"), "edit": ("latent", "measure", "video"),
         "few": ("latent", "measure", "video", "edit"),
         "demo": ("latent", "measure", "video", "text", "edit")}
BEYOND = r"\bclips?\b|latent|sprite|caption|edit|video"  # words that the root does not know
HEADINGS = "captions="  # an argument of a grid, which names its columns
NOT_CODE = {"README.md", "README.zh.md", "EXPERIMENTS.md", "LICENSE", "requirements.txt", "requirements-dev.txt",
            "pyproject.toml"}


def imports(path):
    """The modules of ours that a file imports, anywhere in it, as tuples of names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports relatively"
            module = tuple(node.module.split("."))
            yield from ((*module, alias.name) if len(module) == 1 and module[0] in BELOW else module
                        for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)


@pytest.mark.parametrize("name", ARTICLE)
def test_a_root_file_imports_what_is_below_and_the_root_files_before_it(name):
    allowed = ("support", "record", *ARTICLE[:ARTICLE.index(name)])
    for module in imports(REPOSITORY / f"{name}.py"):
        assert module[0] in allowed or module[0] not in (*BELOW, *ARTICLE), f"{name}.py imports {'.'.join(module)}"


@pytest.mark.parametrize("folder", BELOW)
def test_a_folder_imports_what_is_below_it(folder):
    allowed = (folder, *BELOW[folder], *(() if folder in ("support", "record") else ("support", "record", *ARTICLE)))
    files = sorted((REPOSITORY / folder).glob("*.py"))
    assert files
    for file in files:
        for module in imports(file):
            assert module[0] in allowed or module[0] not in (*BELOW, *ARTICLE), f"{file} imports {'.'.join(module)}"


def test_no_file_imports_itself_round_about():
    """Within a folder too, where the order is not said."""
    for folder in BELOW:
        inside = {file.stem: {module[1] for module in imports(file) if module[0] == folder and len(module) > 1}
                  for file in (REPOSITORY / folder).glob("*.py")}
        while inside:
            free = [name for name, needs in inside.items() if not needs & inside.keys()]
            assert free, f"{folder}: {sorted(inside)} import each other"
            inside = {name: needs for name, needs in inside.items() if name not in free}


def test_the_root_is_the_article():
    """Nothing else, so that a reader knows where to begin; the README names every file, in the same order."""
    found = {path.name for path in REPOSITORY.iterdir() if path.is_file() and not path.name.startswith(".")}
    ours = {f"{name}.py" for name in ARTICLE}
    assert ours | NOT_CODE <= found
    assert {name for name in found if name.endswith(".py")} == ours
    readme = (REPOSITORY / "README.md").read_text()
    places = [readme.index(f"| `{name}.py`") for name in ARTICLE]
    assert places == sorted(places)


def test_the_root_is_read_in_an_evening():
    """It is short, knows nothing of what the folders add, and its commands have few flags."""
    sources = {name: (REPOSITORY / f"{name}.py").read_text().replace(HEADINGS, "") for name in ARTICLE}
    beyond = [f"{name}: {line.strip()}" for name, source in sources.items() for line in source.splitlines()
              if re.search(BEYOND, line, re.IGNORECASE)]
    assert not beyond
    assert sum(source.count("\n") for source in sources.values()) <= LINES
    for parser, most in ((train.train_parser(""), 40), (inference.drawing_parser(""), 14)):
        assert len(parser._actions) - 1 <= most  # but --help


def test_the_tests_that_the_readme_names_are_there():
    readme = (REPOSITORY / "README.md").read_text()
    found = {path.name: path.read_text() for path in (REPOSITORY / "tests").glob("test_*.py")}
    for row in readme.splitlines():
        file = None
        for named, name in re.findall(r"`(?:(test_\w+\.py)(?:::)?)?(test_\w+)?`", row):
            if named:
                file = named
                assert file in found, file
            if name:
                assert file and f"def {name}(" in found[file], f"{file}::{name}"
    assert "::test_" in readme


def test_an_old_python_is_told_so_in_one_line():
    """By the first import of every command, which the old Python must be able to read."""
    minimum = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["requires-python"]
    old = "import sys; sys.version_info = (3, 10, 4); import support; print('went on')"
    done = subprocess.run([sys.executable, "-c", old], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout and "this Python is 3.10:" in done.stderr
    assert done.stderr.count("\n") == 1 and minimum.removeprefix(">=") in done.stderr
    files = [REPOSITORY / "support/__init__.py"]
    files += [path for pattern in ("*.py", "[!.]*/*.py") for path in REPOSITORY.glob(pattern)
              if path.parent.name != "tests" and "\nif __name__ ==" in path.read_text()]
    assert len(files) > 15
    for path in files:
        source = path.read_text()
        tree = ast.parse(source, feature_version=(3, 7))
        for node in ast.walk(tree):  # what `feature_version` does not know to be new: x[*a], return *a, b
            part = {ast.Subscript: "slice", ast.Return: "value"}.get(type(node))
            part = part and getattr(node, part)
            if isinstance(part, ast.Tuple) and any(isinstance(element, ast.Starred) for element in part.elts):
                assert ast.get_source_segment(source, part)[0] == "(", f"{path}, line {part.lineno}"
        if path.name != "__init__.py":
            ours = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
            assert ours[0].module.startswith("support"), f"{path} does not begin with support"


# The READMEs: of the root, and of each wing that has one.
PAGES = [path for pattern in ("*.md", "[!.]*/*.md") for path in sorted(REPOSITORY.glob(pattern))]
READMES = [path.parent for path in PAGES if path.name == "README.zh.md"]
NUMBER = r"(?:± )?-?\d+(?:[.,]\d+)*(?: %)?"


def facts(section):
    """What a section of a README says in any language: its commands, its pictures, where its links lead, the numbers
    and the code in each cell of its tables, and those in all of it, which the order of words may move."""
    lines = section.splitlines()
    said = f"`[^`]*`|{NUMBER}"
    return {
        "commands": [re.sub(r"\s+# .*", "", line) for line in lines if line.startswith("    ")],
        "pictures": re.findall(r"!\[.*?\]\((.*?)\)", section),
        "links": sorted(re.findall(r"\]\((?!#)(.*?)\)", section.replace(".zh.md", ".md"))),
        "tables": [[re.findall(said, cell) for cell in line.split("|")] for line in lines if line.startswith("|")],
        "said": sorted(re.findall(said, " ".join(lines))),
    }


@pytest.mark.parametrize("folder", READMES, ids=lambda folder: folder.name)
def test_a_readme_says_the_same_in_both_languages(folder):
    english, chinese = ((folder / name).read_text() for name in ("README.md", "README.zh.md"))
    assert "](README.zh.md)" in "".join(english.splitlines()[:5])
    assert "](README.md)" in "".join(chinese.splitlines()[:5])
    for ours, theirs in zip(english.split("\n## "), chinese.split("\n## "), strict=True):
        assert facts(theirs) == facts(ours), f"{ours.splitlines()[0]} / {theirs.splitlines()[0]}"


@pytest.mark.parametrize("folder", READMES, ids=lambda folder: folder.name)
def test_a_readme_names_every_file_of_its_folder(folder):
    readme = (folder / "README.md").read_text()
    for path in folder.glob("*.py"):
        assert f"`{path.name}`" in readme or f"{folder.name}.{path.stem}" in readme, path


def places(path):
    """The headings of a page, as GitHub names them: in lower case, without punctuation, with hyphens for spaces."""
    headings = re.findall(r"^#+ (.*)", path.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_to_a_file_and_a_heading():
    assert len(PAGES) > 12
    for page in PAGES:
        for link in re.findall(r"\]\((?!http)(.*?)\)", page.read_text()):
            name, _, heading = link.partition("#")
            target = (page.parent / name) if name else page
            assert target.exists(), f"{page}: {link}"
            assert not heading or heading in places(target), f"{page}: {link}"


def commands():
    """The commands in the READMEs, EXPERIMENTS.md and speedrun.sh: which page, what is run, and its arguments."""
    pages = [*(folder / "README.md" for folder in READMES), REPOSITORY / "EXPERIMENTS.md"]
    for page in [*pages, REPOSITORY / "speedrun.sh"]:
        text = page.read_text()
        block = "" if page.suffix == ".sh" else " {4}"
        for line in re.findall(rf"^{block}(.*)", text, re.MULTILINE) + re.findall(r"`([^`]+)`", text):
            for command in line.split(" && "):
                found = re.search(r"^(?:\w+=\S* )*(?:python|torchrun --nproc-per-node \d|uv run) (?:-m )?(\w\S*.*)",
                                  command.replace("\n", " ").replace('"${resume[@]}" "$@"', ""))
                if found:
                    yield page, *shlex.split(found[1], comments=True)


def test_the_commands_that_are_printed_are_understood(monkeypatch):
    """Each is read by its own parser, up to where the work would begin."""
    class Understood(Exception):
        pass

    def parse_args(parser, *args, **options):
        original(parser, *args, **options)
        raise Understood

    original, count = Parser.parse_args, 0
    monkeypatch.setattr(Parser, "parse_args", parse_args)
    for page, name, *args in commands():
        path = REPOSITORY / (name if name.endswith(".py") else name.replace(".", "/") + ".py")
        assert path.is_file() or name in ("pip", "pytest"), f"{page}: {name}"
        if args and path.is_file() and args != ["--help"]:
            monkeypatch.setattr(sys, "argv", [name, *args])
            with pytest.raises(Understood):
                importlib.import_module(".".join(path.relative_to(REPOSITORY).with_suffix("").parts)).main()
            count += 1
    assert count > 60


def counted(text):
    """The text of a README with the line counts of the root's files as they are."""
    counts = {name: (REPOSITORY / f"{name}.py").read_text().count("\n") for name in ARTICLE}
    for name, count in counts.items():
        text = re.sub(rf"^(\| `{name}\.py` \| )\d+", rf"\g<1>{count}", text, flags=re.MULTILINE)
    return re.sub(r"[\d,]+(?= lines, docstrings| 行，含文档字符串)", f"{sum(counts.values()):,}", text)


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_the_readme_is_short_and_counts_the_lines_of_the_root(name):
    text = (REPOSITORY / name).read_text()
    if "RENEW" in os.environ:
        (REPOSITORY / name).write_text(text := counted(text))
    assert text == counted(text), "renew the counts: RENEW=1 python -m pytest tests/test_layout.py"
    assert text.count("\n") <= 300 and len(re.findall(r"\.py` \| \d+ \|", text)) == len(ARTICLE)
