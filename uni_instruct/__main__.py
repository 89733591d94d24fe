"""Entry point of `python -m uni_instruct`."""

from uni_instruct.cli import main

main()
