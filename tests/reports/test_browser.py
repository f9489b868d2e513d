"""The pages in a browser: headless Chromium, driven by selenium."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

import nibblecast
from tests import tools
from tests.reports import samples

pytestmark = pytest.mark.slow

BROWSER, DRIVER = "chromium", "chromedriver"

#: The WCAG's contrast of each text with what is behind it: [contrast, text], the least first.
CONTRASTS = """
const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
const luminance = ([r, g, b]) => {
  const linear = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  return 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
};
const behind = (element) => {
  for (; element; element = element.parentElement) {
    const found = channels(getComputedStyle(element).backgroundColor);
    if (found.length === 3 || found[3] === 1) return found;
  }
  throw new Error("nothing is behind");
};
const found = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || element.tagName === "SCRIPT") continue;
  const style = getComputedStyle(element);
  const [a, b] = [luminance(channels(element.closest("svg") ? style.fill : style.color)), luminance(behind(element))];
  found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), walker.currentNode.data.trim()]);
}
return found.sort(([a], [b]) => a - b);
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    tools.need([BROWSER, DRIVER], "chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = tools.path(BROWSER)
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(tools.path(DRIVER))) as driver:
        yield driver


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    sources = {
        "model": samples.FIXTURES / "gguf" / "types.gguf",
        "hostile": samples.hostile_model(folder),
        "batch": samples.batch(folder / "batch"),
    }
    made = {name: folder / f"{name}.html" for name in sources}
    for name, source in sources.items():
        nibblecast.report(source, made[name], reference=folder / "floats.safetensors" if name == "hostile" else None)
    return made


@pytest.fixture(params=["model", "hostile", "batch"])
def page(request: pytest.FixtureRequest, browser: webdriver.Chrome, pages: dict[str, Path]) -> Iterator[str]:
    """One of the pages, opened; nothing may have been complained of in the end."""
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.get("about:blank")
    browser.get_log("browser")
    browser.get(pages[request.param].as_uri())
    yield request.param
    assert browser.get_log("browser") == []


def table(browser: webdriver.Chrome) -> WebElement:
    """The table that can be searched."""
    return browser.find_element(By.CSS_SELECTOR, ".search ~ .scroll table")


def column(browser: webdriver.Chrome, title: str) -> list[str]:
    """What a column is sorted by in each row that is shown, from top to bottom."""
    return browser.execute_script(
        "const t = arguments[0], i = [...t.tHead.rows[0].cells].findIndex((h) => h.textContent === arguments[1]);"
        "return [...t.tBodies[0].rows].filter((r) => r.offsetParent !== null || r.offsetHeight)"
        ".map((r) => r.cells[i].dataset.order ?? r.cells[i].textContent)",
        table(browser),
        title,
    )


def header(browser: webdriver.Chrome, title: str) -> WebElement:
    return table(browser).find_element(By.XPATH, f".//thead//button[.='{title}']")


def direction(button: WebElement) -> str | None:
    return button.find_element(By.XPATH, "..").get_attribute("aria-sort")


NUMBERS = {"model": "Size", "hostile": "Signal to noise, dB", "batch": "Seconds"}


def test_a_click_sorts(browser: webdriver.Chrome, page: str) -> None:
    button = header(browser, NUMBERS[page])
    assert direction(button) is None
    button.click()
    assert direction(button) == "ascending"
    numbers = [float(text) for text in column(browser, NUMBERS[page])]
    assert numbers == sorted(numbers)
    button.click()
    assert direction(button) == "descending"
    assert [float(text) for text in column(browser, NUMBERS[page])] == sorted(numbers, reverse=True)


def test_the_keyboard_sorts(browser: webdriver.Chrome, page: str) -> None:
    names = column(browser, "Model" if page == "batch" else "Tensor")
    browser.find_element(By.CSS_SELECTOR, ".search input").send_keys(Keys.TAB, Keys.TAB)
    button = browser.switch_to.active_element
    assert button.tag_name == "button"
    assert button.value_of_css_property("outline-style") == "solid"
    button.send_keys(Keys.ENTER)
    assert direction(button) == "ascending"
    first = column(browser, "Model" if page == "batch" else "Tensor")
    button = browser.switch_to.active_element
    button.send_keys(Keys.SPACE)
    assert direction(button) == "descending"
    second = column(browser, "Model" if page == "batch" else "Tensor")
    assert sorted(first) == sorted(names)
    assert first == second[::-1]


