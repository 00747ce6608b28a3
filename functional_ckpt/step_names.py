"""Names of step directories: the values of `CheckpointManager(step_name=...)`."""

from functional_ckpt.steps.names import CompositeStepName, NameFormat, StepName
from functional_ckpt.steps.template import StepTemplate

__all__ = ["CompositeStepName", "NameFormat", "StepName", "StepTemplate"]
