"""What a user can mend."""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """Bad input. The message is one line that names the file, the key or id, and the remedy.

    Scripts print it to stderr and exit with code 2; a library user catches it as a ValueError.
    """


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's `main`; a UserError or OSError becomes one line on stderr and exit code 2.

    Under torchrun every rank that fails prints its line, and torchrun adds its own report and exit code.
    """
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except UserError as error:
        # An error from a loader process arrives wrapped in that process's traceback.
        message = str(error).rpartition(f"{__name__}.UserError: ")[2]
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a folder where a file should be, no permission, a full disk
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
