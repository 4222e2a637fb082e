"""``python -m baco``: the command line where no ``baco`` is on the path."""

from baco.cli import main

main()
