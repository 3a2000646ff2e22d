"""Step 2, what the bytes are: pure functions of tensors, without group, thread or clock."""
