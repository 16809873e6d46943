"""The Prefect UI in Chromium: the form is filled, the smoke run started, watched to its end and looked at.

PICTURES=docs/images has the pictures of the documentation made anew.
"""

from __future__ import annotations

import os
import shutil
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from .conftest import ROOT, Prefect

pytestmark = pytest.mark.browser


@pytest.fixture
def chromium() -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1300,1100"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def look(chromium: Any, prefect: Prefect, tmp_path: Path) -> Callable[..., None]:
    """Open a page, wait for a text, and take a picture."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    folder = Path(os.environ.get("PICTURES", tmp_path))

    chromium.get(prefect.url)  # the UI asks for the password once, and keeps it like this
    kept = b64encode(prefect.password.encode()).decode()
    chromium.execute_script("localStorage.setItem('prefect-password', arguments[0])", kept)

    def look(path: str, text: str, picture: str) -> None:
        chromium.get(f"{prefect.url}{path}")
        WebDriverWait(chromium, 90).until(lambda driver: text in driver.find_element(By.TAG_NAME, "body").text)
        time.sleep(3)  # what slides in has arrived, and what is typed is taken
        chromium.save_screenshot(str(tmp_path / "page.png"))
        with Image.open(tmp_path / "page.png") as page:
            page.convert("RGB").save(folder / f"{picture}.webp", quality=80)

    return look


def test_the_form_starts_a_run(
    chromium: Any, prefect: Prefect, look: Callable[..., None], demo_dataset: Path, tmp_path: Path
) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    deployment = prefect.deployment("embed/smoke")
    look(f"/deployments/deployment/{deployment}/run", "Which model, and how it computes.", "prefect-form")
    said = chromium.find_element(By.TAG_NAME, "body").text
    assert "JPEG decoding: exact is Pillow's pixels, fast is the GPU's decoder." in said
    fields = {field.get_attribute("value"): field for field in chromium.find_elements(By.TAG_NAME, "textarea")}
    for old, new in {"demo-data": demo_dataset, "smoke-out": tmp_path / "out"}.items():
        old = str(ROOT / old)
        fields[old].send_keys(Keys.CONTROL, "a")
        fields[old].send_keys(str(new))
    (submit,) = [button for button in chromium.find_elements(By.TAG_NAME, "button") if button.text == "Submit"]
    chromium.execute_script("arguments[0].click()", submit)
    run = prefect.ended(WebDriverWait(chromium, 90).until(lambda _: prefect.runs("embed"))[0]["id"])
    assert run["parameters"]["dataset"] == str(demo_dataset)
    assert run["state_type"] == "COMPLETED", run["state"]
    look(f"/runs/flow-run/{run['id']}", "64 images in", "prefect-run")
    artifacts = prefect.artifacts(run["id"])
    look(f"/artifacts/artifact/{artifacts['summary']['id']}", "256 = 254 embedded + 2 quarantined", "prefect-summary")
    look(f"/artifacts/artifact/{artifacts['pictures']['id']}", "A sample of the embedded images", "prefect-pictures")
    sheet = chromium.find_element(By.CSS_SELECTOR, "img[src^='data:image/svg']")
    assert chromium.execute_script("return arguments[0].naturalWidth", sheet) > 1000
    look(f"/artifacts/artifact/{artifacts['quarantine']['id']}", "not_an_image", "prefect-quarantine")
    look(f"/artifacts/artifact/{artifacts['report']['id']}", "report.html", "prefect-report")
    chromium.find_element(By.PARTIAL_LINK_TEXT, "report.html").click()
    WebDriverWait(chromium, 90).until(lambda driver: len(driver.window_handles) > 1 or "Prefect" not in driver.title)
    chromium.switch_to.window(chromium.window_handles[-1])
    WebDriverWait(chromium, 90).until(
        lambda driver: "Norms and spread" in driver.find_element(By.TAG_NAME, "body").text
    )
