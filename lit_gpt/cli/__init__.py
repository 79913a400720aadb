"""The subcommands that Lightning's CLI drives: fit, validate, test, predict."""
