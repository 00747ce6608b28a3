"""The programs are run by the tests, not imported: pytest looks for no doctests in them."""

collect_ignore_glob = ["program_*.py"]
