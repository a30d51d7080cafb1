"""Write `docs/report.png`, the picture of the README: the top of the HTML report of `make demo`.

    python docs/make_picture.py                    run the demo into outputs/demo, then take the picture
    python docs/make_picture.py --report FILE.html take it of a report that exists

It needs Chromium or Chrome in the PATH; `--browser` names another binary.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "report.png"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDTH, HEIGHT = 1000, 1110  # pixels: the totals, the phases and the first plot
HEADLESS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, help="an HTML report; without it the demo is run")
    parser.add_argument("--browser", help="path of Chromium or Chrome")
    parser.add_argument("--output", type=Path, default=PICTURE, help="default: docs/report.png")
    arguments = parser.parse_args()
    browser = arguments.browser or next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        parser.error(f"found none of {', '.join(BROWSERS)} in the PATH. Install one, or name it with --browser.")
    take_picture(browser, arguments.report or run_demo(), arguments.output)
    return 0


def run_demo() -> Path:
    """Run the demo with its defaults and return its HTML report."""
    folder = ROOT / "outputs" / "demo"
    demo = [sys.executable, "-m", "lightning_compress.recipes.demo", "--output-dir", str(folder)]
    subprocess.run(demo, check=True, cwd=ROOT)
    return folder / "compression_report.html"


def take_picture(browser: str, page: Path, output: Path) -> None:
    """Write the top of an HTML page as a PNG."""
    if not page.is_file():
        raise FileNotFoundError(f"{page} is no file. Leave out --report to run the demo first.")
    window = f"--window-size={WIDTH},{HEIGHT}"
    shot = [browser, *HEADLESS, window, f"--screenshot={output.resolve()}", page.resolve().as_uri()]
    subprocess.run(shot, check=True, capture_output=True)


if __name__ == "__main__":
    raise SystemExit(main())
