"""``python -m watersic_hf.cli``, also under torchrun and accelerate launch."""

import sys

from watersic_hf.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
