"""scripts/site.py finds pages without links, requests of other hosts, and searches without hits."""

from __future__ import annotations

import json
from pathlib import Path

from script_modules import load

ROOT = Path(__file__).parents[2]

site_check = load(ROOT / "scripts" / "site.py", "site_check")


def write(folder: Path, pages: dict[str, str], titles: dict[str, str]) -> Path:
    for name, text in pages.items():
        path = folder / name / "index.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (folder / "search").mkdir()
    documents = [{"location": where, "title": title} for where, title in titles.items()]
    (folder / "search" / "search_index.json").write_text(json.dumps({"docs": documents}))
    return folder


ALL = {location: query for query, location in site_check.SEARCHES.items()}
ALL["howto/fsdp2/"] = "FSDP2 and torchtitan"


def test_sound_site_has_no_problems(tmp_path: Path) -> None:
    pages = {
        "": '<a href="a/">a</a> <code>```</code><img src="plot.svg">',
        "a": '<a href="../b/#x">b</a> <a href="https://orbax.readthedocs.io">Orbax</a>',
        "b": "",
        "parity": "",
    }
    assert list(site_check.problems(write(tmp_path, pages, ALL))) == []


def test_each_problem_is_found(tmp_path: Path) -> None:
    pages = {
        "": '<script src="https://cdn.example/mermaid.js"></script>',
        "alone": "<p>```python no-run import torch</p>",
    }
    titles = {where: title for where, title in ALL.items() if where != "learn/install/"}
    titles["object_stores/#x"] = "Install an extra"
    assert list(site_check.problems(write(tmp_path, pages, titles))) == [
        "alone/index.html: no link leads there",
        "alone/index.html: ``` is not rendered",
        "index.html: requests https://cdn.example/mermaid.js",
        "search for 'install': no title of learn/install/ matches; found ['object_stores/#x']",
    ]


def test_missing_site_is_a_problem(tmp_path: Path) -> None:
    assert len(list(site_check.problems(tmp_path))) == 1
