"""Step 3, loops over rows: one set of functions with several implementations of the same names and signatures."""
