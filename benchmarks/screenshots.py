"""Screenshots of the RAG page for docs/images: real documents, a real engine with RASD, headless Chromium.

python benchmarks/screenshots.py [FOLDER]
"""

import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

from pilotfish.integrations.rag import engine

DOCUMENTS = {
    "pilot_fish.md": "# Pilot fish\n\nPilot fish swim in front of sharks and eat their parasites. "
    "A shark hardly ever eats a pilot fish. When they are young, they gather around jellyfish.",
    "remoras.md": "# Remoras\n\nA remora holds on to sharks and whales with a disc on its head.",
    "bread.txt": "Bread rises because yeast makes gas. The oven has to be hot before the loaf goes in.",
}
QUESTION = "What does a remora hold on to?"
OPTIONS = [
    "--start",
    "smollm2-135m-instruct",
    "--drafter",
    "rasd",
    "--max-tokens",
    "48",
    "--",
    "--max-model-len",
    "4096",
]


def main() -> None:
    """Start the page, use it like a user, and take the screenshots."""
    root = Path(__file__).parent.parent
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else root / "docs" / "images"
    out.mkdir(parents=True, exist_ok=True)
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as folder:
        for name, text in DOCUMENTS.items():
            (Path(folder) / name).write_text(text)
        with (
            engine.running_server(["rag", "serve", f"{folder}/index"], OPTIONS) as server,
            sync_playwright() as playwright,
        ):
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 900, "height": 760}, device_scale_factor=2)
            page.goto(server.url)
            page.set_input_files("#files", [f"{folder}/{name}" for name in DOCUMENTS])
            expect(page.locator("#status")).to_contain_text(f"{len(DOCUMENTS)} passages", timeout=60_000)
            ask(page)
            page.screenshot(path=out / "rag_answer.png", full_page=True)
            page.locator("#passages button").first.click()
            page.wait_for_selector("dialog[open]")
            page.screenshot(path=out / "rag_passage.png")
            small = browser.new_page(viewport={"width": 360, "height": 740}, device_scale_factor=2)
            small.goto(server.url)
            ask(small)
            small.screenshot(path=out / "rag_narrow.png")
            browser.close()


def ask(page: Page) -> None:
    """Type the question, and wait for the complete answer."""
    page.fill("#question", QUESTION)
    page.press("#question", "Enter")
    page.wait_for_selector("#figures dt", timeout=120_000)


if __name__ == "__main__":
    main()
