"""`fckpt verify`: checks every byte and lists the lost leaves."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from functional_ckpt import errors
from functional_ckpt.cli import output, targets
from functional_ckpt.format import parts
from functional_ckpt.storage import queries
from functional_ckpt.storage.base import Storage
from functional_ckpt.verify.checkpoint import Finding, verify_checkpoint

if TYPE_CHECKING:
    from rich.padding import Padding

_MAX_LEAVES = 4


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Result:
    """The outcome for one checkpoint."""

    checkpoint: targets.Checkpoint
    damage: tuple[Finding, ...]
    has_digests: bool
    part: str | None
    num_files: int
    size_bytes: int


def run(arguments: argparse.Namespace) -> int:
    """Verifies every checkpoint named; 1 if one is damaged."""
    checkpoints = list(_checkpoints(arguments))
    printer = None if arguments.json else output.Printer()
    results: list[_Result] = []
    known: dict[tuple[object, ...], str] = {}
    for checkpoint in checkpoints:
        result = _verify(checkpoint)
        if result is None:
            continue
        results.append(result)
        if printer is not None:
            _print(printer, result, known)
    num_damaged = sum(bool(result.damage) for result in results)
    if printer is None:
        records = [_record(result) for result in results]
        output.as_json({"schema": "fckpt.verify/1", "ok": num_damaged == 0, "checkpoints": records})
    elif len(results) > 1:
        _print_sum(printer, results)
    return 1 if num_damaged else 0


def _checkpoints(arguments: argparse.Namespace) -> Iterator[targets.Checkpoint]:
    for text in arguments.checkpoint:
        target = targets.find(text, arguments.prefix)
        if isinstance(target, targets.Checkpoint) or arguments.step is not None:
            for step in arguments.step or [None]:
                yield targets.checkpoint_of(text, step, arguments.prefix)
            continue
        if not target.steps and not target.parts():
            raise errors.StepNotFoundError(f"{text} has no step yet.", path=target.path)
        yield from map(target.checkpoint, sorted({*target.steps, *target.damaged()}))


def _verify(checkpoint: targets.Checkpoint) -> _Result | None:
    """None where the step was removed by its writer in the meantime."""
    storage = checkpoint.storage
    num_files, size_bytes = (
        len(storage.walk(checkpoint.path)),
        queries.total_bytes(storage, checkpoint.path),
    )
    try:
        with output.progress_bar(f"verifying {checkpoint.title}") as progress:
            findings = verify_checkpoint(
                storage, checkpoint.path, checkpoint.step, progress=progress
            )
    except errors.StepNotFoundError:
        return None
    except errors.CorruptCheckpointError as error:
        got = error.message.removeprefix(f"{checkpoint.path}: ")
        findings = [
            Finding(item=None, file=".", problem="record", expected="a checkpoint", got=got)
        ]
    if findings and not queries.is_directory(storage, checkpoint.path):
        return None
    return _Result(
        checkpoint=checkpoint,
        damage=tuple(each for each in findings if each.is_damage),
        has_digests=all(each.problem != "no digests" for each in findings),
        part=_part(storage, checkpoint.path),
        num_files=num_files,
        size_bytes=size_bytes,
    )


def _part(storage: Storage, path: str) -> str | None:
    """Returns a description of a step of which other nodes have some files; else None."""
    try:
        found = parts.missing(storage, path)
    except errors.CheckpointError:
        return None  # a finding
    return None if found is None else f"{found}. {parts.ADVICE}."


def _record(result: _Result) -> dict[str, Any]:
    return {
        "path": result.checkpoint.path,
        "step": result.checkpoint.step,
        "ok": not result.damage,
        "has_digests": result.has_digests,
        **({} if result.part is None else {"part": result.part}),
        "num_files": result.num_files,
        "size_bytes": result.size_bytes,
        "findings": [dataclasses.asdict(finding) for finding in result.damage],
    }


# ------------------------------------------------------------------------------------ for people


def _print(printer: output.Printer, result: _Result, known: dict[tuple[object, ...], str]) -> None:
    """Prints a result; damage to a shared file in full once, with the first step that has it."""
    from rich.text import Text

    title = output.styled(result.checkpoint.title, "bold")
    files = f"{result.num_files} files, {output.size(result.size_bytes)}"
    if result.damage:
        count = len(result.damage)
        what = f"  damaged: {count} finding{'' if count == 1 else 's'}"
        mark = Text(f"{printer.sign('✗', 'x')} ", "bold red")
        line = Text.assemble(mark, title, (what, "red"), (f"  {files}", "dim"))
        printer.print(line)
        for finding in result.damage:
            steps = {os.path.basename(result.checkpoint.path), *finding.shared_with}
            key = (frozenset(steps), finding.item, finding.expected, finding.got)
            first = known.setdefault(key, result.checkpoint.title)
            is_told = bool(finding.shared_with) and first != result.checkpoint.title
            printer.print(*_block(finding, first if is_told else None))
        return
    if result.has_digests:
        mark = Text(f"{printer.sign('✓', 'ok')} ", "bold green")
        what = "intact" if result.part is None else f"intact here; {result.part}"
    else:
        mark = Text(f"{printer.sign('○', '--')} ", "bold yellow")
        what = "readable, but foreign: there are no digests to compare with"
    printer.print(Text.assemble(mark, title, f"  {what}", (f"  {files}", "dim")))


def _block(finding: Finding, first: str | None) -> Iterator[Padding]:
    """Yields the lines of a finding; `first` is a step before that has the same file."""
    from rich.padding import Padding
    from rich.text import Text

    yield Padding(output.styled(finding.file, "cyan"), (0, 0, 0, 4))
    if first is not None:
        yield Padding(Text(f"the same file as that of {first}", "red"), (0, 0, 0, 6))
        return
    what = f"expected {finding.expected}, got {finding.got}"
    line = Text.assemble((f"{finding.problem}: ", "red"), output.printable(what))
    yield Padding(line, (0, 0, 0, 6))
    if finding.leaves:
        shown = ", ".join(finding.leaves[:_MAX_LEAVES])
        rest = len(finding.leaves) - _MAX_LEAVES
        more = f" and {rest} more" if rest > 0 else ""
        item = f" of {finding.item}" if finding.item is not None else ""
        count = f"{len(finding.leaves)} {'leaf' if len(finding.leaves) == 1 else 'leaves'}"
        lost = output.printable(f"{count}{item}: {shown}{more}")
        yield Padding(Text.assemble(("lost: ", "red"), lost), (0, 0, 0, 6))
    if finding.shared_with:
        steps = output.printable(", ".join(finding.shared_with))
        yield Padding(Text.assemble(("shared with: ", "red"), steps), (0, 0, 0, 6))


def _print_sum(printer: output.Printer, results: Sequence[_Result]) -> None:
    from rich.text import Text

    damaged = [result for result in results if result.damage]
    num_intact = len(results) - len(damaged)
    word = "intact" if all(result.has_digests for result in results) else "readable"
    line = f"{num_intact} of {len(results)} {'is' if num_intact == 1 else 'are'} {word}"
    intact = [r.checkpoint.step for r in results if not r.damage and r.checkpoint.step is not None]
    if damaged and intact:
        line += f"; the latest {word} step is {max(intact)}"
    printer.print(Text(), Text(f"{line}.", "red" if damaged else "green"))
