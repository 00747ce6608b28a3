"""Tests: one py_test for each test file of a directory, run by pytest."""

load("@rules_python//python:py_library.bzl", "py_library")
load("@rules_python//python:py_test.bzl", "py_test")

def pytest_tests(name, deps = [], data = [], tags = [], size = "medium", srcs = None, args = []):
    """One py_test for each test_*.py beside the BUILD file, named after it.

    Args:
        name: The library that holds what the test files share: every other .py file of the directory.
        deps: What the tests import. What is not declared cannot be imported.
        data: Files that the tests read.
        tags: "slow" keeps a test out of the default run; see .bazelrc.
        size: Bazel's size, which is its time limit.
        srcs: The test files, where not every test_*.py of the directory is meant.
        args: More arguments for pytest.
    """
    py_library(
        name = name,
        testonly = True,
        srcs = native.glob(["*.py"], allow_empty = True, exclude = ["test_*.py"]),
        deps = deps,
    )
    native.filegroup(
        name = "tests",
        srcs = native.glob(["test_*.py"], allow_empty = True),
        visibility = ["//tests:__subpackages__"],
    )
    for src in srcs or native.glob(["test_*.py"], allow_empty = True):
        py_test(
            name = src[:-len(".py")],
            size = size,
            srcs = [
                src,
                "//tests:pytest_main.py",
            ],
            args = ["%s/%s" % (native.package_name(), src)] + args,
            data = data + ["//:pyproject.toml"],
            main = "//tests:pytest_main.py",
            tags = tags,
            deps = [
                ":" + name,
                "//tests:conftest",
            ],
        )
