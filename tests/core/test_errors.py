"""A copy of an error, in this process or another, has everything that the error had."""

from __future__ import annotations

import pickle

import pytest

from functional_ckpt import errors

KINDS = [getattr(errors, name) for name in errors.__all__ if name.endswith("Error")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("of_another_rank", [False, True])
def test_a_copy_keeps_every_attribute(
    kind: type[errors.CheckpointError], of_another_rank: bool
) -> None:
    if of_another_rank:
        kind = errors.on_other_ranks(kind)
    fields = {"step": 3, "path": "/p", "key_path": "a.b", "touched": True, "errno": 5}
    if not issubclass(kind, errors.StorageError):
        del fields["errno"]
    error = errors.rebuild(kind, "why", fields)
    for copy in (error.replace(), pickle.loads(pickle.dumps(error))):
        assert type(copy) is kind and str(copy) == "why"
        assert {name: getattr(copy, name) for name in fields} == fields
    other = error.replace("because", step=4)
    assert (str(other), other.message, other.step, other.path) == ("because", "because", 4, "/p")
    assert (str(error), error.step) == ("why", 3)
