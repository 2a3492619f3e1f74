"""What `test_processes` starts in two processes: agreeing, and examples that each has half of.

python tests/joined.py PORT PROCESS_ID OUT.npz
"""

import sys

import eight_devices
import jax
import numpy as np

import sgd_jax as sj
from sgd_jax.distributed import processes, sharding

ROWS = 40  # 20 in each process


def outcome(function):
    """Returns what a function returns, or what it raises as text."""
    try:
        return function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def answers(mesh, cut, whole):
    """Returns moments and an epoch from examples cut over devices, or on one."""
    params, _ = eight_devices.problem()
    moments = sj.gradient_moments(eight_devices.fun, params, cut, mesh=mesh)
    optimizer = sj.sgd(1.0)
    batches = sj.sampling.epoch(jax.random.key(0), ROWS, 6)
    run = sj.make_epoch(eight_devices.fun, optimizer, mesh=mesh)
    state, info = run(sj.init_state(params, optimizer), whole, batches)
    return {"moments": moments, "params": state.params, "costs": info.cost}


def main(port, process_id, path):
    jax.config.update("jax_enable_x64", True)
    k = int(process_id)
    processes.initialize(f"127.0.0.1:{port}", 2, k, peer_timeout=3000)
    mesh = sharding.data_mesh()
    mine = jax.tree.map(lambda leaf: leaf[20 * k : 20 * k + 20], eight_devices.problem()[1])
    examples = sharding.shard_local_examples(mine, mesh)
    found = eight_devices.flat("", answers(mesh, examples, examples))
    found["told"] = np.array(
        [
            str(processes.from_first(lambda: {"by": k, "text": "∇C"})),
            outcome(lambda: processes.from_first(lambda: [][k])),
            outcome(lambda: processes.in_all(lambda: 1 // (1 - k))),
            outcome(lambda: processes.in_all(lambda: k)),
        ]
    ).astype(str)
    np.savez(path, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
