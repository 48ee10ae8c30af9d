"""Reports as pages: the figures in them, and a browser that draws them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def figures(page: Path):
    """Returns what plotly is given to draw."""
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page.read_text(), re.S)
    return json.loads(found[1])


def words(page: Path):
    """Returns what a reader reads, and the figures, without scripts and styles."""
    return re.sub(r"<script>.*?</script>|<style>.*?</style>", "", page.read_text(), flags=re.S)


def in_browser(url, profile, *options):
    """Shows a page in Chromium, without a window."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={profile}"]
    words = [CHROMIUM, *flags, "--enable-logging=stderr", "--virtual-time-budget=5000", *options, url]
    return subprocess.run(words, capture_output=True, text=True, timeout=120)


def width_on_a_telephone(page: Path, profile: Path):
    """Returns how wide a page is in a frame of 400 pixels, less a scroll bar."""
    frame = page.parent / "frame.html"
    frame.write_text(
        f"<iframe id='f' src='{page.name}' style='width:400px;height:900px;border:0'></iframe><p id='out'></p>"
        "<script>onload = () => setTimeout(() => { const d = document.getElementById('f').contentDocument;"
        "document.getElementById('out').textContent = 'WIDE ' + d.documentElement.scrollWidth }, 500)</script>"
    )
    shown = in_browser(f"file://{frame}", profile, "--allow-file-access-from-files", "--dump-dom")
    return int(re.search(r"WIDE (\d+)", shown.stdout)[1])
