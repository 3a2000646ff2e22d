"""The directory that `anyep compat-path` prints; only what programs import by its own name lies here."""
