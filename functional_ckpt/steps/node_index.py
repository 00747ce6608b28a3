"""The index of a node's directory: without parts that cannot be used, with steps held elsewhere."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from functional_ckpt.steps.index import Entry, Index


class NodeIndex:
    """The steps that all nodes hold together, as one of them lists them; see `Index`.

    Args:
        local: The index of this node's directory.
        unused: The names of the directories here that are not used.
        elsewhere: The steps that only other nodes hold a part of.
    """

    def __init__(
        self, local: Index, unused: Collection[str], elsewhere: Mapping[int, Entry]
    ) -> None:
        self._local = local
        self._elsewhere = dict(elsewhere)
        found = local.look().values()
        # By the identity of their commit, since another may take the name.
        self._unused = {entry.name: entry.commit_id for entry in found if entry.name in unused}

    @property
    def strays(self) -> Mapping[str, str]:
        """See `Index.strays`."""
        return self._local.strays

    @property
    def elsewhere(self) -> Mapping[int, Entry]:
        """See `Index.elsewhere`."""
        return self._elsewhere

    def look(self, *, reread: bool = False) -> dict[int, Entry]:
        """See `Index.look`."""
        found = self._local.look(reread=reread)
        here = {step: each for step, each in found.items() if not self._is_unused(each)}
        return dict(sorted({**self._elsewhere, **here}.items()))

    def forget(self, steps: Collection[int]) -> None:
        """See `Index.forget`."""
        for step in steps:
            self._elsewhere.pop(step, None)

    def is_unused(self, name: str) -> bool:
        """See `Index.is_unused`."""
        if name not in self._unused:
            return False
        return any(
            each.name == name and self._is_unused(each) for each in self._local.look().values()
        )

    def _is_unused(self, entry: Entry) -> bool:
        return self._unused.get(entry.name) == entry.commit_id
