"""`python -m jobs ...` is `raydetr ...`: what a submitted Ray job runs."""

from jobs.cli import main

main()
