import random

import pytest

from autoq.data.splitting import part


@pytest.mark.parametrize(
    ("items", "share", "front", "back"),
    [
        pytest.param(list("abcd"), 0.25, ["a", "b", "c"], ["d"], id="between_items"),
        pytest.param(["abcdefgh"], 0.25, ["abcdef"], ["gh"], id="inside_the_only_item"),
        pytest.param(["ab", "cdef"], 0.25, ["ab", "cd"], ["ef"], id="inside_the_last_item"),
        pytest.param(
            ["ab", "cd", "ef", "gh"], 0.6, ["ab", "c"], ["gh", "ef", "d"], id="last_first"
        ),
        pytest.param(["ab", "cd"], 0.0, ["ab", "cd"], [], id="all_for_calibration"),
        pytest.param(["ab", "cd"], 1.0, [], ["cd", "ab"], id="all_held_out"),
        pytest.param([], 0.5, [], [], id="nothing"),
    ],
)
def test_parts_by_hand(items, share, front, back):
    assert list(part(items, "calibration", share)) == front
    assert list(part(items, "held_out", share)) == back


@pytest.mark.parametrize("seed", range(25))
def test_parts_cover_everything_once(seed):
    generator = random.Random(seed)
    counter = iter(range(10**6))
    items = [[next(counter) for _ in range(generator.randrange(9))] for _ in range(seed)]
    share = generator.random()
    front = [token for item in part(items, "calibration", share) for token in item]
    back = list(part(items, "held_out", share))
    assert front + [t for item in reversed(back) for t in item] == [t for i in items for t in i]
