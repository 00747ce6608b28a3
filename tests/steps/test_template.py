"""Step names with Composer's variables: built, read back, refused where they could not be."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from functional_ckpt.errors import UsageError
from functional_ckpt.policies.progress import Progress
from functional_ckpt.steps.names import CompositeStepName, StepName, as_name_format
from functional_ckpt.steps.template import StepTemplate, new_name

PROGRESS = Progress(
    iteration=1,
    epoch=2,
    batch=500,
    sample=16_000,
    token=2**20,
    batch_in_epoch=20,
    sample_in_epoch=640,
    token_in_epoch=4096,
    total_seconds=3725.5,
    epoch_seconds=61.2,
    batch_seconds=0.4,
)


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{step}", "500"),
        ("ep{epoch}-ba{batch}-rank{rank}", "ep2-ba500-rank0"),
        ("ba{batch:08d}", "ba00000500"),
        ("{run_name}-{step}", "digits-500"),
        ("{batch}_{batch_in_epoch}_{sample}_{sample_in_epoch}", "500_20_16000_640"),
        ("{batch}_{token}_{token_in_epoch}_it{iteration}", "500_1048576_4096_it1"),
        ("{step}-{total_wct}s-{epoch_wct}s-{batch_wct}s", "500-3725s-61s-0s"),
        ("{step}-{world_size}x{local_world_size}-{local_rank}.{node_rank}", "500-16x8-0.0"),
        ("{{{step}}}", "{500}"),
    ],
)
def test_template_fills_every_variable(template: str, name: str) -> None:
    names = StepTemplate(template=template, run_name="digits", world_size=16, local_world_size=8)
    assert as_name_format(names) is names
    assert new_name(names, 500, PROGRESS) == name
    assert names.parse(name) == 500


def test_run_resumes_with_another_number_of_ranks() -> None:
    wide = StepTemplate(template="{step}-of-{world_size}", world_size=8)
    assert (
        StepTemplate(template="{step}-of-{world_size}", world_size=4).parse(wide.build_name(7)) == 7
    )


@given(st.integers(0, 10**9), st.integers(0, 10**9), st.integers(1, 12))
def test_built_names_are_parsed_back(step: int, epoch: int, width: int) -> None:
    names = StepTemplate(template=f"run ep{{epoch}} - {{step:0{width}d}}.x{{epoch}}")
    name = names.name_of(step, Progress(epoch=epoch))
    assert names.parse(name) == step
    assert names.parse(name + "0") is None
    assert names.parse("0" + name) is None


@pytest.mark.parametrize(
    "name",
    [
        *("ep2-ba0500", "ep02-ba500", "ep2-ba500-", "ep2-ba", "ep-ba500", "ep2-ba500x", "latest"),
        *("ep2-ba500.orbax-checkpoint-tmp", "ep2-ba٥٠٠", "ep" + "9" * 5000 + "-ba1"),
    ],
)
def test_look_alikes_are_no_steps(name: str) -> None:
    assert StepTemplate(template="ep{epoch}-ba{batch}").parse(name) is None


def test_epochs_are_steps_where_a_template_has_nothing_else() -> None:
    names = StepTemplate(template="ep{epoch}")
    assert names.name_of(3, Progress(epoch=3, batch=30)) == "ep3"
    assert names.parse("ep3") == 3
    with pytest.raises(UsageError, match="expected step 3 at epoch 3, got step 30"):
        names.name_of(30, Progress(epoch=3, batch=30))


def test_one_variable_has_one_value() -> None:
    names = StepTemplate(template="{step}-{epoch}-{epoch}")
    assert names.parse("7-3-3") == 7
    assert names.parse("7-3-4") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"template": "sa{sample}"}, "expected {step}, {batch} or {epoch} in it"),
        ({"template": "{step}-{eopch}"}, "expected variables out of step, iteration, epoch"),
        ({"template": "{step}-{}"}, "expected variables out of"),
        ({"template": "{step"}, "expected '}' before end of string"),
        ({"template": "{step}{epoch}"}, "a name can be read in two ways"),
        ({"template": "v1{step}"}, "a name can be read in two ways"),
        ({"template": "1{step}"}, "a name can be read in two ways"),
        ({"template": "{step}1"}, "a name can be read in two ways"),
        ({"template": "{step}1x{epoch}"}, "a name can be read in two ways"),
        ({"template": "{step}-{epoch}x1{batch}"}, "a name can be read in two ways"),
        ({"template": "{step}{rank}"}, "a name can be read in two ways"),
        ({"template": "{step}-{run_name}"}, "expected run_name=... with it"),
        ({"template": "{step}-{world_size}"}, "expected world_size=... with it"),
        ({"template": "{step:>5}"}, "expected {step} or, for counts, {step:06d}; got '>5'"),
        ({"template": "{step!r}"}, "expected {step} or, for counts"),
        ({"template": "runs/{step}"}, "no slash"),
        ({"template": ".{step}"}, "no leading dot"),
        ({"template": "{run_name}/{step}", "run_name": "a"}, "no slash"),
        ({"template": "{run_name}-{step}", "run_name": "a/b"}, "no slash"),
        ({"template": 7}, "expected a string; got 7"),
    ],
)
def test_template_refuses_names_that_do_not_identify_steps(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        StepTemplate(**arguments)


def test_template_requires_its_variables() -> None:
    names = StepTemplate(template="ep{epoch}-ba{batch}")
    with pytest.raises(UsageError, match=r"\{epoch\} needs save\(progress=fc"):
        names.build_name(3)
    with pytest.raises(UsageError, match=r"expected step 4 at batch 4, got step 3"):
        names.name_of(3, Progress(batch=4))


def test_old_names_are_still_read() -> None:
    both = CompositeStepName(
        write=StepTemplate(template="ba{batch}"),
        read=(StepTemplate(template="ba{batch}"), StepName()),
    )
    assert new_name(both, 7, Progress(batch=7)) == "ba7"
    assert both.parse("12") == 12
    assert both.parse("ba12") == 12
    assert both.names(12) == ("12",)
