"""The training loop. ``dualenc.train(recipe)``, which has its name, is :func:`dualenc.api.runs.train`."""
