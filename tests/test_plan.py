"""Which layers are paired: the forms that are read, what they mean, and what each mistake is told."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lp_train.errors import UserError
from lp_train.pairing import AutoPairs, PairPlan

LAYERS = 30


def parse(spec: Any, num_layers: int = LAYERS) -> PairPlan:
    return PairPlan.parse(spec, num_layers=num_layers)


def test_the_forms_that_are_read() -> None:
    expected = ((4, 5), (6, 7), (8, 9))
    for spec in ("4:10", " 4:10 ", [[4, 5], [6, 7], [8, 9]], [[8, 9], [4, 5], [6, 7]], ((4, 5), (6, 7), (8, 9))):
        assert parse(spec).pairs == expected
    assert parse(parse("4:10")) == parse("4:10")


def test_what_a_plan_says_of_itself() -> None:
    plan = parse([[8, 9], [4, 5]])
    assert (plan.num_layers, plan.effective_depth, plan.first_layer, plan.layers) == (30, 28, 4, (4, 5, 8, 9))
    assert str(plan) == "2 pairs (4+5 8+9), depth 30 -> 28"


def test_all_layers_may_be_paired() -> None:
    assert parse("0:30").effective_depth == 15


def test_a_plan_is_a_value() -> None:
    assert parse("4:8") == parse([[4, 5], [6, 7]])
    assert len({parse("4:8"), parse([[6, 7], [4, 5]])}) == 1


@given(st.integers(1, 80), st.data())
def test_windows(num_layers: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, num_layers))
    end = data.draw(st.integers(0, num_layers + 4))
    spec = f"{start}:{end}"
    if start < end <= num_layers and (end - start) % 2 == 0:
        plan = parse(spec, num_layers)
        assert plan.layers == tuple(range(start, end))
        assert plan.effective_depth == num_layers - (end - start) // 2
        assert plan.first_layer == start
    else:
        assert_one_line(spec, num_layers)


@given(st.integers(2, 40), st.lists(st.tuples(st.integers(-2, 42), st.integers(-2, 42)), max_size=8))
def test_any_list_of_pairs(num_layers: int, pairs: list[tuple[int, int]]) -> None:
    """Accepted exactly when the definition holds: consecutive, in range, each layer once, at least one."""
    layers = [i for pair in pairs for i in pair]
    good = len(set(layers)) == len(layers) > 0 and all(0 <= i < num_layers for i in layers)
    if good and all(second == first + 1 for first, second in pairs):
        plan = parse(pairs, num_layers)
        assert set(plan.pairs) == set(pairs)
        assert list(plan.layers) == sorted(layers)
    else:
        assert_one_line(pairs, num_layers)


@given(st.integers(2, 60), st.data())
def test_disjoint_pairs_in_any_order_and_back_through_lists(num_layers: int, data: st.DataObject) -> None:
    pairs, i = [], 0
    for pair_here in data.draw(st.lists(st.booleans(), min_size=num_layers, max_size=num_layers)):
        if pair_here and i + 1 < num_layers:
            pairs.append([i, i + 1])
            i += 1
        i += 1
    if not pairs:
        return
    plan = parse(data.draw(st.permutations(pairs)), num_layers)
    assert [list(pair) for pair in plan.pairs] == pairs
    assert parse([list(pair) for pair in plan.pairs], num_layers) == plan
    assert plan.effective_depth == num_layers - len(pairs)


@given(st.text(max_size=12))
def test_any_other_text_is_refused(text: str) -> None:
    if not re.fullmatch(r"\s*\d+:\d+\s*", text):
        assert_one_line(text)


def assert_one_line(spec: Any, num_layers: int = LAYERS) -> str:
    with pytest.raises(UserError) as e:
        parse(spec, num_layers)
    message = str(e.value)
    assert message.startswith(f"plan.pairs {spec!r}: ")
    assert "\n" not in message
    return message


FORMS = 'give a window such as "12:28" (end exclusive) or a list of pairs such as [[4, 5], [8, 9]]'
MISTAKES: list[tuple[Any, str]] = [
    ("12:27", "a window needs an even number of layers, this has 15; use 12:26 or 12:28"),
    ("12:31", "a window needs an even number of layers, this has 19; use 12:30"),
    ("0:1", "a window needs an even number of layers, this has 1; use 0:2"),
    ("29:30", "pair 29-30 is out of range; the model has layers 0 to 29"),
    ("28:13", f"no pair in it; {FORMS}"),
    ("12", f"not understood; {FORMS}"),
    ("12-28", f"not understood; {FORMS}"),
    ("", f"not understood; {FORMS}"),
    ("-2:4", f"not understood; {FORMS}"),
    ("12:12", f"no pair in it; {FORMS}"),
    ("28:12", f"no pair in it; {FORMS}"),
    ([], f"no pair in it; {FORMS}"),
    ("auto:8", f"pairs are chosen when a run starts, whose resolved_config.yaml then has them; else {FORMS}"),
    ("24:32", "pair 30-31 is out of range; the model has layers 0 to 29"),
    ([[-1, 0]], "pair -1-0 is out of range; the model has layers 0 to 29"),
    ([[29, 30]], "pair 29-30 is out of range; the model has layers 0 to 29"),
    ([[4, 6]], "pair 4-6 is not consecutive; a pair is a layer and the next one, such as 4-5"),
    ([[5, 4]], "pair 5-4 is not consecutive; a pair is a layer and the next one, such as 5-6"),
    ([[4, 5], [5, 6]], "layer 5 is in two pairs (overlap); give each layer one partner"),
    ([[4, 5], [4, 5]], "layer 4 is in two pairs (overlap); give each layer one partner"),
    (12, f"not understood; {FORMS}"),
    (None, f"not understood; {FORMS}"),
    ([4, 5], f"not understood; {FORMS}"),
    ([[4]], f"[4] is not a pair of layer numbers; {FORMS}"),
    ([[4, 5, 6]], f"[4, 5, 6] is not a pair of layer numbers; {FORMS}"),
    ([[4, "5"]], f"[4, '5'] is not a pair of layer numbers; {FORMS}"),
    ([[4.0, 5.0]], f"[4.0, 5.0] is not a pair of layer numbers; {FORMS}"),
    ([[False, True]], f"[False, True] is not a pair of layer numbers; {FORMS}"),
]


@pytest.mark.parametrize(("spec", "rule_and_remedy"), MISTAKES, ids=[repr(spec) for spec, _ in MISTAKES])
def test_a_mistake_is_told_with_value_rule_and_remedy(spec: Any, rule_and_remedy: str) -> None:
    assert assert_one_line(spec) == f"plan.pairs {spec!r}: {rule_and_remedy}"


def test_a_plan_for_a_larger_model_is_out_of_range_in_a_smaller_one() -> None:
    with pytest.raises(UserError, match="pair 24-25 is out of range; the model has layers 0 to 23"):
        parse(parse("20:30"), num_layers=24)


@pytest.mark.parametrize(
    ("spec", "expected", "pairs_of_30"),
    [
        ("auto:8", AutoPairs("pairs", 8), 8),
        (" auto: 15 ", AutoPairs("pairs", 15), 15),
        ("auto:loss<=0.02", AutoPairs("loss", 0.02), None),
        ("auto:depth <= 0.7", AutoPairs("depth", 0.7), 9),  # 21 of 30 layers, though 0.7 * 30 is 20.999...
        ("auto:depth<=0.75", AutoPairs("depth", 0.75), 8),  # 22 layers are 0.733, 23 would be 0.767
        ("auto:depth<=.5", AutoPairs("depth", 0.5), 15),
    ],
)
def test_plans_that_are_chosen(spec: str, expected: AutoPairs, pairs_of_30: int | None) -> None:
    auto = AutoPairs.parse(spec)
    assert auto == expected
    assert auto.count(30) == pairs_of_30


@pytest.mark.parametrize("spec", ["12:28", "", [[4, 5]], None, "autos:8"])
def test_any_other_plan_is_not_chosen(spec: Any) -> None:
    assert AutoPairs.parse(spec) is None


@given(st.floats(0.5, 0.999), st.integers(2, 200))
def test_a_share_of_the_depth_is_met_by_the_fewest_pairs(share: float, layers: int) -> None:
    count = AutoPairs("depth", share).count(layers)
    assert count is not None
    assert (layers - count) / layers <= share + 1e-9 < (layers - count + 1) / layers + 2e-9


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("auto:", r"'auto:': not understood; give auto:8 \(pairs\), auto:loss<="),
        ("auto:2.5", "not understood"),
        ("auto:-3", "not understood"),
        ("auto:loss<0.1", "not understood"),
        ("auto:kl<=0.1", "not understood"),
        ("auto:0", "must be above 0"),
        ("auto:loss<=0", "must be above 0"),
        ("auto:depth<=0.4", "pairs can halve the depth at most"),
        ("auto:depth<=22", "pairs can halve the depth at most"),
    ],
)
def test_a_choice_that_cannot_be_read(spec: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        AutoPairs.parse(spec)


def test_more_pairs_than_the_layers_make() -> None:
    with pytest.raises(UserError, match=r"plan.pairs 'auto:16': 30 layers make 15 pairs at most; give auto:15 or less"):
        AutoPairs("pairs", 16).count(30)
