"""The page in a real browser: filters, trajectories, keys, two runs; no data runs, nothing is fetched."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from mosaic_fast.config import Config, RewardConfig
from mosaic_fast.config.read import save_config
from mosaic_fast.report.collect import collect_run
from mosaic_fast.report.page import render_page
from tests.report.chromium import Chromium
from tests.report.runs_for_tests import make_group, write_run, write_step
from tests.report.test_read import HOSTILE


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with Chromium() as started:
        started.resize(1400, 900)
        yield started


@pytest.fixture
def page(browser: Chromium) -> Iterator[Chromium]:
    """A fresh page; whatever a test did, it must have raised no error and asked the network for nothing."""
    browser.open("about:blank")
    browser.evaluate("1")
    browser.console.clear()
    browser.requests.clear()
    yield browser
    browser.evaluate("new Promise((done) => setTimeout(done, 50))")
    assert browser.console == []
    assert browser.dialogs == 0
    assert [url for url in browser.requests if not url.startswith("file:///")] == []
    assert len(browser.requests) <= 2, "the page itself, and nothing beside it"


def write_page(path: Path, *runs: Path) -> str:
    path.write_text(render_page([collect_run(run, 100_000) for run in runs]), encoding="utf-8")
    return path.as_uri()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("page")
    return write_page(folder / "page.html", write_run(folder / "one", steps=4))


def text(page: Chromium, selector: str) -> str:
    return str(page.evaluate(f"document.querySelector({json.dumps(selector)}).textContent"))


def test_the_overview_shows_rates_first_with_their_intervals(page: Chromium, address: str):
    page.open(address)
    page.wait_for("document.querySelector('.chart')")
    assert "90%59.6%–98.2%" in text(page, ".heldout")  # Wilson's interval of 9 of 10
    titles = page.evaluate("[...document.querySelectorAll('.chart h3')].map((e) => e.textContent)")
    assert isinstance(titles, list)
    assert titles[0] == "What it does: harm"
    assert {"Time", "Token budget", "Sharing", "Reward parts"} <= set(titles)


def test_a_chart_shows_the_values_under_the_pointer(page: Chromium, address: str):
    page.open(address)
    page.wait_for("document.querySelector('.chart')")
    assert "harmful refused100%" in text(page, ".chart .legend")
    box = page.evaluate(
        "(() => { const b = document.querySelector('.canvas').getBoundingClientRect();"
        " return [b.x, b.y, b.width, b.height]; })()"
    )
    assert isinstance(box, list)
    page.page.mouse.move(box[0] + 0.1 * box[2], box[1] + 0.5 * box[3])
    page.wait_for("document.querySelector('.at').textContent === 'step 1'")
    assert "harmful refused25%" in text(page, ".chart .legend")


@pytest.mark.parametrize("width", [420, 1280])
@pytest.mark.parametrize("count", [1, 2])
def test_the_held_out_table_fits_the_window(page: Chromium, tmp_path: Path, width: int, count: int):
    runs = [write_run(tmp_path / f"run-{number}", steps=6) for number in range(count)]
    names = ("harmful_refused", "harmful_harm", "injection_harm", "benign_done", "overrefusal", "gate_open")
    for run in runs:  # nothing at 0% or 100%: the widest figures there are
        path = run / "summary.json"
        summary = json.loads(path.read_text())
        rates = {f"safety/{name}": 0.4567 for name in names}
        counts = {name: [4567, 10000] for name in rates}
        summary |= {"before": rates, "after": rates, "counts": {"before": counts, "after": counts}}
        path.write_text(json.dumps(summary))
    page.resize(width, 900)
    try:
        page.open(write_page(tmp_path / "page.html", *runs))
        page.wait_for("document.querySelector('.heldout')")
        folder = os.environ.get("MOSAIC_TEST_SCREENSHOTS")
        if folder:
            page.screenshot(Path(folder) / f"overview-{count}-{width}.png")
        wide = "(() => { const e = document.querySelector('.heldout').parentElement;"
        assert page.evaluate(wide + " return e.scrollWidth - e.clientWidth; })()") == 0
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    finally:
        page.resize(1400, 900)


@pytest.mark.parametrize("steps", [4, 6])
def test_a_line_that_is_not_the_legends_figure_says_so(page: Chromium, tmp_path: Path, steps: int):
    """Up to four steps are drawn as they are; a mean is drawn over the steps themselves, and named."""
    page.open(write_page(tmp_path / "page.html", write_run(tmp_path / "run", steps=steps)))
    page.wait_for("document.querySelector('.chart')")
    chart = "document.querySelector('.chart')"
    said = page.evaluate(f"Boolean({chart}.querySelector('.smoothing'))")
    faint = page.evaluate(f"{chart}.querySelectorAll('.line.faint').length")
    assert (said, bool(faint)) == (steps > 4, steps > 4)
    if steps == 4:  # injection harm ends at 0%: a line at the axis, 22 units above the lower edge
        ends = page.evaluate(
            f"[...{chart}.querySelectorAll('.canvas path.line')]"
            ".map((e) => e.getAttribute('d').split(' ').at(-1))"
        )
        assert isinstance(ends, list)
        assert {"178.0", "8.0"} >= set(ends), ends


def test_filters_choose_and_the_address_keeps_them(page: Chromium, address: str):
    page.open(address + "#view=trajectories")
    page.wait_for("document.querySelector('.row')")
    assert text(page, "#count") == "48 of 48 trajectories"
    page.click("[data-filter=status][data-value=refused]")
    page.wait_for("document.querySelector('#count').textContent.startsWith('12 of')")
    page.click("[data-filter=kind][data-value=benign]")
    page.wait_for("document.querySelector('#count').textContent.startsWith('4 of')")
    page.evaluate(
        "(() => { const e = document.querySelector('[data-filter=from]'); e.value = '3';"
        " e.dispatchEvent(new Event('input')); })()"
    )
    page.wait_for("document.querySelector('#count').textContent.startsWith('2 of')")
    link = page.evaluate("location.href")
    page.open("about:blank")
    page.open(str(link))
    page.wait_for("document.querySelector('.row')")
    assert text(page, "#count") == "2 of 48 trajectories"
    assert (
        page.evaluate("document.querySelector('[data-value=refused]').getAttribute('aria-pressed')") == "true"
    )
    page.click("#clear")
    page.wait_for("document.querySelector('#count').textContent.startsWith('48 of')")


def test_a_trajectory_tells_its_parts_its_group_and_why(page: Chromium, address: str):
    page.open(address + "#view=trajectories")
    page.wait_for("document.querySelector('.row')")
    page.click("[data-at='1.5']")
    page.wait_for("document.querySelector('.matrix')")
    labels = page.evaluate(
        "[...document.querySelectorAll('.conversation .block > h4')].map((e) => e.textContent)"
    )
    assert labels == [
        "user",
        "plan",
        "safety check",
        "action: tool call",
        "observation, not trained",
        "action: final answer",
    ]
    assert "#5 is better than #6task complete beats refused a task that should be done" in text(
        page, "#pairs"
    )
    page.click("[data-pair='3,0']")
    page.wait_for("document.querySelectorAll('#pairs li').length === 1")
    assert text(page, "#pairs") == "▼#7 is worse than #4task complete beats harm done"
    assert text(page, ".group h3 small") == "50 tokens, 23 distinct: 2.2× shared"
    assert page.evaluate("document.querySelectorAll('.tree .fork-mark').length") == 1
    assert "#5 #6check, step 1<safety_thoughts>" in text(page, ".forks")


def test_a_users_own_reward_parts_are_columns_facts_and_a_curve(page: Chromium, tmp_path: Path):
    folder = write_run(tmp_path / "run", steps=1)
    write_step(folder, 1, [make_group(group) for group in range(3)], {"brevity": 0.75})
    config = Config(reward=RewardConfig(parts=("align", "my_reward:brevity")))
    save_config(config, folder / "config.toml")
    metrics = folder / "metrics.jsonl"
    metrics.write_text(json.dumps(json.loads(metrics.read_text()) | {"reward/brevity": 0.75}) + "\n")
    page.open(write_page(tmp_path / "page.html", folder))
    page.wait_for("document.querySelector('.chart')")
    assert "brevity" in text(page, ".charts")
    page.open("about:blank")
    page.open((tmp_path / "page.html").as_uri() + "#view=trajectories&at=1.1")
    page.wait_for("document.querySelector('.matrix')")
    assert "r_alignr_fmtp_lenbrevityRadv." in text(page, ".matrix thead")
    assert "brevity0.75" in text(page, ".rollout-head .numbers")


def test_keys_walk_through_list_and_group(page: Chromium, address: str):
    page.open(address + "#view=trajectories&at=2.4")
    page.wait_for("document.querySelector('.matrix')")
    for key, at in (("j", "2.5"), ("k", "2.4"), ("]", "2.5"), ("[", "2.4"), ("[", "2.7")):
        page.press(key)
        page.wait_for(f"location.hash.includes('at={at}')")
    page.press("/")
    page.wait_for("document.activeElement.dataset.filter === 'q'")
    page.press("Escape")
    page.press("?")
    page.wait_for("document.querySelector('dialog').open")
    page.evaluate("document.querySelector('dialog button').click()")
    page.press("o")
    page.wait_for("document.querySelector('.overview')")
    page.evaluate("history.back()")
    page.wait_for("document.querySelector('.matrix')")


def test_hostile_text_is_shown_and_never_runs(page: Chromium, tmp_path: Path):
    """Script tags, handlers, an ended data block, NUL, a bidi override: all visible, none of it markup."""
    page.open(
        write_page(tmp_path / "page.html", write_run(tmp_path / "run", steps=1, text=HOSTILE))
        + "#view=trajectories&at=1.2"
    )
    page.wait_for("document.querySelector('.matrix')")
    assert page.evaluate("typeof window.hacked") == "undefined"
    assert page.evaluate("document.querySelectorAll('#main img, #main script').length") == 0
    plan = text(page, ".conversation .part-plan")
    assert "</script><script>window.hacked=1</script><img src=x onerror=hacked=1>" in plan
    assert "⟨U+202E⟩⟨U+0000⟩⟨U+2028⟩😀" in plan
    assert "</script>" in text(page, ".row .request")


def test_hostile_values_in_every_field_are_text_too(page: Chromium, tmp_path: Path):
    """Statuses, kinds, tool and argument names, roles, metrics, configuration: all of it could be forged."""
    run = write_run(tmp_path / "run", steps=1)
    for path in [*run.glob("trajectories/*.jsonl"), run / "metrics.jsonl", run / "summary.json"]:
        rows = [hostile(json.loads(line)) for line in path.read_text().splitlines()]
        if path.name == "metrics.jsonl":  # names of metrics, as an environment may make them up
            rows = [{**row, HOSTILE: 1.0, f"env/{HOSTILE}": 0.5} for row in rows if isinstance(row, dict)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "config.toml").write_text(f"model = {json.dumps(HOSTILE.replace(chr(0), ''))}\n")
    page.open(write_page(tmp_path / "page.html", run))
    page.wait_for("document.querySelector('.chart')")
    page.evaluate("document.querySelectorAll('details.card').forEach((e) => { e.open = true; })")
    page.press("t")
    page.wait_for("document.querySelector('.row')")
    for at in ("1.0", "1.2"):
        page.click(f"[data-at='{at}']")
        page.wait_for(f"document.querySelector('.matrix') && location.hash.includes('at={at}')")
        assert HOSTILE[:40] in text(page, ".badges")
    assert HOSTILE[:40] in text(page, "[data-filter=status]")
    assert page.evaluate("typeof window.hacked") == "undefined"
    assert page.evaluate("document.querySelectorAll('main img, main script').length") == 0


def test_damaged_values_never_break_the_page(page: Chromium, tmp_path: Path):
    """Rows with values of other kinds and sizes: what the reader lets through, the page must bear."""
    draw = random.Random(0)
    run = write_run(tmp_path / "run", steps=6, groups=6)
    for path in run.glob("trajectories/*.jsonl"):
        rows = [damaged(json.loads(line), draw) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page.open(write_page(tmp_path / "page.html", run) + "#view=trajectories")
    page.wait_for("document.querySelector('.row')")
    shown = page.evaluate("[...document.querySelectorAll('.row')].length")
    assert shown
    seen: set[object] = set()
    while True:
        page.press("j")
        page.evaluate("new Promise((done) => setTimeout(done, 20))")
        at = page.evaluate("location.hash")
        if at in seen:
            break
        seen.add(at)
        assert page.evaluate("Boolean(document.querySelector('.rollout-head'))"), at
    assert len(seen) > 40, "most rows must survive, or the test tests nothing"


def hostile(value: object, key: str = "") -> object:
    """Every text replaced by hostile text, and the keys of open dictionaries too."""
    if isinstance(value, str):
        return value if key == "action" else HOSTILE + value
    if isinstance(value, list):
        return [hostile(inner) for inner in value]
    if isinstance(value, dict):
        open_keys = key in ("details", "arguments", "before", "after", "counts")
        return {(HOSTILE + k if open_keys else k): hostile(v, k) for k, v in value.items()}
    return value


def damaged(row: dict[str, object], draw: random.Random) -> dict[str, object]:
    """One value somewhere in a row replaced."""
    values = [None, -1, 10**15, "", "x", [], {}, {"a": [None]}, 1e308, [0.5, 7], True]
    place: object = row
    while True:
        keys = (
            list(place)
            if isinstance(place, dict)
            else list(range(len(place)))
            if isinstance(place, list)
            else []
        )
        key = draw.choice(keys)
        inner = place[key]  # pyrefly: ignore
        if not inner or not isinstance(inner, dict | list) or draw.random() < 0.3:
            place[key] = draw.choice(values)  # pyrefly: ignore
            return row
        place = inner


def test_even_markup_in_the_document_could_not_run(page: Chromium, address: str):
    """The second line: were text ever put in as HTML, the policy would still stop it."""
    page.open(address)
    page.wait_for("document.querySelector('.chart')")
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hacked=1\">')")
    page.evaluate("new Promise((done) => setTimeout(done, 200))")
    assert page.evaluate("typeof window.hacked") == "undefined"
    assert any("Content Security Policy" in line for line in page.console)
    page.console.clear()
    page.requests.clear()


def test_two_runs_side_by_side(page: Chromium, tmp_path: Path):
    runs = [write_run(tmp_path / name, steps=2, seed=seed) for name, seed in (("first", 0), ("second", 1))]
    page.open(write_page(tmp_path / "page.html", *runs))
    page.wait_for("document.querySelector('.chart')")
    assert "Configuration (1 values differ)" in text(page, ".overview")
    assert "harmful refusedA100%B100%" in text(page, ".chart .legend")
    page.press("t")
    page.wait_for("document.querySelector('.row')")
    page.click("[data-at='1.1'][data-run=A]")
    page.wait_for("document.querySelector('.matrix')")
    page.press("s")
    page.wait_for("document.querySelectorAll('.pane').length === 2")
    heads = page.evaluate("[...document.querySelectorAll('.pane h2')].map((e) => e.textContent)")
    assert heads == ["AStep 1, rollout 1", "BStep 1, rollout 1"]
    page.click("[data-filter=run][data-value=B]")
    page.wait_for("document.querySelector('#count').textContent === '24 of 48 trajectories'")


def test_the_page_opens_on_a_group_that_differs_and_its_conversation_comes_first(
    page: Chromium, address: str
):
    """Before anything was chosen; a filter moves it to a group that fits."""
    page.open(address + "#view=trajectories")
    page.wait_for("document.querySelector('.pane .matrix')")
    assert page.evaluate("location.hash") == "#view=trajectories"
    parts = page.evaluate("[...document.querySelector('.columns').children].map((e) => e.className)")
    assert parts == ["conversation", "group"]
    page.open(address + "#view=trajectories&status=refused")
    page.wait_for("document.querySelector('.pane .matrix')")
    assert "refused" in text(page, ".pane")


def test_a_narrow_window_shows_list_or_trajectory(page: Chromium, address: str):
    page.resize(420, 800)
    try:
        page.open(address + "#view=trajectories")
        page.wait_for("document.querySelector('.row')")
        page.click("[data-at='1.0']")
        page.wait_for("document.querySelector('.matrix')")
        assert page.evaluate("getComputedStyle(document.querySelector('.side')).display") == "none"
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.click(".back")
        page.wait_for("getComputedStyle(document.querySelector('.side')).display !== 'none'")
    finally:
        page.resize(1400, 900)


@pytest.mark.skipif(
    not os.environ.get("MOSAIC_TEST_REPORT"), reason="only in make test-report: it takes a while"
)
def test_ten_thousand_trajectories(page: Chromium, tmp_path: Path):
    """Every row can be reached, few are drawn, and the file stays far below the trajectories' own size."""
    run = write_run(tmp_path / "run", steps=1)
    for step in range(1, 101):
        write_step(run, step, [make_group(group, " some words" * 20) for group in range(25)])
    raw = sum(path.stat().st_size for path in (run / "trajectories").iterdir())
    page.open(write_page(tmp_path / "page.html", run) + "#view=trajectories")
    page.wait_for("document.querySelector('.row')")
    assert text(page, "#count") == "10,000 of 10,000 trajectories"
    assert page.evaluate("document.querySelectorAll('.row').length < 60")
    page.evaluate("document.querySelector('.list').focus()")
    page.press("End")
    page.wait_for("location.hash.includes('at=100.99') && document.querySelector('.row[aria-selected=true]')")
    assert page.evaluate("document.querySelector('.row[aria-selected=true]').dataset.at") == "100.99"
    assert (tmp_path / "page.html").stat().st_size < raw / 8
