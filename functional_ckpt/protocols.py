"""Types of arguments, for annotations and for implementations of one's own: `fc.protocols`.

`CheckpointManager(coordinator=..., storage=..., on_event=...)` accepts a `Coordinator`, a `Storage`
and `Listeners`; `Channel`, `Turns`, `Lock`, `NewFile` and `TensorStoreAccess` are returned by their
methods. `save_policy`, `keep_policy` and `staging` accept the other types.
"""

from functional_ckpt.distributed.coordinator import Channel, Coordinator, Turns
from functional_ckpt.events import Listener, Listeners
from functional_ckpt.policies.keep_rules import KeepPolicies
from functional_ckpt.policies.save_rules import SavePolicies
from functional_ckpt.saving.options import Staging
from functional_ckpt.storage.base import Lock, NewFile, Storage, TensorStoreAccess

__all__ = [
    "Channel",
    "Coordinator",
    "KeepPolicies",
    "Listener",
    "Listeners",
    "Lock",
    "NewFile",
    "SavePolicies",
    "Staging",
    "Storage",
    "TensorStoreAccess",
    "Turns",
]
