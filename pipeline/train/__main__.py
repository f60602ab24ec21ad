"""`python -m pipeline.train`: training in this process, or in those that `torchrun` started."""

import sys

from pipeline.train.loop import main

if __name__ == "__main__":
    sys.exit(main())
