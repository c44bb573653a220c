"""Registries: names once, near misses, and the manners of a mapping."""

import pytest

from autoq.errors import InputError, UnknownNameError
from autoq.registry import Registry


@pytest.fixture
def shapes():
    registry = Registry("shape")
    for sides, name in enumerate(("triangle", "square", "pentagon"), start=3):
        assert registry.register(name, sides) == sides
    return registry


def test_it_is_a_mapping_in_the_order_of_registration(shapes):
    assert dict(shapes) == {"triangle": 3, "square": 4, "pentagon": 5}
    assert list(shapes) == ["triangle", "square", "pentagon"]
    assert len(shapes) == 3
    assert "square" in shapes
    assert "circle" not in shapes
    assert shapes.get("circle") is None
    assert shapes.get("circle", 0) == 0


def test_a_name_is_taken_once(shapes):
    with pytest.raises(ValueError, match="a shape named 'square' is registered already"):
        shapes.register("square", 44)
    assert shapes["square"] == 4


@pytest.mark.parametrize(
    ("name", "close"),
    [("sqare", "square"), ("SQUARE", "square"), ("Pentagram", "pentagon")],
)
def test_a_wrong_name_is_answered_with_near_misses(shapes, name, close):
    text = (
        rf"no shape named '{name}' \(did you mean {close}\?\); known: pentagon, square, triangle$"
    )
    with pytest.raises(UnknownNameError, match=text) as caught:
        shapes[name]
    assert isinstance(caught.value, InputError)
    assert isinstance(caught.value, KeyError)
    assert not str(caught.value).startswith('"')  # as a KeyError would show it


def test_a_name_like_none_of_them_is_answered_with_all(shapes):
    with pytest.raises(
        UnknownNameError, match="no shape named 'xyz'; known: pentagon, square, triangle"
    ):
        shapes["xyz"]
