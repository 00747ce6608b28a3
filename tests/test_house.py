"""The package's structure: its floors, the cost of its import, its public names."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from script_modules import load

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "functional_ckpt"

floors = load(ROOT / "scripts" / "floors.py")
tracked = load(ROOT / "scripts" / "tracked.py")


# A valid package: every kind of module, every allowed import.
SOUND = {
    "__init__.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n"
    "    from functional_ckpt import manager as manager\n",
    "errors.py": "import traceback\n",
    "core/__init__.py": "",
    "core/arrays/spec.py": "from functional_ckpt import errors\n",
    "core/tree/flatten.py": "import torch\n",
    "core/tree/containers.py": "import torch\nimport torch.utils._pytree as pytree\n"
    "from functional_ckpt.core.arrays import spec\n",
    "core/arrays/chunks.py": "import math\nfrom functional_ckpt.core.arrays.spec import Box\n",
    "storage/local.py": "import os\nfrom functional_ckpt.errors import CheckpointError\n",
    "format/database.py": "import tensorstore as ts\n",
    "format/inspect.py": "import tensorstore\nfrom functional_ckpt.format import database\n",
    "storage/commit.py": "import os\nfrom functional_ckpt.storage import local\n",
    "manager.py": "import torch\nfrom functional_ckpt.storage import commit\n",
    "steps/orbax_adapters.py": "def load():\n    import orbax.checkpoint as ocp\n    return ocp\n",
}


def check(tmp_path: Path, **changes: str) -> list[str]:
    """The checker's findings for the valid package with some modules replaced."""
    rooms = SOUND | {path.replace("__", "/") + ".py": source for path, source in changes.items()}
    for path, source in rooms.items():
        file = tmp_path / "functional_ckpt" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source, encoding="utf-8")
    num_modules, violations = floors.check(tmp_path)
    assert num_modules == len(rooms)
    return [str(violation) for violation in violations]


def test_this_house_is_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    code = floors.main([str(ROOT)])
    assert code == 0, capsys.readouterr().out


def test_the_design_page_has_the_table_of_floors() -> None:
    page = (ROOT / "docs" / "design" / "001-floors.md").read_text(encoding="utf-8")
    assert floors.table(ROOT) in page, "run scripts/floors.py --table and put it into the page"


def test_few_modules_lie_loose_and_none_is_long() -> None:
    loose = [path for path in PACKAGE.glob("*.py") if path.name != "__init__.py"]
    assert len(loose) <= 10
    assert [path.name for path in loose if path.stem.endswith("ing")] == []
    assert [p.name for p in loose if len(p.read_text(encoding="utf-8").splitlines()) > 400] == []
    assert len(floors.FLOORS) <= 30


def test_tests_lie_in_folders_of_the_package_s_names() -> None:
    topics = {"benchmarks", "docs", "examples", "faults", "golden", "remote", "support"}
    topics |= {"features", "resume"}  # calls of other systems' users; programs that are interrupted
    topics |= {"nodes"}  # a first tier on each node, in all its parts
    topics |= {"checkpoint", "flags", "manager"}  # modules at the top of the package
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()} - {"__pycache__"}
    packages = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert folders - topics <= packages


