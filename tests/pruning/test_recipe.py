"""Recipes: names, validation and what they need."""

import itertools

import numpy as np
import pytest

from gluprune.pruning.recipe import ALLOCATIONS, SCORES, Recipe


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    "compensate, allocation, reconstruct", list(itertools.product([False, True], ALLOCATIONS, [False, True]))
)
def test_every_recipe_is_parsed_from_its_name(score, compensate, allocation, reconstruct):
    recipe = Recipe(score, compensate, allocation, reconstruct, multiple_of=1)
    assert Recipe.parse(str(recipe), multiple_of=1) == recipe


def test_a_multiple_of_numpy_is_stored_as_int():
    recipe = Recipe(multiple_of=np.int64(64))
    assert recipe == Recipe(multiple_of=64) and type(recipe.multiple_of) is int


@pytest.mark.parametrize(
    "text", ["", "best", "maw+", "maw+compensated", "maw+compensate+compensate", "compensate", "maw compensate", "+maw"]
)
def test_unknown_names_are_rejected(text):
    with pytest.raises(ValueError, match=r"unknown recipe .* give a score .*maw_gud.*surgeon.*\+compensate"):
        Recipe.parse(text)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"score": "best"}, ValueError, "unknown score 'best'; allowed: maw, .*surgeon or a callable"),
        ({"score": None}, ValueError, "unknown score None"),
        ({"compensate": 1}, TypeError, "compensate must be True or False, got 1"),
        ({"reconstruct": "yes"}, TypeError, "reconstruct must be True or False, got 'yes'"),
        ({"allocation": "best"}, ValueError, "unknown allocation 'best'; allowed: uniform, sensitivity"),
        ({"multiple_of": 0}, ValueError, "multiple_of must be an integer of at least 1, got 0"),
        ({"multiple_of": True}, ValueError, "multiple_of must be an integer of at least 1, got True"),
        ({"multiple_of": 2.0}, ValueError, "multiple_of must be an integer of at least 1, got 2.0"),
    ],
)
def test_bad_values_are_rejected(arguments, error, message):
    with pytest.raises(error, match=message):
        Recipe(**arguments)


@pytest.mark.parametrize(
    "name, argument, gram, sensitivity",
    [
        ("maw_gud", "", False, False),
        ("hybrid", "score='hybrid'", False, False),
        ("maw+compensate", "compensate=True", True, False),
        ("maw+sensitivity", "allocation='sensitivity'", True, True),
        ("surgeon", "score='surgeon'", True, True),
        ("maw+reconstruct", "", False, False),
    ],
)
def test_needs(name, argument, gram, sensitivity):
    needs = Recipe.parse(name).needs
    assert (needs.argument, needs.gram, needs.sensitivity) == (argument, gram, sensitivity)
    assert needs.calibration == bool(argument)


@pytest.mark.parametrize(
    "name", ["maw_gud", "hybrid", "maw+compensate", "maw+sensitivity", "surgeon", "l2+reconstruct"]
)
def test_data_is_given_if_and_only_if_it_is_used(name):
    recipe = Recipe.parse(name)
    for given in ([], ["--texts"]):
        if bool(given) == recipe.needs.calibration:
            recipe.check_data(given, "texts")
        else:
            with pytest.raises(ValueError, match="--texts would be ignored" if given else "needs texts"):
                recipe.check_data(given, "texts")


def test_a_callable_score_needs_nothing_and_has_a_name():
    def largest_rows(gate, up, down):
        return gate.abs().amax(1)

    recipe = Recipe(largest_rows)
    assert str(recipe) == "largest_rows" and not recipe.needs.calibration
