"""Define the `fastvim` command: one module per subcommand. Each module only calls public functions and prints."""
