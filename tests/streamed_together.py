"""What `test_processes` starts in two processes: training on examples that stay on the disk.

python tests/streamed_together.py PORT PROCESS_ID FOLDER OUT_DIR

Three runs of the program one after the other, each of them by both processes: a whole one, one that
is stopped within an epoch, and that one gone on with.
"""

import shutil
import sys
from pathlib import Path
from unittest import mock

import eight_devices
import jax
from absl import flags

from experiments import _recorded, train
from sgd_jax.distributed import processes

SAVE_EVERY, STOP, NUM_CHUNKS = 2, 3, 5  # chunks, of one mini-batch each


def arguments(folder, out_dir):
    """Returns the flags of a run."""
    m = eight_devices.M - 1  # two processes do not divide it
    return [
        f"--dataset={folder}",
        f"--out_dir={out_dir}",
        f"--batch_size={m}",
        f"--chunk_mib={m * (6 + 4) / 2**20}",
        f"--save_every={SAVE_EVERY}",
        *("--stream", "--sizes=6,4,3", "--epochs=1", "--dtype=float64"),
        *("--track_noise", "--noise_examples=12"),
    ]


def run(*given):
    """Runs the program in this process; returns its exit code."""
    flags.FLAGS.unparse_flags()
    flags.FLAGS(["train", *given])
    return train.main()


def stop(save):
    """Returns what saves within an epoch, and is then interrupted."""

    def save_and_stop(self, progress):
        save(self, progress)
        if progress.num_parts == STOP:
            raise KeyboardInterrupt

    return save_and_stop


def main(port, process_id, folder, out_dir):
    processes.initialize(f"127.0.0.1:{port}", 2, int(process_id), peer_timeout=3000)
    jax.config.update("jax_compilation_cache_dir", str(Path(out_dir, ".compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    given = arguments(folder, out_dir)
    assert run(*given, "--run_name=whole") == 0
    checkpoints = _recorded.PartCheckpoints
    with mock.patch.object(checkpoints, "save", stop(checkpoints.save)):
        assert run(*given, "--run_name=stopped") == 130
    stopped = Path(out_dir, "stopped")
    processes.from_first(lambda: str(shutil.copytree(stopped, Path(out_dir, "two"))))
    assert run(f"--out_dir={out_dir}", "--run_name=two", "--resume") == 0


if __name__ == "__main__":
    main(*sys.argv[1:])
