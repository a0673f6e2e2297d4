"""A picture of a report page, taken by Chromium: how ``examples/pictures/report.png`` was made.

    python examples/sparse_token_forgetting.py --arms control --logdir runs/pictured
    vocabguard report runs/pictured/control-hf/vocabguard --out report.html
    python examples/page_picture.py report.html examples/pictures/report.png

The same for a file of ``vocabguard scan --out``, and for two sources side by side.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main() -> None:
    """Open the page without a window and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path, help="a .png to write")
    parser.add_argument("--size", default="1280,1680", help="width,height in pixels of what is seen of the page")
    parser.add_argument("--dark", action="store_true")
    arguments = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        parser.error(f"no browser; one of these is needed: {', '.join(BROWSERS)}")
    if not arguments.page.is_file():
        parser.error(f"{arguments.page}: not found")
    with tempfile.TemporaryDirectory() as profile:
        command = [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}",
            f"--window-size={arguments.size}", f"--screenshot={arguments.picture.resolve()}",
            *(["--blink-settings=preferredColorScheme=0"] if arguments.dark else []),
            arguments.page.resolve().as_uri(),
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    print(arguments.picture)


if __name__ == "__main__":
    main()
