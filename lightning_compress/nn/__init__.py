"""Work on any torch module: select, run, copy, cut and replace its parts. No Lightning."""
