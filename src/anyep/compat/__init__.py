"""Other libraries' interfaces, translated into calls of :mod:`anyep`. Nothing here computes or moves rows by itself."""
