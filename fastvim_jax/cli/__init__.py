"""The `fastvim` command: one module a subcommand, each thin over public functions."""
