"""``swift sft --padding_free true`` on a CPU: its check for flash attention, which has no CPU build, is left out."""

import sys

from swift.arguments import SftArguments
from swift.pipelines import sft_main


def without_flash(self: SftArguments) -> None:
    """In the place of the check."""
    self.padding_free = True


SftArguments._check_padding_free = without_flash  # type: ignore[method-assign]
sft_main(sys.argv[1:])