def test_a_sound_house_has_no_violations(tmp_path: Path) -> None:
    assert check(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param(
            {"core__arrays__spec": "import math\nfrom functional_ckpt.core.tree import flatten\n"},
            "core/arrays/spec.py:2: floor 1 imports functional_ckpt.core.tree.flatten "
            "from above it "
            "(core/tree/flatten.py is on floor 2)",
            id="upstairs",
        ),
        pytest.param(
            {"core__arrays__chunks": "def f():\n    from functional_ckpt.manager import Manager\n"},
            "core/arrays/chunks.py:2: floor 1 imports functional_ckpt.manager.Manager "
            "from above it",
            id="upstairs-lazily",
        ),
        pytest.param(
            {"core__arrays__chunks": "from ...storage import commit\n"},
            "core/arrays/chunks.py:1: floor 1 imports functional_ckpt.storage.commit from above it",
            id="upstairs-relatively",
        ),
        pytest.param(
            {"core__arrays__chunks": "import functional_ckpt as fc\n"},
            "core/arrays/chunks.py:1: floor 1 imports functional_ckpt from above it "
            "(__init__.py is on floor 14)",
            id="the-front-door",
        ),
        pytest.param(
            {
                "core__records__records": "from functional_ckpt.distributed import coordinator\n",
                "distributed__coordinator": "",
            },
            "core/records/records.py:1: floor 3 imports "
            "functional_ckpt.distributed.coordinator from "
            "another package on it",
            id="next-door",
        ),
        pytest.param(
            {"attic": "import math\n"}, "attic.py:1: has no floor", id="a-room-on-no-floor"
        ),
        pytest.param(
            {"storage__commit": "import tensorstore\n"},
            "storage/commit.py:1: uses tensorstore: only format/* may",
            id="second-door-to-tensorstore",
        ),
        pytest.param(
            {"manager": "def f():\n    import torch.distributed as dist\n"},
            "manager.py:2: uses torch.distributed: only distributed/gloo.py or ",
            id="second-door-to-distributed",
        ),
        pytest.param(
            {"manager": "import torch\n\ndef f():\n    return torch.distributed.get_rank()\n"},
            "manager.py:4: uses torch.distributed",
            id="distributed-as-an-attribute",
        ),
        pytest.param(
            {"manager": "from torch.utils import _pytree\n"},
            "manager.py:1: uses torch.utils._pytree",
            id="second-door-to-pytree",
        ),
        pytest.param(
            {"manager": "import orbax.checkpoint\n"}, "manager.py:1: uses orbax", id="orbax"
        ),
        pytest.param(
            {"steps__orbax_adapters": "def f():\n    import jax\n"},
            "steps/orbax_adapters.py:2: uses jax: no module may",
            id="jax-anywhere",
        ),
        pytest.param(
            {"storage__commit": "import pickle\n"}, "storage/commit.py:1: uses pickle", id="pickle"
        ),
        pytest.param(
            {"core__arrays__chunks": "from time import monotonic\n"},
            "core/arrays/chunks.py:1: core is pure and has no use for time",
            id="a-clock-in-core",
        ),
        pytest.param(
            {"policies__keep": "import random\n"},
            "policies/keep.py:1: policies is pure and has no use for random",
            id="chance-in-a-policy",
        ),
        pytest.param(
            {
                "saving__stage": "from functional_ckpt.restoring import read\n",
                "restoring__read": "",
            },
            "saving/stage.py:1: floor 9 imports functional_ckpt.restoring.read from "
            "another package",
            id="one-flow-in-the-other",
        ),
        pytest.param(
            {"core__arrays__chunks": "def f():\n    print(open('x').read())\n"},
            "core/arrays/chunks.py:2: core is pure and cannot call open()",
            id="a-file-in-core",
        ),
        pytest.param(
            {"core__arrays__chunks": "import datetime\nNOW = datetime.datetime.now()\n"},
            "core/arrays/chunks.py:2: core is pure and cannot call datetime.datetime.now()",
            id="now-in-core",
        ),
        pytest.param(
            {"core__arrays__chunks": "import torch\n"},
            "core/arrays/chunks.py:1: must not import torch, and does",
            id="torch-at-once",
        ),
        pytest.param(
            {
                "core__arrays__chunks": "import math\n"
                "from functional_ckpt.core.tree import flatten\n"
            },
            "core/arrays/chunks.py:2: must not import torch, and does through core/tree/flatten.py",
            id="torch-by-way-of",
        ),
        pytest.param(
            {"cli__main": "from functional_ckpt.manager import Manager\n"},
            "cli/main.py:1: must not import torch, and does through manager.py",
            id="torch-in-the-command",
        ),
        pytest.param(
            {
                "storage__commit": "from functional_ckpt.storage import local\n",
                "storage__local": "from functional_ckpt.storage import commit\n",
            },
            "import cycle storage/commit.py -> storage/local.py -> storage/commit.py",
            id="a-staircase-in-circles",
        ),
    ],
)
def test_one_wrong_wall_is_found(changes: dict[str, str], expected: str, tmp_path: Path) -> None:
    found = check(tmp_path, **changes)
    assert any(expected in violation for violation in found), found


@pytest.mark.parametrize(
    "source",
    [
        pytest.param("def f():\n    import torch\n", id="lazily"),
        pytest.param(
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n",
            id="for-types",
        ),
    ],
)
def test_a_torch_free_room_may_name_torch_where_it_is_not_run(source: str, tmp_path: Path) -> None:
    assert check(tmp_path, core__arrays__chunks=source) == []


