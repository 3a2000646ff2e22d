"""The command line: ``anyep bench`` measures and checks, ``anyep doctor`` says what is possible here."""
