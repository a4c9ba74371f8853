"""One file per host library: names, shapes and direction. Importing this package imports no host."""