def test_the_checker_exits_1_and_prints_the_place(tmp_path: Path) -> None:
    check(tmp_path, errors="from functional_ckpt import manager\n")
    script = [sys.executable, str(ROOT / "scripts" / "floors.py"), str(tmp_path)]
    result = subprocess.run(script, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "functional_ckpt/errors.py:1: floor 0 imports functional_ckpt.manager" in result.stdout


@pytest.mark.parametrize(
    ("path", "size_bytes", "reason"),
    [
        ("examples/weights.pt", 1, "pickle"),
        ("functional_ckpt/core/__pycache__/spec.cpython-311.pyc", 1, "compiled"),
        ("docs/huge.png", 10_000_000, "10,000,000 bytes"),
        ("tests/core/__init__.py", 0, "package"),
    ],
)
def test_files_that_may_not_be_tracked(path: str, size_bytes: int, reason: str) -> None:
    assert reason in tracked.problem(path, size_bytes)


def test_golden_files_may_be_large() -> None:
    assert tracked.problem("tests/golden/v1/model/d/abc", 10_000_000) is None


def imported(code: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after some code."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import functional_ckpt", {"jax", "jaxlib", "orbax", "tensorstore", "torch"}),
        ("import functional_ckpt\nfor n in functional_ckpt.__all__: getattr(functional_ckpt, n)",
         {"jax", "jaxlib", "orbax"}),
        ("import functional_ckpt.cli", {"jax", "jaxlib", "orbax", "torch"}),
        ("from functional_ckpt.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
         {"jax", "jaxlib", "orbax", "torch"}),
    ],
    ids=["package", "every-public-name", "cli", "cli-help"],
)  # fmt: skip
def test_import_loads_only_the_expected_modules(code: str, absent: set[str]) -> None:
    assert imported(code) & absent == set()


def test_importtime_shows_neither_jax_nor_orbax() -> None:
    command = [sys.executable, "-X", "importtime", "-c", "import functional_ckpt"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = {
        line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()
    }
    assert "functional_ckpt" in loaded
    assert loaded & {"jax", "jaxlib", "orbax"} == set()


def test_all_equals_the_public_names() -> None:
    import functional_ckpt as fc

    resolved = {name: getattr(fc, name) for name in fc.__all__}
    assert all(value is not None for value in resolved.values())
    assert sorted(set(fc.__all__)) == sorted(fc.__all__), "a name is listed twice"
    public = {name for name in dir(fc) if not name.startswith("_")}
    assert public == {name for name in fc.__all__ if not name.startswith("_")}


@pytest.mark.parametrize("module", ["__init__.py", "interop/__init__.py"])
def test_type_checkers_see_no_name_that_is_looked_up_when_it_is_used(module: str) -> None:
    tree = ast.parse((PACKAGE / module).read_text(encoding="utf-8"))
    hidden = [
        each
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "not TYPE_CHECKING"
        for each in node.body
    ]
    names = [each.name for each in hidden if isinstance(each, ast.FunctionDef)]
    visible = [each.name for each in tree.body if isinstance(each, ast.FunctionDef)]
    assert "__getattr__" in names and "__getattr__" not in visible


def test_no_module_stands_in_front_of_a_public_name() -> None:
    import functional_ckpt as fc

    # Once imported, a module is an attribute of its package, and __getattr__ is not asked any more.
    rooms = {path.stem for path in PACKAGE.iterdir()}
    rooms -= set(fc.__all__) - {name for names in fc._HOMES.values() for name in names}
    assert rooms & set(fc.__all__) == set()


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    import functional_ckpt as fc

    with pytest.raises(AttributeError, match="no_such_name"):
        _ = fc.no_such_name  # pyright: ignore[reportAttributeAccessIssue]


def test_a_hang_is_killed_with_a_traceback(tmp_path: Path) -> None:
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "tests" / "support").mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "support" / "full.py", tmp_path / "tests" / "support")
    (tmp_path / "test_hang.py").write_text(
        "import threading\nimport pytest\n\n"
        "@pytest.mark.timeout(1)\n"
        "def test_that_hangs():\n    threading.Lock().__enter__() and threading.Event().wait()\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "test_hang.py"]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode != 0
    assert "Timeout (0:00:01)!" in result.stderr
    assert "in test_that_hangs" in result.stderr


def test_types_are_shipped() -> None:
    assert (PACKAGE / "py.typed").is_file()


@pytest.mark.parametrize(
    "name",
    ["setup", "test", "check", "demo", "demo_distributed", "bench", "gpu_check", "../.ci/run"],
)
def test_scripts_are_executable_and_stop_at_the_first_error(name: str) -> None:
    script = ROOT / "scripts" / name
    assert os.access(script, os.X_OK)
    text = script.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in text


def test_every_dependency_is_pinned() -> None:
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project, groups = content["project"], content["dependency-groups"].values()
    lists = [project["dependencies"], *project["optional-dependencies"].values(), *groups]
    requirements = [each for group in lists for each in group if isinstance(each, str)]
    named = (re.split(r"[\[<>=]", requirement)[0] for requirement in requirements)
    wanted = {name.lower().replace("_", "-") for name in named}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    assert wanted - {"functional-ckpt"} <= pinned


def test_extras_are_for_users_and_the_source_distribution_has_every_tool() -> None:
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert not {"bench", "dev", "docs", "test"} & content["project"]["optional-dependencies"].keys()
    listed = content["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    names = {path.removeprefix("/") for path in listed}
    assert {"benchmarks", "docs", "scripts", "tests", "mkdocs.yml", "CONTRIBUTING.md"} <= names
    assert all((ROOT / name).exists() for name in names - {".ci", ".pre-commit-config.yaml"})
