"""Time strings: every spelling, exact errors, and the way back to text."""

from __future__ import annotations

import datetime
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from functional_ckpt.errors import UsageError
from functional_ckpt.policies.timespan import Timespan, Unit, parse_timespan


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        (500, 500, "batch"),
        ("500ba", 500, "batch"),
        ("500BA", 500, "batch"),
        ("7iter", 7, "iteration"),
        ("1ep", 1, "epoch"),
        ("0.5ep", 0.5, "epoch"),
        ("2048sp", 2048, "sample"),
        ("3e4tok", 30_000, "token"),
        ("3E+4Tok", 30_000, "token"),
        ("1.5e3tok", 1_500, "token"),
        ("9007199254740993tok", 2**53 + 1, "token"),
        ("0.25dur", 0.25, "duration"),
        ("1dur", 1, "duration"),
        ("1e-3dur", 0.001, "duration"),
        ("90sec", 90, "second"),
        ("0.5sec", 0.5, "second"),
        ("1h20m40s", 4_840, "second"),
        ("1H20M40S", 4_840, "second"),
        ("24h", 86_400, "second"),
        ("90m", 5_400, "second"),
        ("30s", 30, "second"),
        ("2d", 172_800, "second"),
        ("2d6h", 194_400, "second"),
        ("1.5h", 5_400, "second"),
        ("1h30s", 3_630, "second"),
        ("0.5s", 0.5, "second"),
        (datetime.timedelta(minutes=90), 5_400, "second"),
        (datetime.timedelta(milliseconds=1_500), 1.5, "second"),
        (Timespan(3, "epoch"), 3, "epoch"),
    ],
)
def test_parse_timespan_accepts_all_spellings(text: str | int, value: float, unit: Unit) -> None:
    span = parse_timespan(text)
    assert (span.value, span.unit) == (value, unit)
    assert type(span.value) is (int if value == int(value) else float)


@pytest.mark.parametrize(
    "text",
    [
        *("", "ba", "500", "500 ba", " 500ba", "-1ba", "+1ba", "1e4", "nansec", "infsec", "1epoch"),
        *(
            "40s1h",
            "1h1h",
            "1h20",
            "h",
            "1_000ba",
            ".5ep",
            "5.ba",
            "٣ba",
            "1ba\n",
            "9" * 400 + "ba",
        ),
        *(True, 1.5, None, b"1ba"),
    ],
)
def test_invalid_timespan_names_the_expected_form(text: object) -> None:
    message = (
        "time span: expected a whole number of batches, or a number and one of iter, ep, ba, sp, "
        "tok, dur, sec ('500ba', '3e4tok', '0.25dur'), or a wall-clock time ('1h20m40s', '90m', "
        f"'2d'); got {text!r}"
    )
    with pytest.raises(UsageError, match=rf"^{re.escape(message)}\.$"):
        parse_timespan(text)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["1.5ba", "0.5tok", "1e-1sp", "2.5iter"])
def test_half_a_batch_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=rf"expected a whole number; got '{text}'\.$"):
        parse_timespan(text)


@pytest.mark.parametrize(
    ("value", "unit", "message"),
    [
        (-1, "batch", "expected a finite number, zero or more; got -1"),
        (float("nan"), "second", "expected a finite number, zero or more; got nan"),
        (10**400, "batch", "expected a finite number, zero or more; got 1000"),
        (float("inf"), "second", "expected a finite number, zero or more; got inf"),
        (True, "batch", "expected a number; got True"),
        ("1", "batch", "expected a number; got '1'"),
        (1.0, "batch", "expected a whole number; got 1.0"),
        (1, "minute", "expected one of iteration, epoch, batch, sample, token, duration, second"),
    ],
)
def test_the_record_validates(value: float, unit: Unit, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Timespan(value, unit)


@pytest.mark.parametrize(
    ("span", "text"),
    [
        (Timespan(500, "batch"), "500ba"),
        (Timespan(30_000, "token"), "30000tok"),
        (Timespan(0.25, "duration"), "0.25dur"),
        (Timespan(4_840, "second"), "1h20m40s"),
        (Timespan(86_400, "second"), "1d"),
        (Timespan(0, "second"), "0sec"),
        (Timespan(90.0, "second"), "1m30s"),
        (Timespan(4.791944360669179e16, "epoch"), "47919443606691792ep"),
        (Timespan(0.5, "second"), "0.5sec"),
    ],
)
def test_timespan_is_shown_as_a_time_string(span: Timespan, text: str) -> None:
    assert str(span) == text


_whole = st.integers(0, 10**30)
_real = st.one_of(_whole, st.floats(0, 1e308, exclude_max=True))
_spans = st.one_of(
    st.builds(Timespan, _whole, st.sampled_from(["iteration", "batch", "sample", "token"])),
    st.builds(Timespan, _real, st.sampled_from(["epoch", "duration", "second"])),
)


@given(_spans)
def test_timespan_text_parses_back(span: Timespan) -> None:
    assert parse_timespan(str(span)) == span
    assert parse_timespan(str(span).upper()) == span


@given(st.timedeltas(min_value=datetime.timedelta(0)))
def test_timedelta_keeps_whole_seconds_exact(delta: datetime.timedelta) -> None:
    if not delta.microseconds:
        assert datetime.timedelta(seconds=parse_timespan(delta).value) == delta
    assert parse_timespan(delta).value == pytest.approx(delta.total_seconds(), abs=1e-6)


@given(st.text(max_size=12))
def test_any_text_is_a_span_or_a_usage_error(text: str) -> None:
    try:
        span = parse_timespan(text)
    except UsageError:
        return
    assert parse_timespan(str(span)) == span
