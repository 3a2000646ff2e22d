"""What users would run otherwise: the same exchange on gloo and on MPI, written as well as their verbs allow."""
