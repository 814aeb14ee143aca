"""The public API for scripts; every name is also in ``dualenc`` itself: ``dualenc.load_model`` and so on."""
