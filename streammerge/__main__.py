"""python -m streammerge."""

from streammerge.cli import main

main()
