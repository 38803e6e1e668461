"""`python -m srrl_jax` is the `srrl` command."""

from srrl_jax.cli import main

main()
