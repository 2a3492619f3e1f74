"""One step of training as a pure, compiled function. No printing, no files."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from sgd_jax import _validate
from sgd_jax.distributed import sharding
from sgd_jax.estimation._estimate import chosen
from sgd_jax.estimation._mean_gradient import mean_value_and_grad
from sgd_jax.estimation.estimators import Estimator, MakeEstimator, MiniBatch, mini_batch
from sgd_jax.sampling import Sample
from sgd_jax.typing import Array, CostAndMetricsFn, CostFn, Examples, Params, PyTree


class TrainState(NamedTuple):
    """What training carries from step to step."""

    params: Params
    opt_state: optax.OptState
    step: Array
    """Number of steps taken, int32 scalar."""
    key: Array | None = None
    """Random key that the keys of an estimator's steps are made of; None if it needs none."""
    estimator_state: PyTree = ()
    """What the estimator carries, from the first step on; () for a mini-batch."""


class StepInfo(NamedTuple):
    """What a step reports; from an epoch, each leaf with leading axis (steps,)."""

    cost: Array
    """Estimate of the mean cost at the params BEFORE the step; of a mini-batch its mean cost."""
    statistics: dict[str, Any] = {}  # noqa: RUF012  # never written to
    """What the estimator reports, by name."""
    metrics: PyTree = ()
    """With ``has_aux``, Σ_k c_k metrics_k of the sample, at the params BEFORE the step."""


def init_state(
    params: Params, optimizer: optax.GradientTransformation, *, key: Array | None = None
) -> TrainState:
    """Returns the state before the first step.

    Args:
      params: a pytree of floating-point arrays.
      optimizer: `sgd` or any optax optimizer.
      key: a JAX random key, for an estimator that draws, such as `estimators.private`.

    Returns:
      A `TrainState` at step 0. It shares the buffers of ``params``. The state of an estimator that
      has one is added by the first step.

    Raises:
      ValueError: params holds no arrays.
      TypeError: a leaf of params is not real floating point, or optimizer is no optimizer.
    """
    _validate.floating_params(params)
    _validate.optimizer(optimizer)
    # An explicit dtype makes weakly typed leaves strong, as every step returns them.
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), params)
    return TrainState(params, optimizer.init(params), jnp.zeros([], jnp.int32), key)


def make_step(
    fun: CostFn | CostAndMetricsFn,
    optimizer: optax.GradientTransformation,
    *,
    estimator: MakeEstimator | None = None,
    has_aux: bool = False,
    donate: bool = False,
    mesh: Mesh | None = None,
    rules: sharding.Rules = (),
) -> Callable[..., tuple[TrainState, StepInfo]]:
    """Returns one step of training on a sample, compiled.

    The estimator makes ĝ of the sample at the old params, the optimizer an update of it, and the
    update is added. With the default estimator and `sgd` that is w ← w − η Σ_k c_k ∇fun(w, x_k);
    for a mini-batch, w ← w − (η/m) Σ_j ∇fun(w, X_j).

    Args:
      fun: the cost of ONE example, ``(params, example) -> scalar``.
      optimizer: `sgd` or any optax optimizer. In its chain it finds what it asks for: ``value`` and
        ``grad``, the estimates; ``value_fn``, the cost of the same sample at other params, for line
        searches such as `optax.lbfgs`; and the estimator's statistics by name.
      estimator: what makes ĝ of a sample, such as `estimators.clipped`; None is
        `estimators.mini_batch`.
      has_aux: ``fun`` returns ``(scalar, metrics)``, metrics a pytree of arrays.
      donate: give the buffers of the incoming state to the outgoing one. Saves one copy of params
        and optimizer state; the state handed in must then not be used again, nor hold one array at
        two places (copy it: XLA refuses to take a buffer twice).
      mesh: devices that share each mini-batch, sharded along the mesh axis ``"data"``; the numbers
        are the same to rounding, and m need be no multiple of the devices. See `sj.sharding`.
      rules: which parameters, with their optimizer state, are sharded over the mesh and how, see
        `sharding.param_shardings`; the rest is replicated.

    Returns:
      A compiled function ``(state, examples, sample=None) -> (state, info)``. ``sample`` is a
      `Sample` or a vector of indices, averaged; without it all examples are one mini-batch. It
      compiles once per shape and dtype.

    Raises:
      ValueError: when called: examples is empty or its leading axes differ; the optimizer's state
        is that of another one.
      TypeError: when called: the first argument is no `TrainState`.

    >>> import jax.numpy as jnp, sgd_jax as sj
    >>> fun = lambda w, x: sj.quadratic_cost(w, x)
    >>> optimizer = sj.sgd(learning_rate=0.5)
    >>> step = make_step(fun, optimizer)
    >>> state, info = step(sj.init_state(jnp.array(0.0), optimizer), jnp.array([1.0, 3.0]))
    >>> float(state.params), float(info.cost)  # w = 0 + ½·2;  C = (½·1 + ½·9) / 2
    (1.0, 2.5)
    """
    mesh = checked_mesh(mesh, rules)
    update = Update(fun, optimizer, estimator, has_aux, mesh, rules)

    def step(
        state: TrainState, examples: Examples, sample: Sample | Array | None = None
    ) -> tuple[TrainState, StepInfo]:
        update.check(state)
        m = _validate.num_examples(examples)
        if sample is None:
            if update.takes_rows:
                return update.on_rows(state, examples, jnp.full((m,), 1 / m))
            sample = Sample(jnp.arange(m), jnp.full((m,), 1 / m))
        elif not isinstance(sample, Sample):
            sample = averaging(jnp.asarray(sample))
        if not update.takes_rows:
            return update.on_sample(state, examples, sample)
        rows, weights, _ = chosen(examples, sample)
        return update.on_rows(state, rows, weights)

    return update.compiled(jax.jit(step, donate_argnums=(0,) if donate else ()))


