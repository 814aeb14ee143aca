"""``python -m dualenc …``: the same as the ``dualenc`` command, for launchers that start modules."""

from dualenc.cli import main

main()
