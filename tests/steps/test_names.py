"""Step names: built names are parsed, and no others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from functional_ckpt.errors import UsageError
from functional_ckpt.steps.names import CompositeStepName, NameFormat, StepName, as_name_format

_PREFIX_CHARS = st.characters(exclude_characters="/\\", exclude_categories=["Cc", "Cs"])
_prefixes = st.text(_PREFIX_CHARS, min_size=1, max_size=20).filter(lambda text: text[0] != ".")
_formats = st.builds(
    StepName,
    prefix=st.none() | _prefixes,
    zero_pad=st.none() | st.integers(1, 20),
)


@pytest.mark.parametrize(
    ("fmt", "step", "name"),
    [
        (StepName(), 23, "23"),
        (StepName(), 0, "0"),
        (StepName(zero_pad=4), 23, "0023"),
        (StepName(zero_pad=4), 123456, "123456"),
        (StepName(zero_pad=1), 23, "23"),
        (StepName(prefix="step"), 23, "step_23"),
        (StepName(prefix="step", zero_pad=4), 23, "step_0023"),
        (StepName(prefix="a.b_c"), 7, "a.b_c_7"),
    ],
)
def test_step_name_build_and_parse_agree(fmt: StepName, step: int, name: str) -> None:
    assert fmt.build_name(step) == name
    assert fmt.names(step) == (name,)
    assert fmt.parse(name) == step
    assert isinstance(fmt, NameFormat)


@pytest.mark.parametrize(
    ("fmt", "name"),
    [
        (StepName(), "007"),
        (StepName(), "00"),
        (StepName(), "-1"),
        (StepName(), "+1"),
        (StepName(), "1_0"),
        (StepName(), ""),
        (StepName(), " 7"),
        (StepName(), "7\n"),
        (StepName(), "٧"),
        (StepName(), "²"),
        (StepName(), "7.0"),
        (StepName(), ".7"),
        (StepName(), "metadata"),
        (StepName(), "step_7"),
        (StepName(), "7.orbax-checkpoint-tmp"),
        (StepName(), "7.orbax-checkpoint-tmp-1712345678"),
        (StepName(), "9" * 5000),
        (StepName(zero_pad=4), "23"),
        (StepName(zero_pad=4), "00023"),
        (StepName(zero_pad=4), "00000"),
        (StepName(prefix="step"), "7"),
        (StepName(prefix="step"), "step_"),
        (StepName(prefix="step"), "step7"),
        (StepName(prefix="step"), "step_007"),
        (StepName(prefix="step"), "xstep_7"),
        (StepName(prefix="step"), "step_7.orbax-checkpoint-tmp"),
        (StepName(prefix="a.b"), "aXb_7"),
    ],
)
def test_look_alikes_are_no_steps(fmt: StepName, name: str) -> None:
    assert fmt.parse(name) is None


@given(_formats, st.integers(0, 10**40))
def test_step_name_parse_inverts_build(fmt: StepName, step: int) -> None:
    assert fmt.parse(fmt.build_name(step)) == step
    assert fmt.parse(fmt.build_name(step) + ".orbax-checkpoint-tmp") is None


@given(_formats, st.text(alphabet="0123456789_step.-٧", max_size=12))
def test_parsed_names_equal_built_names(fmt: StepName, name: str) -> None:
    step = fmt.parse(name)
    assert step is None or fmt.build_name(step) == name


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("", "expected a non-empty string or None; got ''"),
        (7, "expected a non-empty string or None; got 7"),
        (".hidden", "no leading dot"),
        ("a/b", "no slash"),
        ("a\0b", "no control character"),
        ("a.orbax-checkpoint-tmp-1", "temporary"),
    ],
)
def test_prefixes_that_cannot_be_listed_are_refused(prefix: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        StepName(prefix=prefix)


@pytest.mark.parametrize("pad", [0, -1, 101, True, 4.0])
def test_step_name_refuses_invalid_padding(pad: int) -> None:
    with pytest.raises(UsageError, match="zero_pad of a step name: expected 1 to 100 digits; got"):
        StepName(zero_pad=pad)


@pytest.mark.parametrize("step", [-1, True, 1.0, "1"])
def test_step_name_refuses_invalid_steps(step: int) -> None:
    with pytest.raises(UsageError, match="step: expected an int of at least 0; got"):
        StepName().build_name(step)


def test_composite_reads_several_and_writes_one() -> None:
    old, new = StepName(), StepName(prefix="step", zero_pad=6)
    both = CompositeStepName(write=new, read=(new, old))
    assert both.build_name(7) == "step_000007"
    assert both.names(7) == ("step_000007", "7")
    assert both.parse("step_000007") == both.parse("7") == 7
    assert both.parse("007") is both.parse("step_7") is None
    with pytest.raises(UsageError, match="expected the written format"):
        CompositeStepName(write=new, read=(old,))


def test_step_name_format_accepts_only_instances() -> None:
    fmt = StepName(prefix="step")
    assert as_name_format(None) == StepName()
    assert as_name_format(fmt) is fmt
    assert as_name_format("anything", adapt=lambda _: fmt) is fmt  # type: ignore[arg-type]
    for wrong in ("step_{step}", StepName, 7):
        with pytest.raises(UsageError, match="step name format: expected an instance of StepName"):
            as_name_format(wrong)  # type: ignore[arg-type]
