"""`fckpt report`: a run as one HTML file."""

from __future__ import annotations

import argparse

from functional_ckpt import errors
from functional_ckpt.cli import output
from functional_ckpt.cli import report_gather as gather
from functional_ckpt.cli import report_page as page
from functional_ckpt.cli.rm import root_of
from functional_ckpt.steps import plot


def run(arguments: argparse.Namespace) -> int:
    """Writes the report.

    Raises:
        UsageError: matplotlib is not installed.
    """
    plot.figure_class()
    root = root_of(arguments.directory, arguments.prefix)
    options = gather.Options(compare=arguments.compare, verify=arguments.verify)
    report = gather.gather(root, options)
    text = page.page(report)
    try:
        with open(arguments.output, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError as error:
        raise errors.StorageError(f"{arguments.output} cannot be written: {error}.") from error
    if arguments.json:
        record = {"schema": "fckpt.report/1", "path": report.path, "output": arguments.output}
        output.as_json({**record, "num_bytes": len(text.encode(errors="backslashreplace"))})
    else:
        print(output.printable(f"{report.path} -> {arguments.output}"))
    return 0
