"""Programs: each asks one question, and answers it by a table and a picture."""

from sgd_jax import runs as _runs  # noqa: F401  # first of all, for it says what to install
