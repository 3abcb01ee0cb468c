"""Fine-tune for classification, then test: python tools/finetune.py CONFIG [section.key=value ...].

Starts from a pre-trained encoder, or from another classifier.
"""

import sys
from collections.abc import Sequence

from hpm_video.runs.console import train


def main(command_line: Sequence[str] | None = None) -> int:
    """Fine-tune, test, and report the results."""
    return train(__doc__, command_line, finetunes=True)


if __name__ == "__main__":
    sys.exit(main())
