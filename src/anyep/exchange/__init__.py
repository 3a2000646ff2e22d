"""Step 5, dispatch and combine: the protocol, written once for every transport and kernel set."""
