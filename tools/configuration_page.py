"""The tables of docs/configuration.md, written from the configuration's own models.

    python -m tools.configuration_page

What stands between the page's two markers is replaced: a table a section, with each key's default and the
text that `--help` prints. The rest of the page is written by hand. A test compares the page with what this
command would write.
"""

from __future__ import annotations

import sys

if __name__ == "__main__" and len(sys.argv) > 1:  # it takes no options
    print(__doc__)
    raise SystemExit(0 if sys.argv[1] in ("-h", "--help") else 2)

import json
from collections.abc import Iterator
from pathlib import Path

from pydantic.fields import FieldInfo

from mosaic_fast.config import Config
from mosaic_fast.config.presets import presets_table
from mosaic_fast.config.section import Section

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
BEGIN = "<!-- tables: written by python -m tools.configuration_page -->"
END = "<!-- end of the tables -->"


def main() -> int:
    """Rewrite the tables of the page and say whether anything changed."""
    before = PAGE.read_text(encoding="utf-8")
    after = with_tables(before)
    PAGE.write_text(after, encoding="utf-8")
    print(f"{PAGE}: {'as it was' if after == before else 'rewritten'}")
    return 0


def with_tables(page: str) -> str:
    """The page with the tables that the models give. ValueError for a page without the two markers."""
    above, begin, rest = page.partition(BEGIN)
    _, end, below = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page needs the lines {BEGIN!r} and {END!r}")
    tables = "\n".join(_tables())
    return f"{above}{BEGIN}\n\n{tables}\n\n{END}{below}"


def _tables() -> Iterator[str]:
    """The lines of all tables: the keys without a section first, then a section at a time."""
    sections: dict[str, type[Section]] = {}
    plain: dict[str, FieldInfo] = {}
    for name, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            sections[name] = field.annotation
        else:
            plain[name] = field
    yield from ("### Presets", *presets_table(), "", "### Top level", "", *_table(plain))
    for name, section in sections.items():
        yield from ("", f"### [{name}]", "", _one_line(section.__doc__), "", *_table(section.model_fields))


def _table(fields: dict[str, FieldInfo]) -> Iterator[str]:
    yield from ("| key | default | meaning |", "|---|---|---|")
    for name, field in fields.items():
        yield f"| `{name}` | {_default(field)} | {_one_line(field.description)} |"


def _default(field: FieldInfo) -> str:
    """The default as TOML writes it; nothing for a value that is made when the run starts."""
    if field.default_factory is not None:
        return ""
    if field.default is None:
        return "none"
    return f"`{json.dumps(list(field.default) if isinstance(field.default, tuple) else field.default)}`"


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


if __name__ == "__main__":
    sys.exit(main())
