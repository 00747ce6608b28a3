"""Old names lead to the new ones, and say so."""

import pytest

import functional_ckpt as fc


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Metric", fc.TorchMetric),
        ("Handler", fc.handlers.Handler),
        ("AS_SAVED", fc.handlers.AS_SAVED),
        ("StepName", fc.step_names.StepName),
    ],
)
def test_a_moved_name_warns_with_its_new_place(old: str, new: object) -> None:
    with pytest.warns(DeprecationWarning, match=f"fc.{old} is now fc."):
        assert getattr(fc, old) is new
    assert old not in fc.__all__
