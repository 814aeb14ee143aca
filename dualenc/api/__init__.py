"""What a script of yours calls; every public name stands in ``dualenc`` itself: ``dualenc.load_model`` and so on."""
