"""Planning a run before there is a machine for it: memory and traffic of a step, for each engine."""
