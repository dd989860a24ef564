"""What the documents name is there: links, headings, files, commands, make targets, options, metrics."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from mosaic_fast.config import Config
from mosaic_rollout.environments.custom import load_environment
from tools import configuration_page

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *PAGES,
    *sorted((ROOT / "docs" / "lab").glob("*.md")),
]
CODE = ("mosaic_fast", "kernels", "rollout", "bench", "tools", "examples", "configs", "tests")
METRIC = re.compile(
    r'"((?:safety|rollout|reward|judge|policy|mismatch|optim|tree|time|perf|scale)/[a-z_]+)"(?! *:? *\()'
)
IN_PROSE = 170  # characters of a table's cell, above which it is a paragraph


def each_document() -> Iterator[tuple[str, str]]:
    for path in DOCUMENTS:
        yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")


def commands(text: str) -> Iterator[str]:
    """What a page shows as code, a line or a span at a time: indented, fenced or between backticks."""
    for line in re.findall(r"^(?: {4}|\t)(.*)$", text, re.M):
        yield line.split("  #")[0]
    for block in re.findall(r"^```.*?\n(.*?)^```", text, re.M | re.S):
        yield from block.splitlines()
    yield from re.findall(r"`([^`\n]+)`", text)


def anchors(text: str) -> set[str]:
    """The names that GitHub gives a page's headings."""
    plain = (re.sub(r"[^\w\s-]", "", heading.lower()) for heading in re.findall(r"^#+ (.*)$", text, re.M))
    return {heading.strip().replace(" ", "-") for heading in plain}


def test_there_are_at_most_twelve_pages_beside_the_laboratory():
    assert len(PAGES) <= 12


@pytest.mark.parametrize(("name", "text"), each_document())
def test_every_link_leads_to_a_file_and_a_heading(name: str, text: str):
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), f"{name}: {target}"
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{name}: {target}"


def test_every_document_that_code_and_documents_name_is_there():
    files = [
        path
        for folder in CODE
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".toml", ".md")
    ]
    for path in [*files, *DOCUMENTS, ROOT / "Makefile"]:
        for named in re.findall(
            r"(?<![\w/.-])docs/[\w./-]+\.(?:md|png|svg)", path.read_text(encoding="utf-8")
        ):
            assert (ROOT / named).is_file(), f"{path.relative_to(ROOT)}: {named}"


@pytest.mark.parametrize(("name", "text"), each_document())
def test_every_module_target_option_and_file_of_a_command_is_there(name: str, text: str):
    if name == "CHANGELOG.md":
        return  # it names what was there
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for command in commands(text):
        for module in re.findall(r"python -m ((?:mosaic_\w+|tools|tests|bench)[\w.]*)", command):
            path = module.rstrip(".").replace(".", "/")
            found = [
                root / end
                for root in (ROOT, ROOT / "kernels", ROOT / "rollout")
                for end in (f"{path}.py", f"{path}/__main__.py")
            ]
            assert any(file.is_file() for file in found), f"{name}: python -m {module}"
        for words in re.findall(r"^(?:\$ )?make ((?:[a-z][a-z-]+(?: |$))+)", command):
            assert set(words.split()) <= targets, f"{name}: make {words}"
        for section, key in re.findall(r"--([a-z_-]+)\.([a-z-]+)", command):
            assert _is_key(section.replace("-", "_"), key.replace("-", "_")), f"{name}: --{section}.{key}"
        for path in re.findall(
            r"^((?:mosaic_fast|kernels|rollout|bench|tools|tests|examples|configs)/[\w./-]+)$", command
        ):
            is_metric = path.startswith("rollout/") and "." not in path
            assert is_metric or (ROOT / path).exists(), f"{name}: {path}"


@pytest.mark.parametrize(("name", "text"), each_document())
def test_every_toml_example_has_known_keys(name: str, text: str):
    for block in re.findall(r"^```toml\n(.*?)^```", text, re.M | re.S):
        for section, values in tomllib.loads(block).items():
            for key in values if isinstance(values, dict) else ():
                assert _is_key(section, key), f"{name}: {section}.{key}"
            assert section in Config.model_fields, f"{name}: {section}"


def _is_key(section: str, key: str) -> bool:
    field = Config.model_fields.get(section)
    return field is not None and key in getattr(field.annotation, "model_fields", {})


@pytest.mark.parametrize(
    ("name", "text"), [(name, text) for name, text in each_document() if "lab" not in name]
)
def test_no_cell_of_a_table_is_a_paragraph(name: str, text: str):
    for line in text.splitlines():
        if line.startswith("|"):
            for cell in re.split(r"(?<!\\)\|", line):
                assert len(cell.strip()) <= IN_PROSE, f"{name}: {cell}"


def test_the_tables_of_settings_are_what_the_tool_writes():
    page = configuration_page.PAGE.read_text(encoding="utf-8")
    assert configuration_page.with_tables(page) == page, "run python -m tools.configuration_page"


def test_every_metric_of_a_step_is_explained():
    page = configuration_page.PAGE.read_text(encoding="utf-8")
    for path in (ROOT / "mosaic_fast").rglob("*.py"):
        for name in METRIC.findall(path.read_text(encoding="utf-8")):
            group, _, short = name.partition("/")
            assert name in page or f"{group}/..." in page or f"`{short}`" in page, f"{path}: {name}"


def test_the_environment_of_the_readme_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    (tmp_path / "readme_bank.py").write_text(code)
    (tmp_path / "tasks.jsonl").write_text(
        '{"prompt": "Pay alice"}\n{"prompt": "Pay mallory", "kind": "harmful"}\n'
    )
    monkeypatch.chdir(tmp_path)
    environment = load_environment("readme_bank:Bank", "tasks.jsonl", None, max_observation_chars=1000)
    [tool] = environment.reset(environment.sample("train", 1, 0)[0]).tools
    assert "transfer" in json.dumps(tool)
