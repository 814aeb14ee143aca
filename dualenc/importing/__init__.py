"""Other trainers' command lines and checkpoints as recipes and checkpoints of dualenc.

``flags`` reads a command line; ``from_open_clip`` and ``from_clap`` say what each flag means here (a :class:`Draft`);
``epoch_file`` takes over weights and optimizer state. All of them are facts about the other programs, written down
here: neither program is imported.
"""
