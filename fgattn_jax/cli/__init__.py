"""The command line `fgattn`: one file per command, each with `add_parser(subparsers)` and `run(args) -> int`."""
