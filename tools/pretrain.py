"""Pre-train: python tools/pretrain.py CONFIG [section.key=value ...].

With hard patches mining, or as a plain masked autoencoder.
"""

import sys
from collections.abc import Sequence

from hpm_video.runs.console import train


def main(command_line: Sequence[str] | None = None) -> int:
    """Run, and report the results."""
    return train(__doc__, command_line, finetunes=False)


if __name__ == "__main__":
    sys.exit(main())
