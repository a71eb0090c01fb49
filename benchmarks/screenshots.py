"""Pictures of the page for docs/images: real documents, a real engine that drafts with RASD, headless Chromium.

python benchmarks/screenshots.py [FOLDER]
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
from playwright.sync_api import expect, sync_playwright

DOCUMENTS = {
    "pilot_fish.md": "# Pilot fish\n\nPilot fish swim in front of sharks and eat their parasites. "
    "A shark hardly ever eats a pilot fish. When they are young, they gather around jellyfish.",
    "remoras.md": "# Remoras\n\nA remora holds on to sharks and whales with a disc on its head.",
    "bread.txt": "Bread rises because yeast makes gas. The oven has to be hot before the loaf goes in.",
}
QUESTION = "What does a remora hold on to?"
PORT = 8791


def main() -> None:
    """Start the page, use it as a person does, and take the pictures."""
    root = Path(__file__).parent.parent
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else root / "docs" / "images"
    out.mkdir(parents=True, exist_ok=True)
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    url = f"http://127.0.0.1:{PORT}"
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--start", "smollm2-135m-instruct", "--drafter", "rasd", "--port", str(PORT), "--max-tokens", "48"]
        command = [sys.executable, "-m", "pilotfish", "rag", "serve", f"{folder}/index", *arguments]
        page_server = subprocess.Popen([*command, "--", "--max-model-len", "4096"])
        try:
            while True:
                try:
                    httpx.get(f"{url}/health")
                    break
                except httpx.HTTPError:
                    if page_server.poll() is not None:
                        raise SystemExit("the page ended before it answered") from None
                    time.sleep(0.5)
            for name, text in DOCUMENTS.items():
                (Path(folder) / name).write_text(text)
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
                page = browser.new_page(viewport={"width": 900, "height": 760}, device_scale_factor=2)
                page.goto(url)
                page.set_input_files("#files", [f"{folder}/{name}" for name in DOCUMENTS])
                expect(page.locator("#status")).to_contain_text(f"{len(DOCUMENTS)} passages", timeout=60_000)
                page.fill("#question", QUESTION)
                page.press("#question", "Enter")
                page.wait_for_selector("#figures dt", timeout=120_000)
                page.screenshot(path=out / "rag_answer.png", full_page=True)
                page.locator("#passages button").first.click()
                page.wait_for_selector("dialog[open]")
                page.screenshot(path=out / "rag_passage.png")
                small = browser.new_page(viewport={"width": 360, "height": 740}, device_scale_factor=2)
                small.goto(url)
                small.fill("#question", QUESTION)
                small.press("#question", "Enter")
                small.wait_for_selector("#figures dt", timeout=120_000)
                small.screenshot(path=out / "rag_narrow.png")
                browser.close()
        finally:
            page_server.terminate()
            page_server.wait()


if __name__ == "__main__":
    main()
