"""Operations over a whole store: library functions, which the command line calls."""
