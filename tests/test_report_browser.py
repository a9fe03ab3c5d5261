"""The report in a browser: the card follows a click and the selects, and leads into the text. Skipped without one."""

import shutil

import numpy as np
import pytest
import xarray as xr

from probe import report, schema
from tests.test_report import HOSTILE, recorded
from tests.test_report_attention import recorded as recorded_attention

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api")
    if BROWSER is None:
        pytest.skip("there is no Chromium to open the page with")
    with playwright.sync_playwright() as runner:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = runner.chromium.launch(executable_path=BROWSER, args=options)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def tree():
    tree = recorded(names=(HOSTILE, "b"))
    vocabulary = tree["vocabulary"].to_dataset()
    vocabulary["piece"].values[0] = HOSTILE
    tree["vocabulary"] = xr.DataTree(vocabulary)
    return tree


@pytest.fixture
def page(chromium, tree, tmp_path):
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    page.faults = []
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("dialog", lambda dialog: (page.faults.append("a script of the recording ran"), dialog.dismiss()))
    page.goto(report.write_report(tree, tmp_path).as_uri())
    page.wait_for_selector("#load .main-svg")
    yield page
    assert page.faults == []
    page.close()


def choose(page, layer, expert):
    page.locator("#expert select").nth(0).select_option(label=layer)
    page.locator("#expert select").nth(1).select_option(label=expert)


def test_the_script_writes_the_title_that_the_page_came_with(page, tmp_path):
    html = (tmp_path / "index.html").read_text(encoding="utf-8")
    came_with = html.split('<h2 class="card-title">')[1].split("</h2>")[0]
    assert page.locator(".card-title").inner_text() == came_with.replace("&nbsp;", "\u00a0")


def test_every_expert_has_a_card(page, tree):
    load = tree["routing"]["expert_index"].values[:, :, 0]
    for layer, label in enumerate(("0", "1", "2", "3 ◇")):
        choose(page, label, "5")
        share = 100 * np.mean(load[:, layer] == 5)
        assert page.locator(".card-title").inner_text().startswith(f"Expert 5 of layer {label} takes {share:.0f}")
        assert page.locator(".card .bars .name").all_inner_texts() == [HOSTILE, "b"]


def test_hostile_text_is_text(page):
    """Wherever its token leads, as a chip, a context or the name of a domain."""
    for expert in range(8):
        choose(page, "1", str(expert))
        if HOSTILE in page.locator(".card .chips > span").all_text_contents():
            break
    else:
        raise AssertionError("no expert of layer 1 attracts the token")
    assert page.locator(".card img, .card script:not([type])").count() == 0


def test_a_click_on_the_heatmap_opens_the_card(page):
    page.evaluate(
        "document.querySelector('#load .figure').emit('plotly_click', {points: [{y: 2, customdata: ['', '6'], "
        "data: {type: 'heatmap'}}]})"
    )
    assert page.locator(".card-title").inner_text().startswith("Expert 6 of layer 2 ")
    shapes = page.evaluate("document.querySelector('#load .figure').layout.shapes")
    assert [(shape["x0"], shape["y0"]) for shape in shapes] == [(5.5, 1.5)]


def test_a_context_leads_to_its_token(page, tree):
    choose(page, "0", "1")
    contexts = page.locator(".contexts button")
    assert 1 <= contexts.count() <= 5
    token = contexts.first.locator(".token").text_content()
    contexts.first.click()
    found = page.locator(".probe-tokens i.found")
    assert found.count() == 1
    assert found.text_content() == token
    assert found.get_attribute("data-e") == "1"
    assert page.locator(".probe-controls output").inner_text() == "0"
    pieces = {piece.decode(errors="replace") for piece in schema.pieces(tree["vocabulary"].to_dataset()).values()}
    assert token in pieces


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_scrolls_sideways_on_a_narrow_page(chromium, page, tmp_path, scheme):
    narrow = chromium.new_page(viewport={"width": 700, "height": 900}, color_scheme=scheme)
    narrow.goto((tmp_path / "index.html").as_uri())
    narrow.wait_for_selector("#load .main-svg")
    assert narrow.evaluate("document.documentElement.scrollWidth") == 700
    narrow.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_part_on_attention_draws_and_switches(chromium, tmp_path, scheme):
    tree = recorded_attention(queries=3)
    page = chromium.new_page(viewport={"width": 700, "height": 900}, color_scheme=scheme)
    page.set_default_timeout(120_000)
    faults = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(report.write_report(tree, tmp_path).as_uri())
    for section in ("attention", "heads", "distance", "chunks", "positions", "maps"):
        page.wait_for_selector(f"#{section} .main-svg")
    assert page.evaluate("document.documentElement.scrollWidth") == 700
    shown = (
        "document.querySelector('#heads .figure')._fullData.filter(trace => trace.type === 'heatmap' && trace.visible)"
    )
    before = page.evaluate(f"{shown}.map(trace => trace.text[0][0])")
    page.locator("#heads .updatemenu-button").nth(3).click()
    page.wait_for_function(
        "document.querySelector('#heads .figure').layout.coloraxis.colorbar.title.text === 'far mass'"
    )
    after = page.evaluate(f"{shown}.map(trace => trace.text[0][0])")
    assert len(before) == len(after) == 1
    assert after == ["0.00"] != before  # a RoPE layer has no far mass
    page.locator("#maps .updatemenu-button").nth(1).click()
    assert faults == []
    page.close()
