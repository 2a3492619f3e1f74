"""The noise scale in training: as defined, resumable, and what a batch size makes of it."""

import csv
import functools
import json

import in_process
import jax
import numpy as np
import pytest

import sgd_jax as sj
from experiments import _classifier, _noise, _starting_point, noise_scale, runs, train
from experiments._config import Config, load
from sgd_jax.estimation import GradientMoments
from sgd_jax.estimation.noise import noise_scale as estimate

N = 200  # training examples of the digits with --smoke
SEEDS = range(3, 5)


def call(program, *arguments):
    return in_process.call(program, "--dtype=float64", *arguments)


def measurement(num_examples, seeds=SEEDS, split="train"):
    dataset = load(Config(smoke=True))
    return dataset, _noise.make_measurement(
        dataset,
        cost="quadratic",
        seeds=seeds,
        dtype=np.float64,
        num_examples=num_examples,
        split=split,
    )


def networks(seeds=SEEDS):
    optimizer = sj.sgd(1.0)
    numbers, init_all = _classifier.make_init(
        optimizer, sizes=(64, 5, 10), init="normal", seeds=seeds, dtype=np.float64
    )
    return init_all(numbers).params


def gradients(dataset, params, split="train"):
    """Returns G of one network, rows of examples, by layer: [(n, p_1), (n, p_2)]."""
    fun, _ = _classifier.example_functions(
        "quadratic", dataset.num_classes, dataset.scale, np.float64
    )
    grads = jax.vmap(jax.grad(fun), in_axes=(None, 0))(params, getattr(dataset, split))
    return [
        np.concatenate([np.reshape(leaf, (len(leaf), -1)) for leaf in layer], axis=1)
        for layer in grads
    ]


