"""Names of calibration algorithms: what they parse to, what each format takes of them, refusals."""

import pytest

from autoq.errors import InputError
from autoq.formats import (
    ALGORITHMS,
    FORMATS,
    CalibrationMethod,
    CalibrationRecipe,
    CalibrationSteps,
    FeedbackOptions,
    InputScaling,
    parse_calibration,
)

AWQ, SMOOTH = InputScaling.AWQ, InputScaling.SMOOTH


@pytest.mark.parametrize("method", list(CalibrationMethod))
def test_the_formats_own_ways_keep_their_names(method):
    assert parse_calibration(method.value) is method


@pytest.mark.parametrize(
    ("text", "recipe", "name"),
    [
        ("rtn", CalibrationRecipe(), "rtn"),
        ("max+gptq", CalibrationRecipe(gptq=FeedbackOptions()), "gptq"),
        ("awq", CalibrationRecipe(awq=True, mse=True), "awq"),
        ("mse+awq_lite", CalibrationRecipe(awq=True, mse=True), "awq"),
        ("awq_lite", CalibrationRecipe(awq=True), "awq_lite"),
        (
            "gptq+mse+awq",
            CalibrationRecipe(awq=True, mse=True, gptq=FeedbackOptions()),
            "awq+gptq",
        ),
        (
            "smoothquant:0.5+percentile:99.9",
            CalibrationRecipe(percentile=99.9, smoothquant=True, smooth_strength=0.5),
            "percentile:99.9+smoothquant:0.5",
        ),
        (
            "gptq:order=given,damping=0.123456789",
            CalibrationRecipe(gptq=FeedbackOptions(damping=0.123456789, by_power=False)),
            "gptq:damping=0.123456789,order=given",
        ),
    ],
)
def test_joined_names_are_a_recipe_whose_name_is_the_same_in_any_order(text, recipe, name):
    assert parse_calibration(text) == recipe
    assert str(recipe) == name
    assert parse_calibration(name) == recipe


@pytest.mark.parametrize(
    ("text", "fmt", "steps"),
    [
        ("rtn", "int4_awq", CalibrationSteps()),
        ("mse", "nvfp4", CalibrationSteps(weighs_errors=True)),
        ("mse", "fp8", CalibrationSteps()),
        ("awq_lite", "w4a8_awq", CalibrationSteps(input_scaling=AWQ)),
        ("awq_lite", "fp8", CalibrationSteps()),
        ("smoothquant:0.5", "int8_sq", CalibrationSteps(input_scaling=SMOOTH, smooth_strength=0.5)),
        ("awq+smoothquant:1", "nvfp4", CalibrationSteps(input_scaling=AWQ, weighs_errors=True)),
        (
            "awq+smoothquant:1",
            "int8_sq",
            CalibrationSteps(input_scaling=SMOOTH, smooth_strength=1.0),
        ),
        ("gptq", "mxfp4", CalibrationSteps(feedback=FeedbackOptions())),
        ("gptq", "int8_sq", CalibrationSteps()),
        ("percentile:99", "fp8", CalibrationSteps(input_percentile=99.0)),
        ("percentile:99", "nvfp4_wo", CalibrationSteps()),
        ("percentile:99", "mxfp8", CalibrationSteps()),
    ],
)
def test_a_format_takes_what_it_can(text, fmt, steps):
    assert FORMATS[fmt].algorithm(parse_calibration(text)) == steps


@pytest.mark.parametrize("fmt", [name for name in FORMATS if FORMATS[name].calibration != "none"])
def test_the_default_is_a_recipe_too(fmt):
    joined = parse_calibration("awq+smoothquant+gptq")
    assert FORMATS[fmt].algorithm(joined) == FORMATS[fmt].algorithm(CalibrationMethod.BEST)
    nearest = parse_calibration("awq+smoothquant")
    assert FORMATS[fmt].algorithm(nearest) == FORMATS[fmt].algorithm(CalibrationMethod.SCALES)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("awqq", "no calibration named 'awqq'"),
        ("", "no calibration named ''"),
        ("awq++gptq", "no calibration named ''"),
        ("mse:3", "no calibration named 'mse:3'"),
        ("best+gptq", "joins best with others, and it stands alone"),
        ("max+mse", "max takes largest magnitudes and mse searches block scales; leave one out"),
        ("awq+rtn", "rtn takes largest magnitudes and awq searches block scales; leave one out"),
        ("rtn+gptq", "rtn takes nearest codes"),
        ("gptq+gptq:damping=0.1", "names gptq twice; name it once"),
        ("percentile", "percentile needs a number, as in percentile:99.9"),
        ("percentile:101", "percentile must be a number in (50, 100], got '101'"),
        ("percentile:nan", "percentile must be a number in (50, 100], got 'nan'"),
        ("smoothquant:-1", "smoothquant's alpha must be a number in [0, 1], got '-1'"),
        ("gptq:damping=0", "gptq's damping must be a number in (0, 1], got '0'"),
        ("gptq:order=random", "gptq takes damping=D and order=power or order=given"),
    ],
)
def test_what_is_unknown_or_contradicts_itself_is_refused_in_one_line(text, says):
    with pytest.raises(InputError) as refusal:
        parse_calibration(text)
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_unknown_names_are_answered_with_all_that_are_known():
    with pytest.raises(InputError) as refusal:
        parse_calibration("hessian")
    for name in (*CalibrationMethod, *ALGORITHMS):
        assert name in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "formats", "idle"),
    [
        ("gptq", ("fp8", "nvfp4"), []),
        ("gptq", ("fp8", "int8_sq"), ["gptq"]),
        ("awq+smoothquant", ("nvfp4", "int8_sq"), []),
        ("awq+smoothquant", ("nvfp4", "fp8"), ["smoothquant"]),
        ("percentile:99+mse", ("mxfp8", "int8_wo"), ["percentile", "mse"]),
    ],
)
def test_names_that_none_of_the_formats_takes_are_found(text, formats, idle):
    recipe = parse_calibration(text)
    assert recipe.idle(FORMATS[name].algorithm(recipe) for name in formats) == idle
