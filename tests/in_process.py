"""Runs the program of an experiment in the process of the tests."""

from absl import flags


def call(program, *arguments):
    """Returns the exit code of a program of `experiments` with --smoke and the arguments given."""
    return run(program, "--smoke", *arguments)


def run(program, *arguments):
    """Returns the exit code of a program of `experiments` with the arguments given."""
    flags.FLAGS.unparse_flags()
    flags.FLAGS(["program", *arguments])
    try:
        return program.main()
    except SystemExit as leaving:
        return leaving.code
