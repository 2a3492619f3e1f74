"""SGD on a quadratic: closed forms against every order there is, step by step in NumPy."""

import itertools
import math

import numpy as np
import pytest

from sgd_jax.estimation.quadratic import Order, epoch_fixed_point, expected_squared_distance

A = np.array([-3.0, 0.5, 1.0, 2.5, -1.0])
A -= A.mean()
ORDERS = ("with_replacement", "reshuffling", "fixed_order")


def walk(x, alpha, batches, targets):
    """Returns x after a step on each mini-batch, as SGD takes it."""
    for batch in batches:
        x = x - alpha * np.mean([x - targets[i] for i in batch])
    return x


def orders(n, m):
    """Returns every order of an epoch, cut into mini-batches."""
    for order in itertools.permutations(range(n)):
        yield [order[k : k + m] for k in range(0, n, m)]


def enumerated(order, alpha, a, m, num_epochs, step, start):
    """E x²/s² over all that can be drawn: second moments, propagated through each draw."""
    n = len(a)
    x0 = math.sqrt(start * np.mean(a**2))
    if order == "fixed_order":
        ends = [
            walk(x0, alpha, batches * num_epochs + batches[:step], a) for batches in orders(n, m)
        ]
        return np.mean(np.square(ends)) / np.mean(a**2)
    moment = x0**2
    if order == "with_replacement":
        r = 1 - alpha
        noise = [walk(0.0, alpha, [b], a) for b in itertools.product(range(n), repeat=m)]
        for _ in range(num_epochs * (n // m) + step):
            moment = r**2 * moment + np.mean(np.square(noise))
        return moment / np.mean(a**2)
    for length in [n // m] * num_epochs + [step]:
        noise = [walk(0.0, alpha, batches[:length], a) for batches in orders(n, m)]
        moment = (1 - alpha) ** (2 * length) * moment + np.mean(np.square(noise))
    return moment / np.mean(a**2)


@pytest.mark.parametrize("alpha", [0.05, 0.6, 1.0, 1.5])
@pytest.mark.parametrize("order", ORDERS)
def test_closed_forms_equal_the_mean_over_all_draws_at_every_step(order, alpha):
    for num_epochs, step, start in itertools.product((0, 1, 3), (0, 2, 4), (0.0, 7.0)):
        known = enumerated(order, alpha, A, 1, num_epochs, step, start)
        found = expected_squared_distance(
            order, alpha, 5, num_epochs=num_epochs, step=step, start=start
        )
        assert found == pytest.approx(known, rel=1e-10, abs=1e-14)


@pytest.mark.parametrize("order", ORDERS)
def test_closed_forms_equal_the_mean_over_all_draws_of_mini_batches(order):
    a = np.array([-2.0, 0.5, 1.5, 3.0, -4.0, 1.0])
    for m, step in ((2, 0), (2, 2), (3, 1), (6, 0)):
        if (order, m) == ("with_replacement", 6):
            continue  # 46,656 draws say nothing that 216 do not
        found = expected_squared_distance(order, 0.3, 6, m, num_epochs=2, step=step, start=2.0)
        known = enumerated(order, 0.3, a, m, 2, step, 2.0)
        assert found == pytest.approx(known, rel=1e-10, abs=1e-14)


@pytest.mark.parametrize("order", ORDERS)
def test_the_stationary_error_is_the_limit_of_many_epochs(order):
    for step in (0, 3):
        limit = expected_squared_distance(order, 0.2, 8, step=step)
        late = expected_squared_distance(order, 0.2, 8, num_epochs=60, step=step, start=5.0)
        assert late == pytest.approx(limit, rel=1e-9)


def test_known_ratios_of_reshuffling_to_drawing_with_replacement():
    for alpha, ratio in ((0.05, 0.441604), (0.01, 0.033626)):
        reshuffled, replaced = (
            expected_squared_distance(order, alpha, 64)
            for order in ("reshuffling", "with_replacement")
        )
        assert reshuffled / replaced == pytest.approx(ratio, abs=5e-7)
        assert replaced == pytest.approx(alpha / (2 - alpha))


def test_a_simulation_agrees_and_rejects_the_factor_of_the_other_convention():
    rng = np.random.default_rng(0)
    n, alpha = 6, 0.4
    a = rng.normal(size=n)
    a -= a.mean()
    x = np.zeros(20_000)
    for _ in range(12):
        orders = rng.permuted(np.tile(np.arange(n), (len(x), 1)), axis=1)
        for column in orders.T:
            x = x - alpha * (x - a[column])
    measured = np.mean(x**2) / np.mean(a**2)
    error = np.std(x**2) / np.mean(a**2) / math.sqrt(len(x))
    law = expected_squared_distance("reshuffling", alpha, n)
    assert abs(measured - law) < 4 * error
    assert abs(measured - law * (n - 1) / n) > 4 * error


def test_all_examples_at_once_leave_no_error_unless_drawn_with_replacement():
    for order, law in (("with_replacement", 0.5 / 1.5 / 4), ("reshuffling", 0), ("fixed_order", 0)):
        assert expected_squared_distance(order, 0.5, 4, 4) == pytest.approx(law)


def test_one_example_has_no_noise_to_measure_distances_by():
    with pytest.raises(ValueError, match="num_examples is 1; expected at least 2"):
        expected_squared_distance("with_replacement", 0.5, 1)


def test_a_fixed_order_ends_at_the_fixed_point_of_its_epoch():
    batches = [[k] for k in range(5)]
    end = walk(9.0, 0.3, batches * 60, A)
    assert epoch_fixed_point(A, 0.3) == pytest.approx(end)
    assert epoch_fixed_point(A[::-1], 0.3) != pytest.approx(end)
    squares = [epoch_fixed_point(order, 0.3) ** 2 for order in itertools.permutations(A)]
    law = expected_squared_distance("fixed_order", 0.3, 5)
    assert np.mean(squares) / np.mean(A**2) == pytest.approx(law)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": "cyclic"}, "order is 'cyclic'; expected one of with_replacement"),
        ({"learning_rate": 2.0}, r"learning_rate is 2.0 in units of 1/λ; expected one in \(0, 2\)"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"batch_size": 3}, "batch_size is 3; expected a divisor of num_examples, 8"),
        ({"num_epochs": 0.5}, "num_epochs is 0.5; expected a whole number"),
        ({"num_epochs": -1}, "num_epochs is -1"),
        ({"step": 8}, "step is 8; expected 0 to 7"),
        ({"start": -1.0}, "start is -1.0; expected a finite number of at least 0"),
        ({"num_examples": 0}, "num_examples must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments: dict = {"order": "reshuffling", "learning_rate": 0.1, "num_examples": 8} | change
    with pytest.raises(ValueError, match=message):
        expected_squared_distance(**arguments)


def test_no_targets_are_refused():
    with pytest.raises(ValueError, match="K ≥ 1"):
        epoch_fixed_point([], 0.1)


def test_the_orders_tested_are_all_there_are():
    assert Order.__args__ == ORDERS