def parts(matrix):
    """Returns tr Σ and ‖G‖² of rows, with 1/n."""
    mean = matrix.mean(axis=0)
    return np.mean(np.sum((matrix - mean) ** 2, axis=1)), np.sum(mean**2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("runs")
    assert call(noise_scale, f"--out_dir={out_dir}", "--run_name=one") == 0
    return out_dir / "one"


def test_all_training_examples_give_the_noise_scale_of_training_exactly():
    dataset, measure = measurement(N)
    params = networks()
    record = measure(params, 0)
    for index in range(len(SEEDS)):
        layers = gradients(dataset, jax.tree.map(lambda leaf, i=index: leaf[i], params))
        for name, matrix in (
            ("noise_scale", np.concatenate(layers, axis=1)),
            ("noise_scale_layer1", layers[0]),
            ("noise_scale_layer2", layers[1]),
        ):
            trace, squared_norm = parts(matrix)
            assert record[name][index] == pytest.approx(trace / squared_norm), name
        assert record["noise_scale_low"] == record["noise_scale"] == record["noise_scale_high"]


def test_held_out_examples_give_the_unbiased_parts_of_the_population_with_an_interval():
    dataset, measure = measurement(N, split="validation")
    params = networks()
    record = measure(params, 0)
    for index in range(len(SEEDS)):
        one = jax.tree.map(lambda leaf, i=index: leaf[i], params)
        matrix = np.concatenate(gradients(dataset, one, "validation"), axis=1)
        k = len(matrix)
        trace, squared_norm = parts(matrix)
        s2 = trace * k / (k - 1)
        assert record["noise_scale"][index] == pytest.approx(s2 / (squared_norm - s2 / k))
        assert record["noise_scale_low"][index] < record["noise_scale"][index]
        assert record["noise_scale"][index] < record["noise_scale_high"][index]


@pytest.mark.slow
def test_both_splits_are_what_each_of_them_is():
    _, measure = measurement(60, split="both")
    record = measure(networks(), 3)
    fitted = measurement(60)[1](networks(), 3)
    held_out = measurement(60, split="validation")[1](networks(), 3)
    for name, value in fitted.items():
        assert record[name] == value
        if "layer" not in name:
            assert record[f"held_out_{name}"] == held_out[name] != value


@pytest.mark.slow
def test_subsets_estimate_the_parts_of_all_training_examples_without_bias():
    seeds = range(SEEDS.start, SEEDS.start + 1)
    dataset, measure = measurement(20, seeds)
    params = networks(seeds)
    matrix = np.concatenate(gradients(dataset, jax.tree.map(lambda leaf: leaf[0], params)), axis=1)
    records = [measure(params, epoch) for epoch in range(200)]
    for name, truth in zip(("noise_trace", "noise_squared_norm"), parts(matrix), strict=True):
        values = np.array([record[name] for record in records])
        error = values.std(ddof=1) / np.sqrt(len(values))
        assert abs(values.mean() - truth) < 5 * error
        assert abs(values.mean() - 1.5 * truth) > 5 * error
        assert abs(values.mean() - truth / 1.5) > 5 * error
    assert measure(params, 7) == records[7]
    assert measure(params, 8) != records[7]


def test_the_experiment_leaves_records_table_figure_and_report(folder):
    records = runs.RunFolder(folder).read_metrics()
    with open(folder / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert [float(row["noise_trace"]) for row in rows] == [r["noise_trace"] for r in records]
    report = (folder / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 1
    for label in noise_scale.make_table(2).labels():
        assert f">{label}</th>" in report
    summary = json.loads((folder / "summary.json").read_text())
    undetermined = [record["held_out_noise_scale"] is None for record in records]
    assert summary["num_undetermined"] == sum(undetermined)
    assert report.count("<td>undetermined</td>") >= sum(undetermined)
    for record, is_open in zip(records, undetermined, strict=True):
        assert record["noise_scale_low"] == record["noise_scale_high"] == record["noise_scale"]
        assert record["held_out_noise_scale_low"] > 0
        assert not is_open or record["held_out_noise_scale_high"] is None


def test_measuring_noise_changes_nothing_of_the_training(folder):
    config, dataset = _starting_point.prepare({"smoke": True, "epochs": 2, "dtype": "float64"})
    plain = train.run(config, dataset).records
    for record, tracked in zip(plain, runs.RunFolder(folder).read_metrics(), strict=True):
        for name in record:
            if name not in ("seconds", "examples_per_second"):
                assert tracked[name] == record[name]


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["norm_test", "cabs"])
def test_an_adaptive_run_grows_as_the_rule_says_and_resumes_bit_for_bit(rule, tmp_path):
    arguments = (f"--batch_size=adaptive:{rule}", "--noise_examples=60", f"--out_dir={tmp_path}")
    assert call(train, *arguments, "--run_name=whole", "--epochs=4") == 0
    assert call(train, *arguments, "--run_name=parts", "--epochs=2") == 0
    rest = ("--run_name=parts", "--resume", "--epochs=4", f"--out_dir={tmp_path}")
    assert call(train, *rest) == 0
    whole, resumed = (
        [
            {name: record[name] for name in record if not name.startswith(("seconds", "examples_"))}
            for record in runs.RunFolder(tmp_path / name).read_metrics()
        ]
        for name in ("whole", "parts")
    )
    assert whole == resumed
    sizes = [record["batch_size"] for record in whole]
    assert sizes[0] == 10
    asked = []
    for record in whole:
        trace, squared_norm = record["noise_trace"], record["noise_squared_norm"]
        if rule == "cabs":
            asked.append(np.clip(3.0 * trace / record["cost_train"], 1, N))
        else:
            asked.append(np.clip(trace / squared_norm, 1, N) if squared_norm > 0 else N)
        if len(asked) > 1:
            asked[-1] = np.sqrt(asked[-1] * asked[-2])
        assert record["wanted_batch_size"] == pytest.approx(asked[-1])
    for size, after, wanted in zip(sizes, sizes[1:], asked, strict=False):
        grows, shrinks = wanted >= 2 * size <= N, wanted < size / 2 and size >= 20
        assert after == (2 * size if grows else size // 2 if shrinks else size)
    assert (sizes[-1] > 10) == (rule == "norm_test")
    assert (tmp_path / "parts" / "figures" / "learning_curve.png").is_file()


def test_a_batch_size_changes_by_a_factor_of_two_and_stays_between_the_first_and_n():
    config = Config(adaptive="norm_test")

    def next_size(size, wanted, n=1000):
        record = {"wanted_batch_size": wanted, "batch_size": size}
        return _noise.next_batch_size(config, record, n)

    assert next_size(40, 1000, n=79) == 40
    assert next_size(40, 1000, n=80) == 80
    assert [next_size(40, wanted) for wanted in (19, 20, 79, 80)] == [20, 40, 40, 80]
    assert next_size(10, 1.0) == 10


def test_one_large_measurement_does_not_decide_the_batch_size():
    config, before, sizes = Config(adaptive="norm_test", batch_size=64), None, []
    for epoch in range(8):
        noise = {"noise_trace": 192.0 if epoch == 4 else 64.0, "noise_squared_norm": 1.0}
        wanted = _noise.wanted_batch_size(config, noise, before, 10_000)
        before = {"wanted_batch_size": wanted, "batch_size": sizes[-1] if sizes else 64}
        sizes.append(_noise.next_batch_size(config, before, 10_000))
    assert sizes == [64] * 8  # 192 alone would double it; √(64 · 192) = 111 does not
    negative = {"noise_trace": 1.0, "noise_squared_norm": -1.0}
    assert _noise.wanted_batch_size(config, negative, None, 50) == 50


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (noise_scale, ["--num_measured=2"], "num_measured is 2; expected 0, for all, or at least"),
        (noise_scale, ["--num_measured=201"], "num_measured is 201; expected at most 200"),
        (noise_scale, ["--num_seeds=2"], "--num_seeds means nothing to this program"),
        (train, ["--track_noise", "--noise_examples=2"], "noise_examples is 2; expected a whole"),
        (train, ["--batch_size=adaptive:luck"], "adaptive is 'luck'; expected one of norm_test"),
        (train, ["--batch_size=many"], "expected a whole number, full, or adaptive:norm_test"),
        (train, ["--batch_size=adaptive:cabs", "--num_seeds=2"], "num_seeds is 2; expected 1"),
    ],
)
def test_bad_input_is_told_before_any_work(program, arguments, message, tmp_path, capsys):
    assert call(program, f"--out_dir={tmp_path}", *arguments) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_line_without_a_number_for_some_seed_goes_to_loggers_without_it():
    scalars = runs.loggers.scalars({"epoch": 1, "a": [None, 2.0, 4.0], "b": [None, None]})
    assert scalars == {"a/median": 3.0, "a/min": 2.0, "a/max": 4.0}


def test_the_interval_is_defined_for_as_many_examples_as_mnist_has_in_32_bits():
    with jax.enable_x64(False):
        scale = jax.ShapeDtypeStruct((), np.float32)
        each = jax.ShapeDtypeStruct((50_000,), np.float32)
        moments = GradientMoments(
            count=jax.ShapeDtypeStruct((), np.int32),
            cost=scale,
            mean=scale,
            trace_per_leaf=scale,
            mean_norm=scale,
            squared_norms=each,
            alignments=each,
        )
        of_population = functools.partial(estimate, of="population")
        assert jax.eval_shape(of_population, moments).high.dtype == np.float32


def test_a_split_that_is_not_measured_is_refused():
    with pytest.raises(ValueError, match=r"noise_split is 'test'; expected one of train, valid"):
        Config(noise_split="test")
