"""SmoothQuant: alpha searched by the outputs' error, against a search written out in full."""

import pytest
import torch

from autoq.calibration.awq import candidates
from autoq.calibration.smooth import search_smoothing_scale
from autoq.calibration.statistics import InputStatistics
from autoq.formats import FORMATS
from autoq.layers import Container

INT8_SQ = FORMATS["int8_sq"]


def statistics_of(rows):
    statistics = InputStatistics.empty(
        rows.shape[1], keep=len(rows), dtype=rows.dtype, device=rows.device
    )
    statistics.record(rows, keep=len(rows))
    return statistics


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def search(weights, rows):
    return search_smoothing_scale(
        weights,
        statistics_of(rows),
        INT8_SQ,
        scale_dtype=torch.bfloat16,
        container=Container.COMPRESSED_TENSORS,
    )


def rounded(matrix):
    """INT8 under a scale per row, from the definition."""
    scale = matrix.abs().amax(-1, keepdim=True) / 127
    scale[scale == 0] = 1.0
    return (matrix / scale).round().clamp(-127, 127) * scale


def output_error(weights, rows, scale):
    return sum(
        float(
            (rounded(rows * scale) @ rounded(weight / scale).t() - rows @ weight.t()).square().sum()
        )
        for weight in weights
    )


def scale_by_hand(weights, rows, alpha):
    """The paper's scale, inverted, its range centred, in powers of two."""
    input_amax = rows.abs().amax(0)
    weight_amax = torch.cat(weights).abs().amax(0)
    gain = (input_amax**alpha / weight_amax ** (1 - alpha)).log2()
    return torch.exp2(((gain.max() + gain.min()) / 2 - gain).round())


def test_candidates_by_hand():
    # Input channels of 256, 16 and 1, weight columns of 1, 1 and 16.
    weights = [torch.tensor([[1.0, -0.5, 8.0], [0.25, 1.0, -16.0]])]
    magnitude = torch.tensor([256.0, 16.0, 1.0])
    found = [scale.log2().tolist() for scale in candidates(weights, magnitude)]
    # alpha 0: gain 1 / weight = 2**(0, 0, -4), centred at -2: 2**(-2, -2, 2).
    assert found[0] == [-2.0, -2.0, 2.0]
    # alpha 1: gain = input = 2**(8, 4, 0), centred at 4: 2**(-4, 0, 4).
    assert found[-1] == [-4.0, 0.0, 4.0]
    # alpha 1/2: gain 2**(4, 2, -2), centred at 1: 2**(-3, -1, 3).
    assert [-3.0, -1.0, 3.0] in found


@pytest.mark.parametrize("seed", range(3))
def test_the_best_alpha_of_all_wins(seed):
    generator = torch.Generator().manual_seed(seed)
    factors = torch.exp2(4 * torch.rand(48, generator=generator))
    rows = normal(32, 48, seed=seed) * factors
    weights = [normal(16, 48, seed=seed + 10), normal(8, 48, seed=seed + 20)]
    scales = [torch.ones(48), *(scale_by_hand(weights, rows, step / 10) for step in range(11))]
    errors = [output_error(weights, rows, scale) for scale in scales]
    found = search(weights, rows)
    assert found is not None
    # Sums in another order decide nothing here: the errors differ by more than rounding.
    assert output_error(weights, rows, found) == pytest.approx(min(errors), rel=1e-5)
    assert min(errors) < 0.8 * errors[0]


def test_outliers_move_into_the_weight():
    factors = torch.ones(64)
    factors[[3, 40]] = 50.0
    scale = search([normal(16, 64, seed=1)], normal(64, 64) * factors)
    assert torch.equal(scale, torch.exp2(scale.log2().round()))
    assert scale[factors > 1].max() < scale[factors == 1].min()


def test_none_where_plain_rounding_is_exact():
    # Whole numbers up to 127, which every row holds: codes under the scale 1.
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (8, 16), generator=generator).float()
    rows = torch.randint(-127, 128, (4, 16), generator=generator).float()
    weight[:, 0] = rows[:, 5] = 127.0
    assert output_error([weight], rows, torch.ones(16)) == 0.0
    assert search([weight], rows) is None


def test_silent_channels_and_columns_do_no_harm():
    factors = torch.ones(64)
    factors[7] = 30.0
    rows, weight = normal(32, 64) * factors, normal(16, 64, seed=1)
    rows[:, 5] = 0
    weight[:, 9] = 0
    scale = search([weight], rows)
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()


def test_without_inputs_there_is_no_scale_of_a_given_strength_either() -> None:
    found = search_smoothing_scale(
        [normal(4, 16)],
        statistics_of(torch.empty(0, 16)),
        INT8_SQ,
        scale_dtype=torch.bfloat16,
        container=Container.COMPRESSED_TENSORS,
        strength=0.5,
    )
    assert found is None
