"""The documentation as a site: it builds without a warning, needs no network, and its reference has all there is."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from fdscale import config
from fdscale.kernels.attention import window_attention

pytest.importorskip("mkdocs")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make site` does: strictly, so that a link, an anchor or a page that nothing leads to ends it."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(out)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        text = page.read_text()
        loaded = re.findall(r'<(?:script|img|iframe|source)\b[^>]*\bsrc="([^"]+)"', text)
        loaded += re.findall(r'<link\b[^>]*rel="(?:stylesheet|icon|preconnect|preload)"[^>]*href="([^"]+)"', text)
        assert not [one for one in loaded if one.startswith(("http", "//"))], page
        for one in loaded:
            assert (page.parent / one.split("?")[0].split("#")[0]).is_file() or page.name == "404.html", (
                f"{page}: {one}"
            )


def test_the_reference_is_complete(site: Path) -> None:
    def words(name: str) -> str:
        return _words(html.unescape(re.sub(r"<[^>]+>", "", (site / f"reference/{name}.html").read_text())))

    keys, verbs, recipes = words("keys"), words("verbs"), words("recipes")
    for key, _, entry in config.fields():
        assert key.split(".")[1] in keys, key
        assert _words(entry.metadata["doc"]) in keys, key
    for verb in ("distill", "shards make", "bench step", "report"):
        assert f"usage: fdscale {verb}" in verbs
    python = words("python")
    for name in ("config.load", "models.swin_v2.SwinV2", "kernels.attention.window_attention", "UserError"):
        assert f"fdscale.{name}" in python
    assert _words(str(window_attention.__doc__).splitlines()[0]) in python
    for path in config.recipes().values():
        assert _words(path.read_text()) in recipes, path


def _words(text: str) -> str:
    """Without Markdown's marks, and with single blanks."""
    return " ".join(re.sub(r"[`\\]", "", text).split())
