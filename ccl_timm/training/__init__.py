"""The built-in scripts: their options and settings, the run that they train, and what is done with a trained one."""