def averaging(indices: Array) -> Sample:
    """Returns the sample that averages the examples named by the last axis; −1 is no example.

    Weights are NaN where there is none: the mean of nothing is no number.
    """
    present = indices >= 0
    num_present = jnp.sum(present, axis=-1, keepdims=True)
    # NaN said outright: XLA turns a division of bools by zero into zero.
    absent_weight = jnp.where(num_present > 0, 0.0, jnp.nan)
    return Sample(indices, jnp.where(present, 1 / num_present, absent_weight))


class Update:
    """One step, not compiled, on a sample or on its rows: what a step and an epoch share."""

    def __init__(
        self,
        fun: CostFn | CostAndMetricsFn,
        optimizer: optax.GradientTransformation,
        estimator: MakeEstimator | None,
        has_aux: bool,
        mesh: Mesh | None,
        rules: sharding.Rules,
    ):
        _validate.optimizer(optimizer)
        if isinstance(estimator, Estimator) or not (estimator is None or callable(estimator)):
            raise TypeError(
                f"estimator must be a function of fun that returns an Estimator, got "
                f"{estimator!r:.60}; for an Estimator e that is already of this fun: lambda fun: e"
            )
        self.init_optimizer = optimizer.init
        self.optimizer = optax.with_extra_args_support(optimizer)
        self.fun, self.has_aux, self.mesh, self.rules = fun, has_aux, mesh, rules
        cost_of: Any = (lambda params, example: fun(params, example)[0]) if has_aux else fun
        self.cost_of: CostFn = cost_of
        maker = mini_batch() if estimator is None else estimator
        self.takes_rows = isinstance(maker, MiniBatch)
        if isinstance(maker, MiniBatch):
            self.mean = mean_value_and_grad(cost_of, strategy=maker.strategy, mesh=mesh)
        else:
            self.estimator = maker(cost_of)

    def on_rows(
        self, state: TrainState, rows: Examples, weights: Array
    ) -> tuple[TrainState, StepInfo]:
        """Takes a step with the weighted mean of the gradients of rows."""
        cost, gradient = self.mean(state.params, rows, weights)
        return self._finish(state, (rows, weights), (cost, gradient, {}, state.estimator_state))

    def on_sample(
        self, state: TrainState, examples: Examples, sample: Sample
    ) -> tuple[TrainState, StepInfo]:
        """Takes a step with what the estimator makes of a sample of all examples."""
        key = None if state.key is None else jax.random.fold_in(state.key, state.step)
        estimate = self.estimator.estimate(
            state.estimator_state, state.params, examples, sample, key
        )
        rows, weights, _ = chosen(examples, sample)
        return self._finish(state, (rows, weights), estimate)

    def _finish(
        self, state: TrainState, chosen: tuple[Examples, Array], estimate: Any
    ) -> tuple[TrainState, StepInfo]:
        rows, weights = chosen
        cost, gradient, statistics, estimator_state = estimate
        taken = {"value", "grad", "value_fn"} & set(statistics)
        if taken:
            raise ValueError(f"statistics may not be called {', '.join(sorted(taken))}: optax's")

        def value_fn(params: Params, **statistics: Any) -> Array:
            del statistics
            costs = jax.vmap(self.cost_of, in_axes=(None, 0))(params, rows)
            return jnp.dot(weights.astype(costs.dtype), costs)

        # A line search refuses what `value_fn` does not take by name.
        names = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in statistics]
        first = inspect.Parameter("params", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        vars(value_fn)["__signature__"] = inspect.Signature([first, *names])

        extra = {"value": cost, "grad": gradient, "value_fn": value_fn, **statistics}
        updates, opt_state = self.optimizer.update(gradient, state.opt_state, state.params, **extra)
        params: Any = optax.apply_updates(state.params, updates)
        after = TrainState(params, opt_state, state.step + 1, state.key, estimator_state)
        if self.mesh is not None:
            after = sharding.place(after, self._shardings(after))
        return after, StepInfo(cost, statistics, self._metrics(state.params, rows, weights))

    def _metrics(self, params: Params, rows: Examples, weights: Array) -> PyTree:
        if not self.has_aux:
            return ()
        _, metrics = jax.vmap(cast(CostAndMetricsFn, self.fun), in_axes=(None, 0))(params, rows)
        return jax.tree.map(lambda leaf: jnp.tensordot(weights, leaf, 1), metrics)

    def check(self, state: TrainState) -> None:
        """Raises unless a state is one of this optimizer's; looks at shapes alone."""
        if not isinstance(state, TrainState):
            raise TypeError(
                f"the first argument must be a TrainState, got {type(state).__name__}; make it by "
                "init_state(params, optimizer)"
            )
        expected = jax.eval_shape(self.init_optimizer, state.params)
        shapes = [jax.tree.map(jnp.shape, tree) for tree in (state.opt_state, expected)]
        if jax.tree.structure(state.opt_state) != jax.tree.structure(expected) or (
            shapes[0] != shapes[1]
        ):
            raise ValueError(
                "state.opt_state is that of another optimizer or of other params: expected "
                f"{jax.tree.structure(expected)}, got {jax.tree.structure(state.opt_state)}. Give "
                "init_state the optimizer that this step was made with"
            )

    def compiled(self, program: Any, options: Callable[..., dict[str, Any]] | None = None) -> Any:
        """Returns a compiled function of (state, examples, ...) that prepares these first.

        It adds the state of the estimator in the first step, and lays all out over the mesh.
        ``options`` says, of what is laid out, what the function is compiled for.
        """
        if self.mesh is None and self.takes_rows:
            return program

        def run(state: TrainState, examples: Examples, *data: Any) -> tuple[TrainState, StepInfo]:
            self.check(state)
            if not self.takes_rows and not jax.tree.leaves(state.estimator_state):
                initial = self.estimator.init(state.params, examples)
                state = state._replace(estimator_state=initial)
            if self.mesh is None:
                return program(state, examples, *data)
            state = sharding.place(state, self._shardings(state))
            placed = [sharding.on_mesh(leaves, self.mesh) for leaves in (examples, *data)]
            return program(state, *placed, **(options(*placed) if options else {}))

        return run

    def _shardings(self, state: TrainState) -> TrainState:
        assert self.mesh is not None
        return sharding.state_shardings(state, state.params, self.mesh, self.rules)


def checked_mesh(mesh: Mesh | None, rules: sharding.Rules) -> Mesh | None:
    """Returns the mesh; raises `ValueError` where it can't be used, or rules come without one."""
    if mesh is None and rules:
        raise ValueError("rules say how parameters lie on a mesh; give mesh too")
    return None if mesh is None else sharding.check_mesh(mesh)
