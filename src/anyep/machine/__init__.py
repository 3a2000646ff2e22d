"""The machine below everything: compiled loops, atomics and the few calls only Linux has."""