def test_what_is_empty_comes_last(browser: webdriver.Chrome, page: str) -> None:
    title = {"model": "Unused codes", "hostile": "Unused codes", "batch": "Exit code"}[page]
    for _ in range(2):
        header(browser, title).click()
        values = column(browser, title)
        filled = [value for value in values if value]
        assert values == filled + [""] * (len(values) - len(filled))


def test_typing_searches(browser: webdriver.Chrome, page: str) -> None:
    box = browser.find_element(By.CSS_SELECTOR, ".search input")
    assert browser.find_element(By.CSS_SELECTOR, f"label[for='{box.get_attribute('id')}']").is_displayed()
    every = column(browser, "Model" if page == "batch" else "Tensor")
    word, found = {"model": ("Q4_0", 1), "hostile": ("</TABLE>", 1), "batch": ("onnx done", 8)}[page]
    box.send_keys(word)
    assert len(column(browser, "Model" if page == "batch" else "Tensor")) == found
    status = browser.find_element(By.CSS_SELECTOR, ".search [role=status]")
    assert status.text == f"{found} of {len(every)}"
    box.send_keys(Keys.CONTROL + "a", Keys.DELETE)
    assert column(browser, "Model" if page == "batch" else "Tensor") == every


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(browser: webdriver.Chrome, page: str, scheme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    open_all(browser)
    back = browser.find_element(By.TAG_NAME, "html").value_of_css_property("background-color")
    assert ("255, 255, 255" in back) == (scheme == "light")
    found = browser.execute_script(CONTRASTS)
    assert len(found) > 50
    assert found[0][0] >= 4.5, found[:5]


def test_a_narrow_screen_needs_no_scrolling_sideways(browser: webdriver.Chrome, page: str) -> None:
    metrics = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    open_all(browser)
    assert browser.execute_script("return [innerWidth, document.documentElement.scrollWidth <= innerWidth]") == [
        400,
        True,
    ]


def test_names_have_done_nothing(browser: webdriver.Chrome, page: str) -> None:
    assert (
        browser.title == {"model": "types.gguf", "hostile": "<b>hostile & 'quoted'.safetensors", "batch": "batch"}[page]
    )
    assert browser.find_elements(By.CSS_SELECTOR, "img, iframe, b, i, [onerror], [onfocus], [autofocus]") == []
    assert len(browser.find_elements(By.TAG_NAME, "script")) == 1


@pytest.mark.parametrize("page", ["model", "hostile"], indirect=True)
def test_a_link_opens_what_it_leads_to(browser: webdriver.Chrome, page: str) -> None:
    link = table(browser).find_element(By.CSS_SELECTOR, "tbody a")
    target = browser.find_element(By.ID, link.get_attribute("href").partition("#")[2])
    assert not target.get_property("open")
    for _ in range(2):
        link.send_keys(Keys.ENTER)
        assert target.get_property("open")
        assert browser.switch_to.active_element.tag_name == "summary"
        browser.switch_to.active_element.send_keys(Keys.SPACE)
        assert not target.get_property("open")
    link.send_keys(Keys.ENTER)
    assert target.find_element(By.TAG_NAME, "svg").is_displayed()
    assert "histogram" in target.find_element(By.TAG_NAME, "svg").get_attribute("aria-label")


def test_without_scripts_all_is_there(browser: webdriver.Chrome, pages: dict[str, Path]) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(pages["model"].as_uri())
        assert not browser.find_element(By.CSS_SELECTOR, ".search").is_displayed()
        assert browser.find_elements(By.CSS_SELECTOR, "th button") == []
        assert "Q4_0" in table(browser).text
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_the_policy_forbids_what_is_outside(browser: webdriver.Chrome, pages: dict[str, Path]) -> None:
    browser.get(pages["model"].as_uri())
    forbidden = browser.execute_async_script(
        "const done = arguments[0];"
        "addEventListener('securitypolicyviolation', (event) => done(event.effectiveDirective));"
        "document.body.append(Object.assign(new Image(), { src: 'page.png' }));"
    )
    assert forbidden == "img-src"
    browser.get_log("browser")


def open_all(browser: webdriver.Chrome) -> None:
    browser.execute_script("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
