"""`python -m ops.cli`."""

from ops.cli.app import main

main()
