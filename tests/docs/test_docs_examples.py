"""The site's pages run: each page's Python blocks, in order, in one namespace."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^ *(?P<ticks>`{3,})(?P<info>[^`\n]*)$")


def python_blocks(text: str) -> Iterator[tuple[int, str]]:
    """Yields (line of the first line of code, code) of every block that is to run."""
    lines = text.splitlines()
    position = 0
    while position < len(lines):
        fence = FENCE.match(lines[position])
        position += 1
        if fence is None:
            continue
        start, end = position, position
        while end < len(lines) and lines[end].strip() != fence["ticks"]:
            end += 1
        if fence["info"].split() == ["python"]:
            yield start + 1, textwrap.dedent("\n".join(lines[start:end]))
        position = end + 1


PAGES = sorted(
    path
    for path in (ROOT / "docs").rglob("*.md")
    if any(python_blocks(path.read_text(encoding="utf-8")))
)


# Lightning's own advice about workers and log intervals, and its use of torch's pytree.
@pytest.mark.filterwarnings("ignore:The .* does not have many workers")
@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for line, code in python_blocks(page.read_text(encoding="utf-8")):
        # Blank lines in front make a traceback name the page's own line.
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)


def test_pages_have_examples() -> None:
    assert {"guide.md", "hf_trainer.md", "ema.md"} <= {page.name for page in PAGES}


def test_fences_have_a_form_that_the_site_renders() -> None:
    form = re.compile(r"\w*|\{\.\w+( \.[\w-]+)*\}")
    for path in (ROOT / "docs").rglob("*.md"):
        fences = map(FENCE.match, path.read_text(encoding="utf-8").splitlines())
        wrong = [
            fence[0] for fence in fences if fence and not form.fullmatch(fence["info"].strip())
        ]
        assert wrong == [], path


def test_blocks_are_found_by_their_fence() -> None:
    text = """\
```python
a = 1

b = 2
```
``` {.python .no-run}
1 / 0
```
````markdown
```python
1 / 0
```
````
```console
$ ls
```
  ```python
  if a:
      c = 3
  ```
"""
    assert list(python_blocks(text)) == [(2, "a = 1\n\nb = 2"), (18, "if a:\n    c = 3")]
