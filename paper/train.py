"""``lightning-acu`` for runs.py: the same, but it ends when the process that started it does."""

import os
import threading

from lightning_acu.cli import main


def end_with_parent():
    """Standard input is a pipe that the parent holds: it ends when the parent does, even where that was killed."""
    # Not sys.stdin, whose lock would be held when this process ends by itself.
    os.read(0, 1)
    os._exit(1)  # at once: two trainings in one folder would spoil each other's files


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, daemon=True).start()
    main()
